"""Twenty steps whose losses are known: a change that moves them must say why in its commit.

    MINIMIND_WRITE_GOLDEN=1 python -m pytest tests/golden    # write them anew, after deciding that they should change

The tolerance covers other processors and versions of torch, not other mathematics.
"""

import json
import os
from pathlib import Path

import pytest
from training.tiny_run import DENSE, MOE, tiny_fit

from minimind.training.config import OptimConfig
from minimind.training.metrics import read_metrics

GOLDEN = Path(__file__).with_name("trajectories.json")
RUNS = {
    "dense adamw cosine": (DENSE, OptimConfig(lr=3e-3, warmup_steps=2)),
    "dense muon wsd": (DENSE, OptimConfig(name="muon", lr=3e-3, schedule="wsd", muon_dtype="float32")),
    "moe adamw constant": (MOE, OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.0)),
}


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_go_where_they_went(tmp_path: Path, name: str) -> None:
    config, optim = RUNS[name]
    tiny_fit(tmp_path, steps=20, config=config, optim=optim)
    losses = [row["train_loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "train_loss" in row]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    if os.environ.get("MINIMIND_WRITE_GOLDEN"):
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(known | {name: [round(loss, 6) for loss in losses]}, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=2e-4)
