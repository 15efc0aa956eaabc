"""The tokenizer built from GGUF metadata against transformers' from the same file, and its stream decoder."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from taskgraph.errors import WeightsError
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.models.weights import open_checkpoint
from tests.model_files import TOKENS, raw_tokenizer, write_folder

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


# ------------------------------------------------------------------------- rules of GGUF vocabularies


def vocabulary(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte vocabulary with two special tokens and one merge; a change to None removes a key."""
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": [1] * 256 + [3, 3, 1], "merges": ["a b"]}
    return {f"tokenizer.ggml.{key}": value for key, value in {**keys, **changes}.items() if value is not None}


def letters(text: str) -> list[int]:
    return [TOKENS.index(letter) for letter in text]


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama3"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2"}, False),
        ({"pre": "qwen2"}, False),
        ({"pre": "smollm", "add_bos_token": True}, True),
        ({"pre": "gpt-2", "add_eos_token": True}, False),
    ],
)
def test_prompts_begin_as_in_llama_cpp(changes: dict[str, Any], begins: bool) -> None:
    """Its defaults by pre-tokenizer; an end of sequence is never put behind a prompt, which is to be continued."""
    made = Tokenizer.from_gguf(vocabulary(bos_token_id=256, eos_token_id=257, **changes))
    assert made.encode("hi") == [256] * begins + letters("hi")
    assert made.encode("<|turn|>hi") == [256, *letters("hi")], "a template that begins with BOS does not get another"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eos_token_id": 259}, "eos_token_id is 259"),
        ({"bos_token_id": 2**32 - 1}, "bos_token_id is 4294967295"),
        ({"eot_token_id": -1}, "eot_token_id is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"add_bos_token": True}, "no bos_token_id"),
        ({"add_bos_token": 1, "bos_token_id": 256}, "add_bos_token"),
        ({"add_space_prefix": True}, "add_space_prefix"),
        ({"tokens": [*TOKENS[:-1], "<|end|>"]}, r"'<\|end\|>'.*257.*258"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"token_type": [1, 1]}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["ab"]}, "merges"),
        ({"merges": ["a missing"]}, "merges"),
        ({"pre": "strange"}, "'strange'"),
        ({"pre": 3}, "pre-tokenizer 3"),
        ({"model": "llama"}, "'llama'"),
        ({"model": "bert"}, "'bert'"),
        ({"model": "t5"}, "'t5'"),
        ({"model": None}, "None"),
        ({"precompiled_charsmap": [1]}, "precompiled_charsmap"),
        ({"new_rule": 1}, "new_rule"),
    ],
)
def test_a_strange_vocabulary_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightsError, match=rf"some\.gguf.*{reason}") as caught:
        Tokenizer.from_gguf(vocabulary(**changes), "some.gguf")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
def test_the_end_of_a_turn_is_special_whatever_its_type(kind: int) -> None:
    """And known by its text where no key names it."""
    for changes in ({"eos_token_id": 257}, {}):
        made = Tokenizer.from_gguf(vocabulary(token_type=[1] * 256 + [3, kind, 1], **changes))
        assert made.eos_ids == (257,)
        assert made.encode("a<|end|>") == [*letters("a"), 257] and made.decode([*letters("a"), 257]) == "a"


def test_empty_tokens_have_names() -> None:
    made = Tokenizer.from_gguf(vocabulary(tokens=[*TOKENS, "", ""], token_type=None))
    assert made.vocab_size == len(TOKENS) + 2 and made.encode("ab") == [258]


def test_a_vocabulary_without_a_pre_tokenizer_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = Tokenizer.from_gguf(vocabulary(pre=None), "some.gguf")
    assert "some.gguf names no pre-tokenizer" in caplog.text
    assert made.decode(made.encode("a, b 1234?!  x")) == "a, b 1234?!  x"


