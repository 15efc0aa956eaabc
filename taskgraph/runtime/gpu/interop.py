"""Custom ops of other libraries on the cuda backend: torch, CuPy and numba.cuda functions on their lane's stream.

Each wrapper makes a function for `GraphBuilder.call` out of one that knows nothing of lanes. It must not allocate
device memory that outlives it, nor wait: it is captured.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.runtime.gpu.arrays import DeviceArray

Function = Callable[..., Any]


def torch_stream(stream: Any) -> AbstractContextManager[Any]:
    """Within the block torch launches on a stream of ours."""
    external: Any = torch.cuda.ExternalStream
    found: AbstractContextManager[Any] = torch.cuda.stream(external(int(stream.handle)))
    return found


def torch_op(function: Function) -> Function:
    """`function(*tensors)` of torch on the lane's stream. What torch allocates in it belongs to the executable's pool
    (torch_memory.py), so that a replay finds it as it was captured."""

    @wraps(function)
    def on_lane(*arrays: DeviceArray, stream: Any) -> None:
        tensors = [a.torch() for a in arrays]
        with torch_stream(stream):
            function(*tensors)

    return on_lane


def cupy_op(function: Function) -> Function:
    """`function(*arrays)` of CuPy on the lane's stream; bf16 arrives as pairs of bytes."""

    @wraps(function)
    def on_lane(*arrays: DeviceArray, stream: Any) -> None:
        cupy = _imported("cupy", "cupy-cuda13x")
        with cupy.cuda.Stream.from_external(stream):
            function(*(cupy.asarray(a) for a in arrays))

    return on_lane


def numba_op(function: Function) -> Function:
    """`function(*arrays, stream)` that launches numba.cuda kernels: `kernel[grid, block, stream](*arrays)`."""

    @wraps(function)
    def on_lane(*arrays: DeviceArray, stream: Any) -> None:
        cuda = _imported("numba.cuda", "numba-cuda")
        function(*(cuda.as_cuda_array(a, sync=False) for a in arrays), cuda.external_stream(int(stream.handle)))

    return on_lane


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailable(f"{module} is not installed; pip install {package}.") from error
