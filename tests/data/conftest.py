"""A tiny trained tokenizer and short ways to write data files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import train

TEXTS = [
    "Once upon a time there was a little girl who had a red ball. She gave the ball to the boy.",
    "The dog ran to the river and the cat sat on the mat. What is the capital? The capital is far away.",
    "从前有一个小女孩，她有一个红色的球。她把球给了男孩。今天天气很好，我们去河边。",
    "user assistant system tool name arguments 0 1 2 3 4 5 6 7 8 9 plus minus equals",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 3, 400)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows([{...}, "raw line", ...], name)` -> path of a JSONL file."""

    def write(rows: Iterable[dict[str, Any] | str], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")
        return path

    return write


def turns(*contents: str, system: str = "") -> dict[str, Any]:
    """A conversation row: user and assistant in turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"conversations": ([{"role": "system", "content": system}] if system else []) + messages}
