"""Whole commands that are killed, asked to stop, or started twice."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from stages.tiny_stage import (
    MUON,
    Files,
    Stage,
    after_update,
    curve,
    exit_code,
    send,
    snapshot,
    start,
    train,
    wait_for_step,
)

from minimind import checkpoint
from minimind.training.metrics import read_metrics

PREEMPTED, INTERRUPTED, USAGE = 75, 130, 2


@dataclass
class Process:
    """What both kinds of processes can do."""

    is_alive: Callable[[], bool]
    kill: Callable[[], None]
    wait: Callable[[float], int | None]


def forked(argv: Sequence[str], fault: str) -> Process:
    process = start(argv, fault=fault)

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return Process(process.is_alive, process.kill, wait)


def command(argv: Sequence[str], fault: str) -> Process:
    """The command line as a user has it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIMIND_FAULT": fault}
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind", *argv],
        env=environment,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    return Process(lambda: process.poll() is None, process.kill, process.wait)


Moment = float | int | str
"""Seconds after the start; or that many steps after the newest one of the run; or a place inside a save."""


def kill_at(moment: Moment, run: Path, argv: Sequence[str], begin: Callable[[Sequence[str], str], Process]) -> None:
    """Run the command and kill it (or have it killed) at that moment."""
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    process = begin(argv, moment if isinstance(moment, str) else "")
    if isinstance(moment, int):
        saved = checkpoint.checkpoints_of(run)
        wait_for_more(run, max(steps, default=0) if not saved else int(saved[0].name[5:]), moment, process)
        process.kill()
    elif isinstance(moment, float):
        time.sleep(moment)
        process.kill()
    assert process.wait(60) == -signal.SIGKILL, f"it ended before the kill at {moment}"
    for path in checkpoint.checkpoints_of(run):
        assert checkpoint.verify(path) == []


def wait_for_more(run: Path, newest: int, more: int, process: Process) -> None:
    """Wait until the process has made `more` steps beyond `newest` (rows of steps not saved are made again first)."""
    before = (run / "metrics.jsonl").stat() if (run / "metrics.jsonl").exists() else None
    while process.is_alive() and before and (run / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns:
        time.sleep(0.002)
    wait_for_step(run, newest + more, process.is_alive)


def check_kills(
    files: Files, stage: Stage, moments: Sequence[Moment], begin: Callable[[Sequence[str], str], Process], *flags: str
) -> int:
    """Kill a run at these moments, then let it end; it must equal an uninterrupted one. Returns the number of kills."""
    run = files.folder / "killed"
    for moment in moments:
        kill_at(moment, run, files.argv(stage, "killed", *flags), begin)
    last = begin(files.argv(stage, "killed", *flags), "")
    assert last.wait(300) == 0
    whole = train(files.argv(stage, "whole", *flags))
    resumed = train(files.argv(stage, "killed", *flags))  # nothing is left to do
    assert resumed.state_hash == whole.state_hash
    assert resumed.tokens == whole.tokens
    assert curve(run) == curve(files.folder / "whole")
    assert not list((run / "checkpoints").glob(".*"))
    return len(moments)


def test_four_kills_of_which_one_inside_a_save_change_nothing(files: Files) -> None:
    moments: list[Moment] = [0.05, 7, "optimizer-written", 5]
    flags = ("--steps", "60", "--save-every", "4", "--micro-batch-tokens", "128", *MUON)
    assert check_kills(files, "sft", moments, forked, *flags) == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_twenty_kills_of_which_five_inside_a_save_change_nothing(stage: Stage, files: Files) -> None:
    generator = random.Random(stage)
    moments: list[Moment] = [generator.uniform(0.1, 3) for _ in range(4)]
    moments += [generator.randint(1, 25) for _ in range(11)]
    moments += ["temporary-made", "model-written", "manifest-written", "renamed", "prune-renamed"]
    generator.shuffle(moments)
    flags = ("--steps", "600", "--save-every", "9", "--micro-batch-tokens", "128", *MUON)
    assert check_kills(files, stage, moments, command, *flags) == 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_saves_and_stops(
    number: signal.Signals, code: int, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)  # a shell's background jobs are born ignoring SIGINT
    with after_update(7, send(number)):
        assert exit_code(files.argv("sft", "run")) == code
    said = capsys.readouterr().err
    assert "saved: step 7 of 10" in said
    assert "The same command resumes it" in said
    assert checkpoint.read(files.folder / "run" / "latest").step == 7
    assert signal.getsignal(number) == handler
    assert train(files.argv("sft", "run")).state_hash == train(files.argv("sft", "whole")).state_hash


def test_a_second_run_in_the_same_directory_is_refused_at_once(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = files.argv("pretrain", "run", "--steps", "3000", "--save-every", "0", "--optim.schedule", "constant")
    process = start(argv)
    wait_for_step(files.folder / "run", 3, process.is_alive)
    begin, before = time.monotonic(), snapshot(files.folder / "run").keys()
    assert exit_code(argv) == USAGE
    assert exit_code([*argv, "--fresh"]) == USAGE
    assert time.monotonic() - begin < 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"process {process.pid} is training here; wait for it, stop it, or give another --out" in said
    assert snapshot(files.folder / "run").keys() == before
    process.terminate()
    process.join(30)
    assert process.exitcode == PREEMPTED
    saved = checkpoint.read(files.folder / "run" / "latest")
    assert saved.step == read_metrics(files.folder / "run" / "metrics.jsonl")[-1]["step"] < 3000
