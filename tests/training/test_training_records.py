"""metrics.jsonl and trackers, the run's directory, and how progress looks."""

import fcntl
import io
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training.tiny_run import TinySource

from minimind.errors import ConfigError
from minimind.training import progress
from minimind.training.metrics import Metrics, read_metrics, truncate_after
from minimind.training.prefetch import Ahead
from minimind.training.progress import Clock, Display, count, duration, peak_flops, progress_line, size
from minimind.training.run import LOCK, RunDirectory, environment

ROW: dict[str, Any] = {
    "step": 120,
    "train_loss": 2.3104,
    "lr": 6e-3,
    "grad_norm": 0.812,
    "tokens_per_second": 8432.0,
    "memory_bytes": 420_000_000,
}


def test_rows_are_appended_and_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        for step in range(4):
            metrics.write({"step": step, "train_loss": float("nan") if step == 1 else 1.0 / 3})
        assert len(read_metrics(path)) == 4  # flushed row by row
        metrics.sync()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "train')  # a crash in the middle of a line
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]
    with Metrics(path, keep_until=2) as metrics:
        metrics.write({"step": 3, "train_loss": 9.0})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert (rows[1]["train_loss"], rows[2]["train_loss"], rows[3]["train_loss"]) == (None, 1.0 / 3, 9.0)
    truncate_after(path, -1)
    assert path.read_bytes() == b""
    assert read_metrics(tmp_path / "none.jsonl") == []


class Service(types.ModuleType):
    """A fake wandb: remembers its calls, fails where told."""

    def __init__(self, fails_at: str = "") -> None:
        super().__init__("wandb")
        self.fails_at, self.calls = fails_at, list[str]()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise ConnectionError("no network")

    def init(self, **_: Any) -> object:
        self._call("init")
        return object()

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._call(f"log {step} {sorted(numbers)}")

    def finish(self) -> None:
        self._call("finish")


def test_a_tracker_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    with Metrics(tmp_path / "m.jsonl", trackers=("wandb",)) as metrics:
        metrics.write({"step": 3, "train_loss": 1.0, "grad_norm": None, "note": "x"})
    assert service.calls == ["init", "log 3 ['train_loss']", "finish"]


@pytest.mark.parametrize("fails_at", ["init", "log 3 ['a']", "finish", "import"])
def test_a_failing_tracker_is_said_once_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails_at: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if fails_at == "import" else Service(fails_at))
    with Metrics(tmp_path / "m.jsonl", trackers=("wandb",)) as metrics:
        for step in (3, 4, 5):
            metrics.write({"step": step, "a": 1.0})
    assert len(read_metrics(tmp_path / "m.jsonl")) == 3
    assert capsys.readouterr().err.count("warning: wandb is off for this run, training goes on") == 1


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Metrics(tmp_path / "m.jsonl", trackers=("tensorboard",)) as metrics:
        metrics.write({"step": 1, "train_loss": 1.0})
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_lock_names_its_owner_and_is_reentrant(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = RunDirectory(path)
    assert not path.exists()  # making the object touches nothing
    with run:
        with run:
            pass
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} is training here"), RunDirectory(path):
            pass
    assert not path.exists()  # nothing was written, so nothing stays
    path.mkdir()
    with RunDirectory(path):
        assert (path / LOCK).read_text().strip() == str(os.getpid())
    assert (path / LOCK).exists()  # the directory was there before


