"""GRPO and its family as a stage: what a variant is, what is learned, and what the checkpoint is."""

from pathlib import Path

import pytest
from stages.tiny_rollouts import argv, learn, rows_of
from stages.tiny_stage import Files

from minimind.checkpoint import load
from minimind.config import parse
from minimind.errors import ConfigError
from minimind.stages import grpo

VOWELS = """
def vowels(prompt, answer):
    written = answer.written or "?"
    return sum(letter in "aeiou" for letter in written) / len(written)
"""


def config(*flags: str) -> grpo.Config:
    return parse(grpo.Config, ["--init-from", "x", "--data", "y", *flags], command="grpo")


def test_a_variant_is_a_set_of_numbers_and_each_can_be_given() -> None:
    assert config().preset == grpo.Preset(beta=0.02)
    assert config("--variant", "dapo").preset == grpo.Preset(clip_high=0.28, drop_equal_groups=True)
    assert config("--variant", "dr-grpo").preset == grpo.Preset(aggregation="fixed", use_std=False)
    mixed = config("--variant", "gspo", "--clip-high", "0.1", "--aggregation", "token", "--use-std", "False").preset
    assert mixed == grpo.Preset("sequence", "token", clip_low=3e-4, clip_high=0.1, use_std=False)
    with pytest.raises(ConfigError) as found:
        config("--samples", "1", "--variant", "cispo", "--clip-low", "-1", "--temperature", "-1")
    for name in ("samples = 1", "clip_low = -1.0", "temperature = -1.0"):
        assert name in str(found.value)


@pytest.mark.parametrize("variant", grpo.PRESETS)
def test_a_trivial_reward_is_learned(variant: str, files: Files) -> None:
    file = files.folder / "rewards.py"
    file.write_text(VOWELS)
    flags = ("--variant", variant, "--rewards", f"{file}:vowels", "--steps", "25", "--prompts", "4", "--samples", "8")
    result = learn(argv(files, "grpo", "run", *flags, "--max-tokens", "12", "--optim.lr", "1e-2"))
    rewards = [row["reward"] for row in rows_of(files.folder / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.25
    model, _ = load(result.checkpoint)  # the checkpoint is a policy as it stands
    assert not model.training


def test_one_rollout_one_step_is_on_policy(files: Files) -> None:
    learn(argv(files, "grpo", "run", "--steps", "3", "--beta", "0.1"))
    rows = rows_of(files.folder / "run")
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=1e-5)  # the engine's log-probabilities are the trainer's
        assert row["approx_kl"] == pytest.approx(0, abs=1e-6)
        assert row["clip_low"] == row["clip_high"] == 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is still its reference
    assert rows[2]["kl"] > 1e-6


def test_equal_rewards_teach_nothing(files: Files) -> None:
    file = files.folder / "rewards.py"
    file.write_text("def same(prompt, answer):\n    return 0.1\n")
    base = Path(files.base)
    before, _ = load(base)
    flags = ("--rewards", f"{file}:same", "--steps", "3", "--beta", "0")
    result = learn(argv(files, "grpo", "run", *flags))
    after, _ = load(result.checkpoint)
    for name, weight in before.state_dict().items():
        assert weight.equal(after.state_dict()[name]), name
    assert rows_of(files.folder / "run")[0]["zero_spread_groups"] == 1
