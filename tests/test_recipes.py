"""Every recipe loads, its numbers are consistent, and the historical ones are the historical ones."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minimind.config import from_toml, parse

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.toml"))
STAGES = Path(__file__).resolve().parent.parent / "minimind" / "stages"
COMPLETE = ("pretrain", "sft", "dpo")
"""Stages with a recipe for each published model."""

HISTORICAL: dict[str, dict[str, Any]] = {
    "pretrain": {"lr": 5e-4, "rows_a_pass": 32, "passes": 8, "row_length": 340, "epochs": 1.0},
    "sft": {"lr": 1e-6, "rows_a_pass": 16, "passes": 1, "row_length": 340, "epochs": 2.0},
    "distill": {"lr": 5e-6, "rows_a_pass": 32, "passes": 1, "row_length": 340, "epochs": 6.0},
    "dpo": {"lr": 4e-8, "rows_a_pass": 4, "passes": 1, "row_length": 2 * 1024, "epochs": 1.0},
}
SHAPES = {"minimind2-small": (512, 8), "minimind2": (768, 16), "minimind2-moe": (640, 8), "minimind3": (768, 8)}


def stage_of(path: Path) -> str:
    """The longest beginning of the name that is a stage."""
    words = path.stem.split("-")
    names = ["-".join(words[:count]) for count in range(len(words), 0, -1)]
    return next(name for name in names if (STAGES / f"{name.replace('-', '_')}.py").exists())


def model_of(path: Path) -> str:
    return path.stem.removeprefix(f"{stage_of(path)}-")


def load(path: Path) -> Any:
    stage = stage_of(path)
    module = import_module(f"minimind.stages.{stage.replace('-', '_')}")
    return parse(module.Config, ["--config", str(path)], command=stage)


def test_there_is_a_recipe_for_each_published_model() -> None:
    names = {path.stem for path in RECIPES}
    models = ["minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"]
    assert names >= {f"{stage}-{model}" for stage in COMPLETE for model in models}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_batch_divides(path: Path) -> None:
    config = load(path)
    assert config == from_toml(type(config), path)
    length, micro = config.data.row_length, config.micro_batch_tokens or config.batch_tokens
    assert config.batch_tokens % micro == 0
    assert not length or micro % length == 0  # reinforcement learning makes rows of its own lengths
    assert config.out.parent.name == model_of(path)
    assert f"--config recipes/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("sft")], ids=lambda path: path.stem)
def test_fine_tuning_starts_where_the_pretraining_recipe_ends(path: Path) -> None:
    before = load(path.with_name(path.name.replace("sft-", "pretrain-")))
    assert load(path).init_from == before.out


OLD = [p for p in RECIPES if "minimind2" in p.stem and stage_of(p) in HISTORICAL]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_historical_settings(path: Path) -> None:
    config, known = load(path), HISTORICAL[stage_of(path)]
    length, micro = config.data.row_length, config.micro_batch_tokens or config.batch_tokens
    found = {
        "lr": config.optim.lr,
        "rows_a_pass": micro // length,
        "passes": config.batch_tokens // micro,
        "row_length": length,
        "epochs": config.epochs,
    }
    assert found == known
    assert (config.optim.name, config.optim.schedule, config.optim.warmup_steps) == ("adamw", "cosine", 0)
    assert (config.optim.min_lr_ratio, config.optim.clip, config.data.packing) == (0.1, 1.0, "padded")


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("pretrain")], ids=lambda path: path.stem)
def test_shapes_and_the_sizes_that_the_comments_tell(path: Path) -> None:
    model = load(path).model
    name = path.stem.removeprefix("pretrain-")
    assert (model.hidden_size, model.num_hidden_layers) == SHAPES.get(name, (768, 8))
    assert model.use_moe == name.endswith("moe")
    told = re.findall(r"(\d+)M", path.read_text(encoding="utf-8").splitlines()[0])
    counted = model.num_parameters()
    assert [abs(int(number) * 1e6 / count - 1) < 0.01 for number, count in zip(told, counted, strict=False)] == [
        True
    ] * len(told)
