"""Hostile and broken templates: nothing executed, nothing endless, errors in words."""

import time

import pytest

from minimind.errors import CheckpointError, DataError
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render, render_text
from minimind.tokenizer.template import MAX_TEMPLATE_CHARACTERS, CompiledTemplate

MESSAGES = [{"role": "user", "content": "hi"}]


def run(source: str) -> str:
    return CompiledTemplate(source).render({"messages": MESSAGES, "tools": None, "add_generation_prompt": False})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ (messages|attr('__class__')).__base__ }}",
        "{{ self.__init__.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ '%s' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9 ** 9999 }}",
        "{% set ns = namespace(s='a' * 1000) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='a' * 1000) %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ 'a' * 100000 | replace('a', 'b' * 100000) }}",
        "{{ ('b' * 100000).join('a' * 100000) }}",
        "{{ ['b' * 100000] * 100000 | join }}",
        "{{ 'a'.ljust(10**10) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd') }}",
        "{{ lipsum(n=10**9) }}",
    ],
)
def test_hostile_templates_stop(source: str) -> None:
    start = time.thread_time()
    with pytest.raises((CheckpointError, DataError)):
        run(source)
    assert time.thread_time() - start < 3


def test_unreachable_attributes_are_undefined_or_refused() -> None:
    assert run("{{ messages[0].__class__ is defined }}") == "False"
    assert run("{{ raise_exception.__globals__ }}{{ messages.__class__ }}") == ""
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }", r"chat template, line \d+: .*Mend chat_template.jinja"),
        ("{% generation %}x", "chat template, line 1"),
        ("{{ 'x' | nosuchfilter }}", "chat template, line 1.*nosuchfilter"),
        ("x" * (MAX_TEMPLATE_CHARACTERS + 1), "the limit is"),
        ("{{ (" * 5000, "chat template"),
    ],
)
def test_broken_templates_are_named(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CompiledTemplate(source)


def test_a_template_may_refuse_messages_or_fail_on_them(tokenizer: Tokenizer) -> None:
    strict = Tokenizer(tokenizer._json, chat_template="{{ raise_exception('only one turn, please') }}")
    with pytest.raises(DataError, match="refuses these messages: only one turn, please"):
        render(strict, MESSAGES)
    careless = Tokenizer(tokenizer._json, chat_template="{{ messages[7].content + 'x' }}")
    with pytest.raises(DataError, match="failed on these messages: UndefinedError"):
        render(careless, MESSAGES)


def test_what_templates_are_offered() -> None:
    assert run("{{ {'a': '红<'} | tojson }}") == '{"a": "红<"}'
    assert run("{{ [1, 2] | tojson(indent=1) }}") == "[\n 1,\n 2\n]"
    assert run("{{ strftime_now('%Y') | int > 2000 }}") == "True"
    assert run("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a ~ '-' ~ (3 + 4) }}") == "2-7"
    assert run("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert run("{{ ['a', 'b'] | join(', ') }}{{ 'aXb'.replace('X', '-') }}{{ '.'.join(['c', 'd']) }}") == "a, ba-bc.d"
    assert run("{{ messages | map(attribute='content') | join('/') }}") == "hi"
    # A name that every dict has is the dict's own, whatever the keys; any other is the key.
    assert run("{% set d = {'items': 1, 'a': 2} %}{{ d.a }}{{ d.items() | list | length }}{{ d['items'] }}") == "221"
    assert run("{{ '红' + 'x' }}{{ [1] + [2] }}{{ 'a' | tojson(ensure_ascii=True) }}{{ '红' | tojson }}") == (
        '红x[1, 2]"a""红"'
    )


def test_render_uses_the_template_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    mine = Tokenizer(tokenizer._json, chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert render_text(mine, MESSAGES) == "[hi]"
