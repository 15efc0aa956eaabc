"""The tokenizer built from GGUF metadata against transformers' from the same file, and its stream decoder."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from taskgraph.errors import WeightsError
from taskgraph.models.tokenizer import Tokenizer
from taskgraph.models.weights import open_checkpoint

TEXTS = [
    "Hello, world!",
    "The answer is 42, not 1,234,567.89 or 2026-11-24.",
    "naïve café – 東京 Ωμέγα привет 😀👩‍👩‍👧",
    "  leading, trailing   and\n\n\tinner whitespace  ",
    "it's we'll I'D don't",
    "<|im_start|>user\nHi 7<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x**2",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    with open_checkpoint(smollm2_gguf) as checkpoint:
        return checkpoint.tokenizer()


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, specials=True) == text


def numerals_apart(text: str) -> list[str]:
    """`text` cut so that every Unicode numeral (category N) stands alone: llama.cpp's first step for 'smollm'."""
    pieces = [""]
    for char in text:
        pieces += [char, ""] if unicodedata.category(char).startswith("N") else []
        pieces[-1] += "" if unicodedata.category(char).startswith("N") else char
    return [piece for piece in pieces if piece]


@pytest.mark.model
@pytest.mark.parametrize("text", [*TEXTS, "a  1", "half ½, squared ², four Ⅳ, 12  34"])
def test_numerals_stand_alone_as_in_llama_cpp(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """Numerals apart, then GPT-2's pattern on each piece: the definition of 'smollm' in llama.cpp (llama-vocab.cpp).

    transformers ignores that pre-tokenizer when it reads a GGUF, so whole texts with " ½" or two spaces before a
    digit differ there; piece by piece it is a reference again.
    """
    pieces = numerals_apart(text)
    assert tokenizer.encode(text) == [
        token for piece in pieces for token in reference(piece, add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.model
def test_chat_equals_the_template_of_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    want = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat("Hi", system="Be brief.") == want
    assert tokenizer.chat("Hi").startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.model
def test_eos_is_the_end_of_a_turn(tokenizer: Tokenizer) -> None:
    """And the end of a document, which llama.cpp knows by its text (llama-vocab.cpp)."""
    assert tokenizer.eos_ids == tuple(tokenizer.encode("<|im_end|><|endoftext|>"))
    assert tokenizer.decode(tokenizer.encode("Hi<|im_end|>")) == "Hi"


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream_decoder(specials=True)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


@pytest.mark.model
def test_an_unfinished_character_is_flushed_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    stream = tokenizer.stream_decoder()
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_another_kind_of_vocabulary_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"some\.gguf.*'llama'"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "llama"}, "some.gguf")


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd"}
    metadata |= {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    with pytest.raises(WeightsError, match="'odd'"):
        Tokenizer.from_gguf(metadata, "some.gguf")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_damaged_tokenizer_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
