"""The order of samples as a pure function of (seed, epoch, position): a keyed bijection, no stored permutation.

An epoch of n samples is visited in the order permute(0), permute(1), ..., permute(n - 1). The bijection is a Feistel
network over Z_a x Z_b with a * b >= n, a = ceil(sqrt(n)), b = ceil(n / a), closed onto [0, n) by cycle walking
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002):

    left  <- (left  + F(key_2i,     right)) mod a
    right <- (right + F(key_2i + 1, left))  mod b

Every round can be undone, so `inverse` tells at which position a sample is visited. Memory is constant: 10**10 samples
cost as much as ten. It knows nothing of ranks, workers or files: those take slices of `global_rows`.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Part of a loader's saved state: a change of the bijection would change what a resumed run sees."""

NUM_ROUNDS = 12
"""Half rounds. Small domains need them: with 12 the 24 orders of four samples are equally frequent (tests)."""

MAX_SAMPLES = 2**62
"""Above this the products of the bijection would leave 64 bits."""


@lru_cache(maxsize=64)
def epoch_key(seed: int, epoch: int) -> bytes:
    """Return the key of one epoch: blake2b of (seed, epoch), 8 bytes for each half round."""
    digest = b""
    block = 0
    while len(digest) < 8 * NUM_ROUNDS:
        digest += hashlib.blake2b(f"minimind order {seed} {epoch} {block}".encode(), digest_size=64).digest()
        block += 1
    return digest[: 8 * NUM_ROUNDS]


def _mix(values: U64, key: int) -> U64:
    """Return 64 well mixed bits of each value (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = values + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _sides(n: int) -> tuple[int, int]:
    a = math.isqrt(n - 1) + 1
    return a, -(-n // a)


def _round_keys(key: bytes) -> list[int]:
    return [int.from_bytes(key[8 * i : 8 * i + 8], "little") for i in range(NUM_ROUNDS)]


def _forward(index: U64, a: int, b: int, keys: list[int]) -> U64:
    size_a, size_b = np.uint64(a), np.uint64(b)
    left, right = index // size_b, index % size_b
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right, key) % size_a) % size_a
        else:
            right = (right + _mix(left, key) % size_b) % size_b
    return left * size_b + right


def _backward(index: U64, a: int, b: int, keys: list[int]) -> U64:
    size_a, size_b = np.uint64(a), np.uint64(b)
    left, right = index // size_b, index % size_b
    for i in reversed(range(len(keys))):
        if i % 2 == 0:
            left = (left + size_a - _mix(right, keys[i]) % size_a) % size_a
        else:
            right = (right + size_b - _mix(left, keys[i]) % size_b) % size_b
    return left * size_b + right


def _walk(index: npt.ArrayLike, n: int, key: bytes, *, undo: bool) -> I64:
    if not 0 < n <= MAX_SAMPLES:
        raise ValueError(f"number of samples must be in 1..{MAX_SAMPLES}, not {n}")
    start = np.atleast_1d(np.asarray(index, dtype=np.int64))
    if start.size and (int(start.min()) < 0 or int(start.max()) >= n):
        raise ValueError(f"index {int(start.min())}..{int(start.max())} is outside 0..{n - 1}")
    a, b = _sides(n)
    keys = _round_keys(key)
    step = _backward if undo else _forward
    values = step(start.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = step(values[outside], a, b, keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(np.shape(index))


def permute(index: npt.ArrayLike, n: int, key: bytes) -> I64:
    """Return which sample is visited at each position `index` of an epoch of `n` samples (same shape as `index`)."""
    return _walk(index, n, key, undo=False)


def inverse(sample: npt.ArrayLike, n: int, key: bytes) -> I64:
    """Return at which position each `sample` is visited: `inverse(permute(i, n, key), n, key) == i`."""
    return _walk(sample, n, key, undo=True)


def global_rows(step: int, batch_rows: int, n: int, seed: int) -> I64:
    """Return the rows of the global batch of optimizer step `step` (0-based), shape (batch_rows,).

    Epochs follow each other without a gap: a step may hold the end of one epoch and the beginning of the next, so every
    row is visited exactly once in each epoch whatever `batch_rows` is.
    """
    if step < 0 or batch_rows < 1:
        raise ValueError(f"step {step} must not be negative and batch_rows {batch_rows} must be positive")
    first = step * batch_rows
    rows = np.empty(batch_rows, dtype=np.int64)
    done = 0
    while done < batch_rows:
        epoch, index = divmod(first + done, n)
        count = min(batch_rows - done, n - index)
        rows[done : done + count] = permute(np.arange(index, index + count), n, epoch_key(seed, epoch))
        done += count
    return rows


def share(count: int, rank: int, world_size: int) -> slice:
    """Return which of `count` consecutive rows a rank takes: shares differ by one row at most, rank 0 has a largest."""
    size, rest = divmod(count, world_size)
    start = rank * size + min(rank, rest)
    return slice(start, start + size + (rank < rest))
