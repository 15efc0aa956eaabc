"""What became of a module that torch.compile gave to taskgraph: plans, verdicts, calls."""

from dataclasses import dataclass
from typing import Any

import torch

from taskgraph.embed.border import owner_of
from taskgraph.embed.capture import Padded
from taskgraph.embed.dynamo import ALL
from taskgraph.embed.variants import Shapes, Variant
from taskgraph.units import format_seconds


@dataclass(frozen=True, slots=True)
class Piece:
    """One shape of one graph of Dynamo's: `shape` are its sizes that change, of a `padded` piece the largest it runs.

    `way` is "plan" or "eager", `reason` why it is eager; `ops` and `recognised` count the ops of its plan. `plan_s` and
    `eager_s` are the measured seconds of the fastest trial calls, 0 where there was none; `rebinds` counts how often
    weights or states had moved or changed. `calls` counts all calls."""

    shape: Any
    way: str
    reason: str
    calls: int
    ops: int
    recognised: int
    plan_s: float
    eager_s: float
    rebinds: int
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """All pieces of a compiled module. `captures` counts the plans that were made, those that made room for others too;
    `notes` say which sizes are not padded to buckets, and why."""

    pieces: tuple[Piece, ...]
    captures: int = 0
    notes: tuple[str, ...] = ()

    @property
    def hit_rate(self) -> float:
        """The share of calls of pieces that have a plan in the end; 0 without calls."""
        calls = sum(p.calls for p in self.pieces)
        return sum(p.calls for p in self.pieces if p.way == "plan") / calls if calls else 0.0

    def __str__(self) -> str:
        lines = [f"{len(self.pieces)} pieces; {100 * self.hit_rate:.0f} % of calls by plans"]
        for p in self.pieces:
            if p.way == "plan":
                told = f"plan of {p.ops} ops, {p.recognised} recognised"
                if p.shape:
                    told += f", {'for sizes up to' if p.padded else 'of sizes'} {p.shape}"
                if p.eager_s:
                    told += f"; {format_seconds(p.plan_s)} against {format_seconds(p.eager_s)} eager (measured)"
            else:
                told = f"as torch runs it: {p.reason}"
            lines.append(f"  {p.calls:6d} calls  {told}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def report(compiled: Any = None) -> Report:
    """The pieces of `compiled`, a module that torch.compile or `wrap` returned and that was called; None: of all.

    Pieces of a module are known by the weights that they use. Those without any belong to all modules of the class that
    they were compiled for, as Dynamo shares them so, and those of a function to it."""
    chosen = [each for each in ALL if not each.orphaned]
    if isinstance(compiled, Shapes):
        chosen = [compiled]
    elif compiled is not None:
        module = getattr(compiled, "_orig_mod", compiled)
        own = set()
        if isinstance(module, torch.nn.Module):
            own = {t.data_ptr() for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"}
        whose, of_module = owner_of(compiled), isinstance(module, torch.nn.Module)
        chosen = [c for c in chosen if _belongs(c, own, whose, of_module)]
    notes = [f"the size {name} is not padded: {why}" for c in chosen for name, why in c.unpadded.items() if c.captures]
    pieces = tuple(_piece(c, key, v) for c in chosen for key, v in _variants(c))
    return Report(pieces, sum(c.captures for c in chosen), tuple(dict.fromkeys(notes)))


def _belongs(compiled: Shapes, own: set[int], whose: Any, of_module: bool) -> bool:
    if compiled.addresses and of_module:
        return not compiled.addresses.isdisjoint(own)
    return compiled.owner is whose or (compiled.owner is None and not compiled.addresses)


def _variants(compiled: Shapes) -> list[tuple[Any, Variant]]:
    return [*compiled.variants.items()] or [((), Variant(None, compiled.reason, decided=True))]


def _piece(compiled: Shapes, key: Any, v: Variant) -> Piece:
    captured = v.captured
    return Piece(
        shape=compiled.sizes(key),
        way="eager" if captured is None else "plan",
        reason=v.reason,
        calls=v.calls,
        ops=0 if captured is None else len(captured.plan.steps),
        recognised=0 if captured is None else captured.recognised,
        plan_s=min(v.ours_s, default=0.0),
        eager_s=min(v.eager_s, default=0.0),
        rebinds=0 if captured is None else captured.rebinds,
        padded=isinstance(captured, Padded),
    )
