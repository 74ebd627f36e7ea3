"""Loaders of preference learning: what a batch weighs, which document is which, the reference, answers handed on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minimind.batch import Batch
from minimind.data import pairs
from minimind.data.dataset import TokenDataset, prepare
from minimind.data.packing import PackedRows, Piece, pack
from minimind.data.pairs import PairLoader, Reference
from minimind.data.unpaired import IS_MISMATCHED, UnpairedLoader, hand_on, mismatched, with_kl
from minimind.errors import ConfigError, DataError
from minimind.objectives.kto import IS_DESIRABLE, KL
from minimind.objectives.preference import DOCUMENTS, REF_LOG_PROBS
from minimind.objectives.sequences import sum_by_document
from minimind.tokenizer.bpe import Tokenizer

from .conftest import turns
from .test_packing import make_dataset


def sum_of_labels(batch: Batch) -> Tensor:
    """A score that can be checked: the sum of each document's learned labels."""
    values = batch.labels.float() * (batch.loss_weights != 0)
    return sum_by_document(values, batch.documents, batch.extras[DOCUMENTS].shape[1])


class Opened:
    """Scores by `sum_of_labels` and counts how often it is asked."""

    def __init__(self, name: str = "weights") -> None:
        self.name, self.asked = name, 0

    def __call__(self) -> Reference:
        def score(batch: Batch) -> Tensor:
            self.asked += 1
            return sum_of_labels(batch)

        return Reference(self.name, "float32", score)


@pytest.fixture
def rows(tmp_path: Path) -> PackedRows:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(4, 12, 60).tolist()
    return pack(make_dataset(tmp_path, lengths, "preference"), 40)


def make(rows: PackedRows, **options: Any) -> PairLoader:
    settings: dict[str, Any] = {"batch_rows": 6, "micro_rows": 2, "seed": 0}
    return PairLoader(rows, **(settings | options))


def expected(dataset: TokenDataset, index: int) -> float:
    document = dataset.document(index)
    return float(sum(i for i, w in zip(document.ids[1:], document.loss_weights[1:], strict=True) if w))


def test_a_batch_weighs_its_pairs_and_knows_its_documents(rows: PackedRows) -> None:
    seen: list[int] = []
    for batch in make(rows).all_batches():
        ids = batch.extras[DOCUMENTS]
        assert ids.shape[1] % 2 == 0
        there = ids >= 0
        assert batch.weight == there.sum() / 2
        assert ((ids[:, 0::2] % 2 == 0) == there[:, 0::2]).all()  # chosen are the even documents of the data set
        assert torch.equal(ids[:, 1::2][there[:, 1::2]], ids[:, 0::2][there[:, 0::2]] + 1)
        seen += ids[there].tolist()
        for row, held in enumerate(ids):
            for number, index in enumerate(held[held >= 0].tolist()):
                inside = batch.documents[row] == number
                assert batch.input_ids[row, inside].tolist() == rows.dataset.document(index).ids[:-1]
    assert sorted(seen) == list(range(60))


