"""How well a model predicts text it has not seen: exact token means and bits per byte over any number of batches.

Sums over all batches and processes are divided once, at the end, so the numbers depend on neither the batch size nor
the number of processes. It knows batches, not where they come from.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.errors import DataError
from minimind.model.transformer import Transformer
from minimind.objectives.cross_entropy import cross_entropy, fused_linear_cross_entropy
from minimind.runtime import distributed


def evaluate_loss(
    model: Transformer,
    batches: Iterable[Batch],
    token_bytes: Sequence[int],
    *,
    autocast: AbstractContextManager[object] | None = None,
) -> dict[str, float]:
    """Return the validation metrics of this and all other processes' batches (each process gives its own share).

    - val_loss: mean of -log p over the learned tokens, by weight, in nats
    - val_bits_per_byte: bits to write the learned tokens, each counted once whatever its weight, per byte of their
      text (`token_bytes`, see Tokenizer). Control tokens have no bytes but cost bits, so that the number is the length
      of a real code, with the ends of the documents, and never below the entropy of the source. NaN without any byte
    - val_accuracy: share of the learned tokens, by weight, that the model finds likeliest

    The model is put into evaluation mode and back. Raises DataError when no token is learned.
    """
    device = next(model.parameters()).device
    sizes = torch.tensor(token_bytes, dtype=torch.int64, device=device)
    sums = torch.zeros(5, dtype=torch.float64)
    is_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast or nullcontext():
            for batch in batches:
                batch = batch.to(device)
                output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
                loss_sum, metrics = cross_entropy(output, batch)
                is_learned = batch.loss_weights > 0
                is_plain = bool((batch.loss_weights[is_learned] == 1).all())
                nats = loss_sum if is_plain else _nats(output, batch.labels, is_learned)
                num_bytes = sizes[batch.labels[is_learned]].sum()
                found = (loss_sum, metrics["loss_weight"], metrics["correct"], nats, num_bytes)
                sums += torch.stack([value.to("cpu", torch.float64) for value in found])
    finally:
        model.train(is_training)
    loss_sum, weight, correct, nats, num_bytes = distributed.all_reduce_sum(sums).tolist()
    if not weight:
        raise DataError("validation: no token is learned in the validation data; give other --data.validation files")
    return {
        "val_loss": loss_sum / weight,
        "val_bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.nan,
        "val_accuracy": correct / weight,
    }


def _nats(output: Output, labels: Tensor, is_learned: Tensor) -> Tensor:
    hidden = output.hidden[is_learned]  # (N, D)
    ones = torch.ones(len(hidden), device=hidden.device)
    return fused_linear_cross_entropy(hidden, output.head, labels[is_learned], ones)[0]
