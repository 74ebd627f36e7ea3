"""The order: a bijection for every size, without pattern, the same for any number of ranks, in constant memory."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.data.order import MAX_SAMPLES, epoch_key, global_rows, inverse, permute, share


def test_every_small_size_is_a_bijection() -> None:
    for n in range(1, 260):
        key = epoch_key(3, n)
        order = permute(np.arange(n), n, key)
        assert np.array_equal(np.sort(order), np.arange(n))
        assert np.array_equal(inverse(order, n, key), np.arange(n))


@pytest.mark.parametrize("n", [1023, 1024, 1025, 99_991, 2**17])
def test_larger_sizes_are_bijections(n: int) -> None:
    order = permute(np.arange(n), n, epoch_key(0, 0))
    assert np.array_equal(np.sort(order), np.arange(n))


@given(n=st.integers(1, MAX_SAMPLES), seed=st.integers(0, 2**64), draw=st.data())
def test_inverse_undoes_any_size(n: int, seed: int, draw: st.DataObject) -> None:
    index = draw.draw(st.integers(0, n - 1))
    key = epoch_key(seed, 1)
    sample = int(permute(index, n, key))
    assert 0 <= sample < n
    assert int(inverse(sample, n, key)) == index


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_frequent(n: int) -> None:
    trials, orders = 2400, math.factorial(n)
    counts = Counter(tuple(permute(np.arange(n), n, epoch_key(7, epoch)).tolist()) for epoch in range(trials))
    expected = trials / orders
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values()) + (orders - len(counts)) * expected
    # mean d and deviation sqrt(2 d) for d degrees of freedom; the keys are fixed, so this passes or fails for good
    assert chi2 < orders - 1 + 4 * math.sqrt(2 * (orders - 1))


def test_no_pattern_within_an_epoch() -> None:
    n = 100_000
    order = permute(np.arange(n), n, epoch_key(1, 0)).astype(np.float64)
    limit = 4.5 / math.sqrt(n)  # deviations of a correlation of independent numbers
    for lag in (1, 2, 3, 10, 317, 1000):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < limit
    # the first tenth of an epoch is spread evenly over the samples
    counts = np.histogram(order[: n // 10], bins=100, range=(0, n))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 99 + 4.5 * math.sqrt(2 * 99)
    assert np.count_nonzero(np.diff(order) == 1) < 10  # neighbours stay neighbours about once in n


def test_epochs_and_seeds_are_independent() -> None:
    n = 50_000
    orders = [permute(np.arange(n), n, epoch_key(*key)) for key in [(0, 0), (0, 1), (1, 0)]]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert np.count_nonzero(orders[first] == orders[second]) < 10  # one is expected
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 4.5 / math.sqrt(n)


def test_steps_follow_each_other_through_the_epochs() -> None:
    n, batch = 103, 10
    visited = np.concatenate([global_rows(step, batch, n, seed=5) for step in range(31)])
    for epoch in range(3):
        assert np.array_equal(np.sort(visited[epoch * n : (epoch + 1) * n]), np.arange(n))
    assert not np.array_equal(visited[:n], visited[n : 2 * n])


def test_a_batch_larger_than_the_data() -> None:
    rows = global_rows(0, 25, 10, seed=0)
    assert sorted(Counter(rows.tolist()).values()) == [2] * 5 + [3] * 5


def test_known_order_stays_for_ever() -> None:
    # A resumed run relies on it: a change needs a new ORDER_VERSION.
    assert global_rows(0, 8, 1000, seed=0).tolist() == KNOWN_SMALL
    assert global_rows(12_345, 4, 10**10, seed=42).tolist() == KNOWN_LARGE


KNOWN_SMALL = [207, 755, 746, 825, 650, 657, 343, 903]
KNOWN_LARGE = [4083086009, 7156316221, 4383951165, 370110910]


def test_ten_billion_samples_on_a_thousand_ranks_that_come_and_go() -> None:
    """Every position of an epoch belongs to one rank of its step, and every sample of drawn ranges to one position."""
    n, batch, seed = 10**10, 16_390, 9
    generator = np.random.Generator(np.random.PCG64(0))
    worlds = (1024, 1000, 1023, 512, 1024)  # ranks are lost and added between steps
    tracemalloc.start()
    for epoch in (0, 1, 7):
        key = epoch_key(seed, epoch)
        start = int(generator.integers(0, n - 50_000))
        samples = np.arange(start, start + 50_000)
        places = epoch * n + inverse(samples, n, key)
        assert len(np.unique(places)) == len(samples)
        # the steps that hold the first of them, and the step in which the epoch ends
        for step in [*(places[:8] // batch).tolist(), ((epoch + 1) * n - 1) // batch]:
            rows = global_rows(step, batch, n, seed)
            world = worlds[step % len(worlds)]
            taken = np.concatenate([rows[share(batch, rank, world)] for rank in range(world)])
            assert len(taken) == batch
            here = np.arange(step * batch, (step + 1) * batch)
            for number in np.unique(here // n).tolist():
                part = here // n == number
                assert np.array_equal(inverse(taken[part], n, epoch_key(seed, number)), here[part] - number * n)
            held = samples[places // batch == step]
            assert np.isin(held, taken).all()
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


@given(count=st.integers(0, 5000), world=st.integers(1, 300))
def test_shares_cover_everything_once_and_evenly(count: int, world: int) -> None:
    shares = [np.arange(count)[share(count, rank, world)] for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), np.arange(count))
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == -(-count // world)


def test_impossible_arguments() -> None:
    for call in (
        lambda: permute(5, 5, epoch_key(0, 0)),
        lambda: permute(-1, 5, epoch_key(0, 0)),
        lambda: permute(0, 0, epoch_key(0, 0)),
        lambda: global_rows(-1, 4, 10, 0),
        lambda: global_rows(0, 0, 10, 0),
    ):
        with pytest.raises(ValueError, match=r"index|number of samples|step"):
            call()
