"""PPO as a stage: the critic has a rate of its own, a rollout is left early, a checkpoint is policy and critic."""

from itertools import pairwise

import pytest
import torch
from stages.test_grpo import VOWELS
from stages.tiny_rollouts import TWO_BY_TWO, argv, learn, rows_of
from stages.tiny_stage import Files

from minimind import checkpoint
from minimind.checkpoint import load
from minimind.errors import CheckpointError
from minimind.model.critic import ActorCritic
from minimind.model.heads import ScalarModel
from minimind.training.config import OptimConfig
from minimind.training.optim import Optimizer


def test_a_trivial_reward_is_learned_and_its_value_too(files: Files) -> None:
    file = files.folder / "rewards.py"
    file.write_text(VOWELS)
    flags = ("--rewards", f"{file}:vowels", "--steps", "48", "--prompts", "32", *TWO_BY_TWO, "--critic-lr", "1e-2")
    result = learn(argv(files, "ppo", "run", *flags, "--max-tokens", "12", "--optim.lr", "5e-3", "--max-kl", "0"))
    rows = rows_of(files.folder / "run")
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-8:]) / 8 > rewards[0] + 0.2
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=1e-6)  # a new head says 0 everywhere
    values = [row["value"] for row in rows]
    assert abs(values[-1] - rewards[-1]) < abs(values[0] - rewards[0]) / 2
    saved = checkpoint.read(result.checkpoint)
    assert set(saved.files) == {"model.safetensors", "critic.safetensors"}
    policy, _ = load(result.checkpoint)
    assert set(saved.files["model.safetensors"]) == set(policy.state_dict_for_disk())
    critic = ScalarModel(policy.config)
    critic.load_disk_state_dict(saved.files["critic.safetensors"])
    assert critic.score.weight.abs().sum() > 0


def test_a_rollout_is_left_once_the_policy_has_moved_far(files: Files) -> None:
    far = ("--optim.lr", "3e-2", "--steps", "8", *TWO_BY_TWO)
    learn(argv(files, "ppo", "left", *far, "--max-kl", "1e-4"))
    learn(argv(files, "ppo", "used", *far, "--max-kl", "0"))
    left, used = rows_of(files.folder / "left"), rows_of(files.folder / "used")
    assert [row["rollout"] for row in used] == [0, 0, 0, 0, 1, 1, 1, 1]
    for row, following in pairwise(left):
        if row["approx_kl"] > 1e-4:
            assert following["rollout"] == row["rollout"] + 1
    assert left[-1]["rollout"] > 1


def test_the_critic_has_a_rate_of_its_own(files: Files) -> None:
    policy, _ = load(files.base)
    model = ActorCritic(policy, ScalarModel.from_transformer(policy), critic_rate=10.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.0))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    for name, p in model.named_parameters():
        moved = 1e-2 if name.startswith("critic.") else 1e-3  # the first step of AdamW is its rate
        assert torch.allclose(before[name] - p, torch.full_like(p, moved), rtol=1e-3, atol=1e-6), name
    assert set(optimizer.state_dict()) == {
        f"adamw.{kind}/{name}" for name in before for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def test_actor_and_critic_see_the_same_tokens(files: Files) -> None:
    policy, _ = load(files.base)
    model = ActorCritic(policy, ScalarModel.from_transformer(policy)).eval()
    torch.nn.init.normal_(model.critic.score.weight)
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    output = model(ids)
    assert output.values is not None
    assert torch.equal(output.hidden, policy(ids).hidden)
    normed = policy(ids).hidden  # the critic is a copy, and its hidden states went through the last norm once
    assert torch.allclose(output.values, normed @ model.critic.score.weight[0], atol=1e-5)


def test_a_critic_of_another_kind_is_refused(files: Files) -> None:
    with pytest.raises(CheckpointError, match="not a reward model"):
        learn(argv(files, "ppo", "run", "--critic-from", str(files.base)))
