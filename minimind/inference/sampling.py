"""How the next token is chosen from logits: temperature, top-k, top-p, min-p, repetition penalty, a seed per row.

A row's choice depends on its own logits, parameters, seed and count only: it is the same alone and in any batch. The
random number of token i is a counter-based hash of (seed, i), and the token is drawn by inverting the cumulative
distribution in vocabulary order. It knows no engine, no cache and no text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from minimind.errors import ConfigError

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_TOP_P_GUESS = 128
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is decoded. Filters apply in the order penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens (and ties with the k-th); 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens (and ties) whose probability is at least p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or the answer are divided by it, negative ones multiplied (CTRL)."""
    seed: int | None = None
    """Same seed, same tokens; None draws one from PyTorch's global generator, so a seeded run repeats too."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the one met is the last id of the answer, as training data has it."""
    max_tokens: int = 256
    """The most tokens to add, limited further by the room left in the cache."""
    logprobs: bool = False
    """Report log p of each chosen token: of logits / temperature (temperature 1 when greedy), before any filter."""

    def __post_init__(self) -> None:
        """Refuse impossible values, all at once."""
        found: list[str] = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature {self.temperature}: use 0 (greedy) or a positive number")
        if self.top_k < 0:
            found.append(f"top_k {self.top_k}: use 0 (all) or a positive number")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p {self.top_p}: use a number in (0, 1]")
        if not 0 <= self.min_p <= 1:
            found.append(f"min_p {self.min_p}: use a number in [0, 1]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            found.append(f"repetition_penalty {self.repetition_penalty}: use a positive number, 1 for none")
        if self.max_tokens < 1:
            found.append(f"max_tokens {self.max_tokens}: use at least 1")
        if found:
            raise ConfigError("sampling: " + "; ".join(found))


@dataclass(frozen=True, slots=True)
class RowParams:
    """The parameters of B rows, ready for `sample`: plain numbers where all rows agree, else (B, 1) tensors.

    None stands for a filter that no row uses.
    """

    temperature: Tensor | float
    """1 where the row is greedy."""
    is_greedy: Tensor | bool
    top_k: Tensor | int | None
    top_p: Tensor | float | None
    min_p: Tensor | float | None
    repetition_penalty: Tensor | float | None
    max_top_k: int
    logprobs: bool
    """Whether any row wants log-probabilities."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> "RowParams":
        """Return the parameters of the rows in `params` (at least one)."""
        first = params[0]
        top_ks = [first.top_k]
        if all(p is first or p == first for p in params):
            temperature, is_greedy = first.temperature or 1.0, first.temperature == 0
            top_k, top_p, min_p, penalty = first.top_k, first.top_p, first.min_p, first.repetition_penalty
        else:

            def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
                return torch.tensor(values, dtype=dtype, device=device)[:, None]  # (B, 1)

            temperature = column([p.temperature or 1.0 for p in params])
            is_greedy = column([p.temperature == 0 for p in params], torch.bool)
            top_ks = [p.top_k for p in params]
            top_k = column([k or 1 << 31 for k in top_ks], torch.int64)
            top_p = column([p.top_p for p in params], torch.float64 if device.type != "mps" else torch.float32)
            min_p = column([p.min_p for p in params])
            penalty = column([p.repetition_penalty for p in params])
        return cls(
            temperature=temperature,
            is_greedy=is_greedy,
            top_k=top_k if any(top_ks) else None,
            top_p=top_p if any(p.top_p < 1 for p in params) else None,
            min_p=min_p if any(p.min_p > 0 for p in params) else None,
            repetition_penalty=penalty if any(p.repetition_penalty != 1 for p in params) else None,
            max_top_k=max(top_ks),
            logprobs=any(p.logprobs for p in params),
        )


def sample(
    logits: Float[Tensor, "B V"],
    params: RowParams,
    uniforms: NDArray[np.float64] | None = None,
    seen: Bool[Tensor, "B V"] | None = None,
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"] | None]:
    """Return the chosen tokens and, when a row wants them, their log-probabilities (natural, see `SamplingParams`).

    `uniforms` (B numbers in [0, 1), see `uniforms_of`) may be missing when every row is greedy; `seen` marks the tokens
    that the repetition penalty is for. Logits may hold -inf, but not in a whole row.
    """
    logits = logits.float()
    chosen_from = logits
    if params.repetition_penalty is not None and seen is not None:
        penalty = params.repetition_penalty
        chosen_from = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    scaled = None
    if params.is_greedy is True:
        token_ids = chosen_from.argmax(dim=-1)
    else:
        if uniforms is None:
            raise ValueError("sample: rows with a temperature need their uniforms")
        scaled = _scale(chosen_from, params.temperature)
        token_ids = _invert(truncate(scaled, params), uniforms)
        if params.is_greedy is not False:
            token_ids = torch.where(params.is_greedy[:, 0], chosen_from.argmax(dim=-1), token_ids)
    if not params.logprobs:
        return token_ids, None
    if scaled is None or chosen_from is not logits:
        scaled = _scale(logits, params.temperature)
    log_total = scaled.exp().sum(dim=-1).log()  # as safe as logsumexp: the largest is 0
    return token_ids, scaled.gather(1, token_ids[:, None])[:, 0] - log_total


def truncate(scaled: Float[Tensor, "B V"], params: RowParams) -> Float[Tensor, "B V"]:
    """Return `scaled` (logits over temperature) with -inf at every token that top-k, top-p or min-p removes."""
    if params.top_k is not None:
        largest = scaled.topk(min(params.max_top_k, scaled.shape[-1]), dim=-1).values  # (B, k)
        if isinstance(params.top_k, Tensor):
            limit = largest.gather(1, params.top_k.clamp(max=largest.shape[1]) - 1)
            limit = limit.masked_fill(params.top_k > scaled.shape[-1], -math.inf)
        else:
            limit = largest[:, -1:]
        scaled = scaled.masked_fill(scaled < limit, -math.inf)
    if params.top_p is not None:
        scaled = scaled.masked_fill(scaled < _top_p_limit(scaled, params.top_p), -math.inf)
    if params.min_p is not None:
        top = scaled.amax(dim=-1, keepdim=True)
        log_min = params.min_p.log() if isinstance(params.min_p, Tensor) else math.log(params.min_p)
        scaled = scaled.masked_fill(scaled < top + log_min, -math.inf)
    return scaled


def _top_p_limit(scaled: Tensor, top_p: Tensor | float) -> Tensor:
    """Return (B, 1): the smallest logit inside the smallest set of most likely tokens with mass `top_p`."""
    log_total = scaled.logsumexp(dim=-1, keepdim=True)
    closed = top_p >= 1 if isinstance(top_p, Tensor) else torch.zeros_like(log_total, dtype=torch.bool)
    limit = torch.zeros_like(log_total)
    # A full sort is slow, and the set is nearly always among the first tokens.
    for k in (min(_TOP_P_GUESS, scaled.shape[-1]), scaled.shape[-1]):
        largest = scaled.topk(k, dim=-1).values  # (B, k), descending
        probs = (largest - log_total).exp().to(_precise(scaled.device))
        is_kept = probs.cumsum(dim=-1) - probs < top_p  # mass of the more likely tokens
        limit = largest.masked_fill(~is_kept, math.inf).amin(dim=-1, keepdim=True)
        if (closed | ~is_kept[:, -1:]).all():
            break
    return limit.masked_fill(closed, -math.inf)


def key_of(seed: int) -> int:
    """Return the 64-bit key of a seed; neighbouring seeds get unrelated keys."""
    return _mix(_mix(seed & _MASK) + _STEP)


def uniforms_of(keys: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return one number in [0, 1) for each (key, counter), 53 random bits each (SplitMix64, Steele et al. 2014)."""
    z = keys + counters * np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * _MULTIPLIERS[0] & _MASK
    z = (z ^ (z >> 27)) * _MULTIPLIERS[1] & _MASK
    return z ^ (z >> 31)


def _scale(logits: Tensor, temperature: Tensor | float) -> Tensor:
    # The largest becomes 0 first, so that a tiny temperature overflows to -inf at the others and never to NaN.
    centred = logits - logits.amax(dim=-1, keepdim=True)
    return centred if isinstance(temperature, float) and temperature == 1.0 else centred / temperature


def _invert(scaled: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
    # The sum runs in float64: no rounding can then reach a token of probability 0, on a parallel scan either.
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=_precise(scaled.device))  # (B, V)
    target = torch.from_numpy(uniforms).to(scaled.device, cumulative.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=scaled.shape[-1] - 1)


def _precise(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type != "mps" else torch.float32
