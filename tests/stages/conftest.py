"""A world of a few rows, a tokenizer of 300 ids and a pretrained model of two layers, once for all tests here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stages.tiny_stage import Files, exit_code, train

from minimind.world.write import Sizes, write


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """World, tokenizer and pretrained run; tests read them only."""
    folder = tmp_path_factory.mktemp("stages")
    files = Files(folder / "world", folder / "tokenizer", folder / "base", folder / "cache", folder)
    write(files.world, sizes=Sizes("", *(100, 150, 1, 1, 1, 1, 1, 1), 8, 1))
    texts = [str(files.world / f"{stage}.jsonl") for stage in ("pretrain", "sft")]
    assert exit_code(["train-tokenizer", "--data", *texts, "--out", str(files.tokenizer), "--vocab-size", "300"]) == 0
    train(files.argv("pretrain", "base"))
    return files


@pytest.fixture
def files(shared_files: Files, tmp_path: Path) -> Files:
    """The shared files, and a fresh folder for runs."""
    return replace(shared_files, folder=tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with an exit code, and return what it says on stderr, in one line."""

    def refused(code: int, *argv: str) -> str:
        capsys.readouterr()
        assert exit_code(argv) == code
        found = capsys.readouterr()
        assert found.out == ""
        assert "Traceback" not in found.err
        return " ".join(found.err.split())

    return refused
