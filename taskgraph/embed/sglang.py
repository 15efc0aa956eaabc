"""taskgraph inside SGLang: its contract for kernels that replace a model's decode step (`--enable-nvidia-megakernel`).

SGLang finds a spec by the architecture of the model, builds it once the weights are loaded, asks it on the host which
steps it runs, and runs all others by the model's own forward. A plugin of SGLang registers ours:

    def load():
        taskgraph.embed.sglang.register("LlamaForCausalLM")

The contract is SGLang's `sglang.kernels.plugin_kernels.nvidia.spec`, of version API_VERSION, which is imported on use.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import torch

from taskgraph.embed.border import refusal
from taskgraph.embed.entry import backend
from taskgraph.errors import BackendUnavailable

CONTRACT: Final = "sglang.kernels.plugin_kernels.nvidia.spec"
API_VERSION: Final = 1
"""The version of the contract that this module is written for."""
MOST_ROWS: Final = 64
TOLERANCES: Final[Mapping[str, float]] = {"max_rel_diff_f32": 1e-3, "max_rel_diff_bf16": 2e-2}
"""By how much results may differ from the model's own forward, relative to its largest element."""
ISAS: Final = frozenset({"sm_90", "sm_100", "sm_103"})


def register(architecture: str) -> None:
    """Tell SGLang that there is a spec for an architecture of Hugging Face's; BackendUnavailable without SGLang, or
    with one of another version of the contract."""
    contract().register(architecture=architecture, path=f"{__name__}:SPEC")


def contract() -> ModuleType:
    """SGLang's contract. BackendUnavailable where there is none, or another version of it."""
    try:
        found = import_module(CONTRACT)
    except ImportError as error:
        raise BackendUnavailable(
            f"SGLang's contract {CONTRACT} cannot be imported ({error}); install sglang."
        ) from error
    version = getattr(found, "MEGAKERNEL_API_VERSION", None)
    if version != API_VERSION:
        raise BackendUnavailable(
            f"SGLang's megakernel contract has version {version}; taskgraph knows version {API_VERSION}. "
            "Start SGLang without --enable-nvidia-megakernel."
        )
    return found


def __getattr__(name: str) -> Any:
    if name != "SPEC":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()["SPEC"] = _spec(contract())
    return value


def _spec(made: ModuleType) -> Any:
    """What SGLang checks before it builds."""
    return made.MegakernelSpec(
        name="taskgraph",
        requires=made.Requirements(isas=ISAS, tp_sizes=frozenset({1}), dtypes=frozenset({"bfloat16", "float32"})),
        features=frozenset(),
        numerics=made.Numerics(kind=made.NumericsKind.TOLERANCE, tolerances=dict(TOLERANCES)),
        max_rows=MOST_ROWS,
        build=build,
        api_version=API_VERSION,
        model_disable_reasons=reasons,
    )


def reasons(model: torch.nn.Module, hf_config: Any) -> list[str]:
    """Why the loaded model cannot run by plans; empty if it can."""
    with torch.no_grad():
        found = refusal([*model.parameters(), *model.buffers()])
    return [found] if found else []


def build(model: torch.nn.Module, hf_config: Any, context: Any) -> "Built":
    """What runs the decode steps of `model`, of the widths that the context asks for and that the spec covers."""
    return Built([rows for rows in context.widths if rows <= MOST_ROWS], context.tokens_per_request)


class Built:
    """The decode steps of a model by captured plans, one a width (SGLang's BuiltMegakernel).

    What no plan holds runs as torch runs it, and a FallbackWarning says why. Other steps are the model's own."""

    draft_sampler: None = None

    def __init__(self, widths: Sequence[int], tokens_per_request: int = 1) -> None:
        self.widths, self._tokens = tuple(widths), tokens_per_request
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def summary(self) -> str:
        """For the line that SGLang prints when it starts."""
        return f"captured plans of taskgraph, one for each of {len(self.widths)} widths"

    def plan(self, input_ids: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The step to run, or None for the model's own forward. It looks at sizes alone, never at the device."""
        rows = int(input_ids.shape[0])
        if self._tokens != 1 or rows not in self.widths or not forward_batch.forward_mode.is_decode():
            return None
        return contract().Step(mode="decode", rows=rows)

    def forward(self, step: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the step in place of `original`, with its arguments and results."""
        run = self._compiled.get(step.rows)
        if run is None:
            run = self._compiled[step.rows] = torch.compile(original, backend=_planned, dynamic=False)
        with torch.no_grad():
            return run(*args, **kwargs)


def _planned(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """By plans without a comparison: whoever takes part in a captured step does so always."""
    return backend(gm, example_inputs, options={"verdict": "plan"})
