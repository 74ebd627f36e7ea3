"""What must be equal bit for bit, or to 1e-6: resumed and uninterrupted, run twice, split one way and another."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.tiny_run import DENSE, MOE, TinySource, tiny_fit

from minimind import checkpoint
from minimind.model.config import ModelConfig
from minimind.training.config import OptimConfig
from minimind.training.metrics import read_metrics

SCRIPT = Path(__file__).parents[1] / "training" / "tiny_run.py"
ADAMW = OptimConfig(lr=3e-3, warmup_steps=2)
MUON = OptimConfig(name="muon", lr=3e-3, muon_lr=0.01, warmup_steps=2)
MUON_FP32 = replace(MUON, muon_dtype="float32")
CASES = {
    "dense-adamw-fp32": (DENSE, ADAMW, "float32"),
    "dense-muon-bf16": (DENSE, MUON, "bfloat16"),
    "moe-adamw-bf16": (MOE, ADAMW, "bfloat16"),
    "moe-muon-fp32": (MOE, MUON_FP32, "float32"),
    "dropout-adamw-fp16": (replace(DENSE, dropout=0.2), ADAMW, "float16"),
}


class Stop(BaseException):
    """Ends a run from inside, as a crash does."""


def stop_after(step: int) -> dict[str, Any]:
    def on_step(done: int, _: dict[str, Any]) -> None:
        if done == step:
            raise Stop

    return {"on_step": on_step}


def curve(run: Path) -> list[tuple[float, float, float]]:
    return [(row["step"], row["train_loss"], row["grad_norm"]) for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_five_and_resume_five(case: str, tmp_path: Path) -> None:
    config, optim, dtype = CASES[case]
    options: dict[str, Any] = {"config": config, "optim": optim, "dtype": dtype}
    whole = tiny_fit(tmp_path / "whole", **options)
    assert tiny_fit(tmp_path / "again", **options).state_hash == whole.state_hash  # the same seed twice
    with pytest.raises(Stop):
        tiny_fit(tmp_path / "cut", **options, **stop_after(8))  # three steps after the checkpoint are made again
    assert len(curve(tmp_path / "cut")) == 8
    resumed = tiny_fit(tmp_path / "cut", **options)
    assert resumed.state_hash == whole.state_hash
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert (resumed.steps, resumed.tokens) == (whole.steps, whole.tokens) == (10, 960)


def test_a_finished_run_stays_and_another_seed_differs(tmp_path: Path) -> None:
    whole = tiny_fit(tmp_path / "whole")
    before = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert tiny_fit(tmp_path / "whole").state_hash == whole.state_hash  # nothing left to do
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == before
    assert tiny_fit(tmp_path / "other", seed=1).state_hash != whole.state_hash


def test_validation_and_samples_change_nothing(tmp_path: Path) -> None:
    config = replace(DENSE, dropout=0.2)

    def noisy() -> dict[str, float]:
        return {"val_loss": torch.rand(()).item()}

    def sample(step: int) -> list[dict[str, Any]]:
        return [{"text": str(torch.rand(()).item())}]

    plain = tiny_fit(tmp_path / "plain", config=config)
    watched = tiny_fit(tmp_path / "watched", config=config, validate=noisy, sample=sample, eval_every=1, sample_every=2)
    assert watched.state_hash == plain.state_hash


@pytest.mark.parametrize(("config", "optim"), [(DENSE, MUON_FP32), (MOE, ADAMW)], ids=["dense-muon", "moe-adamw"])
def test_the_split_into_micro_batches_changes_nothing(config: ModelConfig, optim: OptimConfig, tmp_path: Path) -> None:
    curves: dict[int, list[float]] = {}
    for micro_rows in (8, 1):
        run = tmp_path / str(micro_rows)
        tiny_fit(run, steps=20, save_every=0, config=config, optim=optim, source=TinySource(micro_rows=micro_rows))
        curves[micro_rows] = [row["train_loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert len(curves[8]) == 20
    assert curves[1] == pytest.approx(curves[8], rel=1e-6)
    assert curves[8][-1] < curves[8][0] - 0.1


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    # Against the definition, with nothing of the loop: all rows at once, one plain cross-entropy, no division trick.
    import torch.nn.functional as F

    from minimind.model.transformer import Transformer
    from minimind.runtime.seed import seed_all

    seen: list[dict[str, Any]] = []
    source = TinySource(micro_rows=2)
    tiny_fit(tmp_path, steps=1, source=source, on_step=lambda _, row: seen.append(row))
    seed_all(0)
    model = Transformer(DENSE)
    (batch,) = replace(source, micro_rows=8).micro_batches(0)
    losses = F.cross_entropy(model(batch.input_ids).logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    loss = (losses * batch.loss_weights.flatten()).sum() / batch.loss_weights.sum()
    loss.backward()
    assert seen[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert seen[0]["grad_norm"] == pytest.approx(
        float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])), rel=1e-5
    )
    assert loss.item() == pytest.approx(math.log(DENSE.vocab_size), abs=0.1)


def torchrun(run: Path, *flags: str, processes: int = 2, check: bool = True, fault: str = "") -> str:
    """Train with the script under torchrun; returns what it said on stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "MINIMIND_FAULT": fault}
    ended = subprocess.run(
        [*command, str(SCRIPT), str(run), *flags], capture_output=True, text=True, env=environment, timeout=180
    )
    assert (ended.returncode == 0) == check, ended.stderr
    return ended.stderr


