"""Run a command as on an x86-64 processor without AVX-512: python -m tests.avx2 COMMAND...

For example `python -m tests.avx2 python -m pytest` or `python -m tests.avx2 taskgraph run smollm2`. torch, oneDNN,
numba, numpy and OpenBLAS are told that AVX2 is all there is, in the command and in all that it starts. MKL and
llama.cpp ask the processor themselves. What is compiled and measured is kept in a cache folder of its own.
"""

import os
import sys
from pathlib import Path

import llvmlite.binding as llvm
from platformdirs import user_cache_dir

from tests.avx2.sitecustomize import ABSENT

_WIDE = (*ABSENT, "evex512", "vaes", "vpclmulqdq", "gfni")


def environment() -> dict[str, str]:
    """This process's environment, changed so that its children see no AVX-512."""
    found = llvm.get_host_cpu_features().items()
    features = (f"{'+' if on and not name.startswith(_WIDE) else '-'}{name}" for name, on in found)
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(features),
        "XDG_CACHE_HOME": user_cache_dir("taskgraph-avx2"),
    }


def main(command: list[str]) -> None:
    """Become `command`."""
    if not command or command[0] in ("-h", "--help"):
        sys.exit(__doc__)
    os.execvpe(command[0], command, environment())


if __name__ == "__main__":
    main(sys.argv[1:])
