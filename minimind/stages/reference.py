"""The frozen model of preference learning: which one it is, and what it thinks of the documents of a batch."""

from pathlib import Path
from typing import TYPE_CHECKING

from minimind.errors import CheckpointError
from minimind.stages.base import TrainingConfig

if TYPE_CHECKING:
    from minimind.batch import Batch
    from minimind.data.pairs import OpenReference, Reference, Score
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer


def scorer(model: "Transformer", config: TrainingConfig) -> "Score":
    """Return what gives the log-probability of each document under `model` as it then is, without dropout."""
    return _scorer(model, config)[0]


def reference(
    path: Path | None, model: "Transformer", tokenizer: "Tokenizer", config: TrainingConfig
) -> "OpenReference":
    """Return how to open the reference: the model at `path`, or `model` as it is now (so before it is trained).

    Raises CheckpointError when the model at `path` does not read the same ids.
    """
    from minimind.checkpoint import load, resolve
    from minimind.data.pairs import Reference
    from minimind.runtime.integrity import sha256_of_tensors
    from minimind.tokenizer.bpe import Tokenizer

    if path is not None and (theirs := Tokenizer.load(resolve(path))).sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"reference {path}: its tokenizer is {theirs.sha256[:12]}, the policy's {tokenizer.sha256[:12]}; "
            "both must read the same ids: name a reference of the same family, or leave --reference out"
        )

    def open_reference() -> "Reference":
        frozen = model if path is None else load(path)[0]
        score, dtype = _scorer(frozen, config)
        return Reference(sha256_of_tensors(frozen.state_dict_for_disk()), dtype, score)

    return open_reference


def _scorer(model: "Transformer", config: TrainingConfig) -> "tuple[Score, str]":
    import torch

    from minimind.objectives.preference import document_log_probs
    from minimind.runtime.device import autocast, pick_device, pick_dtype

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, num_parameters=model.config.num_parameters()[0])

    def score(batch: "Batch") -> torch.Tensor:
        was_training = model.training
        model.to(device).eval()
        batch = batch.to(device)
        with (
            torch.enable_grad(),
            autocast(device, dtype),
        ):  # as in training: in bfloat16 the other path rounds otherwise
            output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
            found = document_log_probs(output, batch).detach()
        model.train(was_training)
        return found

    return score, str(dtype)
