"""Messages: stderr, main rank only, and the run's file."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from minimind.runtime.log import add_file, get_logger, remove_file


def test_messages_go_to_stderr_plain_and_warnings_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("a").info("step %d", 3)
    get_logger("minimind.a").warning("slow")
    get_logger("a").debug("not shown")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "step 3\nwarning: slow\n"


def test_only_the_main_rank_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    get_logger("b").info("from rank 1")
    get_logger("minimind").info("from rank 1")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    get_logger("b").info("from rank 0")
    assert capsys.readouterr().err == "from rank 0\n"


def test_stderr_is_looked_up_at_each_message(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = get_logger("c")
    replaced = io.StringIO()
    monkeypatch.setattr(sys, "stderr", replaced)
    logger.info("above the bar")
    assert replaced.getvalue() == "above the bar\n"


def test_file_gets_time_and_level_and_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.txt"
    for text in ("first", "second"):
        handler = add_file(path)
        get_logger("d").info(text)
        remove_file(handler)
    get_logger("d").info("after")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO first", "INFO second"]
    assert lines[0][:2] == "20"


def test_log_needs_no_torch() -> None:
    code = "import sys, minimind.runtime.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
