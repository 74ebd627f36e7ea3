"""LoRA (arXiv 2106.09685, eq. 3): a frozen linear layer, and a trained product of two thin matrices beside it.

    y = W x + (alpha / R) B A dropout(x)        W (out, in) frozen, A (R, in), B (out, R)

A starts kaiming-uniform and B at 0, as in PEFT, so a new adapter changes nothing. Which layers of a model have one, and
which of several is on, is `adapters.py`'s knowledge.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minimind.model.adapter_config import LoraConfig


class LoRALinear(nn.Module):
    """A linear layer with an adapter. Only the adapter is trained."""

    def __init__(self, base_layer: nn.Linear, config: LoraConfig) -> None:
        """Wrap `base_layer`, in whose dtype and on whose device the adapter is made."""
        super().__init__()
        self.base_layer = base_layer
        outputs, inputs = base_layer.weight.shape
        self.lora_A = nn.Parameter(base_layer.weight.new_empty(config.rank, inputs))
        self.lora_B = nn.Parameter(base_layer.weight.new_zeros(outputs, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = config.scaling
        self.dropout = config.dropout

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W + (alpha / R) B A, computed in float32 on each read: what the layer is without dropout."""
        return self.base_layer.weight.float() + self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return W x + (alpha / R) B A dropout(x)."""
        return self.base_layer(x) + self.update(x)

    def update(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the adapter's part."""
        return F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_A), self.lora_B) * self.scaling


def side_by_side(x: Float[Tensor, "*batch in"], *layers: nn.Module) -> Float[Tensor, "*batch width"]:
    """Return the outputs of layers of one `x` side by side; of linear layers joined, with one gradient of `x`.

    The weights are one matrix, and so are the adapters': one product into all their ranks, one out of them, with zeros
    between the layers and where a layer has none. Each layer by itself is the definition, and computed where layers are
    of another kind or an adapter drops inputs of its own.
    """
    plain = [layer.base_layer if isinstance(layer, LoRALinear) else layer for layer in layers]
    weights = [layer.weight for layer in plain if type(layer) is nn.Linear]
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    if len(weights) < len(layers) or any(layer.dropout and layer.training for layer in adapted):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    product = F.linear(x, torch.cat(weights))
    if not adapted:
        return product
    into = torch.cat([layer.lora_A for layer in adapted])  # (sum of R, in)
    parts = [
        layer.scaling * layer.lora_B if isinstance(layer, LoRALinear) else weight.new_zeros(len(weight), 0)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return product + F.linear(F.linear(x, into), torch.block_diag(*parts))  # (width, sum of R)
