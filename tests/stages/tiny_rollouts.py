"""Stages of reinforcement learning small enough for tests: a few prompts, short answers, a learnable reward."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from stages.tiny_stage import Files, write_rows

from minimind.config import parse
from minimind.training.loop import FitResult
from minimind.training.metrics import read_metrics

Method = Literal["grpo", "ppo", "spo"]
METHODS: tuple[Method, ...] = ("grpo", "ppo", "spo")
WORDS = ("one", "two", "three", "four", "five", "six", "seven")
TIMES = {"seconds", "tokens_per_second", "memory_bytes", "rollout_seconds"}
TWO_BY_TWO = ("--rollout-epochs", "2", "--minibatches", "2")
"""A rollout is learned in four steps."""


def prompts(folder: Path, count: int = 7) -> Path:
    """Write prompts of unequal length."""
    rows = [{"prompt": " ".join(WORDS[: i % 7 + 1]), "answer": WORDS[i % 7]} for i in range(count)]
    return write_rows(folder / "prompts.jsonl", rows)


def argv(files: Files, method: Method, out: str, *more: str, data: Path | None = None) -> list[str]:
    """Return the words after `minimind` of a short run of `method` in `files.folder / out`; later words win."""
    samples = ("--samples", "3") if method == "grpo" else ()
    return [
        *(method, "--init-from", str(files.base), "--out", str(files.folder / out)),
        *("--data", str(data or prompts(files.folder)), "--rewards", "length=2", "repetition"),
        *("--prompts", "4", *samples, "--max-tokens", "24", "--steps", "6", "--save-every", "0"),
        *("--sample-every", "0", "--data.validation-fraction", "0"),
        *("--device", "cpu", "--dtype", "float32", "--optim.lr", "3e-3"),
        *more,
    ]


def learn(words: Sequence[str]) -> FitResult:
    """Run the stage that the words name as `minimind` would, and return what its loop returns."""
    method, *flags = words
    module = import_module(f"minimind.stages.{method}")
    return module.run(parse(module.Config, flags, command=method))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return every row of training of a run, without what the clock says."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train_loss" in row]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
