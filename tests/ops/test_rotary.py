"""Stretches of rotary frequencies: every number of one reaches the op and its arithmetic, and none is dropped."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgraph import ops
from taskgraph.errors import GraphError
from taskgraph.graph.graph import GraphBuilder
from taskgraph.graph.op import Op, Tensor
from taskgraph.models.llama import step_graph
from taskgraph.models.stretch import RopeScaling
from taskgraph.runtime import rotary
from tests.ops.test_experts import LATENT_TINY

DIM = 32
LLAMA3 = ops.Llama3Stretch(8.0, 1.0, 4.0, 256.0)
YARN = ops.YarnStretch(4.0, 2.5, 9.0, 1.25)


def rope_op(stretch: ops.Llama3Stretch | ops.YarnStretch | None, theta: float = 5e4) -> tuple[Op, dict[str, Tensor]]:
    b = GraphBuilder("rope")
    cache = [b.state(name, (2, 2, 64, DIM), "f32") for name in ("keys", "values")]
    qkv, at = b.input("qkv", (6, 8 * DIM), "f32"), b.input("at", (2,), "i64")
    b.output(ops.rope_kv(qkv, at, cache[0], cache[1], spec=ops.RopeSpec(4, theta, stretch=stretch)))
    graph = b.build()
    return graph.ops[0], dict(graph.tensor)


positive = st.floats(0.1, 100.0)


@given(factor=positive, low=positive, wider=positive, context=st.floats(16.0, 1e5), theta=st.floats(10.0, 1e6))
def test_llama3_is_its_formula_frequency_by_frequency(
    factor: float, low: float, wider: float, context: float, theta: float
) -> None:
    """Meta's `apply_scaling`: by wavelengths, with a mean between the two bounds that is smooth."""
    high = low + wider
    rounded = 1e-4 + 1e-6 * high / wider * max(factor, 1.0)  # near bounds stretch what float32 rounds
    op, _ = rope_op(ops.Llama3Stretch(factor, low, high, context), theta)
    for i, found in enumerate(rotary.inverse_frequencies(op, DIM).tolist()):
        plain = theta ** (-2 * i / DIM)
        wavelength = 2 * math.pi / plain
        smooth = (context / wavelength - low) / (high - low)
        wanted = (1 - smooth) * plain / factor + smooth * plain
        wanted = plain / factor if wavelength > context / low else plain if wavelength < context / high else wanted
        assert found == pytest.approx(wanted, rel=rounded)
    assert rotary.size(op) == 1.0


@given(factor=positive, low=st.floats(-1.0, 10.0), wider=positive, attention=positive)
def test_yarn_is_its_formula_frequency_by_frequency(factor: float, low: float, wider: float, attention: float) -> None:
    """Peng et al. 2023, section 3.2, with the ramp over the numbers of frequencies."""
    op, _ = rope_op(ops.YarnStretch(factor, low, low + wider, attention))
    plain = rotary.inverse_frequencies(rope_op(None)[0], DIM)
    for i, found in enumerate(rotary.inverse_frequencies(op, DIM).tolist()):
        share = min(max((i - low) / wider, 0.0), 1.0)
        assert found == pytest.approx(plain[i] * (share / factor + 1 - share), rel=1e-4)
    assert rotary.size(op) == attention


@pytest.mark.parametrize("stretch", [LLAMA3, YARN])
def test_every_number_of_a_stretch_counts(stretch: ops.Llama3Stretch | ops.YarnStretch) -> None:
    """Changed alone, each changes what is computed; left out of a file, each is missed, and a stranger is named."""
    op, tensors = rope_op(stretch)
    mine = [(rotary.inverse_frequencies(op, DIM), rotary.size(op))]
    for field in fields(stretch):
        other, _ = rope_op(replace(stretch, **{field.name: getattr(stretch, field.name) * 1.5}))
        made = rotary.inverse_frequencies(other, DIM), rotary.size(other)
        assert all(not np.array_equal(made[0], was[0]) or made[1] != was[1] for was in mine), field.name
        (lost,) = (key for key, _ in op.attrs if key.endswith(f"_{field.name}"))
        partial = replace(op, attrs=tuple((key, value) for key, value in op.attrs if key != lost))
        with pytest.raises(GraphError, match=f"{lost}.* go together"):
            ops.check_op(partial, tensors)
    with pytest.raises(GraphError, match="there is no attribute 'yarn_slow'"):
        ops.check_op(replace(op, attrs=(*op.attrs, ("yarn_slow", 1.0))), tensors)


def test_numbers_that_are_missing_or_none_are_refused() -> None:
    yarn: Any = ops.YarnStretch
    with pytest.raises(TypeError):
        yarn(4.0, 2.5, 9.0)
    with pytest.raises(GraphError, match="factor is 'x'"):
        yarn("x", 2.5, 9.0, 1.0)
    numbers: Any = (4.0, 1.0, 2.0)
    with pytest.raises(GraphError, match=r"stretch.*\(4\.0, 1\.0, 2\.0\)"):
        rope_op(numbers)
    with pytest.raises(GraphError, match=r"scaling_factor is 0\.0"):
        rope_op(replace(LLAMA3, factor=0.0))


def test_a_stretch_that_latent_attention_does_not_know_is_refused() -> None:
    config = replace(LATENT_TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))
    with pytest.raises(GraphError, match=r"latent_rope.*there is no attribute 'scaling_factor'"):
        step_graph(config, batch=2, tokens=1, cache=16, dtype="f32")
