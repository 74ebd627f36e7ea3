"""The learning rate as a function of the step."""

import math
from itertools import pairwise

import pytest

from minimind.training.config import OptimConfig
from minimind.training.schedule import cosine, lr_factor, warmup_stable_decay


def test_cosine_without_warmup_is_the_historical_curve() -> None:
    steps, lr = 1000, 5e-4
    for t in range(steps):
        historical = lr * (0.1 + 0.45 * (1 + math.cos(math.pi * t / steps)))
        assert lr * lr_factor(t, steps, OptimConfig()) == pytest.approx(historical, rel=1e-12)


def test_cosine_warms_up_and_ends_at_its_ratio() -> None:
    factors = [cosine(t, 110, warmup_steps=10, min_ratio=0.2) for t in range(111)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.6)  # half way down
    assert factors[110] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))


def test_warmup_stable_decay() -> None:
    factors = [warmup_stable_decay(t, 100, warmup_steps=10, decay_fraction=0.2, min_ratio=0.1) for t in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:81] == [1.0] * 71
    assert factors[85] == pytest.approx(0.1 + 0.9 * 0.5)  # 1 - sqrt(1/4)
    assert factors[100] == pytest.approx(0.1)


def test_constant_stays() -> None:
    config = OptimConfig(schedule="constant", warmup_steps=4)
    assert [lr_factor(t, 10, config) for t in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_odd_lengths_stay_between_zero_and_one(schedule: str) -> None:
    for steps in (1, 2, 7):
        for warmup_steps in (0, 1, 50):
            for fraction in (0.0, 1.0):
                config = OptimConfig(schedule=schedule, warmup_steps=warmup_steps, decay_fraction=fraction)  # type: ignore[arg-type]
                assert all(0 < lr_factor(t, steps, config) <= 1 for t in range(steps + 2))
