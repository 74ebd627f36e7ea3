"""SPO as a stage: the trackers of the prompts steer it, begin where they are told, and are in the checkpoint."""

import pytest
from stages.test_grpo import VOWELS
from stages.tiny_rollouts import argv, learn, prompts, rows_of
from stages.tiny_stage import Files

from minimind import checkpoint
from minimind.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("baseline", ["prompt", "global"])
def test_a_trivial_reward_is_learned(baseline: str, files: Files) -> None:
    file = files.folder / "rewards.py"
    file.write_text(VOWELS)
    flags = ("--baseline", baseline, "--rewards", f"{file}:vowels", "--steps", "30", "--prompts", "32")
    data = prompts(files.folder, 48)
    learn(argv(files, "spo", "run", *flags, "--max-tokens", "12", "--optim.lr", "1e-2", data=data))
    rewards = [row["reward"] for row in rows_of(files.folder / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.2


def test_the_tracker_is_in_the_checkpoint_and_knows_what_was_answered(files: Files) -> None:
    result = learn(argv(files, "spo", "run", "--prompts", "4", "--steps", "4"))
    tracker = checkpoint.read(result.checkpoint).state["batches"]["algorithm"]
    assert (tracker["kind"], len(tracker["alphas"])) == ("prompt", 7)
    answered = {int(prompt) for prompt in tracker["last"]}
    assert 4 <= len(answered) <= 7
    untouched = set(range(7)) - answered
    assert all(tracker["alphas"][i] == tracker["betas"][i] == 4.0 for i in untouched)
    assert all(tracker["alphas"][i] != 4.0 for i in answered)  # rewards are cut to 0 or 1 here
    rows = rows_of(files.folder / "run")
    assert rows[0]["baseline"] == 0.5
    assert rows[0]["drift"] == 0  # nothing was answered before
    assert rows[-1]["drift"] > 0
    assert 0.875 <= rows[-1]["rho"] <= 0.96


def test_trackers_begin_with_offline_samples(files: Files) -> None:
    flags = ("--rewards", "length", "--lowest-reward", "-0.5", "--highest-reward", "0.5", "--steps", "1")
    result = learn(argv(files, "spo", "run", *flags, "--offline-samples", "8"))
    tracker = checkpoint.read(result.checkpoint).state["batches"]["algorithm"]
    assert len(tracker["last"]) == 7  # every prompt was answered
    assert rows_of(files.folder / "run")[0]["drift"] == pytest.approx(0, abs=1e-5)  # by the same weights
    assert rows_of(files.folder / "run")[0]["baseline"] != 0.5


def test_what_cannot_be_is_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="samples = 2: a single stream has 1"):
        learn(argv(files, "spo", "run", "--samples", "2"))
    with pytest.raises(ConfigError, match="lowest_reward = 2"):
        learn(argv(files, "spo", "run", "--lowest-reward", "2"))
    learn(argv(files, "spo", "run", "--steps", "1"))
    with pytest.raises(CheckpointError, match="give --baseline prompt"):
        learn(argv(files, "spo", "run", "--steps", "2", "--baseline", "global"))
