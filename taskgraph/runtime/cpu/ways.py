"""By which way products run on this machine's CPU: one value that binders take, measured and kept by the probe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

WAYS: dict[str, str] = {
    "dot": "weight in panels, bf16 dot products of the processor",
    "tile": "weight in panels, float32 arithmetic",
    "packed": "oneDNN, weight reordered once",
    "plain": "torch",
    "f32": "torch in float32, weight widened once",
}
"""Every way that a product may run, in words."""


@dataclass(frozen=True, slots=True)
class Choice:
    """From `rows` rows on, products of `dtype` run by `way`: with a weight that never changes (`fixed`), or without."""

    dtype: str
    fixed: bool
    rows: int
    way: str


@dataclass(frozen=True, slots=True)
class Rate:
    """Flops a second that products of `rows` rows reached by `way` on one core."""

    dtype: str
    fixed: bool
    rows: int
    way: str
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Ways:
    """The choices for this processor, and what was measured to make them (empty when they are forced)."""

    choices: tuple[Choice, ...] = ()
    rates: tuple[Rate, ...] = ()

    def product(self, dtype: str, rows: int, *, fixed: bool) -> str:
        """The way of a product of that many rows; a dtype that nobody chose for runs by plain torch."""
        mine = [c for c in self.choices if (c.dtype, c.fixed) == (dtype, fixed) and c.rows <= rows]
        return max(mine, key=lambda c: c.rows).way if mine else "plain"

    def rate(self, dtype: str, rows: int, *, fixed: bool = True) -> float:
        """Flops a second of a core at `rows` rows by the way that is chosen there; 0.0 if nothing was measured."""
        way = self.product(dtype, rows, fixed=fixed)
        same = (r.flops_per_s for r in self.rates if (r.dtype, r.fixed, r.rows, r.way) == (dtype, fixed, rows, way))
        return max(same, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "choices": [[c.dtype, c.fixed, c.rows, c.way] for c in self.choices],
            "rates": [[r.dtype, r.fixed, r.rows, r.way, r.flops_per_s] for r in self.rates],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; ValueError, TypeError or KeyError for what is none."""
        made = cls(
            tuple(Choice(str(d), bool(f), int(r), str(w)) for d, f, r, w in data["choices"]),
            tuple(Rate(str(d), bool(f), int(r), str(w), float(s)) for d, f, r, w, s in data["rates"]),
        )
        unknown = {c.way for c in made.choices} - set(WAYS)
        if unknown:
            raise ValueError(f"no ways {sorted(unknown)}")
        return made


PLAIN = Ways()
"""All by plain torch."""
