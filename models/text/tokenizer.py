"""Text to token ids and back, from GGUF metadata or from a `tokenizer.json`; and the chat template."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from taskgraph.errors import WeightsError
from taskgraph.models.documents import optional_object
from taskgraph.models.gguf.tokenizer import read_vocabulary
from taskgraph.models.text.chat import ChatTemplate
from taskgraph.record import shown

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_START = 3  # bytes of a UTF-8 character that is not whole


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

    @property
    def pending(self) -> int:
        """How many ids may be the beginning of a character."""
        return len(self._ids) - self._shown

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
            if end - self._shown <= _LONGEST_START:
                return ""
            end = self._settled(now)
            now = self._decode(self._ids[:end])
        # a decoder may show earlier ids in another way beside those that came now; what was emitted stays
        same = now.startswith(self._before)
        piece = now[len(self._before) :] if same else self._decode(self._ids[self._shown : end])
        self._ids = self._ids[self._shown :]
        self._shown = end - self._shown
        self._before = self._decode(self._ids[: self._shown])
        return piece

    def _settled(self, now: str) -> int:
        """How many ids are certain: up to the last border between characters of `now` that leaves few enough."""
        most = len(self._ids)
        for end in range(most - 1, most - _LONGEST_START - 1, -1):
            if self._decode(self._ids[:end]) + self._decode(self._ids[end:]) == now:
                return end
        return most - _LONGEST_START

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
        self._template: ChatTemplate | None = None
        _mark_special(raw, self.eos_ids)
        added = raw.get_added_tokens_decoder()
        self._special = {index: token.content for index, token in added.items() if token.special}
        self._special_ids = {text: index for index, text in self._special.items()}
        self._added = {index: token.content for index, token in added.items()}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "the GGUF file") -> Tokenizer:
        """Build from GGUF metadata; `source` names the file in errors.

        Raises WeightsError when the vocabulary is absent or of a kind other than byte-level BPE.
        """
        found = read_vocabulary(metadata, source)
        return cls(
            found.raw,
            source=source,
            eos_ids=found.ends,
            prefix_ids=found.prefix,
            bos_id=found.bos,
            chat_template=found.template,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Build from `tokenizer.json` and its neighbours in a Hugging Face folder. Raises WeightsError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise WeightsError(f"{path} is missing. Download it with the model, or use a GGUF file.")
        raw = _raw_tokenizer(path)
        settings = {**optional_object(folder / "special_tokens_map.json"), **optional_object(folder / _SETTINGS)}
        _check_added(raw, folder, settings)
        bos, eos = (_named_id(raw, settings, key, folder) for key in ("bos_token", "eos_token"))
        return cls(
            raw,
            source=str(path),
            eos_ids=_folder_eos_ids(raw, folder, eos),
            prefix_ids=_before(raw),
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
        try:
            ids: list[int] = self._raw.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            raise  # the text's fault, not the tokenizer's
        except BaseException as error:
            raise _own_error(error, self._source, "cannot encode this text") from error
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
        if self._template is None:
            self._template = ChatTemplate(self.chat_template, self._source)
        named = {"bos_token": self._text(self.bos_id), "eos_token": self._text(next(iter(self.eos_ids), None))}
        return self._template.render(messages, {name: text for name, text in named.items() if text})

    def _text(self, token_id: int | None) -> str:
        return "" if token_id is None else str(self._raw.id_to_token(token_id) or "")


@functools.cache
def _byte_of_letter() -> Mapping[str, int]:
    """The byte of each letter that byte-level BPE writes bytes as (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


# -------------------------------------------------------------------------------- a folder's tokenizer

_SETTINGS = "tokenizer_config.json"


def _raw_tokenizer(path: Path) -> RawTokenizer:
    try:
        raw = RawTokenizer.from_file(str(path))
        raw.no_padding()
        raw.no_truncation()
    except BaseException as error:
        raise _own_error(error, str(path), "is not a tokenizer") from error
    return raw


def _own_error(error: BaseException, source: str, says: str) -> BaseException:
    """What tokenizers raised, a bare Exception or a panic, which is none, as a WeightsError; others as they are."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return WeightsError(f"{source} {says} ({shown(error)}). Download it again.")


def _before(raw: RawTokenizer) -> list[int]:
    """The ids that the post-processor puts before a text. Those behind it, an end of sequence, are none of a prompt's,
    which is to be continued."""
    for text in ("a", "0", " ", "\n", "."):
        try:
            found = raw.encode(text)
        except BaseException as error:  # no token for that text
            if not isinstance(_own_error(error, "", ""), WeightsError):
                raise
            continue
        own = [number for number, sequence in enumerate(found.sequence_ids) if sequence is not None]
        if own:
            return list(found.ids[: own[0]])
    return []


def _mark_special(raw: RawTokenizer, ends: Sequence[int]) -> None:
    """Added tokens that end an answer are special whatever their entry says, so that decoding leaves them out."""
    added = raw.get_added_tokens_decoder()
    texts = [added[number].content for number in ends if number in added and not added[number].special]
    raw.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in texts])


def _content(token: object) -> object:
    """The text of a token that is given as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _named_id(raw: RawTokenizer, settings: Mapping[str, Any], key: str, folder: Path) -> int | None:
    """The id of a token that tokenizer_config.json names; WeightsError if the vocabulary has none such."""
    text = _content(settings.get(key))
    if text is None:
        return None
    found = raw.token_to_id(text) if isinstance(text, str) else None
    if found is None:
        raise WeightsError(f"{folder / _SETTINGS}: {key} is {shown(text)}, which is no token of tokenizer.json.")
    return int(found)


def _check_added(raw: RawTokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """WeightsError for a token that the settings add and that tokenizer.json has not, or elsewhere."""
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise WeightsError(f"{folder / _SETTINGS}: added_tokens_decoder is {shown(added)}; it must be an object.")
    for number, token in added.items():
        text = _content(token)
        if not isinstance(text, str) or str(raw.token_to_id(text)) != number:
            raise WeightsError(
                f"{folder / _SETTINGS}: added_tokens_decoder has {shown(text)} as {shown(number)}, and tokenizer.json "
                "has not; download both of one model."
            )


def _folder_eos_ids(raw: RawTokenizer, folder: Path, named: int | None) -> list[int]:
    """The tokenizer's own, and those of generation_config.json, or of config.json where that names none."""
    for name in ("generation_config.json", "config.json"):
        value = optional_object(folder / name).get("eos_token_id")
        if value is not None:
            break
    else:
        return [] if named is None else [named]
    listed = value if isinstance(value, list) else [value]
    for number in listed:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 31:
            raise WeightsError(
                f"{folder / name}: eos_token_id is {shown(value)}; it must be a token's number, or several."
            )
        if raw.id_to_token(number) is None:
            raise WeightsError(f"{folder / name}: eos_token_id {number} is no token of tokenizer.json.")
    return [*([] if named is None else [named]), *listed]


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: `chat_template.jinja`, or the entry of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise WeightsError(f"{file} cannot be read ({shown(error)}). Download it again.") from error
    value = settings.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise WeightsError(f"{folder / _SETTINGS}: chat_template is {shown(value)}; it must be a text, or named ones.")
    return value
