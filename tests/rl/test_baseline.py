import json
import math
import statistics
from collections import Counter

import pytest

from minimind.errors import CheckpointError
from minimind.rl.baseline import GlobalTracker, PromptTracker, decay, draw_without_replacement, drift_of
from minimind.rl.rollout import Sample


def sample(prompt: int, log_probs: tuple[float, ...] = (-0.5, -1.0), mask: tuple[int, ...] | None = None) -> Sample:
    ids = list(range(10, 10 + len(log_probs)))
    return Sample(prompt, [1, 2], ids, list(mask or [1] * len(ids)), list(log_probs), "stop")


def tracker(num_prompts: int = 4, per_rollout: int = 2, **options) -> PromptTracker:
    return PromptTracker(num_prompts, per_rollout, seed=7, **options)


def one(baseline: PromptTracker | GlobalTracker, prompt: int, reward: float, drift: float | None = None) -> float:
    return baseline.credit([sample(prompt)], [reward], [False], [drift])[0]


def test_a_prior_expects_the_middle_with_the_weight_of_eight():
    """N0 = 1 / (1 - 0.875) = 8, so alpha = beta = 4."""
    found = tracker()
    assert found.expected(0) == 0.5
    assert found.state()["alphas"] == found.state()["betas"] == [4.0] * 4


def test_offline_samples_by_hand():
    """Six of eight right: alpha = 8 * 6.5 / 9, beta = 8 * 2.5 / 9; p = 6.5 / 9."""
    found = tracker()
    found.start(1, [1.0] * 6 + [0.0] * 2, sample(1))
    assert found.state()["alphas"][1] == pytest.approx(8 * 6.5 / 9)
    assert found.state()["betas"][1] == pytest.approx(8 * 2.5 / 9)
    assert found.expected(1) == pytest.approx(6.5 / 9)
    assert found.last(1) == sample(1)
    assert found.last(0) is None


def test_an_update_by_hand():
    """rho = 2^(-0.006 / 0.06) = 0.933; alpha = 0.933 * 4 + 1, beta = 0.933 * 4."""
    found = tracker()
    rho = 2 ** (-0.1)
    one(found, 2, 1.0, drift=0.006)
    assert found.state()["alphas"] == [4.0, 4.0, pytest.approx(rho * 4 + 1), 4.0]
    assert found.state()["betas"] == [4.0, 4.0, pytest.approx(rho * 4), 4.0]
    assert found.expected(2) == pytest.approx((rho * 4 + 1) / (rho * 8 + 1))
    assert found.last(2) == sample(2)
    assert found.metrics() == {
        "baseline": 0.5, "baseline_error": 0.5, "rho": pytest.approx(rho), "drift": pytest.approx(0.006)
    }  # fmt: skip


@pytest.mark.parametrize(("drift", "rho"), [(0.0, 0.96), (0.001, 0.96), (0.006, 2**-0.1), (0.06, 0.875), (1e9, 0.875)])
def test_decay_is_cut_at_both_ends(drift: float, rho: float):
    assert decay(drift, 0.875, 0.96) == pytest.approx(rho)


def test_a_first_answer_forgets_the_prior_as_fast_as_it_may():
    found = tracker()
    one(found, 0, 0.0)
    assert found.state()["betas"][0] == pytest.approx(0.875 * 4 + 1)


def test_advantages_are_against_the_expectation_of_before_and_normalised():
    found = tracker()
    found.start(0, [1.0] * 8)
    expected = found.expected(0)
    rewards, samples = [1.0, 0.0, 1.0], [sample(0), sample(0), sample(1)]
    advantages = found.credit(samples, rewards, [False] * 3, [None] * 3)
    raw = [1.0 - expected, 0.0 - expected, 0.5]  # both answers of prompt 0 against the same number
    mean, std = statistics.mean(raw), statistics.pstdev(raw)
    assert advantages == pytest.approx([(a - mean) / std for a in raw], rel=1e-6)


def test_masked_rewards_teach_nothing():
    found = tracker()
    before = json.dumps(found.state()["alphas"])
    advantages = found.credit([sample(0), sample(1)], [math.nan, 1.0], [True, True], [None, None])
    assert advantages == [0.0, 0.0]
    assert json.dumps(found.state()["alphas"]) == before
    assert found.last(1) is None


def test_equal_rewards_against_equal_expectations_give_zero():
    found = tracker()
    assert found.credit([sample(0), sample(1)], [1.0, 1.0], [False, False], [None, None]) == [0.0, 0.0]


def test_rewards_are_mapped_and_cut():
    found = tracker(lowest=-1.0, highest=3.0)
    for prompt, reward in enumerate([-1.0, 1.0, 3.0, 9.0]):
        one(found, prompt, reward)
    gained = [alpha - 0.875 * 4 for alpha in found.state()["alphas"]]
    assert gained == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_drift_is_over_chosen_tokens():
    answer = sample(0, (-1.0, 0.0, -2.0), (1, 0, 1))
    assert drift_of(answer, [-1.25, -9.0, -1.5]) == pytest.approx((0.25 + 0.5) / 2)
    assert drift_of(sample(0, (0.0,), (0,)), [1.0]) is None


def test_weights_of_the_draw():
    """sqrt(p (1 - p)) + 0.05: most where it is open how an answer comes out."""
    found = tracker(2)
    found.start(0, [1.0] * 8)
    p = 8.5 / 9
    assert found.weights() == pytest.approx([math.sqrt(p * (1 - p)) + 0.05, 0.55])


