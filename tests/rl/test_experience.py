"""Rollouts as batches: who stands where, what weighs how much, what is left out, and what a checkpoint holds."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.errors import ConfigError, DataError
from minimind.objectives.sequences import sum_by_document
from minimind.rl.credit import Critic, Groups
from minimind.rl.experience import Aggregation, Experience, Plan, PromptOrder
from minimind.rl.rollout import Sample
from minimind.rl.trajectory import LENGTHS as ROW_LENGTHS
from minimind.rl.trajectory import Meter, Packer, Trajectory, plan_rows

PLAN = Plan(prompts=3, samples=2, max_tokens=10)
LENGTHS = [1, 7, 3, 10, 2, 5]


def sample(prompt: int, length: int, *, finish_reason: str = "stop", mask: Sequence[int] | None = None) -> Sample:
    ids = [10 + prompt + i for i in range(length)]
    chosen = list(mask or [1] * length)
    return Sample(prompt, [1] * (2 + prompt), ids, chosen, [-0.5 * i * c for i, c in enumerate(chosen)], finish_reason)


class Fakes:
    """Plays samples of known lengths, whose rewards are told by seeds."""

    def __init__(
        self, plan: Plan = PLAN, *, rewards: Sequence[float] = (0, 1, 1, 1, 0.5, 2), masked: Sequence[int] = ()
    ):
        self.plan, self.rewards, self.masked, self.rollouts = plan, rewards, masked, 0

    def play(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        self.rollouts += 1
        self.seeds = list(seeds)
        owners = [index for index in indices for _ in range(self.plan.samples)]
        return [
            sample(owner, LENGTHS[i], finish_reason="length" if LENGTHS[i] == 10 else "stop")
            for i, owner in enumerate(owners)
        ]

    def judge(self, samples: Sequence[Sample]) -> list[Trajectory]:
        return [
            Trajectory(one, self.rewards[i], {"part": self.rewards[i]}, is_masked=i in self.masked)
            for i, one in enumerate(samples)
        ]

    def experience(self, *, identity: str = "x", row_length: int = 64, micro: int = 64) -> Experience:
        algorithm = Groups(PromptOrder(5, self.plan.prompts, 0), None, samples=self.plan.samples, use_std=False)
        return Experience(
            self.plan,
            play=self.play,
            judge=self.judge,
            algorithm=algorithm,
            packer=Packer(row_length, micro, 0),
            identity={"prompts": identity},
        )


def per_document(batches: Sequence[Batch], name: str) -> list[float]:
    """Return the sum of loss_weights times the named extra over each document, sorted."""
    found: list[float] = []
    for batch in batches:
        count = int(batch.documents.max()) + 1
        sums = sum_by_document(batch.loss_weights * batch.extras[name], batch.documents, count)
        exists = torch.zeros_like(sums).scatter(1, batch.documents.clamp(min=0), 1.0) > 0
        found += sums[exists].tolist()
    return sorted(found)


def test_rows_hold_every_unit_once_and_waste_least() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = random.integers(1, 200, int(random.integers(1, 40))).tolist()
        rows, length = plan_rows(sizes, 512)
        assert sorted(unit for row in rows for unit in row) == list(range(len(sizes)))
        assert max(sum(sizes[unit] for unit in row) for row in rows) <= length <= 512
        assert length in ROW_LENGTHS
    assert plan_rows([95] * 16, 1024) == ([[2 * i, 2 * i + 1] for i in range(8)], 192)  # 1,536 slots for 1,520
    assert plan_rows([900], 512) == ([[0]], 1024)  # longer than a row: the row grows
    assert plan_rows([], 512) == ([], 64)


@pytest.mark.parametrize(
    ("aggregation", "weights", "weight"),
    [
        ("token", [1.0] * 28, 28.0),
        ("sequence", [1 / length for length in LENGTHS for _ in range(length)], 6.0),
        ("fixed", [1.0] * 28, 60.0),
    ],
)
def test_aggregation_is_loss_weights_and_one_divisor(
    aggregation: Aggregation, weights: list[float], weight: float
) -> None:
    batches = Fakes(replace(PLAN, aggregation=aggregation)).experience().micro_batches(0)
    found = torch.cat([batch.loss_weights[batch.loss_weights > 0] for batch in batches])
    assert sorted(found.tolist()) == pytest.approx(sorted(weights))
    assert sum(batch.weight for batch in batches) == weight


def test_what_stands_where_in_a_batch() -> None:
    (batch,) = Fakes().experience(micro=1024).micro_batches(0)
    assert set(batch.extras) == {"old_log_probs", "advantages"}
    learned = batch.loss_weights > 0
    for row in range(len(batch.input_ids)):
        for document in range(int(batch.documents[row].max()) + 1):
            here = batch.documents[row] == document
            ids, labels = batch.input_ids[row][here], batch.labels[row][here & learned[row]]
            prompt = int((ids == 1).sum()) - 2
            assert labels.tolist() == [10 + prompt + i for i in range(len(labels))]  # the answer, all of it
            assert len(ids) == 2 + prompt + len(labels) - 1
            old = batch.extras["old_log_probs"][row][here & learned[row]]
            assert old.tolist() == [-0.5 * i for i in range(len(labels))]
    assert not (learned & (batch.documents == PAD_DOCUMENT)).any()
    # groups (0, 1), (1, 1), (0.5, 2) less their means
    advantages = [-0.5 * 1, 0.5 * 7, 0, 0, -0.75 * 2, 0.75 * 5]
    assert per_document([batch], "advantages") == pytest.approx(sorted(advantages))


def test_masked_truncated_and_equal_answers_are_left_out() -> None:
    plan = replace(PLAN, mask_truncated=True)
    experience = Fakes(plan, masked=[0]).experience()
    batches = experience.micro_batches(0)
    assert sum(batch.weight for batch in batches) == 28 - 1 - 10  # the first is masked, the fourth was cut off
    assert [one.is_learned for one in experience.trajectories] == [False, True, True, False, True, True]
    # what is left of the first group is one sample: it has nothing to be compared with
    assert experience.trajectories[1].tokens["advantages"] == [0.0] * 7
    numbers = experience.numbers()
    assert numbers["reward"] == pytest.approx((1 + 1 + 1 + 0.5 + 2) / 5)
    assert (numbers["reward_masked"], numbers["truncated"]) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert (numbers["zero_spread_groups"], numbers["answer_tokens"]) == (pytest.approx(2 / 3), pytest.approx(28 / 6))
    dropped = Fakes(replace(PLAN, drop_equal_groups=True)).experience()
    assert sum(batch.weight for batch in dropped.micro_batches(0)) == 28 - 3 - 10


def test_a_step_in_which_nothing_is_learned_is_a_row_of_padding() -> None:
    (batch,) = Fakes(replace(PLAN, drop_equal_groups=True), rewards=[1.0] * 6).experience().micro_batches(0)
    assert batch.weight == 0
    assert (batch.documents == PAD_DOCUMENT).all()
    assert set(batch.extras) == {"old_log_probs", "advantages"}


def test_each_pass_shows_each_answer_once_and_then_a_rollout_is_due() -> None:
    fakes = Fakes(replace(PLAN, epochs=2, minibatches=3))
    experience = fakes.experience()
    seen: list[list[float]] = []
    for step in range(6):
        batches = experience.micro_batches(step)
        seen.append(per_document(batches, "old_log_probs"))
        assert fakes.rollouts == 1
    every = sorted(-0.5 * sum(range(length)) for length in LENGTHS)
    assert sorted(seen[0] + seen[1] + seen[2]) == sorted(seen[3] + seen[4] + seen[5]) == every
    assert [len(part) for part in seen] == [2] * 6
    assert seen[:3] != seen[3:]  # in another order
    first = fakes.seeds
    experience.micro_batches(6)
    assert fakes.rollouts == 2
    assert not set(first) & set(fakes.seeds)
    experience.leave_rollout()
    experience.micro_batches(7)
    assert fakes.rollouts == 3


def test_a_checkpoint_in_the_middle_of_a_rollout_holds_it() -> None:
    plan = replace(PLAN, epochs=2, minibatches=2)
    whole, cut = Fakes(plan, masked=[2]).experience(), Fakes(plan, masked=[2]).experience()
    for step in range(3):
        whole.micro_batches(step)
        cut.micro_batches(step)
    saved = json.loads(json.dumps(cut.state()))
    again = Fakes(plan)
    resumed = again.experience()
    resumed.check_state(saved)
    resumed.load_state(saved)
    assert resumed.numbers() == cut.numbers()
    (there,), (here,) = whole.micro_batches(3), resumed.micro_batches(3)
    assert again.rollouts == 0
    assert torch.equal(here.input_ids, there.input_ids)
    assert all(torch.equal(here.extras[name], there.extras[name]) for name in there.extras)
    assert resumed.state()["trajectories"] == []  # learned to the end, so no longer kept
    resumed.micro_batches(4)
    assert (again.rollouts, resumed.rollout) == (1, 1)


def test_another_run_is_refused() -> None:
    saved = Fakes().experience().state()
    with pytest.raises(DataError, match="the prompts changed since the checkpoint"):
        Fakes().experience(identity="y").check_state(saved)
    with pytest.raises(ConfigError, match="samples was 2 and is 3"):
        Fakes(replace(PLAN, samples=3)).experience().check_state(saved)
    with pytest.raises(ConfigError, match="another kind of stage"):
        Fakes().experience().check_state({"fingerprint": "a supervised run"})


class Echo(nn.Module):
    """Its value at each place is the id read there."""

    def forward(self, input_ids: Tensor, positions: Tensor, documents: Tensor) -> Output:
        hidden = input_ids[..., None].float()
        return Output(hidden, torch.ones(1, 1), torch.zeros(()), values=input_ids.float())


def meter() -> Meter:
    return Meter(Packer(64, 128, 0), torch.device("cpu"), torch.float32)


def test_numbers_are_read_where_the_tokens_are_predicted() -> None:
    trajectories = [Trajectory(sample(i % 3, length)) for i, length in enumerate(LENGTHS)]
    labels = meter()(Echo(), trajectories, lambda _, batch: batch.labels)
    assert labels == [one.sample.ids for one in trajectories]
    learned = meter()(Echo(), trajectories, lambda _, batch: batch.loss_weights)
    assert learned == [one.sample.mask for one in trajectories]
    model = Echo().train()
    meter()(model, trajectories, lambda output, _: output.hidden[..., 0])
    assert model.training


def test_values_are_of_the_state_before_the_token_and_advantages_white() -> None:
    one = Trajectory(sample(0, 4, mask=[1, 1, 0, 1]), reward=30.0)  # its third token was told to it
    other = Trajectory(sample(1, 1), reward=5.0)
    algorithm = Critic(lambda _: [0], None, model=Echo(), meter=meter(), gamma=1.0, gae_lambda=1.0)
    algorithm.measure([one, other])
    assert one.tokens["old_values"] == [1, 10, 11, 12]  # the last of the prompt, then the answer but its last
    numbers = algorithm.credit([one, other])
    assert one.tokens["returns"] == [30, 30, 0, 30]  # gamma = lambda = 1: the reward, whatever the values
    assert other.tokens["returns"] == [5]
    raw = np.array([29.0, 20.0, 18.0, 4.0])  # return - value of the chosen tokens
    white = (raw - raw.mean()) / raw.std()
    found = [one.tokens["advantages"][i] for i in (0, 1, 3)] + other.tokens["advantages"]
    assert found == pytest.approx(white.tolist(), abs=1e-6)
    assert one.tokens["advantages"][2] == 0
    returns = np.array([30.0, 30.0, 30.0, 5.0])
    assert numbers["explained_variance"] == pytest.approx(1 - raw.var() / returns.var())


def test_prompts_are_asked_once_an_epoch() -> None:
    order = PromptOrder(12, 5, seed=3)
    asked: list[Any] = [index for rollout in range(12) for index in order(rollout)]
    assert [sorted(asked[first : first + 12]) for first in range(0, 60, 12)] == [list(range(12))] * 5
    assert asked[:12] != asked[12:24]
