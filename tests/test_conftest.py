"""The annotations are really checked while the tests run, and not while something is compiled."""

import jaxtyping
import pytest
import torch

from minimind.batch import Output


def output(hidden: torch.Tensor) -> Output:
    return Output(hidden=hidden, head=torch.zeros(7, 5), aux_loss=torch.zeros(()))


def test_a_wrong_shape_is_refused() -> None:
    output(torch.zeros(2, 3, 5))
    with pytest.raises(jaxtyping.TypeCheckError, match="hidden"):
        output(torch.zeros(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match="hidden"):
        output(torch.zeros(2, 3, 5, dtype=torch.long))


def test_compiling_switches_the_checks_off_for_this_test_only() -> None:
    torch.compile(lambda x: x, backend="eager")
    output(torch.zeros(2, 3))


def test_the_next_test_checks_again() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        output(torch.zeros(2, 3))
