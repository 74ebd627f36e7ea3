"""The pieces that every figure in benchmarks/results/ goes through."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

SCRIPT = """
import json, sys, time
from pathlib import Path
import contest

LOG = Path(sys.argv[0]).with_name("log")

def make(task, name, speeds):
    speeds = iter(speeds)
    def play():
        with LOG.open("a") as log:
            print(name, file=log)
        print("noise on stdout")
        return {"tokens_per_second": next(speeds), "factor": task["factor"]}
    return play

def broken(task):
    raise ValueError("no such shape")

SIDES = [
    contest.Contender("slow", lambda task: make(task, "slow", [0, 1, 9, 2])),
    contest.Contender("fast", lambda task: make(task, "fast", [0, 4, 5, 6])),
    contest.Contender("broken", broken),
]
options = contest.parser("doc", rounds=3).parse_args()
if options.worker:
    contest.work(SIDES, options.worker)
else:
    results = contest.race(SIDES, {"factor": 7}, options)
    contest.report("title", results, ["slow"], ceilings={"fast": 50.0})
    print(json.dumps(results))
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a script of the folder as Python does when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_race_plays_in_turn_and_takes_medians(tmp_path: Path) -> None:
    script = tmp_path / "race.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n{SCRIPT}")
    done = subprocess.run([sys.executable, str(script), "--threads", "1"], capture_output=True, text=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "log").read_text().split() == ["slow", "fast"] * 4  # the first of each is the warming up
    assert results["slow"]["tokens_per_second"] == 2
    assert results["slow"]["rounds"] == [1, 9, 2]
    assert results["fast"]["times_best_peer"] == 2.5
    assert results["fast"]["share_of_limit"] == 0.1
    assert results["fast"]["factor"] == 7
    assert results["fast"]["peak_rss_bytes"] > 2**20
    assert results["broken"] == {"error": "ValueError: no such shape"}
    assert "broken                           ValueError" in done.stdout


def test_documents_end_to_end_are_asked_for_every_token_but_the_openings(benchmarks: Any) -> None:
    script = benchmarks("real_text_peer")
    documents = [[1, *range(5, 5 + size), 2] for size in (700, 3, 500)]
    stream = np.concatenate(documents).astype(np.uint16)
    batches = list(script.end_to_end(SimpleNamespace(ids=stream), bos_id=1))
    asked = [label for batch in batches for label in batch.labels[batch.loss_weights > 0].tolist()]
    assert asked == [token for document in documents for token in document[1:]]
    assert sum(batch.weight for batch in batches) == len(asked)
    for batch in batches:
        assert (batch.labels[:, :-1] == batch.input_ids[:, 1:]).all()
        assert not batch.documents.any()


def test_conversations_have_the_length_that_the_name_says(benchmarks: Any, tmp_path: Path) -> None:
    script = benchmarks("sft_mixed")
    found = script.write_documents(tmp_path / "documents.json", 6400)
    documents = json.loads((tmp_path / "documents.json").read_text())
    assert abs(found["mean"] - script.MEAN) < 5
    assert max(map(len, documents)) == found["max"] == script.LENGTH


def test_peers_have_our_shapes(benchmarks: Any) -> None:
    from minimind.model.config import ModelConfig

    shapes = benchmarks("training_step").shapes()
    transformers = pytest.importorskip("transformers")
    for family, preset, more in (("llama", "small", 0), ("granitemoeshared", "moe", 0), ("qwen2_moe", "moe", 8 * 1600)):
        shape = dict(shapes[family])
        config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        with importlib.import_module("torch").device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        # Qwen2-MoE has biases on queries, keys and values, and a gate on the shared expert.
        assert sum(p.numel() for p in model.parameters()) == ModelConfig.from_preset(preset).num_parameters()[0] + more
