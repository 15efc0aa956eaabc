"""Chat templates, rendered as transformers renders them: the same environment, filters and variables, in a sandbox.

A template comes with the weights and is not trusted. What it may use is bounded: the rendered text, what `range` counts
in all, and repeated or formatted strings. Its loops over the messages themselves are not.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from taskgraph.errors import BackendUnavailable, WeightsError
from taskgraph.record import shown

MOST_CHARACTERS = 16 << 20
"""The longest rendered conversation, and the longest string that a template may make by repeating or formatting."""
MOST_COUNTED = 1_000_000
"""The most numbers that all calls of `range` in a rendering give together."""


class ChatTemplate:
    """A compiled template; `source` names in errors what it comes from."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        try:
            import jinja2
        except ImportError as error:
            message = "chat templates need jinja2; install taskgraph-gpu[serve], or encode the prompt as it is."
            raise BackendUnavailable(message) from error
        environment = _environment()
        try:
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> WeightsError:
        reason = shown(error, 300) if str(error) else type(error).__name__
        return WeightsError(f"the chat template of {self._source} fails: {reason}. Encode the prompt as it is.")

    def render(self, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> str:
        """The conversation, ready for the assistant's answer; `tokens` are bos_token and the like.

        What a template raises, of any type, is its failure: a WeightsError.
        """
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, range=_Counter().count,
                **tokens,
            ):  # fmt: skip
                pieces.append(piece)
                length += len(piece)
                if length > MOST_CHARACTERS:
                    raise ValueError(f"it gives more than {MOST_CHARACTERS} characters")
        except Exception as error:  # the template is foreign code
            raise self._failed(error) from error
        return "".join(pieces)


class _Counter:
    """`range` for one rendering."""

    def __init__(self) -> None:
        self.counted = 0

    def count(self, *bounds: Any) -> range:
        counted = range(*bounds)
        self.counted += len(counted)
        if self.counted > MOST_COUNTED:
            raise ValueError(f"it counts beyond {MOST_COUNTED}")
        return counted


@functools.cache
def _environment() -> Any:
    """Jinja's sandbox as transformers.utils.chat_template_utils sets it up, with bounds."""
    from jinja2 import nodes, utils
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said; a rendering shows its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Namespace(utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%", "+", "<<"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

    def fail(message: str) -> None:
        raise TemplateError(message)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": fail, "strftime_now": _now, "namespace": Namespace}
    return made


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise for a product, power or format whose result would be larger than a conversation can be."""
    sized = [v for v in (left, right) if isinstance(v, (str, list, tuple))]
    numbers = [v for v in (left, right) if isinstance(v, int)]
    if operator == "*" and sized and numbers and len(sized[0]) * max(numbers) > MOST_CHARACTERS:
        raise ValueError(f"it repeats a value to more than {MOST_CHARACTERS}")
    if operator == "+" and len(sized) == 2 and sum(map(len, sized)) > MOST_CHARACTERS:
        raise ValueError(f"it joins values to more than {MOST_CHARACTERS}")
    if operator == "%" and isinstance(left, str) and any(len(word) > 7 for word in _digits(left)):
        raise ValueError("it formats a value to a width that no conversation has")
    if operator == "**" and any(abs(n) > 1 << 16 for n in numbers):
        raise ValueError("it raises a number to a power that no conversation has")
    if operator == "*" and len(numbers) == 2 and sum(n.bit_length() for n in numbers) > 1 << 16:
        raise ValueError("it multiplies numbers that no conversation has")


def _digits(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: no HTML escapes, keys in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(pattern: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).astimezone().strftime(pattern)
