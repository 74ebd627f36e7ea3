"""Rotary positions (arXiv 2104.09864), half-split layout, with YaRN (arXiv 2309.00071) for contexts beyond the trained.

Angles are computed from the positions given, once per forward; there is no table and no state, so a position may be
any number a caller can justify. Limits are checked by the Transformer.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimind.model.config import ModelConfig
from minimind.model.families import yarn_attention_factor


def inverse_frequencies(config: ModelConfig) -> tuple[Float[Tensor, " half"], float]:
    """Return (radians per position of each rotated pair, factor on cos and sin).

    Pair i rotates by theta^(-2i/Dh). YaRN divides by the stretch s where a pair turns fewer than beta_slow times over
    the trained length, keeps the frequency where it turns more than beta_fast times, and blends linearly between.
    """
    size = config.size_per_head
    # Written as others write it: at position 30,000 one rounding more would be a visible angle.
    periods = config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if config.rope_scaling == "none":
        return 1.0 / periods, 1.0

    def pair_turning(times: float) -> float:
        trained = config.original_max_position_embeddings
        return size * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_turning(config.yarn_beta_slow)), size - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    blended = 1.0 / periods * (1 - interpolated) + 1.0 / (config.yarn_factor * periods) * interpolated
    return blended, yarn_attention_factor(config.yarn_factor)


def angles(
    positions: Int[Tensor, "rows T"], frequencies: Float[Tensor, " half"], factor: float
) -> tuple[Float[Tensor, "rows T 1 half"], Float[Tensor, "rows T 1 half"]]:
    """Return cos and sin of the rotation at each position, times `factor`, in float32; broadcast over heads."""
    turned = positions[..., None, None].float() * frequencies  # (rows, T, 1, Dh/2)
    return turned.cos() * factor, turned.sin() * factor


def rotate(
    x: Float[Tensor, "B T heads Dh"],
    cos: Float[Tensor, "rows T 1 half"],
    sin: Float[Tensor, "rows T 1 half"],
) -> Float[Tensor, "B T heads Dh"]:
    """Return `x` with the pair (i, i + Dh/2) of each head turned by its angle; float32 inside, the dtype of `x` out."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
