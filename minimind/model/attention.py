"""Grouped-query causal attention (arXiv 2305.13245) with rotary positions and optional QK-norm.

`attend(q, k, v, layout)` is the seam where speed lives; `reference_attention` is the definition it must agree with.
Who sees whom is the layout's knowledge.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minimind.model.block_attention import block_attention
from minimind.model.config import ModelConfig
from minimind.model.layout import Layout, Lengths
from minimind.model.lora import side_by_side
from minimind.model.norm import RMSNorm
from minimind.model.rope import rotate
from minimind.native import kernels


def attend(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S K Dh"],
    v: Float[Tensor, "B S K Dh"],
    layout: Layout,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v under the layout, by the fastest path that computes exactly that."""
    if layout.buckets is not None:
        return block_attention(q, k, v, layout.buckets)
    if layout.lengths is not None:
        return _flash(q, k, v, layout.lengths)
    return reference_attention(q, k, v, layout, dropout=dropout)


def reference_attention(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S K Dh"],
    v: Float[Tensor, "B S K Dh"],
    layout: Layout,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H Dh"]:
    """Return what `attend` returns, for a layout that is causal or says it by a mask: torch's own attention."""
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, T, Dh)
        k.transpose(1, 2),  # (B, K, S, Dh)
        v.transpose(1, 2),
        attn_mask=layout.mask,
        is_causal=layout.is_causal,
        dropout_p=dropout,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return output.transpose(1, 2)  # (B, T, H, Dh)


def _flash(
    q: Float[Tensor, "B T H Dh"], k: Float[Tensor, "B T K Dh"], v: Float[Tensor, "B T K Dh"], lengths: Lengths
) -> Float[Tensor, "B T H Dh"]:
    from torch.nn.attention.varlen import varlen_attn

    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, Dh)
    group = q.shape[2] // k.shape[2]
    if group > 1:  # older torch has no grouped queries here
        flat_k, flat_v = flat_k.repeat_interleave(group, 1), flat_v.repeat_interleave(group, 1)
    ends, longest = lengths.ends, lengths.longest
    output = varlen_attn(flat_q, flat_k, flat_v, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(output, Tensor)
    return output.view_as(q)


class Attention(nn.Module):
    """The attention of one layer; `layer` is its index in the cache."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.size_per_head
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dropout = config.dropout
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cos: Float[Tensor, "rows T 1 half"],
        sin: Float[Tensor, "rows T 1 half"],
        layout: Layout,
    ) -> Float[Tensor, "B T D"]:
        """Return the attention's contribution to the residual; writes the cache first where the layout has one."""
        if layout.spans is not None:
            return self.o_proj(self._attend_inside(x, cos, sin, layout.spans))
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)  # (B, T, *, Dh)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if layout.access is not None:
            cached_k, cached_v = layout.access.exchange(self.layer, k, v)
            if not layout.is_causal:
                k, v = cached_k, cached_v
        output = attend(q, k, v, layout, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(output.flatten(2))  # (B, T, D)

    def _attend_inside(self, x: Tensor, cos: Tensor, sin: Tensor, spans: Tensor) -> Tensor:
        """Return what `forward` gives to `o_proj`, from QK-norm to values in one kernel."""
        qkv = side_by_side(x, self.q_proj, self.k_proj, self.v_proj)  # (B, T, (H + 2 K) * Dh)
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return kernels.attention(qkv, cos, sin, spans, self.num_heads, self.num_kv_heads, norms)
