"""Which graph a command means: a step of a model by its sizes, or a graph in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import taskgraph as tg

if TYPE_CHECKING:
    from taskgraph.models.config import ModelConfig

DTYPES = ("bf16", "f16", "f32")
_FOREIGN = ("hf:", "torch:")


@dataclass(frozen=True, slots=True)
class StepSize:
    """A step: sequences, tokens that each has in its cache, new tokens of each, dtype, and the ranks that share it.

    PlanError for sizes that contradict each other."""

    batch: int
    context: int
    tokens: int
    dtype: str = "bf16"
    ranks: int = 1
    whole_experts: bool = False

    def __post_init__(self) -> None:
        if self.context < self.tokens:
            raise tg.PlanError(
                f"context is {self.context}; it counts the {self.tokens} new tokens too, so make it larger."
            )
        if self.dtype not in DTYPES:
            raise tg.PlanError(f"dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        if self.whole_experts and self.ranks < 2:
            raise tg.PlanError("experts are shared out between ranks, and there is one; give --ranks 2 or more.")


@dataclass(frozen=True, slots=True)
class Links:
    """What ranks talk over: a network as for `devices.networked`, or nothing, the device's own links."""

    network: str = ""
    routing: str = ""
    algorithm: str = ""

    def of(self, device: "tg.Device", ranks: int) -> "tg.Device":
        """The device on the network; PlanError for a routing or an algorithm without one, or one rank alone on it."""
        if not self.network:
            if self.routing or self.algorithm:
                raise tg.PlanError("a routing and an algorithm are those of a network; give --network too.")
            return device
        if ranks < 2:
            raise tg.PlanError("a network is what ranks talk over, and there is one; give --tensor-parallel 2 or more.")
        return tg.devices.networked(device, self.network, self.routing, self.algorithm)


RANKS = typer.Option("--ranks", "--tensor-parallel", min=1, help="devices that share every layer (tensor parallel)")
NETWORK = typer.Option(help="what they talk over, as torus:4x4x4, switch:2*8 or machines:2x8@450GB/s,500ns+50GB/s,2us")
ROUTING = typer.Option(help="dimension-order, valiant, minimal-adaptive or goal")
TPOT_MS = typer.Option(min=0, help="wanted ms a token: on a GPU prompts run apart where that is better; 0: no wish")
ALGORITHM = typer.Option(
    help="of collectives: ring, tree, halving, doubling, direct, dimensions, levels, or auto: the fastest"
)


def graph_of(model: str, size: StepSize) -> "tg.Graph":
    """The graph in a file that `Graph.to_json` wrote, of a factory ("torch:package.module:function") or of one step of
    a model: what one rank does of it; of "hf:FOLDER" as transformers writes it."""
    from taskgraph.models.llama import step_graph

    if model.startswith(_FOREIGN):
        return _foreign(model, size)
    if is_graph(model):
        return tg.Graph.from_json(Path(model).read_text())
    share = config_of(model).share(size.ranks, 0 if size.whole_experts else None)
    return step_graph(share, batch=size.batch, tokens=size.tokens, cache=size.context, dtype=size.dtype)


def _foreign(model: str, size: StepSize) -> "tg.Graph":
    """The graph of torch's own code; PlanError for ranks, which it has none of."""
    from taskgraph.embed import sources

    if size.ranks > 1:
        raise tg.PlanError("a module of torch is planned for one device; leave --ranks out.")
    kind, _, source = model.partition(":")
    if kind == "torch":
        return sources.imported_by(source).graph
    sizes = {"batch": size.batch, "context": size.context, "tokens": size.tokens, "dtype": size.dtype}
    return sources.hugging_face(source, **sizes).graph  # type: ignore[arg-type]


def named(model: str, factory: str) -> str:
    """What `graph_of` takes, of the argument MODEL and the option --torch; PlanError unless there is one of them."""
    if bool(model) == bool(factory):
        raise tg.PlanError("give a model or --torch package.module:function, one of them.")
    return model or f"torch:{factory}"


def is_graph(model: str) -> bool:
    """Whether it is a file that holds a graph, not a model."""
    path = Path(model)
    return path.suffix == ".json" and path.is_file() and '"ops"' in path.read_text()


def advice(model: str, size: StepSize, least: int) -> str:
    """ " --ranks N would share it out.", with the fewest ranks from `least` on that can share the model; or nothing."""
    config = None if is_graph(model) or model.startswith(_FOREIGN) else config_of(model)
    if config is None:
        return ""
    for ranks in range(max(least, size.ranks + 1), 65):
        try:
            config.share(ranks, 0 if size.whole_experts else None)
        except tg.TaskgraphError:
            continue
        return f" --ranks {ranks} would share it out."
    return ""


def config_of(model: str) -> "ModelConfig":
    """The config of a known size, a config.json or its folder, or a checkpoint file, whose weights are not read."""
    from taskgraph.models.config import load_config
    from taskgraph.models.weights import open_checkpoint

    if Path(model).suffix not in (".gguf", ".safetensors"):
        return load_config(model)
    with open_checkpoint(model) as checkpoint:
        return checkpoint.config
