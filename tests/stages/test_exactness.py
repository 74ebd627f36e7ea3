"""Whole commands, equal bit for bit or to 1e-6: stopped and resumed, run twice, split one way and another."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stages.tiny_stage import DENSE, MOE, MUON, STAGES, Files, Stage, after_update, curve, exit_code, send, train

from minimind import checkpoint

INTERRUPTED, KILLED_BY_CHILD = 130, 1
OPTIMIZERS = {"adamw": (), "muon": MUON}


class Crash(BaseException):
    """Stands for the death of the process."""


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_are_five_and_resume_five(stage: Stage, optimizer: str, files: Files) -> None:
    # Packed rows, two micro-batches a step, dropout (so that random numbers matter), in the middle of an epoch.
    shape = (*DENSE, "--model.dropout", "0.1")
    flags = ("--micro-batch-tokens", "128", "--save-every", "0", *OPTIMIZERS[optimizer])

    def argv(out: str, *more: str) -> list[str]:
        return files.argv(stage, out, *flags, *more, shape=shape)

    whole = train(argv("whole"))
    assert train(argv("again")).state_hash == whole.state_hash
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(argv("cut")) == INTERRUPTED
    saved = checkpoint.read(files.folder / "cut" / "latest")
    assert saved.step == 5
    batches = saved.state["batches"]
    assert (5 * batches["batch_rows"]) % batches["num_rows"]  # in the middle of an epoch
    resumed = train(argv("cut"))
    assert (resumed.steps, resumed.tokens, resumed.state_hash) == (10, whole.tokens, whole.state_hash)
    assert curve(files.folder / "cut") == curve(files.folder / "whole")
    assert train(argv("other", "--seed", "1")).state_hash != whole.state_hash


def test_a_crash_between_checkpoints_and_past_an_epoch_changes_nothing(files: Files) -> None:
    flags = ("--batch-tokens", "1024", "--steps", "12", "--save-every", "4")
    whole = train(files.argv("sft", "whole", *flags))
    with after_update(11, crash), pytest.raises(Crash):  # three steps after the checkpoint are made again
        train(files.argv("sft", "cut", *flags))
    saved = checkpoint.read(files.folder / "cut" / "latest")
    assert saved.step == 8
    assert 8 * saved.state["batches"]["batch_rows"] > saved.state["batches"]["num_rows"]  # the second epoch has begun
    assert train(files.argv("sft", "cut", *flags)).state_hash == whole.state_hash
    assert curve(files.folder / "cut") == curve(files.folder / "whole")


def test_validation_and_samples_change_nothing(files: Files) -> None:
    shape = (*DENSE, "--model.dropout", "0.1")
    validation = str(files.world / "pretrain-validation.jsonl")
    watching = ("--data.validation", validation, "--eval-every", "2", "--sample-every", "3")
    plain = train(files.argv("pretrain", "plain", shape=shape))
    watched = train(files.argv("pretrain", "watched", *watching, shape=shape))
    assert watched.state_hash == plain.state_hash
    assert (files.folder / "watched" / "samples.jsonl").read_text().count("\n") == 5 * 4  # steps 0, 3, 6, 9, 10


@pytest.mark.parametrize("stage", STAGES)
def test_the_split_into_micro_batches_changes_nothing(stage: Stage, files: Files) -> None:
    losses: dict[int, list[float]] = {}
    for micro_tokens in (64, 128):  # 1 x 8 and 2 x 4 rows
        flags = ("--batch-tokens", "512", "--micro-batch-tokens", str(micro_tokens), "--steps", "20")
        train(files.argv(stage, str(micro_tokens), *flags, "--save-every", "0"))
        losses[micro_tokens] = [row[1] for row in curve(files.folder / str(micro_tokens))]
    assert len(losses[64]) == 20
    assert losses[64] == pytest.approx(losses[128], rel=1e-6)
    assert losses[64][-1] < losses[64][0] - 0.3


def torchrun(argv: list[str], *, processes: int = 2, fault: str = "") -> int:
    """Run `minimind` with these words under torchrun and return the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIMIND_FAULT": fault}
    done = subprocess.run(
        [*command, "-m", "minimind", *argv], capture_output=True, env=environment, cwd=Path(__file__).parents[2]
    )
    return done.returncode


def assert_curves_agree(ours: Path, theirs: Path, *, steps: int) -> None:
    mine, other = curve(ours), curve(theirs)
    assert [row[0] for row in mine] == list(range(1, steps + 1))
    for a, b in zip(mine, other, strict=True):
        assert (a[0], a[3], a[4]) == (b[0], b[3], b[4])  # learning rate and tokens
        assert a[1] == pytest.approx(b[1], rel=1e-6)


def test_one_two_and_one_process_are_one_run(files: Files) -> None:
    # 8 rows a step as 8 x 1, then as two processes of 4 rows (killed after a checkpoint), then as 2 x 4.
    flags = ("--batch-tokens", "512", "--steps", "20", "--save-every", "6")
    train(files.argv("pretrain", "whole", *flags))
    with after_update(4, send(signal.SIGTERM)):
        assert exit_code(files.argv("pretrain", "run", *flags, "--micro-batch-tokens", "64")) == 75
    assert torchrun(files.argv("pretrain", "run", *flags), fault="pruned:2") == KILLED_BY_CHILD
    saved = checkpoint.read(files.folder / "run" / "latest")
    assert (saved.step, len(saved.state["rng"])) == (12, 2)
    train(files.argv("pretrain", "run", *flags, "--micro-batch-tokens", "256"))
    assert_curves_agree(files.folder / "run", files.folder / "whole", steps=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "shape"), [("pretrain", DENSE), ("pretrain", MOE), ("sft", DENSE)], ids=["pretrain", "moe", "sft"]
)
def test_two_processes_are_one(stage: Stage, shape: tuple[str, ...], files: Files) -> None:
    flags = ("--batch-tokens", "512", "--steps", "20", "--save-every", "6")
    train(files.argv(stage, "one", *flags, shape=shape))
    assert torchrun(files.argv(stage, "two", *flags, shape=shape)) == 0
    assert_curves_agree(files.folder / "two", files.folder / "one", steps=20)
