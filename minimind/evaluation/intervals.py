"""How sure a share of correct answers is: intervals for one proportion and for the difference of two.

Wilson's score interval (1927) and Newcombe's hybrid of two of them (Statistics in Medicine 17, 1998, method 10), both
without continuity correction: unlike the textbook p +- 1.96 s they stay inside [0, 1] and are right for few answers.
It knows numbers only.
"""

import math

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point: two-sided 95 %."""


def wilson_interval(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the (low, high) interval of a proportion seen as `correct` of `n`; (0, 1), knowing nothing, for n = 0.

    (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n) with p = correct / n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson_interval: {correct} correct of {n}")
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends one bound is p itself; said exactly, because rounding would leave it a hair away.
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == n else (centre + half) / scale
    return low, high


def newcombe_interval(
    correct_before: int, n_before: int, correct_after: int, n_after: int, z: float = Z_95
) -> tuple[float, float]:
    """Return the (low, high) interval of p_after - p_before for two independent samples; (-1, 1) when one is empty.

    Asked of the same questions twice, it is cautious: it ignores that the answers go together.
    """
    if not n_before or not n_after:
        return -1.0, 1.0
    before, after = correct_before / n_before, correct_after / n_after
    low_before, high_before = wilson_interval(correct_before, n_before, z)
    low_after, high_after = wilson_interval(correct_after, n_after, z)
    difference = after - before
    return (
        difference - math.hypot(after - low_after, high_before - before),
        difference + math.hypot(high_after - after, before - low_before),
    )
