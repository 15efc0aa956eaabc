"""The lanes of plans on a GPU: streams in the contexts of their partitions, and what torch allocates for work on them.

Executables of which one replays at a time may have the same lanes. What a library keeps for a stream is then there once
and not once for each of them: cuBLAS wants 32 MiB on Hopper (its documentation, "cublasSetWorkspace").
"""

from collections import Counter
from typing import Any

from taskgraph.graph.device import Geometry
from taskgraph.runtime.gpu.driver import Gpu, Partitioned
from taskgraph.runtime.gpu.torch_memory import TorchPool
from taskgraph.schedule.plan import Plan


class Lanes:
    """Streams and contexts, made when a plan first has them; closing frees them.

    Plans of two `Lanes` may run at once: with `beside` both have the partitions of the same splits of the device (those
    of two splits overlap), but streams, and what torch allocates, of their own. Close them before those."""

    def __init__(self, gpu: Gpu, beside: "Lanes | None" = None) -> None:
        self._gpu, self.pool, self._owns = gpu, TorchPool(), beside is None
        self._partitions: dict[Geometry, Partitioned] = {} if beside is None else beside._partitions
        self._streams: dict[tuple[Geometry, int, int], Any] = {}

    def of(self, plan: Plan) -> tuple[list[Partitioned], list[Any]]:
        """The contexts of each geometry of a plan, one split a geometry, and the stream of each lane."""
        for geometry in plan.geometries:
            if geometry not in self._partitions:
                self._partitions[geometry] = self._gpu.partition(geometry)
        beside: Counter[tuple[Geometry, int]] = Counter()
        streams = []
        for lane in plan.lanes:
            place = plan.geometries[lane.geometry], lane.partition
            key = (*place, beside[place])
            beside[place] += 1
            if key not in self._streams:
                context = self._partitions[place[0]].contexts[lane.partition]
                self._streams[key] = self._gpu.stream(context)
            streams.append(self._streams[key])
        return [self._partitions[geometry] for geometry in plan.geometries], streams

    def close(self) -> None:
        """Free streams, then contexts, in the reverse order of their making; a second call does nothing."""
        for stream in reversed(self._streams.values()):
            stream.close()
        for made in reversed(self._partitions.values() if self._owns else ()):
            for context in made.contexts:
                if context is not None:
                    context.close()
        self.forget()
        self.pool.close()

    def forget(self) -> None:
        """Let go of what was not closed: in a forked child it is its parent's."""
        self._streams.clear()
        if self._owns:
            self._partitions.clear()
