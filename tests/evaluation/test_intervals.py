import pytest

from minimind.evaluation.intervals import newcombe_interval, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17:857 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand() -> None:
    # z = 2, p = 1/2, n = 10: (0.5 + 4/20 -+ 2 sqrt(0.25/10 + 4/400)) / (1 + 4/10) = (0.7 -+ 2 sqrt(0.035)) / 1.4
    assert wilson_interval(5, 10, z=2.0) == pytest.approx((0.2327388, 0.7672612), abs=1e-7)


def test_wilson_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    for n in (1, 2, 10, 1000):
        for correct in range(0, n + 1, max(1, n // 10)):
            low, high = wilson_interval(correct, n)
            assert 0 <= low <= correct / n <= high <= 1
    with pytest.raises(ValueError, match="3 correct of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("after", "n_after", "before", "n_before", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17:873 (1998), table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0000),
        (10, 10, 0, 10, 0.6075, 1.0000),
    ],
)
def test_newcombe_equals_the_published_intervals(
    after: int, n_after: int, before: int, n_before: int, low: float, high: float
) -> None:
    assert newcombe_interval(before, n_before, after, n_after) == pytest.approx((low, high), abs=6e-5)


def test_newcombe_by_hand() -> None:
    # z = 2, before 5 of 10: as above. After 10 of 10: low = (1 + 0.2 - 2 sqrt(0.01)) / 1.4 = 0.714286
    # difference 0.5: low = 0.5 - hypot(1 - 0.714286, 0.2672612), high = 0.5 + hypot(0, 0.2672612)
    assert newcombe_interval(5, 10, 10, 10, z=2.0) == pytest.approx((0.1087696, 0.7672612), abs=1e-7)


def test_newcombe_of_nothing_says_nothing() -> None:
    assert newcombe_interval(0, 0, 3, 4) == (-1.0, 1.0)
    assert newcombe_interval(3, 4, 0, 0) == (-1.0, 1.0)
