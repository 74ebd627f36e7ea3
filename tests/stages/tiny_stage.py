"""Stages small enough for tests, called as on the command line: in this process, or in one to kill."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from minimind import cli
from minimind.config import parse
from minimind.stages import pretrain, sft
from minimind.training.loop import FitResult
from minimind.training.metrics import read_metrics
from minimind.training.step import Stepper

Stage = Literal["pretrain", "sft"]
STAGES: tuple[Stage, Stage] = ("pretrain", "sft")
SHAPE = {
    "hidden-size": 32,
    "intermediate-size": 64,
    "num-hidden-layers": 2,
    "num-attention-heads": 2,
    "num-key-value-heads": 1,
    "max-position-embeddings": 256,
}
DENSE = tuple(word for name, value in SHAPE.items() for word in (f"--model.{name}", str(value)))
MOE = (*DENSE, "--model.use-moe", "--model.moe-intermediate-size", "32")
MUON = ("--optim.name", "muon", "--optim.muon-lr", "0.01")


@dataclass(frozen=True)
class Files:
    """What the stages start from, made once for all tests, and a folder for this test's own runs."""

    world: Path
    tokenizer: Path
    base: Path
    """A pretrained run."""
    cache: Path
    folder: Path

    def argv(
        self, stage: Stage, out: str, *more: str, shape: Sequence[str] = DENSE, data: Path | None = None
    ) -> list[str]:
        """Return the words after `minimind` of a short run of `stage` in `folder / out`; later words win."""
        start = ["--tokenizer", str(self.tokenizer), *shape] if stage == "pretrain" else ["--init-from", str(self.base)]
        return [
            *(stage, "--out", str(self.folder / out), "--data", str(data or self.world / f"{stage}.jsonl"), *start),
            *("--data.row-length", "64", "--batch-tokens", "256", "--data.cache-dir", str(self.cache)),
            *("--steps", "10", "--save-every", "5", "--log-every", "1", "--sample-every", "0"),
            *("--data.validation-fraction", "0", "--device", "cpu", "--dtype", "float32", "--compile", "off"),
            *("--optim.lr", "3e-3", "--optim.warmup-steps", "2"),
            *more,
        ]


def train(argv: Sequence[str]) -> FitResult:
    """Run the stage that `argv` names as `minimind` would, and return what its loop returns."""
    stage, *flags = argv
    if stage == "pretrain":
        return pretrain.run(parse(pretrain.Config, flags, command=stage))
    return sft.run(parse(sft.Config, flags, command=stage))


def exit_code(argv: Sequence[str]) -> int:
    """Return what a process running `minimind` with these words would exit with."""
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


@contextlib.contextmanager
def after_update(step: int, do: Callable[[], object]) -> Generator[None]:
    """While the block lasts, call `do` in the middle of a run: right after update number `step`, before it is saved."""
    update = Stepper.update

    def updating(stepper: Stepper, at: int, micro_batches: Any) -> dict[str, Any]:
        row = update(stepper, at, micro_batches)
        if at + 1 == step:
            do()
        return row

    with mock.patch.object(Stepper, "update", updating):
        yield


def send(number: signal.Signals) -> Callable[[], None]:
    """Return a function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def curve(run: Path) -> list[tuple[float, ...]]:
    """Return (step, loss, gradient norm, learning rate, tokens) of every step of a run."""
    names = ("step", "train_loss", "grad_norm", "lr", "tokens")
    return [tuple(row[name] for name in names) for row in read_metrics(run / "metrics.jsonl") if "train_loss" in row]


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Return every file below `folder` but the log."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write a JSONL file; a row that is a string is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def start(argv: Sequence[str], *, fault: str = "") -> BaseProcess:
    """Run `minimind` with these words in a process of its own, forked from a clean one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["stages.tiny_stage", "minimind.stages.sampling", "minimind.data.loader", "torch._dynamo"]
    )
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests / "training", tests.parent)))
    with mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
        process = context.Process(target=_run, args=([*argv], fault))
        process.start()
    return process


def _run(argv: list[str], fault: str) -> None:
    os.environ["MINIMIND_FAULT"] = fault
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says is in log.txt
    torch.set_num_threads(1)
    sys.exit(cli.main(argv))


def wait_for_step(run: Path, step: int, is_alive: Callable[[], bool]) -> None:
    """Return as soon as the run has written the row of that step, or its process has ended."""
    deadline = time.monotonic() + 60
    while is_alive() and not any(row["step"] >= step for row in read_metrics(run / "metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
