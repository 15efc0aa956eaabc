"""The border to torch's compilers: which of their graphs we take, what is said of others, and graphs as aten calls."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from taskgraph.embed.flow import Unsupported, faked
from taskgraph.errors import TaskgraphError


class FallbackWarning(UserWarning):
    """A part of a module runs as torch runs it; the message says which and why."""


def refusal(given: Sequence[Any]) -> str:
    """Why a graph of these arguments is left to torch as a whole; empty if it is not."""
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return (
            "the graph is for training: gradients are enabled and some of its tensors require them. Call the module "
            "under torch.no_grad() or torch.inference_mode() for inference"
        )
    devices = {t.device.type for t in tensors}
    if devices - {"cpu"}:
        return f"the graph's tensors are on {', '.join(sorted(devices))}, and plans of torch graphs run on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on; convert the module to the type that you want instead"
    return ""


def warn(reason: str, quiet: bool) -> None:
    """Say that a graph runs as torch runs it, unless nothing shall be said."""
    if not quiet:
        warnings.warn(f"taskgraph runs a graph as torch runs it: {reason}.", FallbackWarning, stacklevel=2)


def to_aten(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """The graph at these shapes as calls of operators, composite ones whole. Unsupported if torch cannot trace it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [faked(mode, a) if isinstance(a, torch.Tensor) else a for a in args]
    try:
        with torch.no_grad(), mode:
            return make_fx(gm, pre_dispatch=True, tracing_mode="real")(*fakes)
    except TaskgraphError:
        raise
    except Exception as error:  # whatever the module's own code and torch's tracing raise
        text = " ".join(str(error).split())[:200]
        raise Unsupported(f"torch cannot trace the graph ({type(error).__name__}: {text})") from error


def owner_of(called: Any) -> Any:
    """Whose graphs are those of a function or module that torch.compile returned, or was given: a class of modules, as
    Dynamo shares what it compiles between modules of one class, or a function."""
    found = getattr(called, "_orig_mod", called)
    while True:
        holder = getattr(found, "__self__", found)
        if isinstance(holder, torch.nn.Module):
            return type(holder)
        inner = getattr(found, "_torchdynamo_orig_callable", getattr(found, "__wrapped__", None))
        if inner is None:
            return found
        found = inner


def owner_now() -> Any:
    """The owner of the graph that Dynamo compiles at this moment; None where its frames do not say."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        called = frame.f_locals.get("fn") if frame.f_code.co_name == "compile_wrapper" else None
        if called is not None and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return owner_of(called)
    return None
