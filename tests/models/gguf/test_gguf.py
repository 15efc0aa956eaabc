"""GGUF files: read as the gguf package reads them, and honoured or refused by name as llama.cpp's rules say."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from taskgraph.errors import WeightsError
from taskgraph.graph.op import Op
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, from_hf
from taskgraph.models.gguf.file import MappedGguf
from taskgraph.models.stretch import Yarn
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime import rotary
from tests.model_files import DIM, HEADS, TOKENS, write_gguf

Q = gguf.GGMLQuantizationType
KIND_OF_BLOCKS = [kind for kind in Q if getattr(gguf.quants, kind.name, None) is not None]


def rope_op(config: ModelConfig) -> Op:
    graph = llama.step_graph(config, batch=1, tokens=1, cache=8, dtype="f32")
    return next(op for op in graph.flat().ops if op.kind == "rope_kv")


def config_of(path: Path) -> ModelConfig:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    values: dict[str, tuple[str, Any]] = {
        "general.a": ("uint8", 200), "general.b": ("int8", -3), "general.c": ("uint16", 60_000),
        "general.d": ("int16", -300), "general.e": ("uint64", 2**63 + 5), "general.f": ("int64", -(2**62)),
        "general.g": ("float64", 1.0 / 3.0), "general.h": ("bool", True), "general.i": ("string", "naïve 東京"),
        "general.j": ("array", [1.5, -2.5]), "general.k": ("array", [True, False]), "general.l": ("array", [-1, 2**30]),
    }  # fmt: skip
    write_gguf(path, keys=values, types={"token_embd.weight": Q.Q8_0, "blk.0.ffn_up.weight": Q.F16})
    want = gguf.GGUFReader(path)
    with MappedGguf(path) as file:
        fields = {key: field.contents() for key, field in want.fields.items() if not key.startswith("GGUF.")}
        assert file.header.metadata == fields
        assert list(file.header.tensors) == [t.name for t in want.tensors]
        for t in want.tensors:
            found = file.header.tensors[t.name]
            assert (found.kind, found.nbytes, found.offset) == (int(t.tensor_type), t.n_bytes, t.data_offset)
            assert found.shape == tuple(int(n) for n in reversed(t.shape))
            assert bytes(file.raw(found)) == t.data.tobytes()


@pytest.mark.parametrize("kind", KIND_OF_BLOCKS, ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_knows(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Random blocks of the type, whatever numbers they are, against the package's own function."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    width = 256 if block <= 256 else block
    raw = rng.integers(0, 256, (len(TOKENS), width // block * size), dtype=np.uint8)
    path = tmp_path / "x.gguf"
    keys: Mapping[str, tuple[str, Any]] = {
        "embedding_length": ("uint32", width), "attention.key_length": ("uint32", DIM),
        "attention.value_length": ("uint32", DIM),
    }  # fmt: skip
    write_gguf(path, keys=keys, tensors={"token_embd.weight": raw}, types={"token_embd.weight": kind})
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, kind)
    with open_checkpoint(path) as checkpoint:
        got = checkpoint.tensor("model.embed_tokens.weight").numpy()
    assert got.dtype == np.float32 and np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("kind", [Q.Q8_1, Q.Q8_K, Q.I8, Q.I16, Q.I32, Q.I64, Q.F64], ids=lambda kind: kind.name)
def test_a_type_that_it_does_not_know_is_named(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((len(TOKENS), max(32, block) // block * size), np.uint8)
    path = tmp_path / "x.gguf"
    keys = {"embedding_length": ("uint32", max(32, block))}
    write_gguf(path, keys=keys, tensors={"token_embd.weight": raw}, types={"token_embd.weight": kind})
    with pytest.raises(WeightsError, match=rf"x\.gguf.*token_embd\.weight.*{kind.name}"):
        open_checkpoint(path)


def test_a_type_beyond_the_known_ones_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at] = 99
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"output_norm\.weight.*type 99"):
        open_checkpoint(path)


# ------------------------------------------------------------------------------ rotary frequencies


def frequencies(factor: float) -> np.ndarray:
    return 1e4 ** (-np.arange(0, DIM, 2) / DIM) / factor


LINEAR: list[tuple[dict[str, tuple[str, Any]], float]] = [
    ({"rope.scaling.type": ("string", "linear"), "rope.scaling.factor": ("float32", 4.0)}, 4.0),
    ({"rope.scaling.factor": ("float32", 4.0)}, 4.0),
    ({"rope.scale_linear": ("float32", 4.0)}, 4.0),
    ({"rope.scaling.type": ("string", "none"), "rope.scaling.factor": ("float32", 4.0)}, 1.0),
    ({"rope.scaling.type": ("string", "linear"), "rope.scaling.factor": ("float32", 0.0)}, 1.0),
    ({"rope.scaling.type": ("string", "yarn")}, 1.0),
]


@pytest.mark.parametrize(("keys", "factor"), LINEAR)
def test_linear_stretches_are_llama_cpps(tmp_path: Path, keys: dict[str, Any], factor: float) -> None:
    """freq_scale = 1 / factor for every frequency; the type is linear unless named, and "none" scales nothing."""
    write_gguf(tmp_path / "x.gguf", keys=keys)
    op = rope_op(config_of(tmp_path / "x.gguf"))
    np.testing.assert_allclose(rotary.inverse_frequencies(op, DIM), frequencies(factor), rtol=1e-6)
    assert rotary.size(op) == 1.0


def ggml_yarn(factor: float, context: int, fast: float = 32.0, slow: float = 1.0, log: float = 0.0) -> Any:
    """(frequencies, magnitude): ggml's rope_yarn with llama.cpp's attention factor, written from their rules."""
    dims = [DIM * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (fast, slow)]
    start, end = max(0.0, math.floor(dims[0])), min(DIM - 1.0, math.ceil(dims[1]))
    out = []
    for i, plain in enumerate(frequencies(1.0)):
        kept = 1 - min(1.0, max(0.0, (i - start) / max(0.001, end - start)))
        out.append(plain / factor * (1 - kept) + plain * kept)
    attention = (0.1 * math.log(factor) + 1) / ((0.1 * log * math.log(factor) + 1) if log else 1.0)
    attention *= 1 / (1 + 0.1 * math.log(factor))  # llama_context cancels what rope_yarn multiplies by
    return np.array(out), attention * (1 + 0.1 * math.log(factor))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.original_context_length": ("uint32", 2048)}, ggml_yarn(8.0, 2048)),
        ({}, ggml_yarn(8.0, 512)),
        (
            {"rope.scaling.yarn_beta_fast": ("float32", 20.0), "rope.scaling.yarn_beta_slow": ("float32", 2.0)},
            ggml_yarn(8.0, 512, 20.0, 2.0),
        ),
        ({"rope.scaling.yarn_log_multiplier": ("float32", 0.7)}, ggml_yarn(8.0, 512, log=0.7)),
    ],
)
def test_yarn_is_llama_cpps(tmp_path: Path, arch: str, keys: dict[str, Any], expected: Any) -> None:
    yarn = {"rope.scaling.type": ("string", "yarn"), "rope.scaling.factor": ("float32", 8.0)}
    write_gguf(tmp_path / "x.gguf", arch, keys=yarn | keys)
    op = rope_op(config_of(tmp_path / "x.gguf"))
    np.testing.assert_allclose(rotary.inverse_frequencies(op, DIM), expected[0], rtol=1e-5)
    assert rotary.size(op) == pytest.approx(expected[1], rel=1e-6)


def test_a_gguf_and_a_config_json_stretch_alike(tmp_path: Path) -> None:
    from tests.model_files import CONFIG

    keys = {
        "rope.scaling.type": ("string", "yarn"), "rope.scaling.factor": ("float32", 4.0),
        "rope.scaling.original_context_length": ("uint32", 128),
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", keys=keys)
    body = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    found = config_of(tmp_path / "x.gguf").rope_scaling
    assert found == from_hf({**CONFIG, "rope_parameters": body}, "x").rope_scaling and isinstance(found, Yarn)


def test_a_stretched_model_computes_what_transformers_does(tmp_path: Path) -> None:
    """A llama GGUF with a linear factor, against transformers' own model with that scaling and the same weights."""
    import transformers as hf

    from taskgraph.serving.session import Session

    path = tmp_path / "x.gguf"
    write_gguf(
        path, keys={"rope.scaling.factor": ("float32", 3.0), "attention.layer_norm_rms_epsilon": ("float32", 1e-5)}
    )
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        weights = llama.load_weights(config, checkpoint, "f32")
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=HEADS, num_key_value_heads=1,
            max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        )
    )  # fmt: skip
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    prompt = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62]
    with torch.no_grad():
        want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    with Session(config, weights, cache=64) as session:
        assert list(session.generate(prompt, 12)) == want[len(prompt) :].tolist()


