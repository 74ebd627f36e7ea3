"""The tools that an agent may call: the world's, which are pure functions, and a user's own, run in a sandbox.

A user's file of functions with type hints and docstrings is enough:

    def price(item: str, count: int = 1) -> float:
        '''Return the price of some items.

        Args:
            item: Its name, for example "apple".
        '''

Nothing that a model writes is evaluated: arguments are JSON, checked against the schema. Whatever is wrong with a call
(no JSON, no such tool, wrong arguments, a tool that raises, hangs or dies) becomes a reply that says so, for the model
to read, and is counted. It knows neither conversations nor rewards.
"""

import difflib
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast

from minimind.errors import ConfigError, DataError
from minimind.rl.sandbox import Limits, Sandbox, SandboxFault
from minimind.runtime.log import get_logger
from minimind.world import tools as world

MAX_REPLY = 2000
"""Characters of a reply that the model is shown."""
MAX_HANGS = 3
"""After so many hangs one after the other a tool is not asked again until `forget_hangs`."""

Schema = dict[str, Any]
"""A tool as a model sees it, in OpenAI's form: `{"type": "function", "function": {"name", "parameters", ...}}`."""

_log = get_logger("tools")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a call."""

    text: str
    """As the model is shown it; an error begins with `error: `."""
    is_error: bool = False


UNREADABLE = Reply(
    'error: the call could not be read; write <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>', True
)
"""The reply to a call whose text is no JSON object with a name and arguments."""


class Toolbox:
    """Runs calls. Close it: a user's tools are a process."""

    def __init__(self, file: Path | None = None, *, seconds: float = 5.0, limits: Limits | None = None) -> None:
        """Take the world's tools and those in `file`, which win over the world's of the same name.

        `seconds`: for each call of a user's tool. ConfigError at once when the file cannot be imported, offers no
        function, or has one whose arguments cannot be described.
        """
        self._file, self._seconds = file, seconds
        self._sandbox: Sandbox | None = None
        self._hangs: Counter[str] = Counter()
        self.own: list[Schema] = []
        """Schemas of the user's tools."""
        if file is not None:
            self._sandbox = Sandbox("minimind.rl.tools:load", str(Path(file).resolve()), limits=limits)
            self.own = self._start(file)
        self.schemas: dict[str, Schema] = {name: tool.schema for name, tool in world.TOOLS.items()}
        """Every tool that can be run, by name."""
        self.schemas |= {schema["function"]["name"]: schema for schema in self.own}

    def run(self, call: Mapping[str, Any], offered: Sequence[Schema]) -> Reply:
        """Return the reply to a call `{"name", "arguments"}`; `offered` are the tools of its conversation."""
        name, arguments = str(call["name"]), call["arguments"]
        names = [schema["function"]["name"] for schema in offered]
        if name not in names:
            return _error(f"unknown tool {name!r:.60}; there are {', '.join(names)}")
        if name not in self.schemas:
            return _error(f"{name}: it is offered, but nobody runs it here")
        problem = problem_with(arguments, self.schemas[name]["function"].get("parameters") or {})
        if problem:
            return _error(f"{name}: {problem}")
        if not any(schema["function"]["name"] == name for schema in self.own):
            text = world.run_tool(name, arguments)
            return Reply(_cut(text), text.startswith("error: "))
        return self._run_own(name, arguments)

    def check(self, offered: Sequence[Schema], place: str) -> None:
        """Raise DataError when a prompt offers a tool that nobody runs."""
        for schema in offered:
            name = schema["function"]["name"]
            if name not in self.schemas:
                near = difflib.get_close_matches(name, self.schemas, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.schemas)}"
                raise DataError(f"{place}: tools: nobody runs {name!r}; {hint} (--tools FILE.py adds your own)")

    def forget_hangs(self) -> None:
        """Ask tools that hung again."""
        self._hangs.clear()

    def close(self) -> None:
        """End the process of the user's tools. A later call would start it again."""
        if self._sandbox:
            self._sandbox.close()

    def _start(self, file: Path) -> list[Schema]:
        assert self._sandbox
        if not file.is_file():
            near = sorted(path.name for path in file.parent.glob("*.py")) if file.parent.is_dir() else []
            raise ConfigError(f"tools: there is no file {file}; {file.parent} has {', '.join(near) or 'no .py file'}")
        try:
            known = self._sandbox.start()
        except SandboxFault as fault:
            raise ConfigError(f"tools: {file}: its import failed: {fault}") from None
        if "problem" in known:
            raise ConfigError(f"tools: {file}: {known['problem']}")
        if known["has_network"]:
            _log.warning("tools: this system does not let them be cut off the network; they are limited otherwise")
        return cast(list[Schema], known["schemas"])

    def _run_own(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        assert self._sandbox
        if self._hangs[name] >= MAX_HANGS:
            return _error(f"{name}: not asked again, for it gave no reply {MAX_HANGS} times")
        try:
            found = self._sandbox.ask({"name": name, "arguments": arguments}, self._seconds)
        except SandboxFault as fault:
            if fault.kind == "hung":
                self._hangs[name] += 1
                if self._hangs[name] == MAX_HANGS:
                    _log.warning("tool %s gave no reply within %g s %d times", name, self._seconds, MAX_HANGS)
            return _error(f"{name}: {fault}")
        self._hangs[name] = 0
        return Reply(_cut(found["value"])) if "value" in found else _error(f"{name}: {found['problem']}")


def _error(what: str) -> Reply:
    return Reply(_cut(f"error: {what}"), is_error=True)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_REPLY else f"{text[:MAX_REPLY]} ... ({len(text) - MAX_REPLY} characters left out)"


_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip


def problem_with(arguments: Any, schema: Mapping[str, Any]) -> str:
    """Return what is wrong with the arguments of a call by a JSON schema of an object; "" when nothing is."""
    if not isinstance(arguments, Mapping):
        return f"the arguments must be an object, not {type(arguments).__name__}"
    given = cast(Mapping[str, Any], arguments)
    known: Mapping[str, Any] = schema.get("properties") or {}
    for name in schema.get("required") or ():
        if name not in given:
            return f"the argument {name!r} is missing"
    for name, value in given.items():
        if name not in known:
            return f"unknown argument {name!r:.60}; expected {', '.join(known) or 'none'}"
        if problem := _mismatch(value, known[name]):
            return f"{name!r} {problem}"
    return ""


def _mismatch(value: Any, schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    kinds = [kind] if isinstance(kind, str) else kind or []
    if kinds and not any(_is_of(value, one) for one in kinds):
        return f"must be of type {' or '.join(kinds)}, not {type(value).__name__}"
    if "enum" in schema and value not in schema["enum"]:
        return f"must be one of {', '.join(map(repr, schema['enum']))}"
    if isinstance(value, list) and "items" in schema:
        problems = (_mismatch(item, schema["items"]) for item in cast(list[Any], value))
        return next((f"holds an item that {problem}" for problem in problems if problem), "")
    return ""


def _is_of(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if isinstance(value, bool) and kind in ("integer", "number"):  # a bool is an int to Python only
        return False
    return kind not in _KINDS or isinstance(value, _KINDS[kind])


# -- a user's file, seen from inside its process -----------------------------------------------------------------------


def load(path: str) -> tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]:
    """Return ({"schemas"} of the functions in a file, what runs one call of them). Any error is for people."""
    functions = _functions_of(Path(path))
    if not functions:
        raise ConfigError("it has no function whose name begins with a letter")

    def run(call: dict[str, Any]) -> dict[str, Any]:
        try:
            value = functions[call["name"]](**call["arguments"])
            return {"value": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}
        except BaseException as error:  # noqa: BLE001 - whatever it is, SystemExit too, the model is told
            return {"problem": f"{type(error).__name__}: {error}"}

    return {"schemas": [schema_of(function) for function in functions.values()]}, run


def _functions_of(path: Path) -> dict[str, Callable[..., Any]]:
    """Return the public functions that are defined in the file."""
    spec = importlib.util.spec_from_file_location(f"user_tools_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError("it cannot be imported")
    sys.path.insert(0, str(path.parent))  # so that it can import its neighbours
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == spec.name and not name.startswith("_")
    }


def schema_of(function: Callable[..., Any]) -> Schema:
    """Return the schema of a function: types from its hints, texts from its docstring (Google style `Args:`).

    ConfigError for an argument without a hint, or with one that JSON has no type for.
    """
    text = inspect.getdoc(function) or ""
    listed = text.partition("Args:")[2].partition("\n\n")[0]
    told = dict(re.findall(r"^\s+\*{0,2}(\w+)(?: ?\([^)]*\))?: +(.+)$", listed, re.MULTILINE))
    hints = typing.get_type_hints(function)
    properties: dict[str, dict[str, Any]] = {}
    required: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        where = f"{function.__name__}({name})"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"{where}: a tool's arguments have names; use no *args, **kwargs or positional-only ones")
        if name not in hints:
            raise ConfigError(f"{where}: has no type hint; write for example {name}: str")
        properties[name] = _schema_of_hint(hints[name], where) | ({"description": told[name]} if name in told else {})
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"description": " ".join(text.partition("\n\n")[0].split())} if text else {}
    return {"type": "function", "function": {"name": function.__name__, **described, "parameters": parameters}}


_NAMES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object", type(None): "null",
}  # fmt: skip


def _schema_of_hint(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        names = sorted({_NAMES.get(type(value), "string") for value in inner})
        return {"type": names[0] if len(names) == 1 else names, "enum": list(inner)}
    if origin in (Union, types.UnionType):
        kinds = [_schema_of_hint(one, where)["type"] for one in inner]
        return {"type": kinds}
    if origin is list and inner:
        return {"type": "array", "items": _schema_of_hint(inner[0], where)}
    if hint is Any:
        return {}
    if (origin or hint) not in _NAMES:
        raise ConfigError(f"{where}: JSON has no type for {hint}; use str, int, float, bool, list, dict or Literal")
    return {"type": _NAMES[origin or hint]}
