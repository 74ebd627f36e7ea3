"""What the loop does with bad numbers, bad data, bad luck, and what it writes down."""

import errno
import json
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.tiny_run import DENSE, MOE, TinySource, tiny_fit

from minimind import checkpoint
from minimind.batch import Batch, Output
from minimind.errors import CheckpointError, ConfigError, DataError, DivergedError, OutOfResourcesError
from minimind.model.transformer import Transformer
from minimind.runtime import faults
from minimind.runtime.integrity import sha256_of_tensors
from minimind.tokenizer.train import MIN_VOCAB_SIZE, train
from minimind.training.config import LoopConfig, OptimConfig
from minimind.training.metrics import read_metrics
from minimind.training.run import RunDirectory
from minimind.training.step import is_compiling_worth_it


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Every message of the package, as text."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keep()
    logging.getLogger("minimind").addHandler(handler)
    yield found
    logging.getLogger("minimind").removeHandler(handler)


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    values = iter((5.0, 4.0, 3.0, 2.0))

    def sample(step: int) -> list[dict[str, Any]]:
        return [{"prompt": "a", "text": "b"}]

    seen: list[int] = []
    result = tiny_fit(
        tmp_path,
        log_every=4,
        eval_every=5,
        sample_every=5,
        validate=lambda: {"val_loss": next(values)},
        sample=sample,
        on_step=lambda step, _: seen.append(step),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 4, 8, 10]
    assert [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row] == [(0, 5.0), (5, 4.0), (10, 3.0)]
    assert seen == list(range(1, 11))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 5, 10]
    last = next(row for row in reversed(rows) if "train_loss" in row)
    assert last["tokens"] == result.tokens == 10 * 96
    assert last["lr"] == pytest.approx(3e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8))))
    for key in ("seconds", "grad_norm", "tokens_per_second", "memory_bytes", "correct", "aux_loss"):
        assert isinstance(last[key], float | int), key
    assert result.metrics["val_loss"] == 3.0
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000010"
    found = checkpoint.read(result.checkpoint)
    assert sha256_of_tensors(found.model_state, found.optimizer_state) == result.state_hash
    assert result.state_hash in (tmp_path / "log.txt").read_text()


def test_the_last_step_is_always_saved(tmp_path: Path) -> None:
    tiny_fit(tmp_path, steps=7, save_every=0)
    assert [path.name for path in checkpoint.checkpoints_of(tmp_path)] == ["step-000007"]
    with pytest.raises(ConfigError, match="steps = 0: at least 1"):
        tiny_fit(tmp_path, steps=0)


