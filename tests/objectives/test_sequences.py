"""Sums over the documents of packed rows."""

import torch

from minimind.objectives.sequences import num_documents, spread_over_tokens, sum_by_document

DOCUMENTS = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 2]])
VALUES = torch.tensor([[1.0, 2.0, 4.0, 99.0], [1.0, 2.0, 3.0, 5.0]])


def test_a_document_has_the_sum_of_its_tokens_and_padding_counts_nowhere():
    assert num_documents(DOCUMENTS) == 3
    assert sum_by_document(VALUES, DOCUMENTS, 3).tolist() == [[3.0, 4.0, 0.0], [1.0, 5.0, 5.0]]


def test_the_gradient_of_padding_is_zero():
    values = VALUES.clone().requires_grad_()
    sum_by_document(values, DOCUMENTS, 3).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_value_comes_back_to_the_tokens_of_its_document():
    spread = spread_over_tokens(torch.tensor([[3.0, 4.0, 7.0], [1.0, 5.0, 6.0]]), DOCUMENTS)
    assert spread.tolist() == [[3, 3, 4, 0], [1, 5, 5, 6]]


def test_rows_of_padding_alone_have_sums_of_zero():
    empty = torch.full((1, 3), -1)
    assert num_documents(empty) == 1
    assert sum_by_document(torch.ones(1, 3), empty, 1).tolist() == [[0.0]]
