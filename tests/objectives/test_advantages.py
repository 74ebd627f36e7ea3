import math
import statistics

import pytest
import torch

from minimind.batch import PAD_DOCUMENT
from minimind.objectives.advantages import gae, group_advantages, terminal_rewards, whiten

ALL = torch.ones(1, 4, dtype=torch.bool)


def test_group_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 0.5, std sqrt(1/3)."""
    advantages, teaches_nothing = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), ALL)
    want = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[want, -want, -want, want]]))
    assert teaches_nothing.tolist() == [False]


def test_without_std_it_is_the_difference():
    advantages, _ = group_advantages(torch.tensor([[3.0, 0.0, 0.0, 1.0]]), ALL, use_std=False)
    torch.testing.assert_close(advantages, torch.tensor([[2.0, -1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -2.7])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("use_std", [True, False])
def test_equal_rewards_give_exactly_zero(reward: float, size: int, use_std: bool):
    rewards = torch.full((2, size), reward)
    advantages, teaches_nothing = group_advantages(rewards, torch.ones(2, size, dtype=torch.bool), use_std=use_std)
    assert (advantages == 0).all()
    assert teaches_nothing.all()


def test_masked_members_leave_mean_and_std():
    rewards = torch.tensor([[1.0, math.nan, 0.0, 0.0], [1.0, 5.0, 5.0, 5.0]])
    is_counted = torch.tensor([[True, False, True, True], [True, False, False, False]])
    advantages, teaches_nothing = group_advantages(rewards, is_counted)
    values = [1.0, 0.0, 0.0]
    want = [(r - statistics.mean(values)) / (statistics.stdev(values) + 1e-4) for r in values]
    torch.testing.assert_close(advantages[0], torch.tensor([want[0], 0.0, want[1], want[2]]))
    assert (advantages[1] == 0).all()  # one alone has nothing to be compared with
    assert teaches_nothing.tolist() == [False, True]


def test_a_group_of_which_all_is_masked_is_zero():
    advantages, teaches_nothing = group_advantages(torch.full((1, 4), math.nan), ~ALL)
    assert (advantages == 0).all()
    assert teaches_nothing.all()


def reference_gae(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """The sum of the definition, written out, over a whole episode of chosen tokens."""
    errors = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** k * errors[t + k] for k in range(len(errors) - t)) for t in range(len(errors))]


# Row 0: an answer of 4 with an observation of 2 inside it, then one of 2; row 1: one of 5. Prompts of 2 before each.
DOCUMENTS = torch.tensor([[0] * 8 + [1] * 4 + [PAD_DOCUMENT], [0] * 7 + [PAD_DOCUMENT] * 6])
CHOSEN = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]) > 0
ANSWERS = [(0, [2, 3, 6, 7], 0), (0, [10, 11], 1), (1, [2, 3, 4, 5, 6], 0)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_the_sum_written_out(gamma: float, gae_lambda: float):
    torch.manual_seed(0)
    values = torch.randn(2, 13)
    totals = torch.tensor([[1.5, -0.5], [0.25, 9.0]])  # row 1 has no second answer
    rewards = terminal_rewards(totals, CHOSEN, DOCUMENTS)
    advantages, returns = gae(rewards, values, CHOSEN, DOCUMENTS, gamma=gamma, gae_lambda=gae_lambda)
    want = torch.zeros(2, 13)
    for row, places, number in ANSWERS:
        episode = [0.0] * (len(places) - 1) + [float(totals[row, number])]
        want[row, places] = torch.tensor(
            reference_gae(episode, [float(values[row, t]) for t in places], gamma, gae_lambda)
        )
    torch.testing.assert_close(advantages, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, (want + values) * CHOSEN, rtol=1e-6, atol=1e-6)


def test_terminal_rewards_stand_at_the_last_chosen_token():
    rewards = terminal_rewards(torch.tensor([[1.5, -0.5], [0.25, 9.0]]), CHOSEN, DOCUMENTS)
    want = torch.zeros(2, 13)
    want[0, 7], want[0, 11], want[1, 6] = 1.5, -0.5, 0.25
    assert torch.equal(rewards, want)


def test_gae_by_hand():
    """Two tokens, V = 0.5 and 0.8, reward 1: d_1 = 1 - 0.8 = 0.2, d_0 = 0.8 - 0.5 = 0.3, A_0 = 0.3 + 0.95 * 0.2."""
    documents, chosen = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.8]]), chosen, documents)
    torch.testing.assert_close(advantages, torch.tensor([[0.49, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.99, 1.0]]))


def test_an_empty_answer_has_no_advantage():
    documents, chosen = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool)
    rewards = terminal_rewards(torch.ones(1, 1), chosen, documents)
    advantages, returns = gae(rewards, torch.randn(1, 3), chosen, documents)
    assert (rewards == 0).all()
    assert (advantages == 0).all()
    assert (returns == 0).all()


def test_values_where_nothing_was_chosen_do_not_matter():
    torch.manual_seed(0)
    values, rewards = torch.randn(2, 13), terminal_rewards(torch.ones(2, 2), CHOSEN, DOCUMENTS)
    want = gae(rewards, values, CHOSEN, DOCUMENTS)
    found = gae(rewards, torch.where(CHOSEN, values, torch.nan), CHOSEN, DOCUMENTS)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


def test_whiten_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0, 99.0])
    counted = torch.tensor([True, True, True, False])
    std = statistics.pstdev([1.0, 2.0, 6.0])
    torch.testing.assert_close(whiten(values, counted), torch.tensor([-2 / std, -1 / std, 3 / std, 0.0]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_whiten_of_equal_numbers_is_exactly_zero(value: float):
    assert (whiten(torch.full((7,), value), torch.ones(7, dtype=torch.bool)) == 0).all()


def test_whiten_of_nothing_is_zero():
    assert (whiten(torch.tensor([math.nan, 3.0]), torch.zeros(2, dtype=torch.bool)) == 0).all()


def test_whiten_over_two_ranks_equals_one():
    """The sums of both ranks are added before anything is divided."""
    torch.manual_seed(0)
    values, counted = torch.randn(10), torch.rand(10) > 0.3
    halves = [(values[:4], counted[:4]), (values[4:], counted[4:])]
    whole = whiten(values, counted)
    mean = values.double()[counted].mean()
    own = []  # what each rank hands to the first and to the second reduction
    for part, mask in halves:
        first = torch.stack((mask.sum().double(), torch.where(mask, part.double(), 0.0).sum()))
        own.append((first, ((part.double() - mean) * mask).square().sum()[None]))
    sums = [own[0][k] + own[1][k] for k in range(2)]
    for rank, (part, mask) in enumerate(halves):
        calls = iter(range(2))

        def all_reduce_sum(tensor: torch.Tensor, rank: int = rank, calls=calls) -> torch.Tensor:
            number = next(calls)
            torch.testing.assert_close(tensor, own[rank][number])
            return sums[number]

        torch.testing.assert_close(
            whiten(part, mask, all_reduce_sum=all_reduce_sum), whole[:4] if rank == 0 else whole[4:]
        )