def test_training_learns(tmp_path: Path) -> None:
    tiny_fit(tmp_path, steps=60, save_every=0, optim=OptimConfig(name="muon", lr=1e-2, muon_lr=0.02))
    losses = [row["train_loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(DENSE.vocab_size), abs=0.05)
    assert losses[-1] < 2.5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(DivergedError, match=r"step 8: loss nan.*No weight was changed.*diverged/step-000008-rank-0"):
        tiny_fit(tmp_path, source=TinySource(micro_rows=4, poison_step=7), save_every=1, dtype=dtype)
    kept = load_file(tmp_path / "diverged" / "step-000008-rank-0.safetensors")
    assert kept["1/loss_weights"].isnan().any()
    assert torch.equal(kept["0/input_ids"], TinySource(micro_rows=4).micro_batches(7)[0].input_ids)
    assert json.loads((tmp_path / "diverged" / "step-000008-rank-0.json").read_text())["train_loss"] == "nan"
    latest = checkpoint.find_latest(tmp_path)
    assert latest
    assert latest.name == "step-000007"
    assert all(tensor.isfinite().all() for tensor in checkpoint.read(latest).model_state.values())
    source = TinySource(micro_rows=4)  # the batch is good now: the run goes on as if nothing had been
    mended = tiny_fit(tmp_path, source=source, dtype=dtype)
    assert mended.state_hash == tiny_fit(tmp_path / "whole", source=source, dtype=dtype).state_hash


def exploding(output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A finite loss whose gradient is not: the root of 0."""
    zero = (output.hidden.float() * 0).sum()
    return zero.sqrt() + 1.0, {}


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.tiny_run.cross_entropy", exploding)
    with pytest.raises(DivergedError, match=r"step 1: loss 0\.01\d+, gradient norm nan"):
        tiny_fit(tmp_path)


def test_float16_skips_an_overflow_and_goes_on(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []

    def overflow(output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # in float16 a gradient of 1e3 times the scale 65536 is infinite; halved ten times it is not
        return (output.hidden.half() * 300).float().sum() * batch.weight, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.tiny_run.cross_entropy", overflow)
        tiny_fit(tmp_path, steps=20, dtype="float16", on_step=lambda _, row: rows.append(row))
    skipped = [row["is_skipped"] for row in rows]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)  # first the skipped ones, then no more
    count = sum(skipped)
    assert rows[-1]["loss_scale"] == 2.0 ** (16 - count)
    assert all(row["grad_norm"] is None for row in rows[:count])


def test_a_step_without_learned_tokens_is_finite(tmp_path: Path) -> None:
    class Empty(TinySource):
        def micro_batches(self, step: int) -> Sequence[Batch]:
            batches = super().micro_batches(step)
            for batch in batches if step == 1 else ():
                batch.loss_weights = torch.zeros_like(batch.loss_weights)
                batch.weight = 0.0
            return batches

    tiny_fit(tmp_path, steps=3, config=MOE, source=Empty(micro_rows=4))
    losses = [row["train_loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[1] == 0.0
    assert all(math.isfinite(loss) for loss in losses)


def test_the_balance_loss_is_learned_but_not_reported_as_loss(tmp_path: Path) -> None:
    def nothing(output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return output.hidden.sum() * 0.0, {}

    rows: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.tiny_run.cross_entropy", nothing)
        tiny_fit(
            tmp_path, steps=2, config=MOE, source=TinySource(micro_rows=2), on_step=lambda _, row: rows.append(row)
        )
    assert rows[0]["train_loss"] == 0.0
    assert rows[0]["aux_loss"] == pytest.approx(MOE.aux_loss_alpha, rel=0.2)  # alpha at uniform load, however split
    assert rows[0]["grad_norm"] > 0.0


def test_a_padding_micro_batch_weighs_nothing(tmp_path: Path) -> None:
    class Padded(TinySource):
        def micro_batches(self, step: int) -> Sequence[Batch]:
            batches = list(super().micro_batches(step))
            shape = batches[0].input_ids.shape
            zeros = torch.zeros(shape, dtype=torch.long)
            return [*batches, Batch(zeros, zeros, zeros, zeros - 1, torch.zeros(shape), 0.0)]

    plain, padded = TinySource(micro_rows=4), Padded(micro_rows=4)
    assert (
        tiny_fit(tmp_path / "a", steps=3, config=MOE, source=plain).metrics["train_loss"]
        == pytest.approx(tiny_fit(tmp_path / "b", steps=3, config=MOE, source=padded).metrics["train_loss"], rel=1e-6)
    )  # fmt: skip


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_source_that_dies_stops_the_run(tmp_path: Path, prefetch: bool) -> None:
    class Dying(TinySource):
        def micro_batches(self, step: int) -> Sequence[Batch]:
            if step == 6:
                raise DataError("rows.jsonl:7: gone")
            return super().micro_batches(step)

    with pytest.raises(DataError, match=r"rows\.jsonl:7: gone"):
        tiny_fit(tmp_path, source=Dying(prefetch=prefetch))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 6
    assert not [thread for thread in threading.enumerate() if thread.name == "minimind-prefetch"]
    assert tiny_fit(tmp_path).state_hash == tiny_fit(tmp_path / "whole").state_hash


def test_prefetching_changes_nothing(tmp_path: Path) -> None:
    ahead = tiny_fit(tmp_path / "ahead", source=TinySource(prefetch=True))
    assert ahead.state_hash == tiny_fit(tmp_path / "behind", source=TinySource(prefetch=False)).state_hash


def test_a_source_with_state_gets_it_back(tmp_path: Path) -> None:
    class Counting(TinySource):
        calls = 0

        def micro_batches(self, step: int) -> Sequence[Batch]:
            self.calls += 1
            return super().micro_batches(step + self.calls)

        def state(self) -> dict[str, Any]:
            return {**super().state(), "calls": self.calls}

        def load_state(self, saved: dict[str, Any]) -> None:
            self.calls = saved["calls"]

    tiny_fit(tmp_path / "cut", steps=5, source=Counting(prefetch=False), optim=OptimConfig(schedule="constant"))
    options: dict[str, Any] = {"prefetch": False}
    results = [
        tiny_fit(tmp_path / name, source=Counting(**options), optim=OptimConfig(schedule="constant"))
        for name in ("cut", "whole")
    ]
    assert results[0].state_hash == results[1].state_hash


def test_changed_data_tokenizer_model_and_optimizer_are_refused(tmp_path: Path) -> None:
    tiny_fit(tmp_path, steps=5)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="data changed: tiny in the checkpoint, other here"):
        tiny_fit(tmp_path, source=TinySource(fingerprint="other"))
    with pytest.raises(CheckpointError, match=r"of another model: tokenizer .*--fresh"):
        tiny_fit(tmp_path, tokenizer=train(["abab" * 9], MIN_VOCAB_SIZE + 1))
    with pytest.raises(CheckpointError, match="num_hidden_layers 2, here 3"):
        tiny_fit(tmp_path, config=replace(DENSE, num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="not that of muon"):
        tiny_fit(tmp_path, optim=OptimConfig(name="muon"))
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_changed_settings_are_named(tmp_path: Path, messages: list[str]) -> None:
    tiny_fit(tmp_path, steps=5)
    tiny_fit(tmp_path, steps=6, optim=OptimConfig(lr=1e-3, warmup_steps=2))
    assert any("steps 5 -> 6, lr 0.003 -> 0.001" in text for text in messages)


def test_a_corrupt_newest_checkpoint_is_passed_over(tmp_path: Path, messages: list[str]) -> None:
    whole = tiny_fit(tmp_path)
    path = tmp_path / "checkpoints" / "step-000010" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = tiny_fit(tmp_path)
    assert any("step-000010 is passed over" in text and "bytes, written with" in text for text in messages)
    assert any("resuming" in text and "step 5 of 10" in text for text in messages)
    assert again.state_hash == whole.state_hash
    assert checkpoint.verify(tmp_path / "checkpoints" / "step-000010") == []


def test_all_checkpoints_bad_is_exit_4_and_nothing_is_overwritten(tmp_path: Path) -> None:
    tiny_fit(tmp_path)
    for path in checkpoint.checkpoints_of(tmp_path):
        (path / "config.json").write_text("{}")
    before = sorted(
        (path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt"
    )
    with pytest.raises(CheckpointError, match="every checkpoint is bad"):
        tiny_fit(tmp_path)
    assert before == sorted(
        (path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt"
    )
    aside = RunDirectory(tmp_path).start_afresh()
    assert aside
    assert aside == tmp_path / "previous-1"
    assert (aside / "checkpoints" / "step-000010").is_dir()
    assert tiny_fit(tmp_path).steps == 10


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> None:
        if name == "optimizer-written" and (tmp_path / "checkpoints" / "step-000005").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(faults, "hook", full)
    with pytest.raises(OutOfResourcesError, match=r"step-000010: could not be written, it needs [\d,]+ bytes"):
        tiny_fit(tmp_path)
    monkeypatch.setattr(faults, "hook", None)
    assert [path.name for path in checkpoint.checkpoints_of(tmp_path)] == ["step-000005"]
    assert tiny_fit(tmp_path).state_hash == tiny_fit(tmp_path / "whole").state_hash


class CrashError(BaseException):
    """Stands for the process dying."""


EIGHT_STEPS: dict[str, Any] = {"steps": 8, "save_every": 2}


@pytest.fixture(scope="module")
def hash_of_eight_steps(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_fit(tmp_path_factory.mktemp("whole"), **EIGHT_STEPS).state_hash


@pytest.mark.parametrize("point", checkpoint.FAULT_POINTS)
def test_a_crash_at_any_point_of_a_save_is_resumed(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch, hash_of_eight_steps: str
) -> None:
    if point == "old-moved":
        pytest.skip("a run never writes a step twice")
    passed = 0

    def crash(name: str) -> None:
        nonlocal passed
        passed += name == point
        if passed == 2 or (point == "prune-renamed" and passed):
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(faults, "hook", crash)
        with pytest.raises(CrashError):
            tiny_fit(tmp_path, **EIGHT_STEPS)
    assert tiny_fit(tmp_path, **EIGHT_STEPS).state_hash == hash_of_eight_steps
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_compiled_training_agrees_and_saves_plain_names(tmp_path: Path, messages: list[str]) -> None:
    # "eager" traces as every back end does, and needs no compiler of C++.
    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: real(model, backend="eager"))  # type: ignore[no-untyped-call]
        compiled = tiny_fit(tmp_path / "compiled", steps=5, compile="on")
    assert sum(message.startswith("compiled, with the first step, in ") for message in messages) == 1
    plain = tiny_fit(tmp_path / "plain", steps=5)
    assert compiled.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-5)
    assert set(checkpoint.read(compiled.checkpoint).model_state) == set(Transformer(DENSE).state_dict_for_disk())


def test_compiling_only_where_it_pays() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert is_compiling_worth_it("on", cpu)
    assert not is_compiling_worth_it("off", cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda name: f"/bin/{name}")
        assert is_compiling_worth_it("auto", cuda)
        assert not is_compiling_worth_it("auto", cpu)
        patch.setattr("shutil.which", lambda _: None)
        assert not is_compiling_worth_it("auto", cuda)


def test_impossible_settings_are_all_named() -> None:
    problems = OptimConfig(lr=-1, beta1=1.0, eps=0.0, min_lr_ratio=2.0, clip=float("nan")).problems()
    assert [text.partition(" ")[0] for text in problems] == ["lr", "clip", "beta1", "min_lr_ratio", "eps"]
    found = LoopConfig(steps=5, keep=1, log_every=0, save_every=-1, trackers=("myspace",)).problems()
    assert [text.partition(" ")[0] for text in found] == ["save_every", "log_every", "keep", "trackers"]
    assert OptimConfig().problems() == []
    assert LoopConfig(steps=1).problems() == []
