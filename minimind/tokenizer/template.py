"""The sandbox in which a chat template runs: Jinja without reach, with a budget.

A template comes with a checkpoint, so it may come from a stranger. It can reach no file, no module and no Python object
but the messages; loops, calls, sizes and time are bounded. It offers what Transformers offers to templates (`tojson`,
`raise_exception`, `strftime_now`, `{% generation %}`, loop controls), so that both render the same text.

It knows nothing of tokens: `{% generation %}` puts two mark characters around its text, chosen by the caller.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minimind.errors import CheckpointError, DataError

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_CHARACTERS = 16 * 2**20
"""Of any text a template builds, its result included."""
MAX_STEPS = 100_000
"""Loop rounds and macro calls of one rendering."""
MAX_SECONDS = 10.0
"""Processor time of one rendering."""
MAX_BITS = 4096
"""Of a product or power of integers."""

_FORBIDDEN_FILTERS = (
    "center",
    "filesizeformat",
    "format",
    "indent",
    "pprint",
    "random",
    "urlize",
    "wordwrap",
    "xmlattr",
)
_FORBIDDEN_METHODS = frozenset(("center", "expandtabs", "ljust", "rjust", "translate", "zfill"))
_STATE = "render state"
"""Key of the budget in the context: no identifier, so no template can name it."""


class CompiledTemplate:
    """A chat template ready to render. `has_generation_marks`: it says itself what the assistant wrote."""

    def __init__(self, source: str) -> None:
        """Compile. CheckpointError if the source is no template or too long."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"chat template: {len(source)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}. Use a shorter one."
            )
        environment = _Environment()
        try:
            tree = environment.parse(source)
            self.has_generation_marks = _tracker(environment).seen
            tree = _Instrument(_tracker(environment)).visit(tree)
            code = environment.compile(tree)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"chat template, line {error.lineno}: {error.message}. Mend chat_template.jinja."
            ) from error
        except (RecursionError, ValueError, SyntaxError, TemplateError) as error:
            raise CheckpointError(f"chat template: cannot be compiled: {error}. Mend chat_template.jinja.") from error
        self._template = Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
        """Return the text, with `marks` around each `{% generation %}` block.

        CheckpointError when the template leaves its sandbox or budget, DataError when it refuses the messages or fails
        on them.
        """
        state = _State(marks)
        parts: list[str] = []
        try:
            for part in self._template.generate({**variables, _STATE: state}):
                state.add(len(part))
                parts.append(part)
        except _RefusedError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from None
        except SecurityError as error:
            raise CheckpointError(f"chat template stopped: {error}. Use another chat_template.jinja.") from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise CheckpointError(
                f"chat template stopped: {type(error).__name__}. Use another chat_template.jinja."
            ) from None
        except Exception as error:  # a template can raise anything Python raises
            raise DataError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from error
        return "".join(parts)


@lru_cache(maxsize=32)
def compile_template(source: str) -> CompiledTemplate:
    """Return the compiled template of this source, compiled once."""
    return CompiledTemplate(source)


class _RefusedError(TemplateError):
    """Raised by the template itself, through `raise_exception`."""


class _State:
    """The budget and the marks of one rendering."""

    def __init__(self, marks: tuple[str, str]) -> None:
        self.marks = marks
        self._steps = 0
        self._characters = 0
        self._deadline = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop rounds and macro calls")
        if time.thread_time() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:.0f} s of processor time")

    def add(self, characters: int) -> None:
        self._characters += characters
        _check_size(self._characters)


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise SecurityError(f"more than {MAX_CHARACTERS} characters of text")


class _Tracker(Extension):
    """`{% generation %}`, and the calls that `_Instrument` puts into the template."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration
    seen = False

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.seen = True
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    @pass_context
    def mark(self, context: Context, caller: Callable[[], str]) -> str:
        start, end = _state(context).marks
        return start + caller() + end

    @pass_context
    def step(self, context: Context) -> str:
        _state(context).step()
        return ""

    def concat(self, *values: object) -> str:
        texts = [str(value) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)


def _state(context: Context) -> _State:
    state = context.resolve(_STATE)
    assert isinstance(state, _State)
    return state


def _tracker(environment: "_Environment") -> _Tracker:
    tracker = environment.extensions[_Tracker.identifier]
    assert isinstance(tracker, _Tracker)
    return tracker


class _Instrument(NodeTransformer):
    """Counts every round of a loop and every call of a macro, and bounds `~`."""

    def __init__(self, tracker: _Tracker) -> None:
        self._tracker = tracker

    def _count(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._tracker.call_method("step")).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _count  # noqa: N815 - Jinja's own names

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's own name
        self.generic_visit(node)
        return self._tracker.call_method("concat", node.nodes, lineno=node.lineno)


class _Namespace(Namespace):
    """`namespace()` without underscored attributes, which would reach into Python."""

    def __init__(*args: Any, **values: Any) -> None:  # so that `self=` is an ordinary name
        names = dict(*args[1:], **values)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Tracker, LoopControlExtension],
            cache_size=0,
            optimized=False,  # the optimizer computes constant expressions while compiling, out of reach of the budget
        )
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        for name in _FORBIDDEN_FILTERS:
            self.filters.pop(name, None)
        offered: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _strftime_now, "namespace": _Namespace}
        filters: dict[str, Any] = {"tojson": _tojson, "join": _join, "replace": _replace}
        self.globals.update(offered)
        self.filters.update(filters)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):  # most of all, and much faster
            return cast(dict[str, Any], obj)[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _FORBIDDEN_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        # Jinja hands out `format` and `format_map` of texts through here; a width of a billion is a billion characters.
        if super().wrap_str_format(value) is not None:
            raise SecurityError("format() of a text")
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's own names
        function = getattr(__obj, "__func__", None)  # those of `_Tracker` no template can name: they need no inspection
        if function is _Tracker.step:
            return __obj(__context)
        if function is _Tracker.mark:
            return __obj(__context, kwargs["caller"])
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("join", "replace"):
            return (_join_text if name == "join" else _replace)(owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:
            _check_size(len(left) + len(right))
            return left + right
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("formatting with %")
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        return super().call_binop(context, operator, left, right)


def _check_product(operator: str, left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
            _check_size(len(one) * max(0, other))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(0, right)
        if bits > MAX_BITS:
            raise SecurityError(f"an integer of more than {MAX_BITS} bits")


def _raise(message: object) -> str:
    raise _RefusedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern[:100])


_PLAIN_JSON = json.JSONEncoder(ensure_ascii=False)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and not 0 <= int(indent) <= 16:
        raise SecurityError(f"tojson with indent {indent}")
    if not ensure_ascii and indent is None and separators is None and not sort_keys:
        return _PLAIN_JSON.encode(value)  # json.dumps would make an encoder each time
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _join(values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = [value.get(attribute, "") if isinstance(value, dict) else "" for value in values]
    return _join_text(str(d), values)


def _join_text(separator: str, values: Iterable[Any]) -> str:
    texts: list[str] = []
    total = 0
    for value in values:
        texts.append(str(value))
        total += len(texts[-1]) + len(separator)
        _check_size(total)
    return separator.join(texts)


def _replace(text: Any, old: str, new: str, count: int | None = -1) -> str:
    text = str(text)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _check_size(len(text) + times * (len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)
