"""Chat templates against transformers' own rendering of the same template, and what bounds them."""

import json
from typing import Any

import pytest

from taskgraph.errors import WeightsError
from taskgraph.models.text import chat
from taskgraph.models.text.tokenizer import Tokenizer
from tests.model_files import raw_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be "brief" & <kind>; it\'s é 東京.'},
    {"role": "user", "content": "  Hi\n"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": 1, "args": {"b": [1, 2.5], "a": None}}]},
    {"role": "user", "content": "Bye"},
]
TEMPLATES = {
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "generation with controls": "{%- generation -%}\n  {{ messages|length }}\n{%- endgeneration -%} x",
    "tojson": "{{ messages | tojson }}",
    "tojson options": "{{ messages[2] | tojson(indent=2, sort_keys=True) }}{{ messages[0]|tojson(ensure_ascii=True) }}",
    "tojson separators": "{{ messages[2] | tojson(separators=(',', ':')) }}",
    "blocks": "\n  {% if true %}\n    a\n  {% endif %}\nb\n   {# c #}\nd {{ 'e' }}\n\n",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 2 %}{% endfor %}{{ n.k }}",
    "absent": "{% if tools is none %}no tools{% endif %}{{ documents is none }}{{ nothing }}{{ bos_token }}",
    "defined": "{% if tools is defined %}t{% endif %}{% if bos_token is defined %}b{% endif %}{{ eos_token }}",
    "a missing key": "{% for m in messages %}{{ m.content|trim if m.content is defined else '-' }}{% endfor %}",
    "filters": "{{ messages|map(attribute='role')|unique|join(',') }}{{ 'a-b'.split('-')[1] }}{{ '%03d' % 7 }}",
    "range": "{% for i in range(2, 9, 3) %}{{ i }}{% endfor %}{{ add_generation_prompt }}",
    "macro": "{% macro f(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}{{ f('b', y='?') }}",
    "whitespace": "{%- for m in messages %}\n {{- m.role }}\n{%- endfor %}",
}


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(raw_tokenizer(), source="case", eos_ids=[257], chat_template=template)


def rendered(template: str) -> str:
    """What transformers gives."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(), eos_token="<|end|>", chat_template=template)
    return str(made.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_gives_what_transformers_gives(template: str) -> None:
    assert tokenizer(template).conversation(MESSAGES) == rendered(template)


def test_tojson_is_json_dumps() -> None:
    got = tokenizer("{{ messages[0] | tojson }}").conversation(MESSAGES)
    assert got == json.dumps(MESSAGES[0], ensure_ascii=False)


def test_the_time_is_that_of_now() -> None:
    import datetime

    got = tokenizer("{{ strftime_now('%Y') }}").conversation(MESSAGES)
    assert abs(int(got) - datetime.datetime.now().year) <= 1


FAILURES = {
    "raise": ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
    "syntax": ("{% for m in messages %}", "for"),
    "tag": ("{% nonsense %}", "nonsense"),
    "division": ("{{ 1 // 0 }}", "zero"),
    "key": ("{{ messages[0].content.x.y }}", "x"),
    "index": ("{{ messages[99].content }}", "no element"),
    "type": ("{{ 'a' + 1 }}", "str"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "escape": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "import": ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    "mutation": ("{{ messages.append(1) }}", "append"),
    "namespace": ("{% set n = namespace() %}{% set n.__x = 1 %}", "__x"),
    "include": ("{% include 'a' %}", "loader"),
    "deep": ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", ""),
    "long repeat": ("{{ 'a' * 10000000000 }}", "repeats"),
    "long format": ("{{ '%1000000000d' % 1 }}", "width"),
    "huge power": ("{{ 2 ** (2 ** 40) }}", "power"),
    "huge list": ("{{ [1] * 10000000000 }}", "repeats"),
    "long count": ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "counts beyond"),
    "long count at once": ("{% for i in range(10**12) %}{% endfor %}", "counts beyond"),
    "much text": ("{% for i in range(20000) %}{{ 'a' * 10000 }}{% endfor %}", "more than"),
}


@pytest.mark.parametrize(("template", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_template_that_fails_says_so_in_one_line(template: str, reason: str) -> None:
    with pytest.raises(WeightsError, match=r"chat template of case fails") as caught:
        tokenizer(template).conversation(MESSAGES)
    message = str(caught.value)
    assert reason.lower() in message.lower() and len(message.splitlines()) == 1


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer("{{ messages[0].content }}{% for i in range(60000) %}{% endfor %}")
    first = made.chat("a")
    monkeypatch.setattr(chat, "_environment", lambda: 1 / 0)
    assert [made.chat("a") for _ in range(20)] == [first] * 20, "every rendering counts for itself"
