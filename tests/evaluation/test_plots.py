"""The picture of several algorithms of reinforcement learning side by side."""

from pathlib import Path

from minimind.evaluation import plots

ROWS = [
    {"step": 0, "val_reward": 0.25},
    {"step": 1, "rollout": 0, "generated_tokens": 100.0},
    {"step": 2, "rollout": 0, "generated_tokens": 100.0},  # the second pass over the same rollout samples nothing
    {"step": 3, "rollout": 1, "generated_tokens": 40.0},
    {"step": 3, "val_reward": 0.5},
]


def test_a_reward_stands_over_the_tokens_sampled_until_then() -> None:
    assert plots.rewards_over_tokens(ROWS) == [(0, 0.25), (140.0, 0.5)]


def test_the_picture_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    curves = {"GRPO": plots.rewards_over_tokens(ROWS), "PPO": [(0.0, 0.25), (90.0, 0.4)]}
    first = plots.save_rewards(tmp_path / "a.svg", curves).read_text()
    assert first == plots.save_rewards(tmp_path / "b.svg", curves).read_text()
    assert first.count("tokens sampled") == 1
