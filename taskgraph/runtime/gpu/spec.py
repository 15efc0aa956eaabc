"""The Device to plan for on the GPU of this process: a published spec with what the driver says."""

from dataclasses import replace

from taskgraph.errors import DeviceError
from taskgraph.graph.device import Device, iter_specs, reported_as
from taskgraph.runtime.gpu import virtual
from taskgraph.runtime.gpu.driver import Capability, Gpu


def planning_device(device: str | None = None) -> Device:
    """The spec of the GPU that `device` names ("virtual:h100_sxm"), or of this machine's; DeviceError when it has none:
    make one with devices.make()."""
    gpu = Gpu.open(device)
    control = virtual.loaded()
    return control.device if control is not None else _of_real(gpu.capability, gpu.memory_bytes())


def _of_real(found: Capability, memory_bytes: int) -> Device:
    """The published spec of a device of that name, with the SMs and memory of this one."""
    spec = reported_as(found.device)
    if spec is None:
        known = ", ".join(each.name for each in iter_specs())
        raise DeviceError(
            f"no published spec of {found.device!r}; known are {known}. Make one with devices.make(), or run "
            "`taskgraph gpu-check`, which measures this one."
        )
    return replace(spec, sm_count=found.sm_count, memory_bytes=memory_bytes)
