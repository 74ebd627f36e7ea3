"""The rules of the house, checked on the tree itself: floors, sizes, names, doors and what the doorplates say."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "minimind"
MODULES = sorted(PACKAGE.rglob("*.py"))

FILE_BUDGET, STAGE_BUDGET, OBJECTIVE_BUDGET, LOOP_BUDGET = 400, 150, 120, 300


def tracked_files() -> list[Path]:
    """Files under version control; without git (a source archive), everything but the usual build folders."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    skipped = {".git", ".venv", "runs", "dist", "build", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.relative_to(ROOT).parts)]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_only_go_down() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_has_a_floor() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    named = {name.strip() for contract in layers for layer in contract["layers"] for name in layer.split("|")}
    rooms = {
        f"minimind.{path.stem if path.is_file() else path.name}"
        for path in PACKAGE.iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert rooms == named


def budget(path: Path) -> int:
    if path.parent.name == "stages":
        return STAGE_BUDGET
    if path.parent.name == "objectives":
        return OBJECTIVE_BUDGET
    if path == PACKAGE / "training" / "loop.py":
        return LOOP_BUDGET
    return FILE_BUDGET


def test_files_keep_their_budget() -> None:
    lengths = {relative(path): (len(path.read_text(encoding="utf-8").splitlines()), budget(path)) for path in MODULES}
    assert {name: sizes for name, sizes in lengths.items() if sizes[0] > sizes[1]} == {}


def test_no_rooms_without_a_subject() -> None:
    bad = [relative(path) for path in MODULES if re.search(r"util|common|helper|misc", path.stem)]
    assert bad == []


def test_init_files_hold_nothing_but_the_names_of_their_room() -> None:
    names_only = {ast.Expr, ast.ImportFrom, ast.Assign}  # a docstring, names, __all__
    rooms = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    kinds = {path: {type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body} for path in rooms}
    assert [relative(path) for path, found in kinds.items() if not found <= names_only] == []
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    kinds = {type(node) for node in body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef}
    assert [node.name for node in body if isinstance(node, ast.FunctionDef)] == ["__getattr__"]


def test_public_names_load() -> None:
    import minimind

    for name in minimind.__all__:
        assert getattr(minimind, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minimind.nothing


def test_transformers_lives_in_interop_only() -> None:
    outside = [path for path in MODULES if "interop" not in path.relative_to(PACKAGE).parts]
    users = [relative(path) for path in outside if any(name.split(".")[0] == "transformers" for name in imports(path))]
    assert users == []


def test_no_postponed_annotations() -> None:
    # jaxtyping and the configuration read annotations at run time; a string would be a different thing to each of them
    assert [relative(path) for path in MODULES if "__future__" in imports(path)] == []


def test_importing_the_package_and_the_commands_needs_no_torch() -> None:
    code = "import sys, minimind, minimind.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_no_path_of_one_machine_in_tracked_files() -> None:
    # put together here, so that this file does not contain what it looks for
    private = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + r"home/\w", "/" + r"Users/\w", "/" + "tmp/bw"]))
    found: list[str] = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found.extend(f"{relative(path)}: {match[0]}" for match in private.finditer(text) if b"\0" not in text.encode())
    assert found == []


def test_no_unfinished_work() -> None:
    unfinished = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|raise NotImplemented" + "Error")
    found = [relative(path) for path in MODULES if unfinished.search(path.read_text(encoding="utf-8"))]
    assert found == []


def config_classes() -> list[type]:
    """Every dataclass in a module that names its class Config or ends a class name with it."""
    found: list[type] = []
    for path in MODULES:
        classes = [n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
        wanted = [name for name in classes if name.endswith("Config")]
        module = import_module(module_name(path)) if wanted else None
        candidates = [typing.cast("type", getattr(module, name)) for name in wanted]
        found.extend(cls for cls in candidates if is_dataclass(cls))
    return found


def test_every_config_field_documents_itself() -> None:
    classes = config_classes()
    assert {"ModelConfig", "OptimConfig", "DataConfig"} <= {cls.__name__ for cls in classes}
    missing: list[str] = []
    for cls in classes:
        path = Path(str(import_module(cls.__module__).__file__))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__).body
        for node, following in zip(body, [*body[1:], None], strict=True):
            is_documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not is_documented:
                missing.append(f"{cls.__name__}.{node.target.id}")
    assert missing == []


