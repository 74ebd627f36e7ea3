"""SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)). Knows neither the residual nor the norm before it."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minimind.model.lora import side_by_side
from minimind.native import kernels


class FeedForward(nn.Module):
    """Position-wise feed-forward without biases; `size` is the inner width."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the transformed `x`, each position by itself."""
        if not (x.requires_grad and kernels.usable(x.device, kernels.product_dtype(x))):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(swiglu(side_by_side(x, self.gate_proj, self.up_proj)))


def swiglu(gate_up: Float[Tensor, "*batch F2"]) -> Float[Tensor, "*batch F"]:
    """Return silu(gate) * up, where the last axis holds the gates, then the ups."""
    if gate_up.requires_grad and kernels.usable(gate_up.device, gate_up.dtype):
        return kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
