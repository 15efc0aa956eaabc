"""Every error the package raises on purpose: typed, and also the builtin that it refines.

A message says the value, the limit and the way out. The CLI prints it in one line and exits 2.
"""


class TaskgraphError(Exception):
    """Root of all errors raised on purpose."""


class GraphError(TaskgraphError, ValueError):
    """A graph that is not well formed: cycle, unknown tensor, shape or dtype mismatch, bad work, duplicate name."""


class DemandError(TaskgraphError, ValueError):
    """A declared demand that cannot be read or that no partition of the device can meet."""


class DeviceError(TaskgraphError, ValueError):
    """An unknown device, or a device specification that contradicts itself."""


class PlanError(TaskgraphError, ValueError):
    """A plan that breaks a rule, belongs to another graph, or has another schema version."""


class CalibrationError(TaskgraphError, ValueError):
    """A table of measurements or a coefficient file that cannot be used; names the row and the column."""


class ProfileError(TaskgraphError, RuntimeError):
    """A profile database that is damaged, foreign or not writable, or a row that is no measurement."""


class NetworkError(TaskgraphError, ValueError):
    """A network that is not connected, a routing that is not made for it, more ranks than hosts, a deadlock."""


class WeightsError(TaskgraphError, ValueError):
    """A checkpoint that is missing, truncated or does not fit the model."""


class ConfigError(WeightsError):
    """A model's config.json that lacks a key, contradicts itself, or asks for what is not supported; names the key."""


class RequestError(TaskgraphError, ValueError):
    """A request that the serving engine refuses: too long, malformed, or more than it has room for; `field` names the
    part that is wrong, where one is."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class KeyFileError(TaskgraphError, ValueError):
    """A file of API keys that is missing, damaged or cannot be written, or a key's name or role that cannot be."""


class BackendUnavailable(TaskgraphError, RuntimeError):  # noqa: N818 - the name says what it means
    """A backend that this machine or this version cannot offer."""


class ExecutionError(TaskgraphError, RuntimeError):
    """An op raised while a plan was replayed; `op` names it and `__cause__` is what it raised."""

    def __init__(self, message: str, op: str = "") -> None:
        super().__init__(message)
        self.op = op


class RankLost(TaskgraphError, ConnectionError):  # noqa: N818 - the name says what it means
    """A rank or replica that died, left or did not answer in time; what waited for it cannot be finished."""


class CudaError(TaskgraphError, RuntimeError):
    """The CUDA driver refused a call or lost the device; `code` is its name for it (CUDA_ERROR_OUT_OF_MEMORY)."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class CaptureMismatch(TaskgraphError, RuntimeError):  # noqa: N818 - the name says what it means
    """A captured graph that is not the plan: `what` names the property that differs."""

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what
