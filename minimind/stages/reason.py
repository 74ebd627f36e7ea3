"""Reasoning: learn to think before answering. Fine-tuning in which the tags around thought and answer count more.

    loss = - sum_t w_t log p(x_t | x_<t) / sum_t w_t

w_t is 0 outside the assistant's turns, `tag_weight` on <think>, </think>, <answer> and </answer> inside them, else 1. A
model that has learned when to open and close a thought puts the rest in its place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.errors import CheckpointError
from minimind.stages.base import TrainingConfig, start
from minimind.stages.supervised import train
from minimind.training.config import OptimConfig

if TYPE_CHECKING:
    from torch import Tensor

    from minimind.batch import Batch, Output
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Fine-tune a model on conversations whose answers think first: --init-from RUN --data FILE ..."""

    out: Path = Path("runs/reason")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    tag_weight: float = 10.0
    """How many times more a tag counts than another token of the answer."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5, weight_decay=0.0))
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.init_from is None:
            found.append("init_from: reasoning starts from a trained model; give --init-from RUN")
        if not 0 < self.tag_weight < math.inf:
            found.append(f"tag_weight = {self.tag_weight}: more than 0; 1 weighs the tags as everything else")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.data.loader import Loader

    model, tokenizer = start(config)
    emphasis = dict.fromkeys(tag_ids(tokenizer, where=str(config.init_from)), config.tag_weight)
    objective = partial(cross_entropy_of_tags, emphasis=emphasis)
    make_loader = partial(Loader, emphasis=emphasis)
    return train(config, "conversation", model, tokenizer, objective, make_loader=make_loader)


def tag_ids(tokenizer: "Tokenizer", *, where: str) -> list[int]:
    """Return the ids of the four tags. CheckpointError, naming `where`, if a tag is not one token."""
    encoded = {tag: tokenizer.encode(tag, allow_special=True) for tag in TAGS}
    if split := [f"{tag} into {len(ids)}" for tag, ids in encoded.items() if len(ids) != 1]:
        raise CheckpointError(
            f"{where}: its tokenizer splits {', '.join(split)} tokens, but each of {' '.join(TAGS)} must be one; "
            "start from a model whose vocabulary `minimind train-tokenizer` made"
        )
    return [ids[0] for ids in encoded.values()]


def cross_entropy_of_tags(
    output: "Output", batch: "Batch", *, emphasis: Mapping[int, float]
) -> "tuple[Tensor, dict[str, Tensor]]":
    """Return the weighted cross-entropy, and among its metrics `tag_share`: the weight that lies on the tags."""
    import torch

    from minimind.objectives.cross_entropy import cross_entropy

    loss_sum, metrics = cross_entropy(output, batch)
    is_tag = torch.isin(batch.labels, torch.tensor(list(emphasis), device=batch.labels.device))
    return loss_sum, {**metrics, "tag_share": (batch.loss_weights * is_tag).sum()}


def main(argv: Sequence[str]) -> None:
    """`minimind reason`."""
    run(parse(Config, argv, command="reason"))
