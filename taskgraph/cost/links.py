"""Collectives on a device that names a network: the fluid model of that network in place of the link's rate."""

import numpy as np

from taskgraph.cost.families import COLLECTIVE
from taskgraph.cost.families.collective import COLLECTIVES, CollectiveCoefficients, CollectiveShape
from taskgraph.cost.family import Kernel
from taskgraph.cost.fitted import DeviceModel
from taskgraph.network.cluster import Network
from taskgraph.network.fluid import Cost, collective_cost


def on_network(kernel: Kernel, network: Network, model: DeviceModel | None, sms: np.ndarray) -> tuple[np.ndarray, str]:
    """Seconds (m,) of a collective on `sms` (m,) SMs without launch, and where they come from.

    Latency and transfer are the network's. On a calibrated device an empty kernel's seconds are added, and the transfer
    takes as much longer as the device's collectives reach less than their link, on so many SMs. NetworkError for more
    ranks than hosts."""
    algorithm, cost, nbytes = _fastest(kernel, network)
    latency_s = cost.seconds(0.0)
    transfer_s = cost.seconds(nbytes) - latency_s
    source = f"fluid model of {network.name}, {algorithm}"
    if model is None:
        return np.full(len(sms), latency_s + transfer_s), source
    fitted = model.family(COLLECTIVE.name).coefficients
    assert isinstance(fitted, CollectiveCoefficients)
    reached = fitted.link_efficiency * model.spec("f32").link_share(sms)
    seconds = fitted.fixed_s + latency_s + transfer_s / reached
    return np.maximum(seconds - model.launch_s, 0.05 * seconds), source


def algorithm_on(kernel: Kernel, network: Network) -> str:
    """The algorithm that the seconds of `on_network` are of: the network's own, or the fastest."""
    return _fastest(kernel, network)[0]


def _fastest(kernel: Kernel, network: Network) -> tuple[str, Cost, float]:
    """With what it costs and the bytes of the message."""
    shape = CollectiveShape(*kernel.shape)
    name, ranks, nbytes = COLLECTIVES[int(shape.kind)], int(shape.ranks), float(shape.nbytes)
    return *collective_cost(network, name.replace("alltoall", "all_to_all"), ranks, nbytes), nbytes


def is_collective(kernel: Kernel) -> bool:
    """Whether a kernel runs between ranks."""
    return kernel.family == COLLECTIVE.name and float(CollectiveShape(*kernel.shape).ranks) > 1
