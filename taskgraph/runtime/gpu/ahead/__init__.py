"""Kernels that are compiled ahead: Triton functions, made cubins for a device that need not be there, and kept.

`cubins` compiles and keeps them and knows what a cubin needs to be launched; `launching` makes launches of them. The
functions themselves are in `jit`, whose modules import Triton: nothing imports these but a compilation. The rules that
launch them are in the modules beside, one for each sort of op.
"""
