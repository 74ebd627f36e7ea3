"""Runs in processes of their own that are killed, asked to stop, or started twice."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from training.tiny_run import TinySource, start, tiny_fit

from minimind import checkpoint
from minimind.errors import ConfigError
from minimind.training.config import OptimConfig
from minimind.training.metrics import read_metrics
from minimind.training.run import RunDirectory

FLAGS = ("--steps", "30", "--save-every", "3", "--optim", "muon", "--micro-rows", "4")
OPTIM = OptimConfig(name="muon", lr=3e-3, muon_lr=0.01, muon_dtype="float32", warmup_steps=2)


def finish(run: Path, steps: int = 30) -> str:
    """Make what is left of the run here, and return its state hash."""
    return tiny_fit(run, steps=steps, save_every=3, optim=OPTIM, source=TinySource(micro_rows=4)).state_hash


def wait_for_step(run: Path, step: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not any(row["step"] >= step for row in read_metrics(run / "metrics.jsonl")):
        assert process.is_alive(), "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: BaseProcess, timeout: float = 60) -> int:
    process.join(timeout)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def crash(run: Path, moment: float | str, *flags: str) -> None:
    """Kill a run after some seconds, or at a fault point of its save."""
    process = start(run, *FLAGS, *flags, fault=moment if isinstance(moment, str) else "")
    if isinstance(moment, float):
        process.join(moment)
        process.kill()
    assert end(process) == -signal.SIGKILL, "the run was over before it could be killed: make its steps slower"
    for path in checkpoint.checkpoints_of(run):
        assert checkpoint.verify(path) == []


def check_kills(tmp_path: Path, moments: list[float | str], *, steps: int, delay: float) -> None:
    run = tmp_path / "killed"
    for moment in moments:
        crash(run, moment, "--steps", str(steps), "--delay", str(delay))
    whole = finish(tmp_path / "whole", steps)
    assert finish(run, steps) == whole
    curves = [
        [(row["step"], row["train_loss"], row["tokens"]) for row in read_metrics(path / "metrics.jsonl")]
        for path in (run, tmp_path / "whole")
    ]
    assert curves[0] == curves[1]
    assert [step for step, _, _ in curves[0]] == list(range(1, steps + 1))


def test_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    moments = [0.4, "model-written:2", 0.3, "synced", 0.5, "renamed", 0.2]
    check_kills(tmp_path, moments, steps=30, delay=0.08)


@pytest.mark.slow
def test_twenty_kills_of_which_five_inside_a_save_change_nothing(tmp_path: Path) -> None:
    generator = random.Random(0)
    moments: list[float | str] = [generator.uniform(0.02, 0.8) for _ in range(15)]
    moments += ["temporary-made", "optimizer-written", "manifest-written", "latest-moved", "prune-renamed"]
    generator.shuffle(moments)
    check_kills(tmp_path, moments, steps=60, delay=0.15)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    process = start(run, *FLAGS, "--delay", "0.05")
    wait_for_step(run, 4, process)
    assert process.pid
    os.kill(process.pid, number)
    assert end(process, 30) == code
    text = (tmp_path / "run.stderr").read_text()
    assert "saving, then stopping" in text
    assert "saved: step" in text
    saved = checkpoint.find_latest(run)
    assert saved is not None
    assert checkpoint.read(saved).step == read_metrics(run / "metrics.jsonl")[-1]["step"]  # not a step was lost
    assert finish(run) == finish(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *FLAGS, "--delay", "20")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert end(process, 2) == 130
    assert "stopped at once, not saved" in (tmp_path / "run.stderr").read_text()


def test_a_signal_cuts_validation_short_and_the_resumed_run_makes_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *FLAGS, "--slow-validation")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    assert end(process, 10) == 75
    assert checkpoint.find_latest(run) == run / "checkpoints" / "step-000000"
    result = tiny_fit(
        run, steps=30, save_every=3, optim=OPTIM, source=TinySource(micro_rows=4), validate=lambda: {"val_loss": 2.0}
    )
    validated = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
    assert validated == [0, 30]
    assert result.state_hash == finish(tmp_path / "whole")


def test_a_second_run_in_the_same_directory_is_refused_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *FLAGS, "--delay", "0.2")
    wait_for_step(run, 1, process)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=rf"process {process.pid} is training here.*--out"):
        finish(run)
    with pytest.raises(ConfigError, match="--out"):
        RunDirectory(run).start_afresh()
    assert time.monotonic() - begin < 2
    process.kill()
    process.join()
    assert finish(run)  # the dead one's lock is gone