def test_the_draw_is_a_function_of_seed_rollout_and_state():
    found, same, other = tracker(100, 10), tracker(100, 10), PromptTracker(100, 10, seed=8)
    assert found.choose(3) == same.choose(3) == found.choose(3)
    assert found.choose(3) != found.choose(4)
    assert found.choose(3) != other.choose(3)
    assert len(set(found.choose(3))) == 10
    for prompt in range(50):
        found.start(prompt, [1.0] * 8)
    assert found.choose(3) != same.choose(3)


def test_more_than_there_are_come_round_again():
    chosen = tracker(4, 10).choose(0)
    assert sorted(Counter(chosen).values()) == [2, 2, 3, 3]
    assert len(set(chosen[:4])) == len(set(chosen[4:8])) == 4


def test_first_draws_are_by_weight():
    """Of weights 3, 1, 1 the first is drawn first in 3 of 5 cases (95 % bounds of 4000 draws are +-0.015)."""
    firsts = Counter(draw_without_replacement([3.0, 1.0, 1.0], f"case {i}")[0] for i in range(4000))
    assert firsts[0] / 4000 == pytest.approx(0.6, abs=0.025)
    assert firsts[1] / 4000 == pytest.approx(0.2, abs=0.025)


def lived(baseline: PromptTracker | GlobalTracker, rollouts: range) -> list:
    """Return what a tracker says over some rollouts in which rewards and drifts differ."""
    told = []
    for rollout in rollouts:
        chosen = baseline.choose(rollout)
        samples = [sample(prompt, (-0.1 * (rollout + 1), -1 / 3, -0.7)) for prompt in chosen]
        rewards = [((prompt * 7 + rollout) % 3) / 2 for prompt in chosen]
        masked = [(prompt + rollout) % 5 == 0 for prompt in chosen]
        drifts = [0.01 * rollout if baseline.last(prompt) else None for prompt in chosen]
        told.append((chosen, baseline.credit(samples, rewards, masked, drifts), baseline.metrics()))
    return told


@pytest.mark.parametrize("kind", [PromptTracker, GlobalTracker])
def test_a_tracker_resumes_bit_for_bit(kind: type):
    whole = kind(9, 4, seed=7)
    want = lived(whole, range(12))
    first = kind(9, 4, seed=7)
    lived(first, range(5))
    resumed = kind(9, 4, seed=7)
    resumed.load_state(json.loads(json.dumps(first.state())))
    assert lived(resumed, range(5, 12)) == want[5:]
    assert resumed.state() == whole.state()


def test_the_state_of_another_tracker_is_refused():
    with pytest.raises(CheckpointError, match="is 'global', this run's is 'prompt'; give --baseline global"):
        tracker().load_state(GlobalTracker(4, 2, seed=7).state())
    with pytest.raises(CheckpointError, match="knows 4 prompts, the data 5"):
        tracker(5).load_state(tracker(4).state())


def historical(rewards: list[list[float]], means: list[float]) -> list[tuple[float, float]]:
    """MiniMind's tracker, written out: (expectation before, rho) of each rollout."""
    alpha = beta = 0.5 / (1 - 0.5)
    last: float | None = None
    told: list[tuple[float, float]] = []
    for found, mean in zip(rewards, means, strict=True):
        expected = alpha / (alpha + beta)
        rho = 0.9 if last is None else max(min(2 ** (-abs(last - mean) / 0.06), 0.96), 0.5)
        last = mean
        average = sum((r + 3) / 6 for r in found) / len(found)
        alpha, beta = rho * alpha + average, rho * beta + 1 - average
        told.append((expected, rho))
    return told


def test_the_global_tracker_is_the_historical_one():
    found = GlobalTracker(8, 2, seed=7)
    rewards = [[1.0, -2.0], [3.0, 3.0], [0.5, 2.5], [-3.0, -3.0]]
    levels = [-1.0, -1.01, -1.4, -1.4001]
    for (expected, rho), pair, level in zip(historical(rewards, levels), rewards, levels, strict=True):
        samples = [sample(0, (level, level)), sample(1, (level,))]
        advantages = found.credit(samples, pair, [False, False], [None, None])
        assert advantages == pytest.approx([max(-5, min(5, r - (6 * expected - 3))) for r in pair])
        assert found.metrics()["rho"] == pytest.approx(rho)
        assert found.metrics()["baseline"] == pytest.approx(expected)


def test_the_global_tracker_leaves_masked_samples_out():
    found, without = (GlobalTracker(8, 2, seed=7) for _ in range(2))
    told = found.credit([sample(0), sample(1, (-9.0,))], [1.0, math.nan], [False, True], [None, None])
    assert told == [*without.credit([sample(0)], [1.0], [False], [None]), 0.0]
    assert found.state() == without.state()
    assert found.credit([sample(1)], [math.nan], [True], [None]) == [0.0]
    assert found.state() == without.state()


def test_the_global_tracker_cuts_advantages():
    assert one(GlobalTracker(8, 1, seed=7), 0, 9.0) == 5.0


def test_the_global_tracker_asks_every_prompt_once_an_epoch():
    found = GlobalTracker(6, 2, seed=7)
    assert sorted(prompt for rollout in range(3) for prompt in found.choose(rollout)) == list(range(6))
