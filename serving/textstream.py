"""The text of an answer as its tokens come, up to the first of its stop texts."""

from collections.abc import Sequence, Set

from taskgraph.models.text.tokenizer import Tokenizer


class _Finder:
    """Finds texts in a stream, letter by letter (Knuth, Morris and Pratt 1977): a letter costs the same however long
    the texts are. The text that is whole first is found, and of several then the one that began first."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [(text, _borders(text)) for text in texts]
        self._matched = [0] * len(texts)
        self._seen = 0

    @property
    def open(self) -> int:
        """Letters at the end of the stream that may be the beginning of a text."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> int | None:
        """Where in the stream the first text begins that is now whole; None while there is none."""
        for letter in text if self._texts else "":
            self._seen += 1
            longest = 0
            for i, (wanted, borders) in enumerate(self._texts):
                at = self._matched[i]
                while at and wanted[at] != letter:
                    at = borders[at - 1]
                at += wanted[at] == letter
                if at == len(wanted):
                    longest = max(longest, at)
                    at = borders[at - 1]
                self._matched[i] = at
            if longest:
                return self._seen - longest
        return None


def _borders(text: str) -> list[int]:
    """For each beginning of the text the length of its longest end that is also a beginning."""
    borders, at = [0] * len(text), 0
    for i in range(1, len(text)):
        while at and text[at] != text[i]:
            at = borders[at - 1]
        at += text[at] == text[i]
        borders[i] = at
    return borders


class TextStream:
    """The text of an answer as its tokens come; it ends before the first of the stop texts, and at a token of `ends`.

    Tokens of `hidden` are never shown, whatever the vocabulary says of them. A stop text may have special tokens in
    it, which the text itself does not show.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], ends: Set[int] = frozenset(), hidden: Set[int] = frozenset()
    ) -> None:
        self._decoder, self._ends, self._hidden = tokenizer.stream_decoder(), ends, hidden | ends
        self._special = {index: text for text, index in tokenizer.special_texts.items()}
        mixed = [stop for stop in stops if any(text in stop for text in self._special.values())]
        self._shown_finder, self._full_finder = _Finder(stops), _Finder(mixed)
        self._follows_specials = bool(mixed)
        self._unshown: list[tuple[int, int]] = []  # special tokens: where in the full text, and how long
        self._full = 0
        self._held = ""
        self.decoded = self.released = 0
        self.stopped = self.cut = False

    @property
    def pending(self) -> int:
        """How many of the last tokens may be the beginning of a character."""
        return self._decoder.pending

    def push(self, token: int) -> str:
        """The text that is certain now; what may be the beginning of a stop text is held back."""
        if self.stopped:
            return ""
        if token in self._ends:
            self.stopped = True
            return self._take(self._decoder.flush(), final=True)
        if self._follows_specials and token in self._special:
            return self._pass(self._special[token])
        return "" if token in self._hidden else self._take(self._decoder.push(token), final=False)

    def flush(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self._take(self._decoder.flush(), final=True)

    def _take(self, new: str, *, final: bool) -> str:
        self._held += new
        self.decoded += len(new)
        self._full += len(new)
        found = self._shown_finder.feed(new)
        if self._follows_specials and (full := self._full_finder.feed(new)) is not None:
            shown = self._shown_before(full)
            found = shown if found is None else min(found, shown)
        return self._release(found, final=final)

    def _pass(self, special: str) -> str:
        """A special token, of which nothing is shown."""
        text = self._decoder.flush()
        before = self._take(text, final=False) if text else ""
        if self.stopped:
            return before
        self._unshown.append((self._full, len(special)))
        self._full += len(special)
        full = self._full_finder.feed(special)
        return before + self._release(None if full is None else self._shown_before(full), final=False)

    def _shown_before(self, full: int) -> int:
        """How much is shown of the first letters of the full text."""
        return full - sum(min(length, max(full - at, 0)) for at, length in self._unshown)

    def _release(self, found: int | None, *, final: bool) -> str:
        """The text up to `found`, where a stop text begins, or up to what may be one."""
        if found is not None:
            until, self.stopped, self.cut = found, True, True
        elif final:
            until = self.decoded
        else:
            until = self.decoded - self._shown_finder.open
            if self._follows_specials:
                until = min(until, self._shown_before(self._full - self._full_finder.open))
        count = max(until - self.released, 0)
        text, self._held = self._held[:count], self._held[count:]
        self.released += count
        return text
