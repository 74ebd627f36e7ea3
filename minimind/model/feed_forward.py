"""SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)). Knows neither the residual nor the norm before it."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Position-wise feed-forward without biases; `size` is the inner width."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the transformed `x`, each position by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
