"""What rotary embeddings are told: the frequencies and how they are stretched, as attributes of an op."""

from dataclasses import asdict, dataclass
from typing import Final

from taskgraph.errors import GraphError
from taskgraph.ops.signatures import COUNT, NUMBER, POSITIVE, SMALL, Attrs
from taskgraph.record import Typed, instance


@dataclass(frozen=True, slots=True)
class Llama3Stretch(Typed, error=GraphError):
    """Llama 3.1's: frequencies that turn less than `low_freq` times over the original context are divided by `factor`,
    those that turn more than `high_freq` times are kept, and those between are mixed."""

    factor: float
    low_freq: float
    high_freq: float
    original_context: float


@dataclass(frozen=True, slots=True)
class YarnStretch(Typed, error=GraphError):
    """YaRN's (Peng et al. 2023): frequency number i is divided by `factor` from `high` on, not up to `low`, and in part
    between, and cosines and sines are multiplied by `attention`."""

    factor: float
    low: float
    high: float
    attention: float


Stretch = Llama3Stretch | YarnStretch | None

_PREFIX: Final = {Llama3Stretch: "scaling", YarnStretch: "yarn"}
LLAMA3: Final = {f"scaling_{field}": POSITIVE for field in Llama3Stretch.__dataclass_fields__}
YARN: Final = {f"yarn_{field}": NUMBER for field in YarnStretch.__dataclass_fields__}
"""The attributes that a stretch becomes, and what each can be."""
ROPE: Final = {"theta": POSITIVE, "eps": SMALL, "heads": COUNT}


def stretch_attrs(stretch: Stretch) -> Attrs:
    """The attributes of a stretch, every one of its fields; none for None. GraphError for what is no stretch."""
    if stretch is None:
        return Attrs()
    kind = type(instance("the stretch of a rotary embedding", stretch, (Llama3Stretch, YarnStretch), GraphError))
    return Attrs({f"{_PREFIX[kind]}_{field}": value for field, value in asdict(stretch).items()})


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """What happens to the heads of a token: how many query `heads` there are, the `eps` of their norms, and the
    rotation by frequencies theta^(-2i/dim), stretched."""

    heads: int
    theta: float = 10000.0
    eps: float = 1e-6
    stretch: Stretch = None

    def attrs(self) -> Attrs:
        """The attributes of an op."""
        return Attrs(heads=self.heads, theta=self.theta, eps=self.eps, **stretch_attrs(self.stretch))
