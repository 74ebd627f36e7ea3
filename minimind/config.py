"""Frozen dataclasses <-> TOML <-> the command line. It knows no field of any of them, and needs no torch.

A configuration is read in the order defaults, `--config file.toml`, flags. A nested dataclass with a field `preset` and
a classmethod `from_preset(name)` starts from that preset instead of its defaults. Every problem is reported, all at
once: unknown keys with a suggestion, values of the wrong type, and what each dataclass's own `problems()` says.
"""

import difflib
import inspect
import json
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from minimind.errors import ConfigError

C = TypeVar("C")

_CONFIG_HELP = "TOML file with values for the options below; flags override it. May be repeated: the later file wins."


def parse(cls: type[C], argv: Sequence[str], *, command: str, description: str = "") -> C:
    """Return a `cls` from its defaults, the files of `--config` in `argv`, and the flags in `argv`, checked.

    Raises ConfigError with all problems of the files and of the final values. A bad flag exits with status 2, `--help`
    with 0, as tyro does.
    """
    import tyro

    paths, flags = _take_config_files(argv)
    mapping: dict[str, Any] = {}
    for path in paths:
        mapping = _merge(mapping, read_toml(path))
    where = ", ".join(str(path) for path in paths) or "command line"
    builder = _Builder(cls, where, presets=_preset_flags(flags), missing=tyro.MISSING)
    default = builder.build(cls, mapping)
    if builder.preset_problems:
        raise ConfigError(_report(builder.problems))
    wrapper = make_dataclass(
        "Options",
        [
            (
                "config",
                typing.Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=_CONFIG_HELP)],
                field(default=None),
            ),
            ("values", typing.Annotated[cls, tyro.conf.arg(name="", prefix_name=False)], field(default=default)),
        ],
    )
    try:
        parsed = tyro.cli(
            wrapper,
            prog=f"minimind {command}",
            description=_summary(description, cls),
            args=list(flags),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except SystemExit as stop:
        if stop.code and builder.problems:
            print(_report(builder.problems), file=sys.stderr)  # noqa: T201 - next to what tyro has just printed
        raise
    config = cast("C", cast("Any", parsed).values)
    if found := [*builder.problems, *_own_problems(config, "")]:
        raise ConfigError(_report(found))
    return config


def from_dict(cls: type[C], mapping: Mapping[str, Any], *, where: str) -> C:
    """Return a `cls` with the values of `mapping` over its defaults (or preset), checked.

    `where` names the source in the ConfigError that reports every unknown key, wrong type and impossible value at once.
    """
    builder = _Builder(cls, where)
    config = builder.build(cls, mapping)
    found = builder.problems if builder.incomplete else [*builder.problems, *_own_problems(config, "", where)]
    if found:
        raise ConfigError(_report(found))
    return config


def from_toml(cls: type[C], path: Path) -> C:
    """Return the `cls` that the TOML file at `path` describes, checked. Raises ConfigError."""
    return from_dict(cls, read_toml(path), where=str(path))


def to_dict(config: object) -> dict[str, Any]:
    """Return the values of a dataclass as JSON-able ones: dataclasses become dicts, paths strings, tuples lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(cast("Any", config))}


def to_toml(config: object) -> str:
    """Return the TOML text that `from_toml` reads back to an equal dataclass.

    TOML has no None: such a value is left out where None is the default, and written as `"none"` where it is not.
    """
    lines: list[str] = []
    _write_table(cast("Any", config), "", lines)
    return "\n".join(lines).strip() + "\n"


def check(config: object) -> None:
    """Raise one ConfigError with every problem that `config` and the dataclasses inside it report by `problems()`."""
    if found := _own_problems(config, ""):
        raise ConfigError(_report(found))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in the TOML file at `path`. Raises ConfigError when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; check the path given to --config"
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


class _MismatchError(Exception):
    """A value that does not fit its field; the text says what was expected."""


@dataclass
class _Builder:
    """Turns a mapping into (nested) dataclasses, collecting problems instead of stopping at the first."""

    root: type
    where: str
    presets: Mapping[str, str] = field(default_factory=dict[str, str])
    missing: object = None
    problems: list[str] = field(default_factory=list[str])
    preset_problems: bool = False
    incomplete: bool = False

    def build(self, cls: type[C], mapping: Mapping[str, Any], prefix: str = "", base: C | None = None) -> C:
        """Return a `cls` with `mapping` over `base` (None: over its preset or defaults)."""
        mapping = dict(mapping)
        known = {f.name: f for f in _init_fields(cls)}
        for key in [key for key in mapping if key not in known]:
            self.problems.append(self._unknown(f"{prefix}{key}", prefix, list(known)))
            del mapping[key]
        hints = typing.get_type_hints(cls)
        preset = self._preset(cls, mapping, prefix)
        if preset is not None:
            base = preset
            mapping["preset"] = cast("Any", base).preset
        values: dict[str, Any] = {}
        for name, spec in known.items():
            hint = hints[name]
            if is_dataclass(hint) and isinstance(hint, type):
                inner = mapping.get(name, {})
                if not isinstance(inner, Mapping):
                    self.problems.append(f"{self.where}: {prefix}{name}: expected a table, got {_show(inner)}")
                    inner = {}
                start = getattr(base, name) if base is not None else _default(spec)
                values[name] = self.build(hint, cast("Mapping[str, Any]", inner), f"{prefix}{name}.", start)
            elif name in mapping:
                try:
                    values[name] = _convert(mapping[name], hint)
                except _MismatchError as expected:
                    self.problems.append(
                        f"{self.where}: {prefix}{name}: expected {expected}, got {_show(mapping[name])}"
                    )
            if name not in values and base is None and _default(spec) is None and _is_required(spec):
                values[name] = self.missing
                self.incomplete = True
                if self.missing is None and name not in mapping:
                    self.problems.append(f"{self.where}: {prefix}{name}: missing, and it has no default")
        if base is not None:
            return cast("C", replace(cast("Any", base), **values))
        return cls(**values)

    def _preset(self, cls: type[C], mapping: dict[str, Any], prefix: str) -> C | None:
        from_preset = getattr(cls, "from_preset", None)
        name = self.presets.get(f"{prefix}preset") or mapping.get("preset")
        if from_preset is None or not name:
            return None
        mapping.pop("preset", None)
        try:
            found = from_preset(name)
        except ConfigError as error:
            source = "command line" if f"{prefix}preset" in self.presets else self.where
            self.problems.append(f"{source}: {prefix}preset: {error}")
            self.preset_problems = True
            return None
        return replace(found, preset=name) if "preset" in {f.name for f in fields(found)} else found

    def _unknown(self, key: str, prefix: str, siblings: Sequence[str]) -> str:
        leaf = key.removeprefix(prefix)
        places = {dotted.rpartition(".")[2]: dotted for dotted in reversed(_dotted_keys(self.root, ""))}
        places.update({name: f"{prefix}{name}" for name in siblings})
        near = difflib.get_close_matches(leaf, siblings, n=1) or difflib.get_close_matches(leaf, places, n=1)
        table = f"[{prefix[:-1]}]" if prefix else "the top level"
        hint = f"did you mean {places[near[0]]}?" if near else f"the keys of {table} are {', '.join(siblings)}"
        return f"{self.where}: unknown key {key}; {hint}"


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (value == "none" and type(None) in args):
            return None if type(None) in args else _fail(hint)
        for option in args:
            try:
                return _convert(value, option)
            except _MismatchError:
                continue
        return _fail(hint)
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in args) else _fail(hint)
    if origin in (tuple, list) or hint in (tuple, list):
        return _convert_sequence(value, hint, origin or hint, args)
    if origin is dict or hint is dict:
        return cast("object", value) if isinstance(value, dict) else _fail(hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    return _fail(hint)


def _convert_sequence(value: Any, hint: Any, kind: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _fail(hint)
    items = cast("Sequence[Any]", value)
    if kind is list or not args or args[-1] is Ellipsis:
        inner = args[0] if args else Any
        return kind(_convert(item, inner) for item in items)
    if len(items) != len(args):
        return _fail(hint)
    return tuple(_convert(item, inner) for item, inner in zip(items, args, strict=True))


def _fail(hint: Any) -> Any:
    raise _MismatchError(_describe(hint))


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (tuple, list):
        if origin is tuple and args[-1] is not Ellipsis:
            return f"a list of {len(args)} values ({', '.join(_describe(arg) for arg in args)})"
        return f"a list, each item {_describe(args[0])}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a path (string)"}
    return words.get(hint, "nothing" if hint is type(None) else str(getattr(hint, "__name__", hint)))


def _show(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "list", dict: "table"}
    return f"{value!r} ({kinds.get(type(value), type(value).__name__)})"


def _take_config_files(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    paths: list[Path] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word.startswith("--config="):
            paths.append(Path(word.removeprefix("--config=")))
        elif word == "--config":
            value = next(words, None)
            if value is None:
                rest.append(word)
            else:
                paths.append(Path(value))
        else:
            rest.append(word)
    return paths, rest


def _preset_flags(argv: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, word in enumerate(argv):
        match = re.fullmatch(r"--((?:[\w-]+\.)*preset)(?:=(.*))?", word)
        if match:
            following = argv[index + 1] if index + 1 < len(argv) else ""
            found[match[1].replace("-", "_")] = match[2] if match[2] is not None else following
    return found


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(cast("dict[str, Any]", below), cast("dict[str, Any]", value)) if both else value
    return merged


def _own_problems(config: object, prefix: str, where: str = "") -> list[str]:
    source = f"{where}: " if where else ""
    found: list[str] = []
    names = [f.name for f in fields(cast("Any", config))]
    problems: list[str] = cast("Any", config).problems() if hasattr(config, "problems") else []
    for problem in problems:
        starts_with_field = any(re.match(rf"{re.escape(name)}\b", problem) for name in names)
        place = prefix if starts_with_field else f"{prefix[:-1]}: " if prefix else ""
        found.append(f"{source}{problem if problem.startswith(prefix) else place + problem}")
    for name in names:
        value = getattr(config, name)
        if is_dataclass(value) and not isinstance(value, type):
            found.extend(_own_problems(value, f"{prefix}{name}.", where))
    return found


def _report(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _dotted_keys(cls: type, prefix: str) -> list[str]:
    keys: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(f"{prefix}{name}")
        if isinstance(hint, type) and is_dataclass(hint):
            keys.extend(_dotted_keys(hint, f"{prefix}{name}."))
    return keys


def _init_fields(cls: type) -> list[Field[Any]]:
    return [f for f in fields(cast("Any", cls)) if f.init]


def _is_required(spec: Field[Any]) -> bool:
    return spec.default is MISSING and spec.default_factory is MISSING


def _default(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return None if spec.default is MISSING else spec.default


def _summary(text: str, cls: type) -> str:
    """Return the first paragraph of `text` (or of `cls`'s docstring) in lines of at most 80 columns.

    Each begins with a space: tyro joins lines that begin with a letter, and wraps none.
    """
    text = text or inspect.getdoc(cls) or ""
    text = "" if text.startswith(f"{cls.__name__}(") else text.partition("\n\n")[0]
    return textwrap.indent(textwrap.fill(text, 79, break_on_hyphens=False), " ")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast("dict[str, Any]", value).items()}
    return value


def _write_table(config: Any, prefix: str, lines: list[str]) -> None:
    nested: list[tuple[str, Any]] = []
    for spec in fields(config):
        value = getattr(config, spec.name)
        if is_dataclass(value):
            nested.append((spec.name, value))
        elif value is not None:
            lines.append(f"{spec.name} = {_toml_value(_plain(value))}")
        elif _is_required(spec) or _default(spec) is not None:
            lines.append(f'{spec.name} = "none"')
    for name, value in nested:
        lines.extend(["", f"[{prefix}{name}]"])
        _write_table(value, f"{prefix}{name}.", lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):  # JSON's escapes are TOML's, except for this one control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in cast("list[Any]", value)) + "]"
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in items) + "}"
    raise TypeError(f"TOML cannot hold {value!r}")
