"""Custom ops on the cuda backend: each launches on its lane's stream, which is being captured, and only there."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from taskgraph.errors import BackendUnavailable, CudaError, ExecutionError
from taskgraph.graph.functions import check_arity
from taskgraph.graph.op import Op
from taskgraph.runtime.custom import Function, function_of, refuse_result
from taskgraph.runtime.gpu import captures, driver
from taskgraph.runtime.gpu.arrays import DeviceArray


def bound_call(
    op: Op, functions: Mapping[str, Function], ins: Sequence[DeviceArray], outs: Sequence[DeviceArray]
) -> Callable[[Any], None]:
    """What launches a custom op on a stream: its function gets the stream as `stream`."""
    function = function_of(op, functions)
    if not _takes_stream(function):
        raise BackendUnavailable(
            f"op {op.name!r}: on the cuda backend {op.attr('function')!r} must take a keyword argument `stream` and "
            "launch on it."
        )
    check_arity(op.name, function, len(ins) + len(outs))

    def launch(stream: Any) -> None:
        result = function(*ins, *outs, stream=stream)
        if result is not None:
            refuse_result(op.name, result, outs)

    return launch


def _takes_stream(function: Function) -> bool:
    try:
        return "stream" in signature(function).parameters
    except (ValueError, TypeError):  # a builtin that tells nothing
        return False


def named_error(op: str, error: Exception, stream: Any) -> Exception:
    """What went wrong while `op` was captured, or ran (no stream), as one of our errors that names it."""
    if isinstance(error, ExecutionError) and error.op == op:
        return error
    if stream is None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        failed = driver.is_driver_error(error) or isinstance(error, CudaError)
        return CudaError(f"op {op!r}: {text}") if failed else ExecutionError(f"op {op!r} failed: {text}", op=op)
    if isinstance(error, CudaError):
        return CudaError(f"op {op!r} broke the capture: {error} {_RULE}", error.code)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if driver.is_driver_error(error):
        typed = driver.typed(f"op {op!r} broke the capture", error)
        return CudaError(f"{typed} {_RULE}", typed.code)
    if not captures.capturing(stream):
        code = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
        return CudaError(f"op {op!r} broke the capture: {text}. {_RULE}", code)
    return ExecutionError(f"op {op!r} failed while it was captured: {text}", op=op)


_RULE = "While it is captured, an op must not wait for the device, allocate on it, or use other streams."
