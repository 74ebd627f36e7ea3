"""RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight. Float32 inside, the input's dtype outside."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minimind.native import kernels


class RMSNorm(nn.Module):
    """Normalise the last axis by its root mean square, then scale by `weight`; no bias and no mean."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"], *, for_product: bool = False) -> Float[Tensor, "*batch D"]:
        """Return the normalised `x` in its own dtype, also under autocast.

        `for_product`: in autocast's dtype, where only matrix products read it: rounded once instead of in each of them.
        """
        dtype = kernels.product_dtype(x) if for_product else x.dtype
        if x.requires_grad and kernels.usable(x.device, dtype) and x.dtype == self.weight.dtype == torch.float32:
            return kernels.rms_norm(x, self.weight, self.eps, dtype)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed).to(dtype)