def pattern_of(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
    "llama-bpe": pattern_of(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": pattern_of(_WORDS + r"\p{N}" + _REST),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
}  # fmt: skip


@pytest.mark.parametrize("pre", PUBLISHED)
@pytest.mark.parametrize("text", [*TEXTS, "a  1", "x\r\n\n  y\t", "12345 abc's"])
def test_text_is_cut_as_in_the_published_tokenizers(pre: str, text: str) -> None:
    made = json.loads(Tokenizer.from_gguf(vocabulary(pre=pre)).to_json())["pre_tokenizer"]
    raw = RawTokenizer(models.BPE({}, []))
    raw_settings = json.loads(raw.to_str())
    cut = RawTokenizer.from_str(json.dumps({**raw_settings, "pre_tokenizer": made})).pre_tokenizer
    assert cut is not None
    assert cut.pre_tokenize_str(text) == PUBLISHED[pre].pre_tokenize_str(text)


# -------------------------------------------------------------------------------- a folder's settings


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(
            single="<|turn|> $A <|end|>", special_tokens=[("<|turn|>", 256), ("<|end|>", 257)]
        ),
        processors.Sequence([
            processors.ByteLevel(),
            processors.TemplateProcessing(
                single="<|turn|> $A <|end|> <|end|>", special_tokens=[("<|turn|>", 256), ("<|end|>", 257)]
            ),
        ]),
        processors.RobertaProcessing(("<|end|>", 257), ("<|turn|>", 256)),
        processors.BertProcessing(("<|end|>", 257), ("<|turn|>", 256)),
    ],
)  # fmt: skip
def test_what_a_post_processor_appends_is_left_out(tmp_path: Path, processor: Any) -> None:
    folder = write_folder(tmp_path / "m", tokenizer_config={"bos_token": "<|turn|>", "eos_token": "<|end|>"})
    raw = raw_tokenizer()
    raw.post_processor = processor
    raw.save(str(folder / "tokenizer.json"))
    made = Tokenizer.from_folder(folder)
    assert made.encode("hi") == [256, *letters("hi")] == [i for i in raw.encode("hi").ids if i != 257]
    assert made.encode("") == [256] and made.encode("<|turn|>hi") == [256, *letters("hi")]


def test_only_what_ends_is_appended_by_a_post_processor(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    raw = raw_tokenizer()
    raw.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 257)])
    raw.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_folder(folder).encode("hi") == letters("hi")


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "generation_config": {"eos_token_id": [256, 257]}}, (257, 256)),
        ({"generation_config": {"eos_token_id": 256}}, (256,)),
        ({"generation_config": {"temperature": 1.0}}, (257,)),
        ({"special_tokens_map": {"eos_token": {"content": "<|turn|>"}}}, (256, 257)),
    ],
)
def test_ends_are_the_tokenizers_and_the_generations(tmp_path: Path, files: dict[str, Any], ids: Any) -> None:
    """config.json's (257) counts only where generation_config.json names none, as in transformers."""
    assert Tokenizer.from_folder(write_folder(tmp_path / "m", **files)).eos_ids == ids


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, "eos_token is '</s>'"),
        ({"tokenizer_config": {"bos_token": {"content": 3}}}, "bos_token is 3"),
        ({"tokenizer_config": {"added_tokens_decoder": {"300": {"content": "<new>"}}}}, "'<new>' as '300'"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template is 3"),
        ({"generation_config": {"eos_token_id": 259}}, "eos_token_id 259"),
        ({"generation_config": {"eos_token_id": [257, -1]}}, "eos_token_id"),
        ({"generation_config": {"eos_token_id": True}}, "eos_token_id is True"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightsError, match=rf"config\.json.*{reason}"):
        Tokenizer.from_folder(write_folder(tmp_path / "m", **files))


def test_templates_may_be_named_or_in_a_file(tmp_path: Path) -> None:
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    folder = write_folder(tmp_path / "m", tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(folder).chat("a") == "a"
    (folder / "chat_template.jinja").write_text("from a file {{ messages[0].content }}")
    assert Tokenizer.from_folder(folder).chat("a") == "from a file a"
