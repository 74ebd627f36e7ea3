"""Cross-entropy of the next token, weighted: sum of -w log p(label). The loop divides by the global weight.

Linear head and cross-entropy are one function computed in chunks of tokens, gradient included, so (B, T, V) logits
never exist. `reference_cross_entropy` is the definition it must agree with. It knows neither stages nor devices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.native import kernels

CHUNK = 1024
"""Tokens whose logits exist at one time."""

ROUND = 128
"""The number of learned tokens is filled up to a multiple of this: oneDNN keeps a product for each new shape, so that a
run over rows of ever other numbers would grow by some 0.2 GB."""


def cross_entropy(output: Output, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return (sum of -w log p(label), {"correct": sum of w where the label is the likeliest, "loss_weight": sum w}).

    Positions of weight 0 cost nothing and change nothing. Softmax in float32; the two products in the dtype of
    autocast. Both metrics are detached sums over the micro-batch.
    """
    weights = batch.loss_weights.flatten().float()  # (N,)
    labels = batch.labels.flatten()
    hidden = output.hidden.flatten(0, 1)  # (N, D)
    if not hidden.is_cuda:  # on a GPU, counting the learned rows would make the host wait
        learned = weights.nonzero()[:, 0]
        spare = -learned.numel() % ROUND if learned.numel() else 0
        if learned.numel() + spare < weights.numel():
            weights = F.pad(weights[learned], (0, spare))
            learned = torch.cat((learned, learned[-1:].expand(spare)))  # the last one again, now without weight
            hidden, labels = hidden.index_select(0, learned), labels[learned]
    loss_sum, correct = fused_linear_cross_entropy(hidden, output.head, labels, weights)
    return loss_sum, {"correct": correct, "loss_weight": weights.sum()}


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], labels: Int[Tensor, " N"], weights: Float[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return (sum of w * -log softmax(head h)[label], sum of w where the label is the argmax), both float32."""
    loss_sum, correct = _Fused.apply(hidden, head, labels, weights)
    return loss_sum, correct


def reference_cross_entropy(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], labels: Int[Tensor, " N"], weights: Float[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return what `fused_linear_cross_entropy` returns, with all logits at once and autograd's gradient."""
    logits = F.linear(hidden, head).float()  # (N, V)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum(), (weights * (logits.argmax(-1) == labels)).sum()


class _Fused(torch.autograd.Function):
    """The gradient is linear in the upstream scalar, so it is computed with the loss and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        dtype = kernels.product_dtype(hidden)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        needs_grad = needs_hidden or needs_head
        is_native = kernels.usable(hidden.device, dtype)
        narrow_head = head.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            x = hidden[part].to(dtype)
            logits = x @ narrow_head.T  # (n, V)
            if is_native:  # one pass over each row, the gradient in place of the logits
                losses, hits = kernels.cross_entropy_(logits, labels[part], weights[part], needs_grad=needs_grad)
                grad = logits
            else:
                losses, hits, grad = _chunk(logits, labels[part], weights[part], needs_grad=needs_grad)
            loss_sum += losses.sum()
            correct += hits.sum()
            if not needs_grad:
                continue
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ narrow_head
            if grad_head is not None:
                grad_head += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(correct)
        return loss_sum, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        upstream = grads[0]
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * upstream).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None


def _chunk(logits: Tensor, labels: Tensor, weights: Tensor, *, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, weights where the label is the likeliest, d loss / d logits = w (softmax - onehot))."""
    logits, target, weight = logits.float(), labels[:, None], weights[:, None]  # (n, V), (n, 1), (n, 1)
    best, argmax = logits.max(dim=-1, keepdim=True)
    at_label = logits.gather(1, target)
    exponentials = logits.sub_(best).exp_()
    normaliser = exponentials.sum(-1, keepdim=True)
    losses = weight * (normaliser.log() + best - at_label)
    if needs_grad:
        exponentials.mul_(weight / normaliser).scatter_add_(1, target, -weight)
    return losses, weight * (argmax == target), exponentials