def test_a_lock_that_its_owner_removes_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    path.mkdir()
    flock, calls = fcntl.flock, 0

    def late(descriptor: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the owner finds nothing written and removes file and directory just now
            (path / LOCK).unlink()
            path.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunDirectory(path):
        assert (path / LOCK).read_text().strip() == str(os.getpid())
        with pytest.raises(ConfigError, match="is training here"), RunDirectory(path):
            pass


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be a run directory"), RunDirectory(tmp_path / "file"):
        pass


def test_a_run_keeps_its_configuration_and_environment(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write_config("steps = 3\n")
    run.write_environment({"pretrain.jsonl": "ab12"})
    assert run.config.read_text() == "steps = 3\n"
    facts = json.loads((run.path / "environment.json").read_text())
    assert facts["data"] == {"pretrain.jsonl": "ab12"}
    assert facts["versions"]["torch"]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(environment()) >= {"git_commit", "platform", "command", "world_size", "processors"}


def test_samples_are_appended_and_cut_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (0, 5, 10):
        run.append_samples([{"step": step, "text": "红色的球"}])
    run.cut_samples_after(5)
    assert [row["step"] for row in read_metrics(run.samples)] == [0, 5]
    assert "红色" in run.samples.read_text(encoding="utf-8")


def test_starting_afresh_moves_everything_aside_and_deletes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.start_afresh() is None
    for round_number in (1, 2):
        run.write_config(f"round = {round_number}\n")
        (run.path / "checkpoints" / "step-000001").mkdir(parents=True)
        (run.path / "latest").symlink_to("checkpoints/step-000001")
        aside = run.start_afresh()
        assert aside
        assert aside == run.path / f"previous-{round_number}"
        assert (aside / "config.toml").read_text() == f"round = {round_number}\n"
        assert (aside / "latest").resolve() == (aside / "checkpoints" / "step-000001").resolve()
    assert sorted(path.name for path in run.path.iterdir()) == [LOCK, "previous-1", "previous-2"]


def test_the_line_says_everything_in_eighty_columns() -> None:
    line = progress_line(ROW, steps=1270, eta_seconds=151)
    assert line == "step 120/1270  9.4%  loss 2.310  lr 6.0e-3  grad 0.81  8.4k tok/s  420 MB  ETA 2:31"
    assert len(line) <= 84
    skipped = progress_line(ROW | {"grad_norm": None, "mfu": 0.412}, steps=1270, eta_seconds=0)
    assert "grad -  8.4k tok/s  MFU 41%  420 MB" in skipped


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (-3, 0, 59.6, 151, 3600, 90061)] == [
        "0:00",
        "0:00",
        "1:00",
        "2:31",
        "1:00:00",
        "25:01:01",
    ]
    assert [size(n) for n in (0, 420e6, 1.94e9)] == ["0 MB", "420 MB", "1.9 GB"]
    assert [count(n) for n in (843, 8432, 84320, 1.2e6)] == ["843", "8.4k", "84k", "1.2M"]


def test_a_pipe_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(1270) as display:
        display.show(ROW, eta_seconds=151)
        display.say({"step": 120, "val_loss": 2.45678, "val_bits_per_byte": 0.9812})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        progress_line(ROW, steps=1270, eta_seconds=151),
        "step 120/1270  val_loss 2.457  val_bits_per_byte 0.9812",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_gets_a_bar_that_fits(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=screen, width=width, force_terminal=True, color_system=None)
    )
    with Display(1270) as display:
        display.show(ROW, eta_seconds=151)
        assert display._live
        still = io.StringIO()
        Console(file=still, width=width, color_system=None).print(display._live.renderable)
    bar, numbers = still.getvalue().splitlines()
    assert "120/1270" in bar
    assert bar.rstrip().endswith("ETA 2:31")
    assert numbers.startswith("loss 2.310  lr 6.0e-3")
    assert max(len(bar), len(numbers)) <= width


def test_the_clock_leaves_validation_out_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(earlier_seconds=50.0)
    now += 2.0
    clock.tick(100)
    with clock.stopped():
        now += 8.0
    assert clock.tokens_per_second() == pytest.approx(50.0)
    assert clock.seconds() == pytest.approx(60.0)
    assert clock.seconds_per_step() == pytest.approx(10.0)


def test_peak_flops_of_a_cpu_are_not_guessed() -> None:
    import torch

    assert peak_flops(torch.device("cpu")) is None


def test_ahead_hands_out_in_order_and_stops_early() -> None:
    source = TinySource(rows=2)
    with Ahead(source.micro_batches, range(3, 1000)) as ahead:
        for step in (3, 4, 5):
            (batch,) = ahead.take(step)
            assert batch.input_ids.equal(source.micro_batches(step)[0].input_ids)
        with pytest.raises(RuntimeError, match="step 6 came where step 9 was due"):
            ahead.take(9)
    assert not ahead._thread.is_alive()


def test_ahead_notices_that_its_thread_is_gone() -> None:
    with Ahead(TinySource().micro_batches, range(1)) as ahead:
        ahead.take(0)
        with pytest.raises(RuntimeError, match="ended before step 1"):
            ahead.take(1)