def test_the_reference_is_asked_once_for_all(rows: PackedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Opened()
    loader = make(rows, reference=reference)
    asked = reference.asked
    assert asked == -(-len(rows) // 2)
    for step in range(3):
        for batch in loader.micro_batches(step):
            ids, found = batch.extras[DOCUMENTS], batch.extras[REF_LOG_PROBS]
            assert found.shape == ids.shape
            for index, value in zip(ids.flatten().tolist(), found.flatten().tolist(), strict=True):
                assert value == (expected(rows.dataset, index) if index >= 0 else 0.0)
    assert reference.asked == asked
    again = make(rows, reference=reference, micro_rows=5, seed=3)  # a resumed run, or another one
    other_rows = make(pack(rows.dataset, 40, mode="padded"), reference=reference)  # the cache is by document
    assert reference.asked == asked
    for loader_again in (again, other_rows):
        assert loader_again.ref_log_probs is not None
        assert loader.ref_log_probs is not None
        assert torch.equal(loader_again.ref_log_probs, loader.ref_log_probs)
    make(rows, reference=(other := Opened("other weights")))
    assert other.asked == asked
    monkeypatch.setattr(pairs, "CACHE_VERSION", pairs.CACHE_VERSION + 1)
    make(rows, reference=reference)
    assert reference.asked == 2 * asked


def test_a_run_goes_on_with_its_own_reference_only(rows: PackedRows) -> None:
    saved = make(rows, reference=Opened()).state()
    make(rows, reference=Opened()).check_state(saved)
    with pytest.raises(ConfigError, match="its weights were weights, now others; give the same --init-from"):
        make(rows, reference=Opened("others")).check_state(saved)
    with pytest.raises(ConfigError, match="its weights were weights, now none"):
        make(rows).check_state(saved)
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        make(rows, reference=Opened(), seed=1).check_state(saved)


@pytest.mark.parametrize("damage", [b"", b"xx", b"\xff" * 200])
def test_a_damaged_cache_is_made_again(damage: bytes, rows: PackedRows, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(rows, reference=Opened()).ref_log_probs
    (file,) = rows.dataset.folder.parent.glob("reference-*.safetensors")
    file.write_bytes(damage)
    reference = Opened()
    second = make(rows, reference=reference).ref_log_probs
    assert reference.asked
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert "computed again" in capsys.readouterr().err
    make(rows, reference=(third := Opened()))
    assert not third.asked


def test_a_cache_that_cannot_be_written_stops_nothing(
    rows: PackedRows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pairs, "save_file", full)
    loader = make(rows, reference=Opened())
    assert loader.ref_log_probs is not None
    assert "No space left" in capsys.readouterr().err
    assert not [*rows.dataset.folder.parent.glob("reference-*")]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_pairs_of_a_step(rows: PackedRows, world: int) -> None:
    loaders = [make(rows, rank=rank, world_size=world) for rank in range(world)]
    for step in range(4):
        whole = make(rows).micro_batches(step)
        parts = [loader.micro_batches(step) for loader in loaders]
        assert len({len(part) for part in parts}) == 1
        assert sum(b.weight for part in parts for b in part) == sum(b.weight for b in whole)


def test_a_rank_without_rows_has_an_empty_batch(rows: PackedRows) -> None:
    (batch,) = make(rows, batch_rows=1, rank=1, world_size=2, reference=Opened()).micro_batches(0)
    assert (batch.weight, batch.num_tokens) == (0.0, 0)
    assert batch.extras[DOCUMENTS].tolist() == [[-1, -1]]
    assert batch.extras[REF_LOG_PROBS].tolist() == [[0.0, 0.0]]


# --- single answers ---------------------------------------------------------------------------------------------------


def piece(prompt: list[int], answer: list[int], weight: float = 1.0) -> Piece:
    return Piece(np.array([*prompt, *answer]), np.array([0.0] * len(prompt) + [weight] * len(answer), dtype=np.float32))


def test_answers_are_handed_on() -> None:
    row = [piece([1, 2, 3], [7, 8]), piece([4], [9, 9, 9], -1.0), piece([4], [5])]
    made, changed = hand_on(row)
    assert [one.ids.tolist() for one in made] == [[1, 2, 3, 5], [4, 7, 8], [4, 9, 9, 9]]
    assert [one.loss_weights.tolist() for one in made] == [[0, 0, 0, 1], [0, 1, 1], [0, 1, 1, 1]]
    assert changed == [True, True, False]  # the last two ask the same
    assert sum(len(one.ids) for one in made) == sum(len(one.ids) for one in row)
    assert hand_on(row[:1])[1] == [False]  # alone it gets its own answer back


ROWS = [
    {**turns("who are you", "a cat"), "label": True},
    {"conversations": turns("who is she", "the boy")["conversations"], "label": False},
    {
        "chosen": turns("what is red", "the ball of the girl")["conversations"],
        "rejected": turns("what is red", "the dog")["conversations"],
    },
    {**turns("where is it", "far away"), "label": True},
]


@pytest.fixture
def answers(tokenizer: Tokenizer, tmp_path: Path, write_rows: Callable[..., Path]) -> TokenDataset:
    return prepare([write_rows(ROWS)], tokenizer, kind="unpaired", cache_dir=tmp_path / "cache", max_length=60)


def policy(batch: Batch) -> Tensor:
    """The reference's score and 3 more for each document."""
    return sum_of_labels(batch) + 3


def unpaired(dataset: TokenDataset, length: int = 200, **options: Any) -> UnpairedLoader:
    settings: dict[str, Any] = {"batch_rows": 2, "micro_rows": 1, "seed": 0, "reference": Opened(), "policy": policy}
    return UnpairedLoader(pack(dataset, length), **(settings | options))


def test_rows_of_one_side_or_two_become_single_answers(answers: TokenDataset, tokenizer: Tokenizer) -> None:
    learned = [
        (tokenizer.decode([i for i, w in zip(d.ids, d.loss_weights, strict=True) if w]), max(d.loss_weights) > 0)
        for d in answers
    ]
    assert [(text.removesuffix("<|im_end|>"), good) for text, good in learned] == [
        ("a cat", True), ("the boy", False), ("the ball of the girl", True), ("the dog", False), ("far away", True),
    ]  # fmt: skip


def test_a_long_single_answer_is_cut(tokenizer: Tokenizer, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    row = {**turns("who are you", "the cat sat on the mat and " * 9), "label": False}
    dataset = prepare([write_rows([row])], tokenizer, kind="unpaired", cache_dir=tmp_path / "cache", max_length=30)
    assert (dataset.longest, dataset.report["cut"], min(dataset.document(0).loss_weights)) == (30, 1, -1.0)


def test_a_pair_is_still_wanted_where_pairs_are_learned(
    tokenizer: Tokenizer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: label: one answer with a label, expected a pair"):
        prepare([write_rows(ROWS)], tokenizer, kind="preference", cache_dir=tmp_path / "cache", max_length=60)


def test_labels_weights_and_estimate_of_a_step(answers: TokenDataset) -> None:
    loader = unpaired(answers, batch_rows=1)
    assert not loader.prefetch
    (batch,) = loader.micro_batches(0)
    assert batch.weight == 5.0
    good = dict(zip(batch.extras[DOCUMENTS][0].tolist(), batch.extras[IS_DESIRABLE][0].tolist(), strict=True))
    assert good == {0: True, 1: False, 2: True, 3: False, 4: True}
    assert (batch.loss_weights >= 0).all()
    assert torch.equal(batch.extras[REF_LOG_PROBS], sum_of_labels(batch))
    # The policy gives 3 more than the reference to every document, on the rows with the answers handed on as well.
    assert batch.extras[KL].tolist() == [[3.0]]
    swapped = mismatched(batch)
    assert torch.equal(batch.extras["mismatched/" + REF_LOG_PROBS], sum_of_labels(swapped))
    assert swapped.num_tokens == batch.num_tokens
    assert int(batch.extras[IS_MISMATCHED].sum()) >= 3


def test_the_estimate_is_one_for_the_step_and_never_negative(answers: TokenDataset) -> None:
    scores = iter([torch.tensor([[5.0, 1.0]]), torch.tensor([[0.0, 6.0]])])
    batches = [*unpaired(answers, 40, batch_rows=8, micro_rows=1).micro_batches(0)][:2]
    for batch, mask in zip(batches, ([[True, True]], [[False, True]]), strict=True):
        batch.extras["mismatched/" + REF_LOG_PROBS] = torch.tensor([[1.0, 2.0]])
        batch.extras[IS_MISMATCHED] = torch.tensor(mask)
    with_kl(batches, lambda _: next(scores))
    assert [batch.extras[KL].tolist() for batch in batches] == [[[pytest.approx((4 - 1 + 4) / 3)]]] * 2
    with_kl(batches, lambda _: torch.tensor([[-9.0, -9.0]]))
    assert [batch.extras[KL].tolist() for batch in batches] == [[[0.0]]] * 2
    for batch in batches:
        batch.extras[IS_MISMATCHED] = torch.zeros(1, 2, dtype=torch.bool)
    with_kl(batches, lambda _: torch.tensor([[9.0, 9.0]]))
    assert [batch.extras[KL].tolist() for batch in batches] == [[[0.0]]] * 2
