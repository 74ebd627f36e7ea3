"""`minimind dpo`: it learns the preference, for each loss; exactness; the reference; what is refused."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.test_exactness import INTERRUPTED, torchrun
from stages.tiny_pairs import HELD_OUT, PAIRS, pair
from stages.tiny_stage import Files, after_update, curve, exit_code, send, write_rows

from minimind import checkpoint
from minimind.config import parse
from minimind.stages import dpo
from minimind.stages.base import TrainingConfig
from minimind.stages.reference import scorer
from minimind.training.loop import FitResult
from minimind.training.metrics import read_metrics

Refused = Callable[..., str]
LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")
LOG_2 = math.log(2)


@pytest.fixture
def data(files: Files) -> Path:
    return write_rows(files.folder / "pairs.jsonl", PAIRS)


def argv(files: Files, data: Path, out: str, *more: str) -> list[str]:
    """The words after `minimind` of a short run in `out`."""
    flags = [*files.argv("sft", out, "--optim.lr", "1e-3", "--data.row-length", "128", data=data)[1:], *more]
    return ["dpo", *flags]


def train(words: list[str]) -> FitResult:
    return dpo.run(parse(dpo.Config, words[1:], command="dpo"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "train_loss" in row]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_teaches_the_preference(loss: str, files: Files, data: Path) -> None:
    validation = write_rows(files.folder / "held.jsonl", HELD_OUT)
    beta = {"simpo": "2", "ipo": "0.5"}.get(loss, "0.3")
    flags = (
        "--loss",
        loss,
        "--beta",
        beta,
        "--steps",
        "25",
        "--data.validation",
        str(validation),
        "--eval-every",
        "25",
    )
    train(argv(files, data, "run", *flags, "--batch-tokens", "512", "--optim.lr", "3e-3"))
    rows = rows_of(files.folder / "run")
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    looks = [row for row in read_metrics(files.folder / "run" / "metrics.jsonl") if "val_loss" in row]
    first, last = looks[0], looks[-1]
    assert last["val_loss"] < 0.8 * first["val_loss"]
    assert last["val_reward_accuracy"] > 0.9
    if loss == "kto":
        assert first["val_loss"] == pytest.approx(0.5, abs=1e-5)
        assert last["val_signed_reward"] > first["val_signed_reward"] + 0.3
    else:
        assert last["val_reward_margin"] > first["val_reward_margin"] + 0.3
    if loss == "dpo":
        assert rows[0]["train_loss"] == pytest.approx(LOG_2, abs=1e-5)
        assert first["val_loss"] == pytest.approx(LOG_2, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_policy_and_reference_are_equal_to_the_last_bit(dtype: str, files: Files, data: Path) -> None:
    flags = ("--dtype", dtype, "--data.validation", str(data), "--steps", "1")
    train(argv(files, data, "run", *flags))
    first = rows_of(files.folder / "run")[0]
    assert (first["reward_margin"], first["chosen_reward"], first["rejected_reward"]) == (0.0, 0.0, 0.0)
    assert first["train_loss"] == pytest.approx(LOG_2, rel=1e-7)
    look = next(row for row in read_metrics(files.folder / "run" / "metrics.jsonl") if "val_loss" in row)
    assert (look["val_reward_margin"], look["val_chosen_reward"]) == (0.0, 0.0)


def test_the_step_counts_pairs(files: Files, data: Path) -> None:
    train(argv(files, data, "run", "--steps", "1", "--data.packing", "padded", "--batch-tokens", str(128 * len(PAIRS))))
    (row,) = rows_of(files.folder / "run")
    assert row["step_weight"] == len(PAIRS)
    assert row["train_loss"] == pytest.approx(LOG_2, abs=1e-6)
    train(argv(files, data, "kto", "--steps", "1", "--loss", "kto", "--batch-tokens", str(128 * len(PAIRS))))
    (row,) = rows_of(files.folder / "kto")
    assert row["step_weight"] >= 2 * len(PAIRS)  # the rest of the batch is the next epoch's


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_ten_steps_are_five_and_resume_five(loss: str, files: Files, data: Path) -> None:
    flags = ("--loss", loss, "--save-every", "0", "--micro-batch-tokens", "128")
    whole = train(argv(files, data, "whole", *flags))
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(argv(files, data, "cut", *flags)) == INTERRUPTED
    assert checkpoint.read(files.folder / "cut" / "latest").step == 5
    resumed = train(argv(files, data, "cut", *flags))
    assert (resumed.steps, resumed.state_hash) == (10, whole.state_hash)
    assert curve(files.folder / "cut") == curve(files.folder / "whole")


def test_a_resumed_run_does_without_the_cache(files: Files, data: Path) -> None:
    def fresh(out: str) -> list[str]:
        return argv(files, data, out, "--data.cache-dir", str(files.folder / f"cache-{out}"))

    whole = train(fresh("whole"))
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(fresh("cut")) == INTERRUPTED
    (cached,) = (files.folder / "cache-cut").glob("reference-*.safetensors")
    cached.unlink()
    assert train(fresh("cut")).state_hash == whole.state_hash  # from the model started from, not the one trained


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_split_into_micro_batches_changes_nothing(loss: str, files: Files, data: Path) -> None:
    losses: dict[int, list[float]] = {}
    for tokens in (128, 512):
        flags = ("--loss", loss, "--batch-tokens", "512", "--micro-batch-tokens", str(tokens), "--save-every", "0")
        train(argv(files, data, str(tokens), *flags, "--beta", "0.5"))
        losses[tokens] = [row[1] for row in curve(files.folder / str(tokens))]
    assert losses[128] == pytest.approx(losses[512], rel=1e-5)
    assert losses[128][-1] < losses[128][0]


@pytest.mark.parametrize("loss", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_two_processes_are_one(loss: str, files: Files, data: Path) -> None:
    def words(out: str) -> list[str]:
        cache = ("--data.cache-dir", str(files.folder / f"cache-{out}"))  # each asks the reference itself
        return argv(files, data, out, "--loss", loss, "--batch-tokens", "512", "--steps", "6", *cache)

    train(words("one"))
    assert torchrun(words("two")) == 0
    for mine, other in zip(curve(files.folder / "two"), curve(files.folder / "one"), strict=True):
        assert mine[1] == pytest.approx(other[1], rel=1e-5)


def test_the_default_reference_is_where_it_starts_and_another_can_be_named(
    files: Files, data: Path, refused: Refused
) -> None:
    moved = train(argv(files, data, "moved", "--steps", "3"))
    base = str(files.base)
    by_default = train(argv(files, data, "by default", "--steps", "2"))
    named = train(argv(files, data, "named", "--steps", "2", "--reference", base))
    assert named.state_hash == by_default.state_hash
    other = train(argv(files, data, "other", "--steps", "2", "--reference", str(moved.checkpoint)))
    said = refused(2, *argv(files, data, "by default", "--steps", "4", "--reference", str(moved.checkpoint)))
    assert "the run was made with another reference" in said
    assert other.state_hash != by_default.state_hash
    first = rows_of(files.folder / "other")[0]
    assert first["reward_margin"] < 0  # the reference has learned the preference already, the policy has not


def test_the_score_of_the_reference_is_without_dropout_and_leaves_the_model_as_it_was(files: Files) -> None:
    from minimind.batch import Example
    from minimind.data.collate import collate
    from minimind.data.pairs import DOCUMENTS

    model, _ = checkpoint.load(files.base)

    for layer in model.model.layers:
        setattr(layer, "dropout", 0.5)  # noqa: B010 - a module types what is set on it
    batch = collate([[Example([5, 6, 7, 8], [0, 0, 1, 1])]], 8, 0)
    batch.extras[DOCUMENTS] = torch.tensor([[0]])
    score = scorer(model, TrainingConfig(device="cpu", dtype="float32"))
    model.train()
    first = score(batch)
    assert model.training
    assert torch.equal(first, score(batch))
    assert not first.requires_grad


def test_bad_rows_are_named(files: Files, refused: Refused) -> None:
    asked = PAIRS[0]["chosen"][:1]
    other = {"role": "user", "content": "Something else?"}
    cases = {
        "the two sides share no prompt": (
            {"chosen": PAIRS[0]["chosen"], "rejected": [other, PAIRS[0]["rejected"][1]]},
            "no user turn comes before the answers, expected a prompt that both share",
        ),
        "empty": (pair("Well?", "", "No."), "chosen: is empty, expected an answer"),
        "the same": (pair("Well?", "No.", "No."), "chosen: is equal to rejected: nothing to prefer"),
        "one side": ({"chosen": PAIRS[0]["chosen"]}, 'rejected: is missing, expected "chosen" and "rejected"'),
        "a label": (
            {"messages": PAIRS[0]["chosen"], "label": True},
            "one answer with a label, expected a pair: chosen and rejected (dpo --loss kto takes it)",
        ),
        "no answer": ({"chosen": asked, "rejected": PAIRS[0]["rejected"]}, "chosen"),
    }
    for name, (row, what) in cases.items():
        data = write_rows(files.folder / "bad.jsonl", [PAIRS[1], row])
        said = refused(3, *argv(files, data, "run"))
        assert "bad.jsonl:2: " in said, name
        assert what in said, name
        assert "--data.on-error skip" in said
        assert not [*files.folder.glob("run/checkpoints/*")]
    trained = train(
        argv(files, write_rows(files.folder / "bad.jsonl", [*PAIRS, {"chosen": []}]), "run", "--data.on-error", "skip")
    )
    assert trained.steps == 10


def test_kto_takes_labels_and_pairs(files: Files) -> None:
    rows = [{"messages": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)} for i, row in enumerate(PAIRS)]
    data = write_rows(files.folder / "labels.jsonl", [*rows, *PAIRS[:4]])
    train(argv(files, data, "run", "--loss", "kto", "--steps", "2"))
    row = rows_of(files.folder / "run")[0]
    assert row["train_loss"] == pytest.approx(0.5, abs=1e-5)
    assert 0 < row["desirable"] < 1
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)


def test_impossible_settings_are_refused_together(files: Files, data: Path, refused: Refused) -> None:
    said = refused(
        2, *argv(files, data, "run", "--beta", "0", "--loss", "simpo", "--length-averaged", "--reference", "x")
    )
    for what in (
        "beta = 0.0: must be above 0",
        "length_averaged: is for loss dpo; simpo has one form only",
        "reference: simpo has none; leave it out",
    ):
        assert what in said


def test_a_reference_with_another_tokenizer_is_refused(files: Files, data: Path, refused: Refused) -> None:
    folder = files.folder / "other"
    rows = str(files.world / "sft.jsonl")
    assert exit_code(["train-tokenizer", "--data", rows, "--out", str(folder), "--vocab-size", "300"]) == 0
    from stages.tiny_stage import train as pretrain

    pretrain(files.argv("pretrain", "theirs", "--steps", "1", "--tokenizer", str(folder)))
    said = refused(4, *argv(files, data, "run", "--reference", str(files.folder / "theirs")))
    assert "theirs: its tokenizer is " in said
    assert "both must read the same ids" in said
    assert not (files.folder / "run").exists()


def test_validation_changes_nothing(files: Files, data: Path) -> None:
    for loss in ("dpo", "kto"):
        flags = ("--loss", loss, "--steps", "2")
        plain = train(argv(files, data, f"{loss}-plain", *flags))
        watching = (
            "--data.validation",
            str(data),
            "--eval-every",
            "1",
            "--sample-every",
            "2" if loss == "dpo" else "0",
        )
        watched = train(argv(files, data, f"{loss}-watched", *flags, *watching))
        assert watched.state_hash == plain.state_hash
    assert (files.folder / "dpo-watched" / "samples.jsonl").read_text().count("\n") == 2 * 4
