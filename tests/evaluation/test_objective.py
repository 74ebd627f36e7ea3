"""The validation of any objective: the exact mean over all batches, whatever their sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from training.tiny_run import DENSE

from minimind.batch import Batch, Output
from minimind.errors import DataError
from minimind.evaluation.objective import evaluate_objective
from minimind.model.transformer import Transformer


def batch_of(ids: Tensor, weight: float) -> Batch:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, ids, positions, torch.zeros_like(ids), torch.ones(ids.shape), weight)


def objective(output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return output.hidden.square().sum(), {"size": torch.tensor(float(batch.input_ids.numel()))}


def test_the_mean_is_over_the_weights_of_all_batches() -> None:
    torch.manual_seed(0)
    model = Transformer(DENSE).train()
    ids = torch.randint(20, 60, (6, 5))
    whole = evaluate_objective(model, [batch_of(ids, 12.0)], objective)
    parts: list[Any] = [batch_of(ids[:1], 1.0), batch_of(ids[1:4], 4.0), batch_of(ids[4:], 7.0)]
    assert evaluate_objective(model, parts, objective) == pytest.approx(whole, rel=1e-6)
    with torch.no_grad():
        assert whole == pytest.approx({"val_loss": float(model(ids).hidden.square().sum()) / 12, "val_size": 30 / 12})
    assert model.training


def test_nothing_to_validate_is_said() -> None:
    model = Transformer(DENSE)
    with pytest.raises(DataError, match="there is no batch"):
        evaluate_objective(model, [], objective)
    with pytest.raises(DataError, match="nothing is learned"):
        evaluate_objective(model, [batch_of(torch.full((1, 3), 20), 0.0)], objective)
