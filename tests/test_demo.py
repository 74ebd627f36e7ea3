"""`minimind demo` with next to nothing to do: what it writes, and that an interrupted one goes on."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stages.tiny_stage import SHAPE, after_update, curve, exit_code, send

from minimind import checkpoint
from minimind.demo import chapter, settings
from minimind.model.config import ModelConfig
from minimind.training.metrics import read_metrics
from minimind.world import write as world

STEPS = 4
KEYS = ["stage", "metric", "before", "after", "control", "low", "high", "n", "target", "met", "seconds"]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Make everything small."""
    tokens = STEPS * settings.BATCH_TOKENS
    sizes = replace(world.SIZES["quick"], pretrain=60, sft=60, held_out=8, questions=1)
    shape: dict[str, Any] = {name.replace("-", "_"): value for name, value in SHAPE.items()}
    shape["max_position_embeddings"] = 2048
    model = ModelConfig(**shape)
    with pytest.MonkeyPatch.context() as patch:
        tiny_budget = replace(settings.QUICK, pretrain_tokens=tokens, sft_tokens=tokens, questions=1)
        patch.setattr(settings, "QUICK", tiny_budget)
        patch.setattr(settings, "VOCAB_SIZE", 400)
        patch.setattr(settings, "demo_model", lambda: model)
        patch.setattr(chapter, "ANSWER_TOKENS", 4)
        patch.setitem(world.SIZES, "quick", sizes)
        yield


def quick(out: Path, *flags: str) -> int:
    return exit_code(["demo", "--quick", "--out", str(out), "--device", "cpu", *flags])


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted demo."""
    out = tmp_path_factory.mktemp("whole")
    assert quick(out) == 0
    return out


def test_what_it_writes(whole: Path) -> None:
    rows = results(whole)
    assert all(list(row) == KEYS for row in rows)
    lines = (whole / "world" / "questions-test.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {f"{q['domain']} {q['language']}" for q in map(json.loads, lines) if q["set"] == "main"}
    assert len(asked) >= 40
    about = json.loads((whole / "world" / "world.json").read_text(encoding="utf-8"))
    floor = about["floor"]["pretrain-validation.jsonl"]["bits_per_byte"]
    for stage in ("pretrain", "sft"):
        own = {row["metric"]: row for row in rows if row["stage"] == stage}
        bits = own.pop("bits per byte")
        assert bits["after"] < bits["before"]
        if stage == "pretrain":
            assert bits["target"] == pytest.approx(1.15 * floor, abs=1e-4)
            assert bits["met"] is False  # four steps reach no floor
        else:
            assert bits["target"] is None
            assert bits["met"] is True
        assert set(own) == {name for name in asked if name.split()[0] in settings.taught(stage)}
        assert len(own) >= 22
        for row in own.values():
            assert 0 <= row["low"] <= row["after"] <= row["high"] <= 1
            assert row["n"] == 1
            assert row["met"] == (row["target"] is not None and row["after"] >= row["target"])
            assert row["target"] == (settings.TARGETS.get(row["metric"].rsplit(" ", 1)[0]) if stage == "sft" else None)
    report = (whole / "report.html").read_text(encoding="utf-8")
    assert report.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in report.replace("http://www.w3.org", "")  # nothing is loaded from anywhere
    assert "<script src" not in report
    assert "who-one" in report


def test_an_interrupted_demo_goes_on(whole: Path, tmp_path: Path) -> None:
    for stage in ("pretrain", "sft"):
        with after_update(2, send(signal.SIGINT)):
            assert quick(tmp_path) == 130
        assert checkpoint.read(tmp_path / stage / "latest").step == 2
        assert not (tmp_path / "results.json").exists()
    assert quick(tmp_path) == 0
    for stage in ("pretrain", "sft"):
        assert curve(tmp_path / stage) == curve(whole / stage)
        mine, theirs = (read_metrics(folder / stage / "metrics.jsonl") for folder in (tmp_path, whole))
        assert [row["val_loss"] for row in mine if "val_loss" in row] == [
            row["val_loss"] for row in theirs if "val_loss" in row
        ]
    assert _timeless(results(tmp_path)) == _timeless(results(whole))
    assert not list(tmp_path.glob("*/previous-*"))


def test_a_demo_on_another_world_moves_the_earlier_runs_aside(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "demo", symlinks=True)
    assert quick(out, "--seed", "1") == 0
    for stage in ("pretrain", "sft"):
        assert (out / stage / "previous-1" / "checkpoints" / f"step-{STEPS:06d}").is_dir()
        assert curve(out / stage) != curve(whole / stage)
    assert _timeless(results(out)) != _timeless(results(whole))
    said = " ".join("".join(capsys.readouterr()).split())
    assert all(f"── {part}" in said for part in ("World", "Tokenizer", "Pretraining", "Fine-tuning", "Report"))
    assert f"Report: {out / 'report.html'}" in said
    assert f"minimind chat {out / 'sft'}" in said


def test_every_stage_has_a_chapter_and_most_a_control(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "demo", symlinks=True)
    few = dict.fromkeys(
        ("lora", "reason", "manners", "dpo", "distill", "early", "later", "agent"), STEPS * settings.BATCH_TOKENS
    )
    budget = replace(settings.QUICK, rollouts=1, **{f"{name}_tokens": tokens for name, tokens in few.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "QUICK", budget)
        patch.setattr(settings, "ANSWER_TOKENS", 4)
        patch.setattr(settings, "student_model", settings.demo_model)
        for name in ("GRPO", "PPO", "SPO", "AGENT"):
            patch.setitem(getattr(settings, name), "prompts", 4)
        assert quick(out, "--stages", "all") == 0
    rows = results(out)
    assert [stage for stage in settings.STAGES if any(row["stage"] == stage for row in rows)] == list(settings.STAGES)
    for stage in settings.STAGES[2:]:
        assert all(row["control"] is not None for row in rows if row["stage"] == stage), stage
        assert any(row["met"] is not None for row in rows if row["stage"] == stage), stage
    assert (out / "images" / "rewards.png").stat().st_size > 1000
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(
        title in page for title in ("LoRA", "Reasoning", "DPO", "Distillation", "GRPO", "PPO", "SPO", "Tool agent")
    )


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(tmp_path / "out", "--stages", "dpo", "dop") == 2
    assert "dop: not one of pretrain, sft, lora" in " ".join(capsys.readouterr().err.split())


def test_two_budgets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(tmp_path, "--full") == 2
    assert "quick and full: choose one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    assert quick(tmp_path / "file") == 2
    assert "--out" in capsys.readouterr().err


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
