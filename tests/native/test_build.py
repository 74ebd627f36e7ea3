"""A library is built once, kept, built anew when its source changes, and never required."""

import ctypes
import logging
from pathlib import Path

import pytest

from minimind.native import build

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MINIMIND_NATIVE", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def test_built_once_and_anew_when_the_source_changes(source: Path) -> None:
    folder = build.cache_folder()
    first = build.built(source, folder)
    stamp = first.stat().st_mtime_ns
    assert build.built(source, folder) == first
    assert first.stat().st_mtime_ns == stamp
    assert ctypes.CDLL(str(first)).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    second = build.built(source, folder)
    assert ctypes.CDLL(str(second)).answer() == 43
    assert sorted(folder.iterdir()) == sorted([first, second])  # nothing unfinished is left


@pytest.mark.parametrize("breakage", ["source", "compiler", "folder"])
def test_without_a_library_one_line_says_why(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, breakage: str
) -> None:
    if breakage == "source":
        source.write_text("int answer(\n")
    elif breakage == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        build.cache_folder().parent.write_text("a file where a folder should be")
    log = logging.getLogger("minimind.native")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)  # or caplog may see it twice
    assert build.library(source) is None
    (record,) = caplog.records
    assert "answer.cpp: not built, PyTorch does it instead" in record.getMessage()


def test_can_be_switched_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_NATIVE", "0")
    assert build.library(source) is None
    assert not build.cache_folder().exists()
