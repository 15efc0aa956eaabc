"""Tokenizers in the metadata of GGUF files, byte-level BPE, by the rules of llama.cpp (llama-vocab.cpp)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from taskgraph.errors import WeightsError
from taskgraph.models.documents import known_formats, words
from taskgraph.record import shown

log = logging.getLogger("taskgraph.models")

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types of GGUF


@dataclass(frozen=True, slots=True)
class CutRule:
    """How pre-tokenizers of these names cut text; checkpoints.toml says what the fields are."""

    names: list[str]
    patterns: list[str]
    whole: bool = False
    bos: bool = False
    composed: bool = False


RULES = {name: rule for rule in (CutRule(**each) for each in known_formats()["pre_tokenizers"]) for name in rule.names}
"""llama.cpp's name of a pre-tokenizer -> its rule."""

_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")
"""Tokens that end an answer whatever the file's keys say: llama.cpp knows them by their text."""

_KNOWN = words(known_formats()["vocabulary"]["read"])
"""Keys after "tokenizer.ggml." that are honoured or harmless."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """A tokenizer and its special ids: those that end an answer, BOS, and what a prompt begins with."""

    raw: RawTokenizer
    ends: list[int]
    bos: int | None
    prefix: list[int]
    template: str | None


def read_vocabulary(metadata: Mapping[str, Any], source: str) -> GgufVocabulary:
    """The vocabulary in a GGUF's metadata; WeightsError names what is missing, senseless or not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise WeightsError(
            f"{source}: tokenizer kind {shown(kind)} cannot be built from GGUF, only byte-level BPE ('gpt2'). "
            "Give the Hugging Face folder of the model, with its tokenizer.json."
        )
    _check_keys(metadata, source)
    rule = _rule(metadata, source)
    tokens = _tokens(metadata, source)
    special = {key: _special(metadata, key, len(tokens), source) for key in ("bos", "eos", "eot", "eom")}
    ids = {token: number for number, token in enumerate(tokens)}
    named = [special[key] for key in ("eos", "eot", "eom")] + [ids.get(text) for text in _ENDS]
    ends = list(dict.fromkeys(number for number in named if number is not None))
    bos, given = special["bos"], metadata.get("tokenizer.ggml.add_bos_token")
    if given and bos is None:
        raise WeightsError(f"{source}: tokenizer.ggml.add_bos_token is true, and there is no bos_token_id.")
    begins = bos is not None and (rule.bos if given is None else given)
    raw = _built(metadata, tokens, ids, rule, source)
    _add_special(raw, tokens, _types(metadata, len(tokens), source), {*ends, *([] if bos is None else [bos])})
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise WeightsError(f"{source}: tokenizer.chat_template is {shown(template)}; it must be a text.")
    return GgufVocabulary(raw, ends, bos, [bos] if begins and bos is not None else [], template)


def _check_keys(metadata: Mapping[str, Any], source: str) -> None:
    for key, value in metadata.items():
        if not key.startswith("tokenizer.") or key.startswith("tokenizer.chat_template"):
            continue
        name = key.removeprefix("tokenizer.ggml.")
        if key != "tokenizer.huggingface.json" and (name == key or name not in _KNOWN):
            raise WeightsError(
                f"{source}: the GGUF key {shown(key)} is not known to this version and may change the tokens; "
                "give the Hugging Face folder of the model, with its tokenizer.json."
            )
        if name.startswith(("add_", "remove_")) and not isinstance(value, bool):
            raise WeightsError(f"{source}: {key} is {shown(value)}; it must be true or false.")
        if name in ("add_space_prefix", "remove_extra_whitespaces") and value:
            raise WeightsError(f"{source}: {key} is true, which a byte-level vocabulary does not support.")


def _rule(metadata: Mapping[str, Any], source: str) -> CutRule:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        log.warning("%s names no pre-tokenizer (tokenizer.ggml.pre); text is cut by llama.cpp's default rule.", source)
        return RULES["default"]
    if not isinstance(pre, str) or pre not in RULES:
        raise WeightsError(
            f"{source}: unknown pre-tokenizer {shown(pre)}; known are {', '.join(RULES)}. "
            "Give the Hugging Face folder of the model, with its tokenizer.json."
        )
    return RULES[pre]


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WeightsError(f"{source}: metadata {key!r} is missing or not a list of strings. Download it again.")
    return value


def _tokens(metadata: Mapping[str, Any], source: str) -> list[str]:
    """The tokens, each once; empty ones get a name, as in llama.cpp."""
    given = _strings(metadata, "tokenizer.ggml.tokens", source)
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(given)]
    if not tokens:
        raise WeightsError(f"{source}: tokenizer.ggml.tokens is empty. Download it again.")
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        twice = next(i for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
        raise WeightsError(
            f"{source}: token {shown(tokens[twice])} stands in tokenizer.ggml.tokens as {first[tokens[twice]]} and as "
            f"{twice}; a token has one id."
        )
    return tokens


def _types(metadata: Mapping[str, Any], count: int, source: str) -> Sequence[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [1] * count
    good = isinstance(types, list) and len(types) == count and all(isinstance(t, int) for t in types)
    if not isinstance(types, list) or not good:
        raise WeightsError(f"{source}: tokenizer.ggml.token_type must have one number for each of {count} tokens.")
    return types


def _special(metadata: Mapping[str, Any], name: str, count: int, source: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise WeightsError(f"{source}: {key} is {shown(value)}, which is not in the vocabulary of {count} tokens.")
    return value


def _built(
    metadata: Mapping[str, Any], tokens: list[str], ids: dict[str, int], rule: CutRule, source: str
) -> RawTokenizer:
    merges = _strings(metadata, "tokenizer.ggml.merges", source)
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    if len(pairs) < len(merges):
        raise WeightsError(f"{source}: an entry of tokenizer.ggml.merges is no pair of tokens. Download it again.")
    try:
        raw = RawTokenizer(models.BPE(ids, pairs, ignore_merges=rule.whole))
    except Exception as error:  # tokenizers raises bare Exception
        message = f"{source}: the merges do not fit the tokens ({shown(error)}). Download it again."
        raise WeightsError(message) from error
    cuts = [pre_tokenizers.Split(Regex(known_formats()["patterns"][name]), "isolated") for name in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    raw.decoder = decoders.ByteLevel()
    if rule.composed:
        raw.normalizer = normalizers.NFC()
    return raw


def _add_special(raw: RawTokenizer, tokens: list[str], types: Sequence[int], ends: set[int]) -> None:
    """Tokens that text cannot be made of part by part; those in `ends` are special whatever their type."""
    special = [
        t for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (_UNKNOWN, _CONTROL) or i in ends
    ]
    taken = set(special)
    other = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED and t not in taken]
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    raw.add_tokens([AddedToken(token, normalized=False) for token in other])
