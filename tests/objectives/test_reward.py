"""The reward model's loss by hand: which token is read, what margin and centre do."""

import math

import pytest
import torch

from minimind.batch import Batch, Output
from minimind.objectives.preference import DOCUMENTS
from minimind.objectives.reward import bradley_terry, last_values

DOCS = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3], [0, 0, 0, 1, 1, 1, -1, -1]])
VALUES = torch.arange(16.0).view(2, 8) / 4
"""The last token of each document: 1, 4, 5, 7; 10, 13 (by 4)."""


def example(docs: torch.Tensor = DOCS) -> tuple[Output, Batch, torch.Tensor]:
    zeros = torch.zeros_like(docs)
    batch = Batch(zeros, zeros, zeros, docs, zeros.float(), weight=3.0)
    batch.extras[DOCUMENTS] = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1]])
    values = VALUES.clone().requires_grad_()
    hidden = torch.zeros(2, 8, 1)
    return Output(hidden, torch.zeros(1, 1), torch.zeros(()), values=values), batch, values


def test_the_last_token_of_each_document_is_read() -> None:
    output, batch, _ = example()
    assert last_values(output, batch).tolist() == [[0.25, 1.0, 1.25, 1.75], [2.5, 3.25, 0.0, 0.0]]


def test_a_row_that_is_full_to_its_end() -> None:
    output, batch, _ = example(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]]))
    assert last_values(output, batch)[:, :2].tolist() == [[0.5, 1.75], [2.0, 3.75]]


@pytest.mark.parametrize(("margin", "centre"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.1), (1.0, 0.01)])
def test_values_and_gradients(margin: float, centre: float) -> None:
    output, batch, values = example()
    loss, metrics = bradley_terry(output, batch, margin=margin, centre=centre)
    sides = [(0.25, 1.0), (1.25, 1.75), (2.5, 3.25)]
    expected = sum(math.log(1 + math.exp(margin + r - c)) + centre * (c + r) ** 2 for c, r in sides)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert values.grad is not None
    pull = -1 / (1 + math.exp(-0.75 - margin)) + 2 * centre * 1.25  # d loss / d r(chosen) of the first pair
    assert float(values.grad[0, 1]) == pytest.approx(pull, rel=1e-5)
    read = torch.zeros(2, 8, dtype=torch.bool)
    read[0, [1, 4, 5, 7]] = read[1, [2, 5]] = True
    assert ((values.grad != 0) == read).all()
    assert float(metrics["reward_accuracy"]) == 0.0
    assert float(metrics["reward_margin"]) == pytest.approx(-2.0)


def test_equal_values_give_log_2_for_each_pair() -> None:
    output, batch, _ = example()
    output.values = torch.full((2, 8), 3.7)
    assert float(bradley_terry(output, batch)[0]) == pytest.approx(3 * math.log(2), rel=1e-7)
