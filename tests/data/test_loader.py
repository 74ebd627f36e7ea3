"""From rows to batches: the shift by hand, exact partitions over ranks and micro-batches, resuming."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimind.batch import PAD_DOCUMENT, Batch, Example
from minimind.data.collate import collate
from minimind.data.loader import Loader
from minimind.data.packing import PackedRows, pack
from minimind.errors import ConfigError, DataError

from .test_packing import make_dataset


def test_collate_by_hand() -> None:
    rows = [
        [Example([5, 6, 7, 8], [0, 0, 1, 2]), Example([9, 4], [0, 1])],
        [Example([3, 2, 1], [1, 0.5, 1])],
    ]
    batch = collate(rows, 5, pad_id=0)
    none = PAD_DOCUMENT
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 0], [3, 2, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 4, 0], [2, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, none], [0, 0, none, none, none]]
    assert batch.loss_weights.tolist() == [[0, 1, 2, 1, 0], [0.5, 1, 0, 0, 0]]
    assert batch.weight == 5.5
    assert batch.num_tokens == 6
    assert (batch.input_ids.dtype, batch.loss_weights.dtype) == (torch.int64, torch.float32)


def test_collate_pads_and_refuses() -> None:
    empty = collate([[]], 3, pad_id=7)
    assert (empty.input_ids.tolist(), empty.weight, empty.num_tokens) == ([[7, 7, 7]], 0.0, 0)
    with pytest.raises(ValueError, match="row 0: documents need 4 positions or more, the row has 3"):
        collate([[Example([1, 2, 3, 4, 5], [1.0] * 5)]], 3, pad_id=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedRows:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(2, 20, 150).tolist()
    return pack(make_dataset(tmp_path_factory.mktemp("loader"), lengths, "conversation"), 24)


def make(rows: PackedRows, batch_rows: int = 8, micro_rows: int = 3, seed: int = 0, **world: Any) -> Loader:
    return Loader(rows, batch_rows=batch_rows, micro_rows=micro_rows, seed=seed, **world)


def labels(batches: list[Batch]) -> list[int]:
    """Every learned label, which tells its token (ids are unique in this dataset)."""
    return [int(x) for batch in batches for x in batch.labels[batch.loss_weights > 0]]


@given(batch=st.integers(1, 40), micro=st.integers(1, 12), world=st.integers(1, 9), step=st.integers(0, 50))
def test_ranks_and_micro_batches_partition_the_global_batch(
    rows: PackedRows, batch: int, micro: int, world: int, step: int
) -> None:
    whole = make(rows, batch, batch).micro_batches(step)
    assert len(whole) == 1
    parts = [make(rows, batch, micro, rank=rank, world_size=world).micro_batches(step) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert labels([b for part in parts for b in part]) == labels([*whole])
    assert sum(b.weight for part in parts for b in part) == pytest.approx(whole[0].weight, rel=1e-12)
    for part in parts:
        assert all(1 <= len(b.input_ids) <= micro for b in part)


@pytest.mark.parametrize("worlds", [(1, 2, 1), (2, 1, 2), (3, 1, 4)])
def test_a_changing_number_of_ranks_sees_the_same_samples(rows: PackedRows, worlds: tuple[int, ...]) -> None:
    def run(world_of_step: list[int]) -> list[list[int]]:
        seen: list[list[int]] = []
        for step, world in enumerate(world_of_step):
            loaders = [make(rows, rank=rank, world_size=world) for rank in range(world)]
            seen.append(labels([b for loader in loaders for b in loader.micro_batches(step)]))
        return seen

    steps = 12
    assert run([worlds[step * len(worlds) // steps] for step in range(steps)]) == run([1] * steps)


def test_kills_and_other_worker_counts_repeat_and_skip_nothing(rows: PackedRows) -> None:
    state, seen = make(rows, batch_rows=2).state(), list[int]()
    generator = np.random.Generator(np.random.PCG64(4))
    steps = make(rows, batch_rows=2).steps_per_epoch
    assert steps > 20
    for step in range(steps):  # each step in a new life, with another number of ranks and rows of a forward
        world, micro = (int(x) for x in generator.integers(1, 6, 2))
        for rank in range(world):
            loader = make(rows, batch_rows=2, micro_rows=micro, rank=rank, world_size=world)
            loader.check_state(state)
            seen += labels([*loader.micro_batches(step)])
    learned = sorted(labels([*make(rows, rows.num_rows, 64).micro_batches(0)]))
    assert sorted(seen[: len(learned)]) == learned
    assert len(learned) == rows.dataset.num_learned_tokens


def test_micro_batches_is_pure(rows: PackedRows) -> None:
    def digest(batch: Batch) -> str:
        tensors = (batch.input_ids, batch.labels, batch.positions, batch.documents, batch.loss_weights)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    loader = make(rows, seed=3)
    forwards = {step: [digest(b) for b in loader.micro_batches(step)] for step in range(10)}
    backwards = {step: [digest(b) for b in make(rows, seed=3).micro_batches(step)] for step in reversed(range(10))}
    assert forwards == backwards
    assert forwards[0] != [digest(b) for b in make(rows, seed=4).micro_batches(0)]


def test_validation_sees_each_row_once(rows: PackedRows) -> None:
    once = sorted(labels(list(make(rows, micro_rows=64).all_batches())))
    for world in (1, 2, 3, 7):
        shares = [list(make(rows, rank=rank, world_size=world).all_batches()) for rank in range(world)]
        assert len({len(part) for part in shares}) == 1
        assert sorted(labels([b for part in shares for b in part])) == once
    assert len(once) == rows.dataset.num_learned_tokens


def test_counts(rows: PackedRows) -> None:
    loader = make(rows, batch_rows=10)
    assert loader.num_rows == rows.num_rows
    assert loader.steps_per_epoch == -(-rows.num_rows // 10)
    assert loader.prefetch
    assert loader.tokens_per_step == pytest.approx(10 * rows.num_slots / rows.num_rows)


def test_changed_data_is_refused_and_both_fingerprints_are_named(rows: PackedRows, tmp_path: Path) -> None:
    saved = make(rows).state()
    make(rows, micro_rows=1, rank=1, world_size=2).check_state(saved)  # these may change
    other = pack(make_dataset(tmp_path, [5, 9, 7], "conversation"), 24)
    with pytest.raises(DataError) as caught:
        make(other).check_state(saved)
    assert caught.value.exit_code == 3
    assert rows.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_changed_settings_are_refused(rows: PackedRows) -> None:
    saved = make(rows).state()
    with pytest.raises(ConfigError, match=r"batch_rows was 8 and is 9; seed was 0 and is 1"):
        make(rows, batch_rows=9, seed=1).check_state(saved)
    shorter = pack(rows.dataset, 23)
    with pytest.raises(ConfigError, match="row_length was 24 and is 23"):
        make(shorter).check_state(saved)


def test_impossible_settings(rows: PackedRows, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_rows is 0"):
        make(rows, batch_rows=0)
    with pytest.raises(ConfigError, match=r"rank 2 is outside 0\.\.1"):
        make(rows, rank=2, world_size=2)
    with pytest.raises(DataError, match="no rows to train on"):
        make(pack(make_dataset(tmp_path, []), 16))
