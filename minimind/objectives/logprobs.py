"""Log-probabilities of chosen tokens: the one primitive that every objective beyond cross-entropy stands on.

From hidden states and head, in chunks of tokens, so that (B, T, V) logits never exist; chunks are recomputed in the
backward. `reference_log_probs` is the definition. Which tokens matter is told by the caller, or by `loss_weights`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minimind.batch import Batch, Output
from minimind.objectives.sequences import on_learned_tokens

CHUNK = 1024
"""Tokens whose logits exist at one time."""


def token_log_probs(
    hidden: Float[Tensor, "B T D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Tensor, "B T"]:
    """Return log softmax(head h / temperature)[label], float32, in nats; differentiable in `hidden` and `head`.

    The softmax is over the whole vocabulary: a behaviour policy that samples at this temperature without top-k has
    exactly these log-probabilities. Labels at positions that do not matter must still be valid ids (0 will do).
    """
    (log_probs,) = _in_chunks(_log_probs_of_chunk, hidden, head, labels, temperature, chunk)
    return log_probs


def token_log_probs_and_entropy(
    hidden: Float[Tensor, "B T D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return (log-probabilities, entropy of the distribution at each position in nats), both differentiable."""
    log_probs, entropy = _in_chunks(_both_of_chunk, hidden, head, labels, temperature, chunk)
    return log_probs, entropy


def learned_log_probs(
    output: Output, batch: Batch, *, temperature: float = 1.0
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return (log-probability of the label, entropy in nats) where `loss_weights` is not 0; both are 0 elsewhere."""

    def both(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        found = token_log_probs_and_entropy(hidden[None], head, labels[None], temperature=temperature)
        return found[0][0], found[1][0]

    log_probs, entropy = on_learned_tokens(output, batch, both)
    return log_probs, entropy


def reference_log_probs(
    hidden: Float[Tensor, "B T D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return what `token_log_probs_and_entropy` returns, with all logits at once."""
    log_probs = (F.linear(hidden, head).float() / temperature).log_softmax(-1)  # (B, T, V)
    chosen = log_probs.gather(-1, labels[..., None])[..., 0]
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def _in_chunks(
    of_chunk: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]],
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, ...]:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.flatten()  # (N, D), (N,)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, flat_labels.shape[0], chunk):
        arguments = (flat_hidden[start : start + chunk], head, flat_labels[start : start + chunk], temperature)
        if needs_grad:  # keep (n, D) for the backward instead of (n, V)
            parts.append(checkpoint(of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(of_chunk(*arguments))
    return tuple(torch.cat(column).view(labels.shape) for column in zip(*parts, strict=True))


def _log_probs_of_chunk(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor]:
    logits = F.linear(hidden, head).float() / temperature  # (n, V)
    return (logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1),)


def _both_of_chunk(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, head).float() / temperature  # (n, V)
    normaliser = logits.logsumexp(-1)  # (n,)
    log_probs = logits.gather(-1, labels[:, None])[:, 0] - normaliser
    # H = log Z - sum_v p_v z_v
    return log_probs, normaliser - (logits.softmax(-1) * logits).sum(-1)
