"""Tools: schemas from functions, calls that go wrong in every way, and a process that protects training from them."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from minimind.errors import ConfigError, DataError
from minimind.rl.sandbox import Limits, Sandbox, SandboxFault
from minimind.rl.tools import MAX_HANGS, MAX_REPLY, Toolbox, problem_with, schema_of
from minimind.world.tools import TOOLS

WORLD = [tool.schema for tool in TOOLS.values()]

OWN = '''
import os
import socket
import time

calls = []

def price(item: str, count: int = 1) -> dict:
    """Return the price of some items.

    Args:
        item: Its name.
    """
    calls.append(item)
    print("this goes to stderr")
    return {"item": item, "price": 3 * count, "asked": len(calls)}

def hang() -> str:
    while True:
        time.sleep(1)

def fail(why: str) -> str:
    raise ValueError(why)

def leave() -> str:
    raise SystemExit(3)

def die() -> str:
    os._exit(7)

def eat() -> str:
    return str(len(bytearray(1 << 34)))

def connect(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        return "connected"

def key() -> str:
    return os.environ.get("SECRET_KEY", "no key")

def write(count: int) -> str:
    with open("file", "wb") as file:
        file.write(b"x" * count)
    return "written"

def talk() -> str:
    return "x" * 5000

def _hidden() -> str:
    return "hidden"
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolbox]:
    file = tmp_path_factory.mktemp("tools") / "own.py"
    file.write_text(OWN)
    os.environ["SECRET_KEY"] = "secret"
    box = Toolbox(file, seconds=2.0, limits=Limits(file_bytes=1000))
    del os.environ["SECRET_KEY"]
    yield box
    box.close()


def ask(box: Toolbox, name: str, **arguments: Any) -> tuple[str, bool]:
    reply = box.run({"name": name, "arguments": arguments}, list(box.schemas.values()))
    return reply.text, reply.is_error


# -- schemas -----------------------------------------------------------------------------------------------------------


def book(
    room: str, nights: int, price: float = 0.0, *, with_bath: bool = False, who: list[str] | None = None,
    kind: Literal["single", "double"] = "single", more: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """Book a room
    in the inn.

    It is paid at once.

    Args:
        room: Its name: any.
        kind (str): How large it is.

    Returns:
        nights: how many were booked.
    """
    return room


def test_a_function_is_its_schema() -> None:
    assert schema_of(book) == {
        "type": "function",
        "function": {
            "name": "book",
            "description": "Book a room in the inn.",
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"type": "string", "description": "Its name: any."},
                    "nights": {"type": "integer"},
                    "price": {"type": "number"},
                    "with_bath": {"type": "boolean"},
                    "who": {"type": ["array", "null"]},
                    "kind": {"type": "string", "enum": ["single", "double"], "description": "How large it is."},
                    "more": {"type": ["object", "null"]},
                },
                "required": ["room", "nights"],
            },
        },
    }


def test_functions_without_a_schema_are_refused() -> None:
    def no_hint(a) -> str:  # pyright: ignore[reportMissingParameterType]
        return str(a)

    def odd(a: Path) -> str:
        return str(a)

    def many(*a: str) -> str:
        return str(a)

    for function, what in (
        (no_hint, r"no_hint\(a\): has no type hint"),
        (odd, "JSON has no type"),
        (many, "have names"),
    ):
        with pytest.raises(ConfigError, match=what):
            schema_of(function)


WRONG: dict[str, tuple[Any, str]] = {
    "no object": ([1], "must be an object, not list"),
    "missing": ({"room": "red"}, "'nights' is missing"),
    "unknown": ({"room": "red", "nights": 1, "days": 2}, "unknown argument 'days'; expected room, nights"),
    "type": ({"room": 5, "nights": 1}, "'room' must be of type string, not int"),
    "bool is no int": ({"room": "red", "nights": True}, "'nights' must be of type integer, not bool"),
    "float is no int": ({"room": "red", "nights": 1.0}, "'nights' must be of type integer, not float"),
    "enum": ({"room": "red", "nights": 1, "kind": "huge"}, "'kind' must be one of 'single', 'double'"),
    "union": ({"room": "red", "nights": 1, "who": "me"}, "'who' must be of type array or null, not str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, what = WRONG[case]
    assert what in problem_with(arguments, schema_of(book)["function"]["parameters"])


def test_right_arguments_are_right() -> None:
    schema = schema_of(book)["function"]["parameters"]
    for arguments in (
        {"room": "red", "nights": 1},
        {"room": "", "nights": -1, "price": 2, "who": None, "kind": "double"},
    ):
        assert problem_with(arguments, schema) == ""
    items = {"properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    assert problem_with({"a": [1, 2]}, items) == ""
    assert problem_with({"a": [1, "2"]}, items) == "'a' holds an item that must be of type integer, not str"


# -- the world's tools -------------------------------------------------------------------------------------------------


def test_the_worlds_tools_are_run_and_nothing_is_evaluated() -> None:
    box = Toolbox()
    assert ask(box, "calculator", expression="12 * 3") == ("36", False)
    text, is_error = ask(box, "calculator", expression="__import__('os').getcwd()")
    assert is_error
    assert text.startswith("error: calculator: cannot read")
    assert ask(box, "clock", minutes="5") == ("error: clock: 'minutes' must be of type integer, not str", True)
    assert box.run({"name": "clock", "arguments": {"minutes": 0}}, WORLD[:1]).is_error  # it is not offered here
    assert ask(box, "rm", path="/")[0] == "error: unknown tool 'rm'; there are calculator, clock, weather"


def test_a_prompt_that_offers_what_nobody_runs_is_refused() -> None:
    box = Toolbox()
    box.check(WORLD, "rows.jsonl:1")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: tools: nobody runs 'wether'; did you mean 'weather'"):
        box.check([{"type": "function", "function": {"name": "wether"}}], "rows.jsonl:2")


# -- a user's own ------------------------------------------------------------------------------------------------------


def test_own_tools_are_run_in_one_process_that_stays(own: Toolbox) -> None:
    assert [schema["function"]["name"] for schema in own.own][:2] == ["price", "hang"]
    assert "_hidden" not in own.schemas
    assert "calculator" in own.schemas
    first, second = ask(own, "price", item="apple"), ask(own, "price", item="苹果", count=2)
    assert first == ('{"item": "apple", "price": 3, "asked": 1}', False)
    assert second == ('{"item": "苹果", "price": 6, "asked": 2}', False)


def test_whatever_a_tool_does_is_a_reply(own: Toolbox) -> None:
    assert ask(own, "fail", why="no reason") == ("error: fail: ValueError: no reason", True)
    assert ask(own, "leave") == ("error: leave: SystemExit: 3", True)
    assert ask(own, "die") == ("error: die: its process ended with code 7", True)
    assert ask(own, "eat") == ("error: eat: MemoryError: ", True)
    assert "error: write: OSError" in ask(own, "write", count=2000)[0]
    assert ask(own, "write", count=500) == ("written", False)
    text, _ = ask(own, "talk")
    assert text.startswith("x" * MAX_REPLY + " ... (3000 characters")
    assert ask(own, "key") == ("no key", False)
    assert ask(own, "price", item="pear")[1] is False  # it was started again


def test_a_tool_that_hangs_is_killed_and_after_three_times_not_asked(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    box = Toolbox(file, seconds=0.2)
    start = time.monotonic()
    for _ in range(MAX_HANGS):
        assert ask(box, "hang") == ("error: hang: no reply within 0.2 s", True)
    before = time.monotonic()
    assert ask(box, "hang") == (f"error: hang: not asked again, for it gave no reply {MAX_HANGS} times", True)
    assert time.monotonic() - before < 0.1
    assert before - start < 60
    box.forget_hangs()
    assert ask(box, "hang")[0].endswith("within 0.2 s")
    box.close()


def test_there_is_no_network_where_the_system_permits(tmp_path: Path, own: Toolbox) -> None:
    with Sandboxed(own) as has_network, socket.create_server(("127.0.0.1", 0)) as server:
        text, is_error = ask(own, "connect", port=server.getsockname()[1])
    if has_network:
        pytest.skip("this system does not permit a network of one's own")
    assert is_error
    assert "OSError" in text or "Error" in text


class Sandboxed:
    """Whether the process of a toolbox has network."""

    def __init__(self, box: Toolbox) -> None:
        self.box = box

    def __enter__(self) -> bool:
        assert self.box._sandbox
        return self.box._sandbox.start()["has_network"]

    def __exit__(self, *_: object) -> None: ...


BAD_FILES = {
    "nothing": ("x = 1\n", "it has no function"),
    "no hint": ("def f(a):\n    return a\n", r"f\(a\): has no type hint"),
    "broken": ("def f(:\n", "SyntaxError"),
    "raising": ("raise RuntimeError('no')\n", "RuntimeError: no"),
    "leaving": ("import sys\nsys.exit(1)\n", "SystemExit: 1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_at_once(case: str, tmp_path: Path) -> None:
    text, what = BAD_FILES[case]
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match=what):
        Toolbox(tmp_path / "own.py")
    with pytest.raises(ConfigError, match=r"there is no file .*other\.py; .* has own\.py"):
        Toolbox(tmp_path / "other.py")


def test_a_file_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "near.py").write_text("WORD = 'near'\n")
    (tmp_path / "own.py").write_text("import near\n\ndef word() -> str:\n    return near.WORD\n")
    box = Toolbox(tmp_path / "own.py")
    assert ask(box, "word") == ("near", False)
    box.close()


def test_what_a_sandbox_starts_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import os, subprocess, sys, time\n"
        "def spawn() -> int:\n"
        "    return subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid\n"
    )
    sandbox = Sandbox("minimind.rl.tools:load", str(file))
    child = int(sandbox.ask({"name": "spawn", "arguments": {}}, 10)["value"])
    os.kill(child, 0)  # it is there
    sandbox.close()
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("it is still running")
    (tmp_path / "own.py").write_text("raise ValueError\n")
    with pytest.raises(SandboxFault, match="ValueError"):
        sandbox.ask({"name": "spawn", "arguments": {}}, 10)
