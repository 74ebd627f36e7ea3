"""Our reward model as a reward: its value at the end token of the whole conversation, as it was trained."""

import math

import pytest
import torch
from stages.tiny_rollouts import argv, learn, rows_of
from stages.tiny_stage import Files

from minimind import checkpoint
from minimind.checkpoint import load
from minimind.errors import CheckpointError, ConfigError
from minimind.model.heads import ScalarModel
from minimind.stages.scorers import own_model
from minimind.tokenizer.chat import render


@pytest.fixture
def reward_model(files: Files) -> ScalarModel:
    """A reward model saved in `files.folder / "judge"`."""
    policy, tokenizer = load(files.base)
    torch.manual_seed(0)
    model = ScalarModel.from_transformer(policy)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    checkpoint.save(
        files.folder / "judge",
        1,
        model=model,
        model_config=policy.config,
        tokenizer=tokenizer,
        optimizer_state={},
        state={},
    )
    return model


def test_a_score_is_the_value_at_the_end_token(files: Files, reward_model: ScalarModel) -> None:
    _, tokenizer = load(files.base)
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    ids = render(tokenizer, turns).ids
    end = len(ids) - 1 - ids[::-1].index(tokenizer.eos_id)
    with torch.no_grad():
        values = reward_model(torch.tensor([ids])).values
    long = [turns[0], {"role": "assistant", "content": "three " * 200}]
    score, none = own_model(files.folder / "judge", torch.device("cpu"))([turns, long])
    assert score == pytest.approx(float(values[0, end]), abs=1e-5)
    assert math.isnan(none)  # longer than it can read: masked


def test_a_policy_learns_from_it(files: Files, reward_model: ScalarModel) -> None:
    del reward_model
    learn(argv(files, "grpo", "run", "--rewards", f"model:{files.folder / 'judge'}", "--steps", "2"))
    rows = rows_of(files.folder / "run")
    assert rows[0]["reward/model"] != 0
    assert rows[0]["reward_std"] > 0
    assert rows[0]["reward_masked"] == 0


def test_what_is_no_reward_model_is_refused(files: Files) -> None:
    with pytest.raises(CheckpointError, match="not a reward model"):
        learn(argv(files, "grpo", "run", "--rewards", f"model:{files.base}"))
    with pytest.raises((CheckpointError, ConfigError), match=r"transformers|no reward model"):
        learn(argv(files, "grpo", "run", "--rewards", f"transformers:{files.folder}"))