def test_every_config_is_frozen_and_made_of_types_that_a_file_can_hold() -> None:
    from minimind.config import from_dict, to_dict
    from minimind.errors import ConfigError

    def complaint(cls: type) -> str:
        try:
            return (
                "" if from_dict(cls, to_dict(cls()), where="defaults") == cls() else "the defaults come back different"
            )
        except ConfigError as error:  # of impossible values only: a stage must be given its data, a loop its steps
            return str(error)

    for cls in config_classes():
        assert cls.__dataclass_params__.frozen, cls.__name__  # type: ignore[attr-defined]
        if any(f.default is MISSING and f.default_factory is MISSING for f in fields(cls)):
            continue
        assert not re.search("expected|unknown key|different", complaint(cls)), (cls.__name__, complaint(cls))


def is_public(node: ast.stmt) -> typing.TypeGuard[ast.FunctionDef | ast.ClassDef]:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def test_everything_public_says_what_it_is() -> None:
    missing: list[str] = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            missing.append(relative(path))
        for node in filter(is_public, tree.body):
            if not ast.get_docstring(node):
                missing.append(f"{relative(path)}: {node.name}")
            is_protocol = isinstance(node, ast.ClassDef) and any(
                ast.unparse(b).startswith("Protocol") for b in node.bases
            )
            if not isinstance(node, ast.ClassDef) or is_protocol:
                continue
            for member in filter(is_public, node.body):
                marks = {ast.unparse(mark).rpartition(".")[2] for mark in member.decorator_list}
                if not marks & {"overload", "override", "setter"} and not ast.get_docstring(member):
                    missing.append(f"{relative(path)}: {node.name}.{member.name}")
    assert missing == []


def readme_commands() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in ("README.md", "README_zh.md", "docs/where-is.md"):
        path = ROOT / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            found.extend(
                (name, match[1].strip()) for match in re.finditer(r"^\s*(?:\$ )?minimind ([^#\n|]*)", text, re.M)
            )
            found.extend((name, match[1].strip()) for match in re.finditer(r"`minimind ([^`\n]*)`", text))
    return found


def test_every_command_in_the_documents_exists() -> None:
    from minimind.cli import COMMANDS

    unknown: list[str] = []
    for name, command in readme_commands():
        words = re.split(r"\s+", command)
        if words[0].startswith("-") or words[0] in {"COMMAND", "..."}:
            continue
        if words[0] not in COMMANDS and " ".join(words[:2]) not in COMMANDS:
            unknown.append(f"{name}: minimind {command}")
    assert unknown == []


def test_every_make_target_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert {"demo", "test", "check", "chat", "help"} <= targets
    for name in ("README.md", "README_zh.md"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        named = set(re.findall(r"(?:^|`)\s*make ([a-z]+)", text, re.M))
        assert named <= targets, name


def test_version_and_pins_agree() -> None:
    import minimind

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == minimind.__version__
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned: dict[str, str] = {}
    for line in pins:
        if line.startswith("#"):
            continue
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"only name==version belongs into constraints.txt: {line}"
        name, _, version = line.partition("==")
        pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    needed = [
        *project["dependencies"],
        *(spec for extra in ("hf", "data", "dev") for spec in project["optional-dependencies"][extra]),
    ]
    for spec in needed:
        name = re.split(r"[\[<>=!~ ]", spec)[0].lower()
        if name != "minimind":
            assert re.sub(r"[-_.]+", "-", name) in pinned, f"{name} has no pin in constraints.txt"