# ------------------------------------------------------------------- keys and tensors, honoured or named


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.dimension_count", ("uint32", DIM // 2)),
        ("rope.dimension_sections", ("array", [4, 4, 4, 4])),
        ("rope.scaling.type", ("string", "longrope")),
        ("rope.scaling.type", ("string", "dynamic")),
        ("rope.freq_base_swa", ("float32", 1e4)),
        ("rope.freq_base", ("float32", float("nan"))),
        ("attention.value_length", ("uint32", DIM // 2)),
        ("attention.key_length", ("uint32", 15)),
        ("attention.sliding_window", ("uint32", 128)),
        ("attention.sliding_window_pattern", ("uint32", 4)),
        ("attention.scale", ("float32", 0.5)),
        ("attention.causal", ("bool", False)),
        ("attention.max_alibi_bias", ("float32", 8.0)),
        ("attention.clamp_kqv", ("float32", 8.0)),
        ("attention.layer_norm_epsilon", ("float32", 1e-5)),
        ("attn_logit_softcapping", ("float32", 50.0)),
        ("final_logit_softcapping", ("float32", 30.0)),
        ("logit_scale", ("float32", 0.5)),
        ("embedding_scale", ("float32", 12.0)),
        ("residual_scale", ("float32", 0.2)),
        ("use_parallel_residual", ("bool", True)),
        ("pooling_type", ("uint32", 1)),
        ("expert_count", ("uint32", 8)),
        ("expert_used_count", ("uint32", 2)),
        ("expert_gating_func", ("uint32", 2)),
        ("expert_weights_scale", ("float32", 2.5)),
        ("some_new_key", ("float32", 1.0)),
        ("attention.head_count", ("uint32", 0)),
        ("attention.head_count", ("string", "two")),
        ("attention.head_count_kv", ("uint32", 3)),
        ("block_count", ("uint32", 2**32 - 1)),
        ("context_length", None),
        ("embedding_length", None),
        ("block_count", None),
        ("feed_forward_length", None),
        ("attention.head_count", None),
        ("attention.layer_norm_rms_epsilon", None),
    ],
)
def test_a_key_that_is_not_honoured_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write_gguf(tmp_path / "x.gguf", keys={key: value})
    with pytest.raises(WeightsError, match=rf"x\.gguf.*llama\.{key}") as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", ("string", "adapter")),
        ("split.count", ("uint16", 2)),
        ("other.key", ("float32", 1.0)),
    ],
)
def test_a_general_key_that_is_not_honoured_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write_gguf(tmp_path / "x.gguf", keys={key: value})
    with pytest.raises(WeightsError, match=key.replace(".", r"\.")):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.dimension_count", ("uint32", DIM)), ("attention.key_length", ("uint32", DIM)),
        ("attention.value_length", ("uint32", DIM)), ("attention.sliding_window", ("uint32", 512)),
        ("attention.sliding_window", ("uint32", 0)), ("attention.scale", ("float32", DIM**-0.5)),
        ("attention.causal", ("bool", True)), ("logit_scale", ("float32", 1.0)), ("expert_count", ("uint32", 0)),
        ("vocab_size", ("uint32", 259)), ("rope.scaling.finetuned", ("bool", True)),
        ("general.license", ("string", "mit")), ("general.file_type", ("uint32", 3)), ("split.count", ("uint16", 1)),
        ("general.tags", ("array", ["a"])), ("tensor_data_layout", ("string", "Meta AI original pth")),
    ],
)  # fmt: skip
def test_a_key_that_changes_nothing_is_read_past(tmp_path: Path, key: str, value: Any) -> None:
    write_gguf(tmp_path / "plain.gguf")
    write_gguf(tmp_path / "x.gguf", keys={key: value})
    from dataclasses import replace

    assert config_of(tmp_path / "x.gguf") == replace(config_of(tmp_path / "plain.gguf"), name="x")


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_layers_that_are_alike_may_be_listed(tmp_path: Path, key: str) -> None:
    from tests.model_files import KEYS

    one = KEYS[key][1]
    twice = {"block_count": ("uint32", 2)}
    write_gguf(tmp_path / "x.gguf", keys={**twice, key: ("array", [one, one])})
    write_gguf(tmp_path / "y.gguf", keys=twice)
    from dataclasses import replace

    assert config_of(tmp_path / "x.gguf") == replace(config_of(tmp_path / "y.gguf"), name="x")
    for entries in ([one, 2 * one], [one], [one] * 3):
        write_gguf(tmp_path / "x.gguf", keys={**twice, key: ("array", entries)})
        with pytest.raises(WeightsError, match=rf"llama\.{key}"):
            open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias", "blk.0.attn_norm.bias", "output_norm.bias",
        "output.bias", "blk.0.attn_q_norm.weight", "blk.0.attn_sub_norm.weight", "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_q.scale", "blk.0.attn_q.input_scale", "blk.1.attn_q.weight", "rope_factors_long.weight",
        "rope_factors_short.weight", "blk.0.post_attention_norm.weight", "cls.weight", "position_embd.weight",
        "blk.00.attn_q.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_the_model_has_not_is_named(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "x.gguf", tensors={name: np.ones(HEADS * DIM, np.float32)})
    with pytest.raises(WeightsError, match=rf"x\.gguf.*{name.replace('.', chr(92) + '.')}"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_what_a_family_has_is_read(tmp_path: Path, arch: str) -> None:
    made = write_gguf(tmp_path / "x.gguf", arch)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        weights = llama.load_weights(checkpoint.config, checkpoint, "f32")
    name, parts = ("qkv_bias", "qkv") if arch == "qwen2" else ("q_norm", "q")
    ends = "attn_{}.bias" if arch == "qwen2" else "attn_{}_norm.weight"
    want = np.concatenate([made[f"blk.0.{ends.format(p)}"] for p in parts])
    np.testing.assert_array_equal(weights[f"layer.0/{name}"].numpy(), want)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "token_embd.weight", "output_norm.weight"])
def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, name: str) -> None:
    from taskgraph.models.gguf.config import hf_name

    for tensor in (None, np.ones((7, 32), np.float32)):
        write_gguf(tmp_path / "x.gguf", tensors={name: tensor})
        with open_checkpoint(tmp_path / "x.gguf") as checkpoint, pytest.raises(WeightsError, match=str(hf_name(name))):
            llama.load_weights(checkpoint.config, checkpoint, "f32")


def test_an_output_head_of_its_own_is_read(tmp_path: Path) -> None:
    head = np.random.default_rng(9).standard_normal((len(TOKENS), 32)).astype(np.float32)
    write_gguf(tmp_path / "x.gguf", tensors={"output.weight": head})
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert not checkpoint.config.tie_embeddings
        np.testing.assert_array_equal(llama.load_weights(checkpoint.config, checkpoint, "f32")["lm_head"].numpy(), head)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"output_norm\.weight.*belongs to"):
        open_checkpoint(path)


def test_the_vocabulary_is_that_of_the_table(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", keys={"tokenizer.ggml.tokens": ("array", TOKENS[:-1])})
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint, pytest.raises(WeightsError, match="embed_tokens"):
        llama.load_weights(checkpoint.config, checkpoint, "f32")
