"""A captured plan that is called as torch calls a function: arguments in, new tensors out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

import taskgraph as tg
from taskgraph.embed.calls import Strided, leaves, mapped
from taskgraph.embed.kinds import ATEN
from taskgraph.embed.lower import Lowered, Residence, memory_of
from taskgraph.embed.padding_rules import Rows
from taskgraph.embed.planning import planned

MOST_REBINDS: Final = 64
"""A plan whose weights or states move more often than this is given up."""


class Captured:
    """The executable of a lowered graph, and what of the arguments goes where.

    Inputs are copied into buffers; weights and states are used in place, and looked after: a call that finds them
    moved or changed binds them again. Results are copies, as callers keep them.
    """

    def __init__(self, lowered: Lowered, args: Sequence[Any], scheduler: str, *, alone: bool = False) -> None:
        graph = lowered.graph
        self.plan = planned(graph, scheduler, alone=alone)
        self.lowered, self.why, self.rebinds, self._scheduler = lowered, "", 0, scheduler
        self.recognised = sum(made.kind != ATEN for made in lowered.recognised)
        exe: Any = tg.compile(graph, self.plan)
        self._exe, self.launch = exe, exe.launch_here
        used = {t.name: t.role for t in graph.tensors}
        places = [(i, p) for i, p in enumerate(lowered.sources) if p is not None and p.tensor in used]
        self._bound = [(i, p) for i, p in places if used[p.tensor] != "input"]
        buffers = self._exe.inputs
        self._copies = [(i, p.layout.on(buffers[p.tensor])) for i, p in places if used[p.tensor] == "input"]
        self._constant = [i for i, p in self._bound if used[p.tensor] == "weight"]
        self._states = [i for i, p in self._bound if used[p.tensor] == "state"]
        given = {p.tensor for _, p in self._bound}
        self._exe.bind({n: t for n, t in lowered.tensors.items() if n not in given})
        self._pointers: list[int] = []
        self._versions: list[int] = []
        self._bind(args)
        self._results = self._readers(_whole)

    def alone(self, args: Sequence[Any]) -> "Captured":
        """The same planned for one core; `args` are those of a call."""
        return Captured(self.lowered, args, self._scheduler, alone=True)

    @property
    def cores(self) -> int:
        """Cores that its plan is for."""
        return self.plan.device.sm_count

    def run(self, args: Sequence[Any]) -> Any:
        """One call; None, and `why`, where it must be run otherwise."""
        if not self._ready(args):
            return None
        for i, buffer in self._copies:
            buffer.copy_(args[i])
        self.launch()
        return self._results(args)

    def _ready(self, args: Sequence[Any]) -> bool:
        """Whether weights and states are bound as they are now; `why` not."""
        if [args[i].data_ptr() for i, _ in self._bound] != self._pointers or [
            args[i]._version for i in self._constant
        ] != self._versions:
            if self.rebinds >= MOST_REBINDS:
                self.why = "its weights or states moved or changed too often"
                return False
            self.rebinds += 1
            self._bind(args)
        if self._states and self._shared(args):
            self.why = "an argument shares memory with one that is changed in place"
            return False
        return True

    def _bind(self, args: Sequence[Any]) -> None:
        self._exe.bind({p.tensor: memory_of(args[i], p.layout, p.shape) for i, p in self._bound})
        self._pointers = [args[i].data_ptr() for i, _ in self._bound]
        self._versions = [args[i]._version for i in self._constant]

    def _shared(self, args: Sequence[Any]) -> bool:
        changed = {args[i].untyped_storage()._cdata for i in self._states}
        return any(args[i].untyped_storage()._cdata in changed for i, _ in self._copies)

    # -- results ---------------------------------------------------------------------------------

    def _readers(self, cut: "Cut") -> Callable[[Sequence[Any]], Any]:
        """What makes the results of a call: copies of what `cut` leaves of outputs, and arguments that are returned."""
        outputs, roles = self.lowered.outputs, {t.name: t.role for t in self.lowered.graph.tensors}
        made, source_of = self._exe.outputs, {p.tensor: i for i, p in enumerate(self.lowered.sources) if p is not None}
        places = [p.tensor for p in leaves(outputs) if isinstance(p, Residence)]
        plain: list[tuple[Any, ...]] = []
        for number, p in enumerate(leaves(outputs)):
            if not isinstance(p, Residence):
                plain.append((0, p))
            elif roles.get(p.tensor, "input") == "activation":
                view = p.of(made[p.tensor])
                simple = places.count(p.tensor) == 1 and Strided.of(view).dense
                plain.append((1, cut(number, view)) if simple else (2, p, number))
            else:
                plain.append((3, p, number, source_of.get(p.tensor)))
        flat = (
            all(kind == 1 for kind, *_ in plain)
            and isinstance(outputs, (tuple, list))
            and not any(isinstance(o, (tuple, list, dict)) for o in outputs)
        )
        if flat:
            views = [row[1] for row in plain]
            if len(views) == 1:
                (only,) = views
                return lambda args: (only.clone(),)
            return lambda args: tuple([v.clone() for v in views])
        return lambda args: self._mixed(plain, args, cut)

    def _mixed(self, plain: list[tuple[Any, ...]], args: Sequence[Any], cut: "Cut") -> Any:
        copied: dict[str, torch.Tensor] = {}
        found: list[Any] = []
        for kind, what, *more in plain:
            if kind == 0:
                found.append(what)
            elif kind == 1:
                found.append(what.clone())
            elif kind == 2:
                if what.tensor not in copied:
                    copied[what.tensor] = self._exe.outputs[what.tensor].clone()
                found.append(cut(more[0], what.of(copied[what.tensor])))
            elif more[1] is None:
                found.append(cut(more[0], what.of(self.lowered.tensors[what.tensor])).clone())
            else:
                value = args[more[1]]
                for target, view_args, kwargs, item in what.views:
                    viewed = target(value, *view_args, **kwargs)
                    value = viewed if item is None else viewed[item]
                found.append(value)
        rest = iter(found)
        return mapped(self.lowered.outputs, lambda _: next(rest))

    def close(self) -> None:
        """Free buffers and lanes."""
        self._exe.close()


# ------------------------------------------------------------------------------------------------ padding

Cut = Callable[[int, torch.Tensor], torch.Tensor]
"""Of result number i, which is that tensor, what belongs to a call."""
MOST_PROGRAMS: Final = 64
"""Sizes of a bucket whose views are kept."""


def _whole(number: int, made: torch.Tensor) -> torch.Tensor:
    return made


@dataclass(frozen=True, slots=True)
class Padding:
    """A size that is padded: the (argument, axis) pairs that have it, the first of which tells a call's size, and for
    each result its rows, if it has the size."""

    axes: tuple[tuple[int, int], ...]
    results: tuple[Rows | None, ...]


@dataclass(frozen=True, slots=True)
class _Program:
    """For calls of some sizes: what is copied, in order, as (to, an argument's number or a tensor), and the results."""

    copies: list[tuple[torch.Tensor, int | torch.Tensor]]
    results: Callable[[Sequence[Any]], Any]


class Padded(Captured):
    """The plan of a bucket of sizes. A call of smaller ones is padded with copies of its own first rows, which no
    operator can take amiss that took the rows themselves; results are cut."""

    def __init__(
        self,
        lowered: Lowered,
        args: Sequence[Any],
        scheduler: str,
        *,
        paddings: Sequence[Padding],
        alone: bool = False,
    ) -> None:
        super().__init__(lowered, args, scheduler, alone=alone)
        self._paddings = paddings
        self._programs: dict[tuple[int, ...], _Program] = {}

    def alone(self, args: Sequence[Any]) -> Captured:
        """As `Captured.alone`."""
        return Padded(self.lowered, args, self._scheduler, paddings=self._paddings, alone=True)

    def run(self, args: Sequence[Any]) -> Any:
        """One call, of at most the sizes of the bucket; as `Captured.run`."""
        if not self._ready(args):
            return None
        sizes = tuple([args[p.axes[0][0]].shape[p.axes[0][1]] for p in self._paddings])
        program = self._programs.get(sizes)
        if program is None:
            if len(self._programs) >= MOST_PROGRAMS:
                self._programs.clear()
            program = self._programs[sizes] = self._program(sizes)
        for to, source in program.copies:
            to.copy_(args[source] if isinstance(source, int) else source)
        self.launch()
        return program.results(args)

    def _program(self, sizes: tuple[int, ...]) -> _Program:
        copies: list[tuple[torch.Tensor, int | torch.Tensor]] = []
        for i, buffer in self._copies:
            region, fills = buffer, list[tuple[torch.Tensor, int | torch.Tensor]]()
            cuts = [(axis, n) for p, n in zip(self._paddings, sizes, strict=True) for j, axis in p.axes if j == i]
            for axis, n in cuts:
                rest = region.shape[axis] - n
                if rest:
                    fills.append((region.narrow(axis, n, rest), region.narrow(axis, 0, 1)))
                    region = region.narrow(axis, 0, n)
            copies.append((region, i))
            copies += reversed(fills)

        def cut(number: int, made: torch.Tensor) -> torch.Tensor:
            for p, n in zip(self._paddings, sizes, strict=True):
                rows = p.results[number]
                if rows is not None:
                    made = made.narrow(rows.axis, 0, n * rows.unit)
            return made

        return _Program(copies, self._readers(cut))