@pytest.mark.parametrize(
    "flags",
    [("--optim", "muon"), pytest.param(("--moe", "--micro-rows", "2"), marks=pytest.mark.slow)],
    ids=["dense", "moe"],
)
def test_two_processes_are_one(tmp_path: Path, flags: tuple[str, ...]) -> None:
    torchrun(tmp_path / "two", "--steps", "20", "--save-every", "10", *flags)
    is_moe = "--moe" in flags
    tiny_fit(
        tmp_path / "one",
        steps=20,
        save_every=10,
        config=MOE if is_moe else DENSE,
        optim=ADAMW if is_moe else MUON_FP32,
    )
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 20
    for ours, theirs in zip(one, two, strict=True):
        for key in ("train_loss", "aux_loss", "correct", "step_tokens", "step_weight"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-6), (ours["step"], key)
    saved = json.loads((tmp_path / "two" / "latest" / "state.json").read_text())
    assert len(saved["rng"]) == 2
    # The saved names carry no prefix, and one process goes on where two stopped.
    resumed = tiny_fit(
        tmp_path / "two", steps=22, config=MOE if is_moe else DENSE, optim=ADAMW if is_moe else MUON_FP32
    )
    assert resumed.steps == 22


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 1)], ids=str)
def test_the_number_of_processes_may_change_at_every_resume(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    run, flags = tmp_path / "run", ("--steps", "12", "--save-every", "2", "--micro-rows", "4")
    for processes, fault in zip(sizes, ("pruned:2", "pruned:2", ""), strict=True):  # killed after steps 4 and 8
        torchrun(run, *flags, processes=processes, fault=fault, check=not fault)
    tiny_fit(tmp_path / "whole", steps=12, save_every=2, source=TinySource(micro_rows=4), optim=ADAMW)
    changed, whole = (read_metrics(path / "metrics.jsonl") for path in (run, tmp_path / "whole"))
    assert [row["step"] for row in changed] == list(range(1, 13))
    for ours, theirs in zip(changed, whole, strict=True):
        assert (ours["tokens"], ours["step_weight"]) == (theirs["tokens"], theirs["step_weight"])
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)


@pytest.mark.slow
def test_nan_on_one_of_two_ranks_changes_no_weight_on_any(tmp_path: Path) -> None:
    assert "step 8: loss nan" in torchrun(tmp_path, "--poison-step", "7", "--save-every", "7", check=False)
    kept = sorted(path.name for path in (tmp_path / "diverged").glob("*.safetensors"))
    assert kept == ["step-000008-rank-0.safetensors", "step-000008-rank-1.safetensors"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 7
    latest = checkpoint.find_latest(tmp_path)
    assert latest
    mended = tiny_fit(tmp_path, save_every=7)
    assert mended.metrics["train_loss"] == pytest.approx(
        tiny_fit(tmp_path / "whole", save_every=7).metrics["train_loss"], rel=1e-6
    )


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_on_every_rank_alike(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "stderr").open("w") as log:
        process = subprocess.Popen(
            [*command, str(tmp_path / "run"), "--steps", "500", "--delay", "0.05"], env=environment, stderr=log
        )
        while not any(row["step"] >= 4 for row in read_metrics(tmp_path / "run" / "metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) != 0
    found = checkpoint.find_latest(tmp_path / "run")
    assert found
    saved = checkpoint.read(found)
    assert saved.step == read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert len(saved.state["rng"]) == 2
    assert "stopped and saved: step" in (tmp_path / "stderr").read_text()
