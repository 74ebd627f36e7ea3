"""The stage that learns a vocabulary: which rows it reads and how long a token may be."""

import json
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ConfigError
from minimind.stages import train_tokenizer
from minimind.tokenizer.bpe import Tokenizer


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    path = tmp_path / "text.jsonl"
    texts = ["皮球在公园里" * 20] * 50 + ["harbour master" * 20] * 50
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return (path,)


def learn(files: tuple[Path, ...], out: Path, **flags: Any) -> Tokenizer:
    return train_tokenizer.run(train_tokenizer.Config(files=files, out=out, vocab_size=320, **flags))


def words(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]


def longest(tokenizer: Tokenizer) -> int:
    """Bytes of the longest learned token."""
    learned = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_ids.values()]
    return max(int(tokenizer.token_bytes[token]) for token in learned)


def test_max_token_bytes_keeps_phrases_from_becoming_tokens(files: tuple[Path, ...], tmp_path: Path) -> None:
    assert longest(learn(files, tmp_path / "free")) > 6
    assert longest(learn(files, tmp_path / "short", max_token_bytes=6)) in (5, 6)


def test_max_rows_reads_the_first_rows_only(files: tuple[Path, ...], tmp_path: Path) -> None:
    assert any("harbour" in token for token in words(learn(files, tmp_path / "all")))
    assert not any("harb" in token for token in words(learn(files, tmp_path / "first", max_rows=50)))


def test_impossible_numbers_are_refused(files: tuple[Path, ...], tmp_path: Path) -> None:
    config = train_tokenizer.Config(files=files, out=tmp_path / "x", max_rows=-1, max_token_bytes=1)
    assert [problem.split(" = ")[0] for problem in config.problems()] == ["max_rows", "max_token_bytes"]
    with pytest.raises(ConfigError, match="vocab_size 9 is too small"):
        train_tokenizer.run(train_tokenizer.Config(files=files, out=tmp_path / "y", vocab_size=9))
