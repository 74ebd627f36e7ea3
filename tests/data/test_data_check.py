"""`minimind data check`: all problems with their places, counts that add up, exit codes, 80 columns."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minimind.cli import main
from minimind.data.check import detect
from minimind.errors import ConfigError

from .conftest import turns
from .test_jsonl import MALFORMED

WriteRows = Callable[..., Path]


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    code = main(["data", "check", *map(str, words)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out.splitlines()


def test_a_good_file(write_rows: WriteRows, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows([turns("the dog", "the cat"), turns("a", "b", "c", "d", system="s"), {"text": "the ball"}])
    code, lines = check(capsys, path)
    assert code == 0
    assert lines == [
        f"{path}: 3 rows, no problems",
        "  kinds       2 conversation, 1 pretrain",
        "  turns       3 user, 3 assistant, 1 system",
        "  characters  27 (9 a row, longest 14)",
        "  rows        1 with a system turn",
    ]


def test_every_problem_is_told_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    readable = {name: line for name, (line, _) in MALFORMED.items() if name != "too long"}
    bad_row = json.dumps(
        {"messages": [{"role": "usr", "content": 1}, {"role": "user", "content": 1}], "tools": 3}
    ).encode()
    path.write_bytes(b"\n".join([*readable.values(), bad_row, b'{"text": "good"}']))
    code, lines = check(capsys, path, "--limit", "0")
    assert code == 3
    places = [line.split(": ")[0] for line in lines[: len(readable)]]
    assert places == [f"{path}:{number}" for number in range(1, len(readable) + 1)]
    number = len(readable) + 1
    assert lines[len(readable) : -4] == [
        f'{path}:{number}: messages[0].role: "usr" is unknown, expected system, user, assistant or tool',
        f"{path}:{number}: messages[1].content: is the number 1, expected a string",
        f"{path}:{number}: tools: is the number 3, expected a list of tools",
    ]
    assert lines[-4] == f"{path}: {number + 1} rows, {number + 2} problems"
    assert lines[-1] == "1 of 1 file not usable as it is"
    code, lines = check(capsys, path, "--limit", "2")
    assert code == 3
    assert lines[2] == f"{path}: {number} more problems (--limit 0 shows all)"


def test_exit_codes(write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, empty = write_rows([{"text": "a"}]), write_rows([], "empty.jsonl")
    assert check(capsys, good)[0] == 0
    assert check(capsys, good, empty) == (
        3,
        [*check(capsys, good)[1], f"{empty}: no rows", "1 of 2 files not usable as it is"],
    )
    assert main(["data", "check", str(tmp_path / "rows.json")]) == 2
    assert "no such file; did you mean" in capsys.readouterr().err
    assert main(["data", "check"]) == ConfigError.exit_code
    assert "name at least one" in capsys.readouterr().err


def test_a_wanted_kind_is_demanded(write_rows: WriteRows, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows([{"text": "a"}])
    code, lines = check(capsys, path, "--kind", "conversation")
    assert code == 3
    assert lines[0].startswith(f"{path}:1: row: has no conversation (its fields are text)")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "pretrain"),
        (turns("a", "b"), "conversation"),
        ({"instruction": "a", "output": "b"}, "conversation"),
        ({"prompt": "a", "response": "b"}, "conversation"),
        ({"chosen": [], "rejected": []}, "preference"),
        ({**turns("a", "b"), "label": True}, "preference"),
        (turns("a", ""), "prompt"),
        ({"prompt": "a", "answer": "b"}, "prompt"),
        ({"messages": [], "answer": "b"}, "prompt"),
        ({**turns("a", ""), "tools": [], "gt": []}, "agent"),
        ({"query": "a"}, ""),
    ],
)
def test_kinds_are_told_by_the_fields(row: dict[str, Any], kind: str) -> None:
    assert detect(row) == kind


def test_eighty_columns_on_a_terminal(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_rows(['{"query": 1, "choices": 2, "gold": 3}', json.dumps(turns("a " * 3000, "b"))]).parent)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    _, lines = check(capsys, "rows.jsonl")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("rows.jsonl:1: no known kind of row")
    assert lines[1].startswith("    ")


def test_it_starts_without_torch(write_rows: WriteRows) -> None:
    code = "import sys\nfrom minimind.data.check import main\nmain([sys.argv[1]])\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_rows([turns("a", "b")]))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no problems" in done.stdout
