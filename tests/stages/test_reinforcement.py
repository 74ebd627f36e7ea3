"""What GRPO, PPO and SPO promise alike: stopped, killed, split and repeated they are one and the same run."""

import math
import signal
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from stages.test_exactness import torchrun
from stages.tiny_rollouts import METHODS, TWO_BY_TWO, Method, argv, learn, prompts, rows_of
from stages.tiny_stage import Files, after_update, send, write_rows

from minimind import checkpoint
from minimind.config import from_toml
from minimind.errors import CheckpointError, ConfigError, DataError, Interrupted
from minimind.inference.engine import Engine
from minimind.inference.request import Completion
from minimind.training.metrics import read_metrics


class Crash(BaseException):
    """Stands for the death of the process."""


def crashing_at(call: int) -> Any:
    """Return a patch under which the process dies in the middle of rollout number `call` (from 1)."""
    generate, calls = Engine.generate, [0]

    def dying(engine: Engine, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        found = generate(engine, *arguments, **options)
        if calls[0] == call:
            raise Crash
        return found

    return mock.patch.object(Engine, "generate", dying)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [2, 4], ids=["in the middle of a rollout", "between rollouts"])
def test_stopped_and_resumed_is_one_run(method: Method, stop: int, files: Files) -> None:
    flags = (*TWO_BY_TWO, "--steps", "9", "--beta", "0.05")
    whole = learn(argv(files, method, "whole", *flags))
    with after_update(stop, send(signal.SIGINT)), pytest.raises(Interrupted):
        learn(argv(files, method, "cut", *flags))
    saved = checkpoint.read(files.folder / "cut" / "latest")
    assert saved.step == stop
    assert bool(saved.state["batches"]["trajectories"]) is (stop == 2)
    resumed = learn(argv(files, method, "cut", *flags))
    assert (resumed.steps, resumed.tokens, resumed.state_hash) == (9, whole.tokens, whole.state_hash)
    assert rows_of(files.folder / "cut") == rows_of(files.folder / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_the_middle_of_a_rollout_it_is_played_again(method: Method, files: Files) -> None:
    flags = ("--steps", "5", "--save-every", "2", "--rollout-epochs", "1", "--minibatches", "1")
    whole = learn(argv(files, method, "whole", *flags))
    with crashing_at(4), pytest.raises(Crash):  # one step after the checkpoint of step 2
        learn(argv(files, method, "cut", *flags))
    assert checkpoint.read(files.folder / "cut" / "latest").step == 2
    assert learn(argv(files, method, "cut", *flags)).state_hash == whole.state_hash
    assert rows_of(files.folder / "cut") == rows_of(files.folder / "whole")
    assert learn(argv(files, method, "again", *flags)).state_hash == whole.state_hash
    assert learn(argv(files, method, "other", *flags, "--seed", "1")).state_hash != whole.state_hash


@pytest.mark.parametrize("method", METHODS)
def test_validation_samples_and_micro_batches_change_nothing(method: Method, files: Files) -> None:
    held_out = prompts(files.folder, 5)
    watching = ("--data.validation", str(held_out), "--eval-every", "2", "--sample-every", "2")
    plain = learn(argv(files, method, "plain", "--steps", "4"))
    watched = learn(argv(files, method, "watched", "--steps", "4", *watching))
    assert watched.state_hash == plain.state_hash
    seen = [row for row in read_metrics(files.folder / "watched" / "metrics.jsonl") if "val_reward" in row]
    assert [row["step"] for row in seen] == [0, 2, 4]
    assert {"val_reward/length", "val_reward/repetition", "val_answer_tokens", "val_truncated"} <= seen[0].keys()
    assert (files.folder / "watched" / "samples.jsonl").read_text().count('"reward"') == 2 * 4
    learn(argv(files, method, "split", "--steps", "4", "--micro-batch-tokens", "1", "--data.row-length", "64"))
    for split, whole in zip(rows_of(files.folder / "split"), rows_of(files.folder / "plain"), strict=True):
        assert split["reward"] == whole["reward"]
        assert split["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "method", ["grpo", pytest.param("ppo", marks=pytest.mark.slow), pytest.param("spo", marks=pytest.mark.slow)]
)
def test_two_processes_are_one(method: Method, files: Files) -> None:
    # Five prompts a rollout: one process plays three of them, the other two.
    flags = (*TWO_BY_TWO, "--prompts", "5", "--steps", "8", "--beta", "0.05", "--micro-batch-tokens", "64")
    learn(argv(files, method, "one", *flags))
    assert torchrun(argv(files, method, "two", *flags)) == 0
    ones, twos = rows_of(files.folder / "one"), rows_of(files.folder / "two")
    assert len(ones) == len(twos) == 8
    for one, two in zip(ones, twos, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_refused_before_anything_is_trained(method: Method, files: Files) -> None:
    def refused(error: type[Exception], *more: str, data: Path | None = None) -> str:
        with pytest.raises(error) as found:
            learn(argv(files, method, "bad", *more, data=data))
        assert not list((files.folder / "bad").glob("checkpoints/*"))
        return str(found.value)

    rows = [{"prompt": "one", "answer": "two"}, {"prompt": "three " * 200, "answer": "four"}]
    long = write_rows(files.folder / "long.jsonl", rows)
    assert f"{long}:2: the prompt has" in refused(DataError, data=long)
    assert learn(argv(files, method, "good", "--data.on-error", "skip", "--steps", "1", data=long)).steps == 1
    broken = write_rows(files.folder / "broken.jsonl", ["{", *rows[:1]])
    assert f"{broken}:1" in refused(DataError, data=broken)
    assert "no reward" in refused(ConfigError, "--rewards", "nonsense")
    assert "needs 'grader'" in refused(DataError, "--rewards", "grade")
    assert "temperature = 0.0" in refused(ConfigError, "--temperature", "0")
    assert "batch_tokens" in refused(ConfigError, "--batch-tokens", "64")
    assert "held out" in refused(DataError, "--data.validation-fraction", "0.99999")


@pytest.mark.parametrize("method", METHODS)
def test_another_run_is_not_resumed(method: Method, files: Files) -> None:
    learn(argv(files, method, "run", "--steps", "2"))
    with pytest.raises(DataError, match="the prompts changed since the checkpoint"):
        learn(argv(files, method, "run", "--steps", "3", data=prompts(files.folder, 6)))
    prompts(files.folder)
    with pytest.raises(ConfigError, match="max_tokens was 24 and is 20"):
        learn(argv(files, method, "run", "--steps", "3", "--max-tokens", "20"))
    other: Method = "spo" if method == "ppo" else "ppo"
    with pytest.raises((CheckpointError, ConfigError)):
        learn(argv(files, other, "run", "--steps", "3"))


FAILING = """
import math

def lazy(prompt, answer):
    return math.nan if len(answer.written) % 2 else 1.0 * len(answer.written)

def never(prompt, answer):
    raise ValueError("never")
"""


@pytest.mark.parametrize("method", METHODS)
def test_rewards_that_fail_are_masked_and_counted(method: Method, files: Files) -> None:
    file = files.folder / "failing.py"
    file.write_text(FAILING)
    learn(argv(files, method, "some", "--rewards", f"{file}:lazy", "--steps", "2"))
    rows = rows_of(files.folder / "some")
    assert 0 < rows[0]["reward_masked"] < 1
    assert rows[0]["reward_faults/lazy"] > 0
    learn(argv(files, method, "none", "--rewards", f"{file}:never", "--steps", "2"))
    (first, second) = rows_of(files.folder / "none")
    assert (first["reward_masked"], first["step_weight"], first["grad_norm"], first["train_loss"]) == (1, 1, 0, 0)
    assert second["reward_faults/never"] == second["reward_masked"] * (12 if method == "grpo" else 4)


@pytest.mark.parametrize("method", METHODS)
def test_empty_answers_are_judged_and_teach_what_they_can(method: Method, files: Files) -> None:
    def generate(_: Engine, asked: Sequence[Any], __: Any) -> list[Completion]:
        return [
            Completion([], [], "cancelled") if i % 2 else Completion([2], [-1.0], "stop") for i in range(len(asked))
        ]

    with mock.patch.object(Engine, "generate", generate):
        result = learn(argv(files, method, "run", "--rewards", "exact_answer", "length", "format", "--steps", "2"))
    rows = rows_of(files.folder / "run")
    assert [row["answer_tokens"] for row in rows] == [0.5, 0.5]
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    assert rows[0]["reward/length"] == -0.5
    assert result.steps == 2


HISTORICAL: dict[Method, dict[str, Any]] = {
    "grpo": {"lr": 8e-8, "prompts": 2, "samples": 8, "aggregation": "sequence", "beta": 0.02},
    "ppo": {"lr": 8e-8, "critic_lr": 8e-8, "prompts": 2, "clip": 0.1, "value_coefficient": 0.5, "beta": 0.02},
    "spo": {"lr": 1e-7, "prompts": 2 * 4, "baseline": "global", "beta": 0.02},
}


@pytest.mark.parametrize("method", METHODS)
def test_historical_settings(method: Method, repository: Path) -> None:
    module = import_module(f"minimind.stages.{method}")
    config = from_toml(module.Config, repository / "recipes" / f"{method}-minimind2-small.toml")
    found = {name: config.optim.lr if name == "lr" else getattr(config, name) for name in HISTORICAL[method]}
    assert found == HISTORICAL[method]
    assert (config.max_tokens, config.epochs, config.optim.schedule) == (1536, 1.0, "cosine")
    assert config.rewards[:2] == ("format", "tags")
    assert config.rewards[2].startswith("transformers-mixed:")
