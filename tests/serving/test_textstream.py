"""Answers as text: stop texts, end tokens and special tokens are never in them; bytes that are no text cost no more."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models as raw_models

from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving.textstream import TextStream
from tests.serve_cases import END, TEMPLATE, byte_tokenizer, raw_tokenizer

TURN = 256


def text_of(stream: TextStream, tokens: Sequence[int]) -> str:
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return "".join(pieces) + stream.flush()


def first_whole(text: str, stops: Sequence[str]) -> str:
    """The text before the stop text that is whole first, letter by letter; of several the one that began first."""
    for end in range(1, len(text) + 1):
        found = [text[:end].removesuffix(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return min(found, key=len)
    return text


# ---------------------------------------------------------------------------------------- stop texts


@given(
    pieces=st.lists(st.text(alphabet="ab€", min_size=1, max_size=6), max_size=12),
    stops=st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4),
)
def test_stop_texts_do_not_depend_on_how_the_text_is_cut_into_tokens(pieces: list[str], stops: list[str]) -> None:
    tokenizer = vocabulary_of(pieces)
    ids = [tokenizer.encode(piece)[0] for piece in pieces]
    text = "".join(pieces)
    stream = TextStream(tokenizer, stops)
    got = text_of(stream, ids)
    assert got == first_whole(text, stops)
    assert stream.stopped is (got != text or any(s == "" for s in stops) or any(s in text for s in stops))
    assert not any(stop in got for stop in stops)


def vocabulary_of(pieces: Sequence[str]) -> Tokenizer:
    """A tokenizer that has each piece as one token."""
    raw = RawTokenizer(raw_models.WordLevel({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, "?"))
    raw.decoder = decoders.Fuse()
    return Tokenizer(raw, source="the test")


@pytest.mark.parametrize(
    ("stop", "said"),
    [("a", ""), ("cd", "ab"), ("abcdef", ""), ("efx", "abcdef"), ("f", "abcde"), ("aaab", "abcdef")],
)
def test_stop_texts_at_the_borders(stop: str, said: str) -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, [stop])
    assert text_of(stream, tokenizer.encode("abcdef")) == said
    assert stream.stopped is (stop in "abcdef")


def test_what_may_begin_a_stop_text_is_held_back_no_longer_than_it_may() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["END.", "E-"])
    said = [stream.push(token) for token in tokenizer.encode("xENEND!E")]
    assert said == ["x", "", "", "EN", "", "", "END!", ""]
    assert stream.flush() == "E" and not stream.stopped


@given(st.lists(st.sampled_from(["a", "b", TURN, 300, "é"]), max_size=30), st.integers(0, 3))
def test_stop_texts_of_and_with_special_tokens(parts: list[str | int], kind: int) -> None:
    """Special tokens are not shown, but stop texts may have them; texts that they only part are found beside that."""
    tokenizer = byte_tokenizer()
    stop = ["<|turn|>", "a<|turn|>", "<|turn|>b", "b<|turn|><|turn|>a"][kind]
    ids, full = [], ""
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
        full += {TURN: "<|turn|>", 300: ""}.get(part, "") if isinstance(part, int) else part  # 300 is in no vocabulary
    expected = first_whole(full, [stop]).replace("<|turn|>", "")
    assert text_of(TextStream(tokenizer, [stop]), ids) == expected
    shown = full.replace("<|turn|>", "")
    assert text_of(TextStream(tokenizer, ["ab"]), ids) == first_whole(shown, ["ab"])


@pytest.mark.parametrize("special", [True, False])
def test_end_tokens_are_not_shown_whatever_the_vocabulary_says(special: bool) -> None:
    raw = raw_tokenizer()
    raw.add_tokens([AddedToken("<end>", special=special, normalized=False)])
    ends = {raw.token_to_id("<end>")}
    tokenizer = Tokenizer(raw, source="the test", eos_ids=ends, chat_template=TEMPLATE)
    ids = [*tokenizer.encode("ab"), *ends, *tokenizer.encode("c")]
    stream = TextStream(tokenizer, [], frozenset(ends))
    assert text_of(stream, ids) == "ab" and stream.stopped
    ignored = TextStream(tokenizer, [], hidden=frozenset(ends))
    assert text_of(ignored, ids) == "abc" and not ignored.stopped


def test_an_end_token_lets_go_of_what_was_held_back() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["bcd"], frozenset({END}))
    assert text_of(stream, [*tokenizer.encode("abc"), END, *tokenizer.encode("d")]) == "abc"
    assert stream.stopped and not stream.cut


# --------------------------------------------------------------------------------------- odd bytes


def byte_ids(data: bytes) -> list[int]:
    tokenizer = byte_tokenizer()
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    return [by_byte[bytes([byte])] for byte in data]


def test_token_bytes_are_the_bytes() -> None:
    assert sorted(byte_tokenizer().token_bytes(i)[0] for i in range(256)) == list(range(256))
    assert byte_tokenizer().token_bytes(TURN) == b"<|turn|>"
    assert byte_tokenizer().token_bytes(9999) == b""
    text = "naïve €uro 日本 \x00\n"
    assert b"".join(map(byte_tokenizer().token_bytes, byte_tokenizer().encode(text))) == text.encode()


def fallback_tokenizer() -> Tokenizer:
    """Bytes as tokens like <0xE2>, as SentencePiece vocabularies have them."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "?"]
    raw = RawTokenizer(raw_models.WordLevel({name: i for i, name in enumerate(names)}, "?"))
    raw.normalizer = normalizers.Sequence([])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(raw, source="the test")


