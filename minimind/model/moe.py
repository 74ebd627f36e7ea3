"""Mixture of experts: a float32 softmax router, top-k, renormalised; shared experts always on; a balance loss.

`experts(x, routing, ...)` is the seam: one grouped matrix product over tokens sorted by expert, on CPU, CUDA and under
compile alike; `reference_experts` is the plain loop it must agree with. Names and stacking are those of Transformers'
MoE families (`mlp.gate.weight`, `mlp.experts.gate_up_proj`, `mlp.experts.down_proj`); see `disk.py` for the files.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minimind.model.config import ModelConfig
from minimind.model.feed_forward import FeedForward, swiglu


@dataclass(frozen=True, slots=True)
class Routing:
    """Where N tokens go: A experts each out of E, with which weights."""

    experts: Int[Tensor, "N A"]
    """Expert indices; E (one past the last) where the token is padding, which goes nowhere."""
    weights: Float[Tensor, "N A"]
    """Weight of each chosen expert, float32; 0 at padding."""
    has_padding: bool
    """Whether any token may be padding (known on the host, so that no kernel waits for it)."""


def route(
    logits: Float[Tensor, "N E"], num_chosen: int, *, normalise: bool, real: Bool[Tensor, " N"] | None
) -> tuple[Routing, Float[Tensor, "N E"]]:
    """Return (routing, probabilities) of float32 router logits; `real` is False at padding (None: no padding)."""
    probabilities = logits.softmax(-1)
    weights, chosen = probabilities.topk(num_chosen, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    if real is not None:
        chosen = torch.where(real[:, None], chosen, logits.shape[-1])
        weights = torch.where(real[:, None], weights, 0.0)
    return Routing(chosen, weights, real is not None), probabilities


def balance_loss(
    routing: Routing, probabilities: Float[Tensor, "N E"], num_rows: int, *, per_row: bool
) -> Float[Tensor, ""]:
    """Return sum_i f_i P_i: exactly 1 for evenly loaded experts, up to E when one takes all.

    f_i is E / (A n) times how often expert i was chosen by the n real tokens, P_i its mean probability among them
    (Switch, arXiv 2101.03961, eq. 4-6, with f divided by A so that the scale does not grow with it). `per_row` takes
    f and P over each of the `num_rows` rows and averages the rows that have real tokens (DeepSeek-V2's sequence
    balance, arXiv 2405.04434, eq. 23; a packed row counts as one sequence); else over all tokens together.
    """
    num_experts = probabilities.shape[1]
    groups = num_rows if per_row else 1
    # One more bin collects the padding and is dropped; scatter_add keeps this free of waiting for the device.
    chosen = routing.experts.reshape(groups, -1)  # (rows, T * A)
    counts = torch.zeros(groups, num_experts + 1, device=chosen.device)
    counts = counts.scatter_add(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))[:, :num_experts]
    if routing.has_padding:
        probabilities = probabilities * (routing.experts[:, :1] < num_experts)
    num_choices = counts.sum(1, keepdim=True)  # (rows, 1): A times the real tokens
    num_chosen = routing.experts.shape[1]
    frequency = counts * num_experts / num_choices.clamp(min=1)
    mean_probability = probabilities.reshape(groups, -1, num_experts).sum(1) * num_chosen / num_choices.clamp(min=1)
    return (frequency * mean_probability).sum() / (num_choices > 0).sum().clamp(min=1)


def experts(
    x: Float[Tensor, "N D"],
    routing: Routing,
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return each token's weighted sum over its experts' SwiGLU outputs; 0 at padding.

    Rows are sorted by expert and multiplied group by group in one call. An expert without tokens still gets a gradient
    (of zeros), because the stacked weights are one parameter.
    """
    num_experts, num_chosen = gate_up.shape[0], routing.experts.shape[1]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    flat = routing.experts.flatten()  # (N * A)
    order = flat.argsort(stable=True)
    # Where each expert's rows end; padding (index E) stands behind the last end and is not multiplied.
    ends = torch.searchsorted(flat[order], torch.arange(num_experts, device=x.device), right=True).int()
    rows = x[order // num_chosen]  # (N * A, D)
    inner = swiglu(_grouped_product(rows, gate_up, ends, routing.has_padding))  # (N * A, F)
    rows = _grouped_product(inner, down, ends, routing.has_padding)  # (N * A, D)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rows = rows[back].view(-1, num_chosen, rows.shape[-1])  # (N, A, D)
    return (rows * routing.weights[..., None].to(rows.dtype)).sum(1)


@torch.library.custom_op("minimind::grouped_product", mutates_args=())
def _grouped_product(rows: Tensor, weights: Tensor, ends: Tensor, has_rest: bool) -> Tensor:
    """Return rows[ends[e-1]:ends[e]] @ weights[e].T for every e, zeros for the rest of the rows.

    An operator of our own because compiling torch's refuses every dtype but bfloat16.
    """
    return _without_rest(F.grouped_mm(rows, weights.mT, offs=ends), ends, has_rest)


@torch.library.custom_op("minimind::grouped_product_backward", mutates_args=())
def _grouped_product_backward(
    upstream: Tensor, rows: Tensor, weights: Tensor, ends: Tensor, has_rest: bool
) -> tuple[Tensor, Tensor]:
    upstream = upstream.contiguous()
    grad_rows = _without_rest(F.grouped_mm(upstream, weights, offs=ends), ends, has_rest)
    return grad_rows, F.grouped_mm(upstream.T, rows, offs=ends)


def _without_rest(product: Tensor, ends: Tensor, has_rest: bool) -> Tensor:
    if has_rest:  # rows that no group covers hold whatever was in memory
        is_rest = torch.arange(product.shape[0], device=product.device) >= ends[-1]
        product.masked_fill_(is_rest[:, None], 0.0)
    return product


@_grouped_product.register_fake
def _(rows: Tensor, weights: Tensor, _ends: Tensor, _has_rest: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


@_grouped_product_backward.register_fake
def _(_upstream: Tensor, rows: Tensor, weights: Tensor, _ends: Tensor, _has_rest: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:  # noqa: ARG001 - torch's
    ctx.save_for_backward(*inputs[:3])
    ctx.has_rest = inputs[3]


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_grouped_product_backward(upstream, *ctx.saved_tensors, ctx.has_rest), None, None


_grouped_product.register_autograd(_differentiate, setup_context=_remember)


def reference_experts(
    x: Float[Tensor, "N D"],
    routing: Routing,
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return what `experts` returns, by the definition: every expert on every token, then weighted."""
    result = torch.zeros_like(x)
    for index in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[index].T).chunk(2, dim=-1)
        weight = (routing.weights * (routing.experts == index)).sum(-1, keepdim=True)  # (N, 1)
        result = result + weight.to(x.dtype) * ((F.silu(gate) * up) @ down[index].T)
    return result


class ExpertWeights(nn.Module):
    """The routed experts' matrices, stacked: one grouped product instead of E small ones."""

    def __init__(self, num_experts: int, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, size))


class MixtureOfExperts(nn.Module):
    """The feed-forward of one layer as routed experts plus one shared block (n_shared_experts wide, always on)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.alpha = config.aux_loss_alpha
        self.per_row = config.seq_aux
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = ExpertWeights(config.n_routed_experts, config.hidden_size, config.expert_size)
        shared_size = config.n_shared_experts * config.expert_size
        self.shared_experts = FeedForward(config.hidden_size, shared_size) if shared_size else None

    def forward(
        self, x: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""]]:
        """Return (output, balance loss times alpha); `real` is False at padding (None: no padding)."""
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(flat.float(), self.gate.weight.float())  # (N, E)
        routing, probabilities = route(
            logits, self.num_chosen, normalise=self.normalise, real=None if real is None else real.flatten()
        )
        aux_loss = self.alpha * balance_loss(routing, probabilities, x.shape[0], per_row=self.per_row)
        output = experts(flat, routing, self.experts.gate_up_proj, self.experts.down_proj).view(x.shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts(x)
        return output, aux_loss
