"""Text to token ids and back, from GGUF metadata or from a `tokenizer.json`; and the chat template."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from taskgraph.errors import WeightsError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_START = 3  # bytes of a UTF-8 character that is not whole
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
# Patterns of the tokenizer.json published with the models; the names are llama.cpp's (llama-vocab.cpp).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLIT_REGEX = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}
_DIGITS_THEN_GPT2 = ("smollm",)
_GPT2 = ("gpt-2", "gpt2")


class StreamDecoder:
    """Turns ids that come one by one into text; a piece never ends inside a UTF-8 character.

    Bytes that are no UTF-8 come as U+FFFD, three tokens late at most: no more can be the beginning of a character. So
    an id costs the same whatever came before it."""

    def __init__(self, tokenizer: Tokenizer, *, specials: bool = False) -> None:
        self._tokenizer = tokenizer
        self._specials = specials
        self._ids: list[int] = []  # from the piece before the last emitted one on
        self._shown = 0  # how many of them are already emitted
        self._before = ""  # and as which text

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if self._tokenizer.silent(token_id, specials=self._specials):
            return ""
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end; an unfinished character comes as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        end, now = len(self._ids), self._decode(self._ids)
        if now.endswith(_REPLACEMENT) and not final:
            end -= _LONGEST_START
            if end <= self._shown:
                return ""
            now = self._decode(self._ids[:end])
        # a decoder may show earlier ids in another way beside those that came now; what was emitted stays
        same = now.startswith(self._before)
        piece = now[len(self._before) :] if same else self._decode(self._ids[self._shown : end])
        self._ids = self._ids[self._shown :]
        self._shown = end - self._shown
        self._before = self._decode(self._ids[: self._shown])
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, specials=self._specials) if ids else ""


class Tokenizer:
    """A tokenizer with its special ids and chat template. `prefix_ids` are what `encode` puts first (Llama's BOS)."""

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        source: str,
        eos_ids: Iterable[int] = (),
        prefix_ids: Sequence[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._raw = raw
        self._source = source
        self._prefix = list(prefix_ids)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.chat_template = chat_template
        added = raw.get_added_tokens_decoder()
        self._special = {index: token.content for index, token in added.items() if token.special}
        self._special_ids = {text: index for index, text in self._special.items()}
        self._added = {index: token.content for index, token in added.items()}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "the GGUF file") -> Tokenizer:
        """Build from GGUF metadata; `source` names the file in errors.

        Raises WeightsError when the vocabulary is absent or of a kind other than byte-level BPE.
        """
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return cls(
            _byte_level_bpe(metadata, source),
            source=source,
            eos_ids=[metadata[key] for key in keys if key in metadata],
            prefix_ids=[bos] if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", False) else [],
            bos_id=bos,
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Build from `tokenizer.json` and its neighbours in a Hugging Face folder. Raises WeightsError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise WeightsError(f"{path} is missing. Download it with the model, or use a GGUF file.")
        try:
            raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise WeightsError(f"{path} is not a tokenizer ({error}). Download it again.") from error
        raw.no_padding()
        raw.no_truncation()
        settings = _optional_json(folder / "tokenizer_config.json")
        bos = _named_id(raw, settings.get("bos_token"))
        return cls(
            raw,
            source=str(path),
            eos_ids=_folder_eos_ids(raw, folder, settings),
            prefix_ids=raw.encode("").ids,
            bos_id=bos,
            chat_template=_folder_template(folder, settings),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return int(self._raw.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """The tokenizer as the text of a `tokenizer.json`."""
        return str(self._raw.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids, and a needed BOS comes first once."""
        ids: list[int] = self._raw.encode(text, add_special_tokens=False).ids
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Text of the ids, without special tokens unless `specials`."""
        return str(self._raw.decode(list(ids), skip_special_tokens=not specials))

    def silent(self, token_id: int, *, specials: bool = False) -> bool:
        """Whether `decode` shows nothing of an id: a special token, or none of this vocabulary."""
        return (token_id in self._special and not specials) or self._raw.id_to_token(token_id) is None

    @property
    def special_texts(self) -> Mapping[str, int]:
        """The special tokens, which `decode` leaves out, by their text."""
        return self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special one its text."""
        text = self._raw.id_to_token(token_id)
        if text is None or token_id in self._added:
            return (text or "").encode()
        kind = repr(self._raw.decoder)
        if "ByteLevel" in kind:
            known = _byte_of_letter()
            return bytes(known[letter] for letter in text) if all(c in known for c in text) else text.encode()
        if "ByteFallback" in kind and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace("\u2581", " ").encode()

    def stream_decoder(self, *, specials: bool = False) -> StreamDecoder:
        """A fresh incremental decoder."""
        return StreamDecoder(self, specials=specials)

    def chat(self, prompt: str, system: str | None = None) -> str:
        """The prompt in the model's chat format, ready for `encode` and for the assistant's answer.

        Raises WeightsError when the checkpoint has no chat template or the template fails.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.conversation([*messages, {"role": "user", "content": prompt}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages (role, content) in the model's chat format, as `chat` does one prompt."""
        if self.chat_template is None:
            raise WeightsError(f"{self._source} has no chat template. Encode the prompt as it is, or use a chat model.")
        return self._render(self.chat_template, messages)

    def _render(self, template: str, messages: Sequence[Mapping[str, str]]) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template comes with the weights: not trusted

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals.update(raise_exception=_raise_template_error, strftime_now=_now)
        names = {"bos_token": self._text(self.bos_id), "eos_token": self._text(next(iter(self.eos_ids), None))}
        try:
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
        except (TemplateError, TypeError) as error:
            message = f"the chat template of {self._source} fails: {error}. Encode the prompt as it is."
            raise WeightsError(message) from error

    def _text(self, token_id: int | None) -> str:
        return "" if token_id is None else str(self._raw.id_to_token(token_id) or "")


@functools.cache
def _byte_of_letter() -> Mapping[str, int]:
    """The byte of each letter that byte-level BPE writes bytes as (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _byte_level_bpe(metadata: Mapping[str, Any], source: str) -> RawTokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise WeightsError(
            f"{source}: tokenizer kind {kind!r} cannot be built from GGUF, only byte-level BPE ('gpt2'). "
            "Give the Hugging Face folder of the model, with its tokenizer.json."
        )
    pre = str(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    tokens, merges = (_strings(metadata, f"tokenizer.ggml.{key}", source) for key in ("tokens", "merges"))
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        raw = RawTokenizer(models.BPE(vocabulary, pairs, ignore_merges=_SPLIT_REGEX.get(pre) == _LLAMA3))
    except Exception as error:  # tokenizers raises bare Exception
        raise WeightsError(f"{source}: the merges do not fit the tokens ({error}). Download it again.") from error
    raw.pre_tokenizer = _pre_tokenizer(pre, source)
    raw.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        raw.normalizer = normalizers.NFC()
    _add_special(raw, tokens, metadata.get("tokenizer.ggml.token_type", []))
    return raw


def _pre_tokenizer(pre: str, source: str) -> pre_tokenizers.PreTokenizer:
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS_THEN_GPT2:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in _SPLIT_REGEX:
        split = pre_tokenizers.Split(Regex(_SPLIT_REGEX[pre]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    names = ", ".join([*_GPT2, *_DIGITS_THEN_GPT2, *_SPLIT_REGEX])
    raise WeightsError(
        f"{source}: unknown pre-tokenizer {pre!r}; known are {names}. "
        "Give the Hugging Face folder of the model, with its tokenizer.json."
    )


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WeightsError(f"{source}: metadata {key!r} is missing or not a list of strings. Download it again.")
    return value


def _add_special(raw: RawTokenizer, tokens: list[str], types: Sequence[int]) -> None:
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, k in marked if k == _CONTROL])
    raw.add_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == _USER_DEFINED])


def _optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file. Raises WeightsError that names a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not readable JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a JSON {type(content).__name__}, not an object. Download it again.")
    return content


def _named_id(raw: RawTokenizer, token: object) -> int | None:
    """The id of a token that tokenizer_config.json gives as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return raw.token_to_id(text) if isinstance(text, str) else None


def _folder_eos_ids(raw: RawTokenizer, folder: Path, settings: Mapping[str, Any]) -> list[int]:
    ids = [_named_id(raw, settings.get("eos_token"))]
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    return [item for item in ids if isinstance(item, int)]


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: `chat_template.jinja`, or the entry of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value}.get("default")
    return value if isinstance(value, str) else None


def _raise_template_error(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).astimezone().strftime(pattern)
