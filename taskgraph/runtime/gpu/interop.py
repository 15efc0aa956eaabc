"""Custom ops of other libraries on the cuda backend: torch, CuPy and numba.cuda functions on their lane's stream.

Each wrapper makes a function for `GraphBuilder.call` out of one that knows nothing of lanes. It must not allocate
device memory that outlives it, nor wait: it is captured.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from taskgraph.errors import BackendUnavailable
from taskgraph.runtime.gpu.arrays import DeviceArray

Function = Callable[..., Any]


def torch_op(function: Function, sms: int | None = None) -> Function:
    """`function(*tensors)` of torch on the lane's stream. With `sms`, matrix products size their grids for that many
    SMs: torch's experimental carve-out, which cuBLAS reads as its SM count target."""

    @wraps(function)
    def on_lane(*arrays: DeviceArray, stream: Any) -> None:
        import torch

        tensors = [a.torch() for a in arrays]
        kept = None if sms is None else torch.cuda.get_device_properties(0).multi_processor_count - sms
        torch._C._set_sm_carveout_experimental(kept)
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(int(stream.handle))):  # type: ignore[no-untyped-call]
                function(*tensors)
        finally:
            torch._C._set_sm_carveout_experimental(None)

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
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailable(f"{module} is not installed; pip install {package}.") from error
