"""RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight. Float32 inside, the input's dtype outside."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise the last axis by its root mean square, then scale by `weight`; no bias and no mean."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the normalised `x` in its own dtype, also under autocast."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed).to(x.dtype)
