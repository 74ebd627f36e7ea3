"""Random choices that count their cost, and the hash that says which split a content belongs to.

`Draw` is the only source of chance in the world. It adds -log2 p of every choice to `bits`, so that each text comes
with the number of bits an ideal reader needs for it. It uses nothing of `random.Random` but `random()`, whose stream
is the same in every process and every Python version. It deliberately does not know what the choices mean.
"""

import math
import random
from collections.abc import Sequence
from hashlib import sha256
from typing import Literal, TypeVar

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1
"""Share of all contents that may be trained on, and that validate; the rest is the test."""

T = TypeVar("T")

_LOG2 = [0.0] + [math.log2(n) for n in range(1, 4096)]


def fraction(*labels: object) -> float:
    """Return a number in [0, 1) that depends on the labels only (SHA-256), the same in every process."""
    digest = sha256("|".join(map(str, labels)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split_of(key: str) -> Split:
    """Return the one split in which the content named `key` may appear, whatever the seed and the language."""
    place = fraction("split", key)
    if place < TRAIN_SHARE:
        return "train"
    return "validation" if place < TRAIN_SHARE + VALIDATION_SHARE else "test"


def small_split_of(key: str) -> Split:
    """Return the split of a content of a small domain (some hundred): 70 % train, 15 % validation, 15 % test."""
    place = fraction("split", key)
    if place < 0.7:
        return "train"
    return "validation" if place < 0.85 else "test"


def held_out_split_of(key: str) -> Split:
    """Return validation or test, half and half: the split of contents that no training row shows."""
    return "validation" if fraction("split", key) < 0.5 else "test"


class Draw:
    """A stream of choices named by its labels; `bits` is the sum of -log2 p of all choices made so far."""

    __slots__ = ("_random", "bits")

    def __init__(self, *labels: object) -> None:
        seed = sha256("|".join(map(str, labels)).encode()).digest()
        self._random = random.Random(int.from_bytes(seed, "big")).random  # noqa: S311 - a generator of texts, not of secrets
        self.bits = 0.0

    def below(self, n: int) -> int:
        """Return one of 0..n-1, all equally likely."""
        self.bits += _LOG2[n] if n < 4096 else math.log2(n)
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """Return one of low..high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options, all equally likely."""
        return options[self.below(len(options))]

    def flip(self) -> bool:
        """Return True half of the time."""
        return self.below(2) == 1

    def chance(self, part: int, whole: int) -> bool:
        """Return True with probability part / whole."""
        is_hit = int(self._random() * whole) < part
        self.bits += math.log2(whole / (part if is_hit else whole - part))
        return is_hit

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Return `count` different options in random order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def shuffle(self, items: Sequence[T]) -> list[T]:
        """Return all items in random order."""
        return self.sample(items, len(items))

    def weighted(self, cumulative: Sequence[tuple[float, T]]) -> T:
        """Return an option from (cumulative probability, option) pairs, see `cumulate`."""
        place = self._random()
        before = 0.0
        for until, option in cumulative:
            if place < until:
                self.bits -= math.log2(until - before)
                return option
            before = until
        raise ValueError(f"Draw.weighted: the shares end at {before}, not at 1; use cumulate()")


def cumulate(weights: dict[T, float]) -> list[tuple[float, T]]:
    """Return the (cumulative probability, option) pairs of `weights`, which need not sum to one."""
    total = sum(weights.values())
    pairs: list[tuple[float, T]] = []
    before = 0.0
    for option, weight in weights.items():
        if weight > 0:
            before += weight / total
            pairs.append((before, option))
    pairs[-1] = (1.0, pairs[-1][1])
    return pairs
