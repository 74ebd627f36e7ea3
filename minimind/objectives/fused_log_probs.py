"""Log-probabilities of labels and nothing else: the fast form of `token_log_probs` on a CPU with the native kernels.

Forward and backward each compute a chunk's logits in the dtype of autocast and go over them once; the backward leaves
the gradient in their place. Everywhere else it is `token_log_probs`, which it must agree with.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimind.native import kernels
from minimind.objectives.logprobs import CHUNK, token_log_probs


def fused_log_probs(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], labels: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return log softmax(head h)[label] in nats, float32; differentiable in `hidden` and `head`."""
    if kernels.usable(hidden.device, kernels.product_dtype(hidden)):
        return _LogProbs.apply(hidden, head, labels)
    return token_log_probs(hidden[None], head, labels[None])[0]


class _LogProbs(torch.autograd.Function):
    """d log p(label) / d logits = onehot - softmax: the kernel's gradient of -w log p with w = -upstream."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head, labels)
        ctx.dtype = kernels.product_dtype(hidden)
        narrow_head = head.to(ctx.dtype)
        log_probs = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        minus = torch.full_like(log_probs, -1.0)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            logits = hidden[part].to(ctx.dtype) @ narrow_head.T  # (n, V)
            log_probs[part], _ = kernels.cross_entropy_(logits, labels[part], minus[part], needs_grad=False)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head, labels = ctx.saved_tensors
        needs_hidden, needs_head, _ = ctx.needs_input_grad
        weights = -grads[0].float()
        narrow_head = head.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            x = hidden[part].to(ctx.dtype)
            grad = x @ narrow_head.T  # logits, until the kernel has been here
            kernels.cross_entropy_(grad, labels[part], weights[part], needs_grad=True)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ narrow_head
            if grad_head is not None:
                grad_head += grad.T @ x
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None
