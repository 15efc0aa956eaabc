"""Names of version 0.1: modules that moved and arguments that are given otherwise now go on to work."""

import importlib
import sys
import warnings

import numpy as np
import pytest
import torch

import taskgraph as tg
from taskgraph.moved import moved
from tests import steer_cases

MOVED = moved()


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_at_its_new_place(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} now"):
        assert importlib.import_module(old) is new
    assert new.__spec__ is not None and (new.__spec__.name, new.__name__) == (MOVED[old], MOVED[old])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(old) is new  # the second import says nothing


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"taskgraph\.models\.nothing"):
        importlib.import_module("taskgraph.models.nothing")


def test_arguments_of_op_and_call_as_they_were() -> None:
    def add_to(x: torch.Tensor, state: torch.Tensor, out: torch.Tensor) -> None:
        state += x
        out.copy_(2 * x)

    def built(old: bool) -> tg.Graph:
        b = tg.GraphBuilder("g")
        x, state = b.input("x", (4, 3), "f32"), b.state("s", (4, 3), "f32")
        more = [tg.spec("y", (4, 3), "f32")]
        work = tg.Work(flops=12.0)
        if old:
            y = b.call(
                add_to, [x, state], more, work=work, name="c", writes=[state], split_axes=(0, 0), split_multiple=2
            )
            z = b.op("mine", [y], [tg.spec("z", (4,), "f32")], work, "m", attrs={"k": 3})
        else:
            function = tg.Splittable(add_to, (0, 0), 2)
            y = b.call(function, [x, state.written()], more, work=work, name="c")
            z = b.op(("mine", {"k": 3}), [y], [tg.spec("z", (4,), "f32")], work, "m")
        b.output(*z)
        return b.build()

    assert built(True).ops == built(False).ops
    b = tg.GraphBuilder("g")
    x, other = b.input("x", (4,), "f32"), b.state("s", (4,), "f32")
    with pytest.raises(tg.GraphError, match="writes 's', which must also be among its inputs"):
        b.call(np.copyto, [x], [tg.spec("y", (4,), "f32")], work=tg.Work(flops=1.0), writes=[other])
    for call in (b.call, b.op):
        with pytest.raises(TypeError, match="unexpected keyword argument 'wirtes'"):
            call(np.copyto, [x], [], work=tg.Work(flops=1.0), wirtes=[other])


def test_an_engine_is_made_field_by_field_as_before() -> None:
    from taskgraph.serving import earlier
    from taskgraph.serving.options import KvMemory, Policy
    from taskgraph.serving.requests import Request
    from taskgraph.serving.runners.cpu import cpu_engine
    from taskgraph.serving.scheduler import Limits

    random, limits = steer_cases.weights(poisoned=False), Limits(2, 33, 1, 64)
    with cpu_engine(steer_cases.config(), random, limits, KvMemory(4), policy=Policy(most_waiting=3)) as now:
        wanted = now.run([Request([1, 2, 3], 5)])[0].tokens
    with earlier.cpu_engine(steer_cases.config(), random, limits, pages=4, most_waiting=3, dtype="f32") as before:
        assert before.run([Request([1, 2, 3], 5)])[0].tokens == wanted
    with pytest.raises(tg.PlanError, match="the weights are f32; load them as 'bf16'"):
        earlier.cpu_engine(steer_cases.config(), random, limits, pages=4, dtype="bf16")
    with pytest.raises(TypeError, match="unexpected keyword argument 'page'"):
        earlier.cpu_engine(steer_cases.config(), random, limits, page=4)  # type: ignore[call-arg]
