"""The loss of a stage, and its metrics, on batches that it does not learn from: exact means over any number of batches.

As in training: sums over all batches and processes, divided once by the sum of their weights.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.errors import DataError
from minimind.model.transformer import Transformer
from minimind.runtime import distributed


def evaluate_objective(
    model: Transformer,
    batches: Iterable[Batch],
    objective: Callable[[Output, Batch], tuple[Tensor, dict[str, Tensor]]],
    *,
    autocast: AbstractContextManager[object] | None = None,
) -> dict[str, float]:
    """Return {"val_loss", "val_" + each metric of `objective`} of this and all other processes' batches.

    The model is in evaluation mode meanwhile. It computes with a graph that is dropped, as in training: in bfloat16
    the path without one rounds otherwise, and differences from a reference are smaller than that. Raises DataError when
    the batches weigh nothing.
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    is_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), autocast or nullcontext():
            for batch in batches:
                batch = batch.to(device)
                output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
                loss_sum, metric_sums = objective(output, batch)
                found = {"weight": torch.tensor(batch.weight), "loss": loss_sum} | dict(sorted(metric_sums.items()))
                for name, value in found.items():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().to(
                        "cpu", torch.float64
                    )
    finally:
        model.train(is_training)
    if not sums:
        raise DataError("validation: there is no batch; give other --data.validation files")
    names, values = list(sums), distributed.all_reduce_sum(torch.stack(list(sums.values()))).tolist()
    weight, *totals = values
    if not weight:
        raise DataError("validation: nothing is learned in the validation data; give other --data.validation files")
    return {f"val_{name}": total / weight for name, total in zip(names[1:], totals, strict=True)}