@given(st.lists(st.sampled_from(["a", "é", "€", "𝄞", b"\xff", b"\xe2", b"\x82", b"\xf0\x9d", "\ufffd"]), max_size=40))
def test_any_bytes_come_as_text_three_tokens_late_at_most(parts: list[str | bytes]) -> None:
    data = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    decoder = byte_tokenizer().stream_decoder()
    said = ""
    for count, token in enumerate(byte_ids(data), 1):
        said += decoder.push(token)
        assert len(said.encode()) >= len(data[: max(count - 3, 0)].decode(errors="ignore").encode())
    said += decoder.flush()
    whole = all(isinstance(part, str) for part in parts)
    assert said == data.decode() if whole else said.replace("\ufffd", "") == plain(data)


def plain(data: bytes) -> str:
    return data.decode(errors="replace").replace("\ufffd", "")


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
def test_a_stream_of_invalid_bytes_is_neither_held_back_nor_quadratic(
    make: "type[Tokenizer]", monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int], *, specials: bool = False) -> str:
        decoded.append(len(ids))
        return decode(self, ids, specials=specials)

    bad = next(i for i in range(256) if tokenizer.token_bytes(i) == b"\xff")
    monkeypatch.setattr(Tokenizer, "decode", counted)
    decoder, said = tokenizer.stream_decoder(), 0
    for count in range(1, 2001):
        said += len(decoder.push(bad))
        assert said >= count - 3
    assert said + len(decoder.flush()) == 2000
    assert sum(decoded) <= 2001 * 10 * 8, "each token decodes a few"
    assert max(decoded) <= 8


def test_valid_text_after_invalid_bytes_is_whole_again() -> None:
    decoder = byte_tokenizer().stream_decoder()
    tokens = byte_ids(b"\xff" * 50 + "日本€".encode() + b"\xe2\x82")
    said = "".join(decoder.push(token) for token in tokens) + decoder.flush()
    assert said.lstrip("\ufffd") == "日本€\ufffd"


def test_fallback_bytes_come_whole() -> None:
    tokenizer = fallback_tokenizer()
    decoder = tokenizer.stream_decoder()
    tokens = [256, *"日€".encode(), 257, *"é".encode(), 0xFF, 257]
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) + decoder.flush() == " a日€bé\ufffdb"
    assert tokenizer.token_bytes(0xE2) == b"\xe2" and tokenizer.token_bytes(256) == b" a"
