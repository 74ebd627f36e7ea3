"""Reward models by name: what `model:PATH` and `transformers:PATH` of `--rewards` stand for. Frozen, on one device."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from minimind.data.messages import Message
    from minimind.rl.rewards import Scorer


def scorers_on(device: torch.device) -> "Callable[[str, str], Scorer]":
    """Return what makes the scorer of a kind and a path, as `Rewards` asks for it."""

    def make(kind: str, path: str) -> "Scorer":
        if kind == "model":
            return own_model(Path(path), device)
        from minimind.interop.reward import TransformersReward

        return TransformersReward(Path(path), device)

    return make


def own_model(path: Path, device: torch.device) -> "Scorer":
    """Return the scorer of a run of `minimind reward-model`. Raises CheckpointError for anything else."""
    from minimind.checkpoint.loading import load_reward_model
    from minimind.tokenizer.chat import Conversation, render_batch

    model, tokenizer = load_reward_model(path, device=device)

    def score(conversations: "Sequence[list[Message]]") -> list[float]:
        rendered = render_batch(tokenizer, [Conversation(messages) for messages in conversations])
        ids = [example.ids[:-1] for example in rendered]  # as in training: the value at the end token of the answer
        known = [i for i in range(len(ids)) if len(ids[i]) <= model.config.max_position_embeddings]
        scores = [math.nan] * len(ids)
        for i, value in zip(known, model.rewards([ids[i] for i in known]), strict=True):
            scores[i] = value
        return scores

    return score
