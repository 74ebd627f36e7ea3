"""The table of commands: what it prints, what it returns, and that it stays fast."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import pytest

from minimind import cli
from minimind.errors import CheckpointError, ConfigError, DataError, Preempted


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int | None]], None]:
    """Put a function behind the command `probe`."""

    def put(function: Callable[[list[str]], int | None]) -> None:
        module = ModuleType("probe_module")
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_module:main", "a probe"))

    monkeypatch.delenv("MINIMIND_DEBUG", raising=False)
    return put


def test_help_lists_every_command_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and command.summary in shown for name, command in cli.COMMANDS.items())
        assert max(map(len, shown.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from minimind import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minimind {__version__}\n"


def test_unknown_command_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretain"]) == 2
    assert capsys.readouterr().err == "minimind: no command 'pretain'. Did you mean: minimind pretrain\n"
    assert cli.main(["train_tokenizer"]) == 2
    assert "minimind train-tokenizer" in capsys.readouterr().err
    assert cli.main(["xyzzy"]) == 2
    assert "minimind --help" in capsys.readouterr().err


def test_half_a_command_lists_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 2
    assert "minimind data check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_spin_briefly_unless_told_otherwise(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, given: dict[str, str], seen: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what `main` sets is taken back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    counts: list[str | None] = []
    install(lambda argv: counts.append(os.environ.get("GOMP_SPINCOUNT")))
    assert cli.main(["probe"]) == 0
    assert counts == [seen]


def test_words_after_the_command_reach_it(install: Callable[..., None]) -> None:
    seen: list[list[str]] = []

    def probe(argv: list[str]) -> int | None:
        seen.append(argv)
        return 7 if "--fail" in argv else None

    install(probe)
    assert cli.main(["probe", "a", "--b=1"]) == 0
    assert cli.main(["probe", "--fail"]) == 7
    assert seen == [["a", "--b=1"], ["--fail"]]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (CheckpointError, 4), (Preempted, 75), (KeyboardInterrupt, 130)],
)
def test_errors_become_a_message_and_an_exit_code(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], error: type[BaseException], code: int
) -> None:
    def probe(argv: list[str]) -> int:
        raise error("rows.jsonl:3: no text; give one")

    install(probe)
    assert cli.main(["probe"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert ("interrupted" if error is KeyboardInterrupt else "minimind: rows.jsonl:3: no text") in shown.err


def test_debug_keeps_the_traceback(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(argv: list[str]) -> int:
        raise DataError("x")

    install(probe)
    monkeypatch.setenv("MINIMIND_DEBUG", "1")
    with pytest.raises(DataError):
        cli.main(["probe"])


def test_a_defect_keeps_its_traceback(install: Callable[..., None]) -> None:
    def probe(argv: list[str]) -> int:
        raise ZeroDivisionError

    install(probe)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, types; from minimind import cli; m = types.ModuleType('m');\n"
        "def main(argv):\n    for i in range(100_000): print('a line that fills the pipe')\n"
        "m.main = main; sys.modules['m'] = m; cli.COMMANDS['probe'] = cli.Command('m:main', '')\n"
        "sys.exit(cli.main(['probe']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + 13
    process.stderr.close()


def test_python_dash_m() -> None:
    result = subprocess.run([sys.executable, "-m", "minimind", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: minimind COMMAND")


def test_help_is_fast() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "minimind", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.2  # the best of five: the machine may be busy, the command may not


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_helps_without_torch(name: str) -> None:
    code = (
        f"import sys; from minimind import cli\n"
        f"try: code = cli.main([*{name.split()!r}, '--help'])\n"
        f"except SystemExit as stop: code = stop.code\n"
        f"heavy = [m for m in ('torch', 'transformers', 'matplotlib', 'tokenizers') if m in sys.modules]\n"
        f"sys.exit(f'exit {{code}}, imported {{heavy}}' if code or heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"minimind {name}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
