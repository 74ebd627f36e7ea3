"""Distillation: a student learns its teacher's distribution beside the label (Hinton et al. 2015, arXiv 1503.02531).

    loss = sum_t w_t [ alpha * -log p_1(label) + (1 - alpha) * T^2 * D(teacher_T, student_T) ]

p_T = softmax(logits / T), in float32; D is a `divergence`; T^2 keeps the size of its gradient the same for any T. Both
heads, the divergence and the gradient are one function in chunks of learned tokens, so (B, T, V) logits never exist.
`reference_distillation` is the definition. It does not know what the teacher is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minimind.batch import Batch, Output
from minimind.native import kernels
from minimind.objectives.cross_entropy import CHUNK, ROUND
from minimind.objectives.divergence import Kind, divergence, reference_divergence

SUMS = ("ce_loss", "kl", "teacher_agreement", "correct")


class Taught(NamedTuple):
    """What the teacher says: `logits_of` (n, D_teacher) is (n, V or more); ids past the student's V are left out."""

    hidden: Float[Tensor, "B T D_teacher"]
    logits_of: Callable[[Tensor], Tensor]


class Mixture(NamedTuple):
    """T, alpha and D of the loss."""

    temperature: float
    alpha: float
    divergence: Kind


def distillation(
    output: Output, batch: Batch, *, teacher: Callable[[Batch], Taught], mixture: Mixture
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return (the loss above, {ce_loss, kl, teacher_agreement, correct}): sums over the micro-batch by `loss_weights`.

    `kl`: D in nats, without T^2; `teacher_agreement`: the likeliest token is the teacher's; `correct`: it is the label.
    """
    with torch.inference_mode():
        taught = teacher(batch)
    weights = batch.loss_weights.flatten().float()  # (N,)
    learned = weights.nonzero()[:, 0]
    spare = (0, -len(learned) % ROUND)  # of few different sizes (see ROUND): the first token again, without weight
    weights, learned = F.pad(weights[learned], spare), F.pad(learned, spare)
    hidden, theirs = (each.flatten(0, 1).index_select(0, learned) for each in (output.hidden, taught.hidden))
    labels = batch.labels.flatten()[learned]
    loss_sum, sums = fused_distillation(hidden, output.head, theirs, taught.logits_of, labels, weights, mixture)
    return loss_sum, dict(zip(SUMS, sums.unbind(), strict=True))


def fused_distillation(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N D_teacher"],
    logits_of: Callable[[Tensor], Tensor],
    labels: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    mixture: Mixture,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 4"]]:
    """Return (loss, `SUMS`), float32; the loss is differentiable in `hidden` and `head`."""
    return _Fused.apply(hidden, head, teacher_hidden, logits_of, labels, weights, mixture)


def reference_distillation(
    hidden: Tensor, head: Tensor, theirs: Tensor, labels: Tensor, weights: Tensor, mixture: Mixture
) -> Float[Tensor, ""]:
    """Return the loss of `fused_distillation` from `theirs`, the teacher's logits (N, V), with autograd's gradient."""
    ours, heat = F.linear(hidden, head).float(), mixture.temperature
    teacher, student = ((logits / heat).log_softmax(-1) for logits in (theirs.float(), ours))
    far = (1 - mixture.alpha) * heat**2 * reference_divergence(teacher, student, mixture.divergence)
    return (weights * (mixture.alpha * F.cross_entropy(ours, labels, reduction="none") + far)).sum()


class _Fused(torch.autograd.Function):
    """The gradient is linear in the upstream scalar, so it is computed with the loss and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        teacher_hidden, logits_of, labels, weights, mixture = given
        narrow_head = head.to(kernels.product_dtype(hidden))
        grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        sums = hidden.new_zeros(1 + len(SUMS), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            x = hidden[part].to(narrow_head.dtype)
            theirs = logits_of(teacher_hidden[part])[:, : len(head)].float()
            values, grad = _of_chunk((x @ narrow_head.T).float(), theirs, labels[part], mixture)
            sums += (values * weights[part]).sum(-1)
            grad = grad.mul_(weights[part, None]).to(x.dtype)
            grad_hidden[part] = grad @ narrow_head
            grad_head += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(metrics := sums[1:].clone())
        return sums[0].clone(), metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_head * grads[0], None, None, None, None, None


def _of_chunk(ours: Tensor, theirs: Tensor, labels: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return (loss and `SUMS` of each token (5, n), d loss / d ours); `ours`, `theirs`: float32 logits (n, V)."""
    alpha, heat = mixture.alpha, mixture.temperature
    log_probs = ours.log_softmax(-1)
    ce = -log_probs.gather(1, labels[:, None])[:, 0]
    kl, grad = divergence((theirs / heat).log_softmax(-1), (ours / heat).log_softmax(-1), mixture.divergence)
    grad = grad.mul_((1 - alpha) * heat).add_(log_probs.exp_(), alpha=alpha)  # T^2 * d(z / T)/dz = T
    grad.scatter_add_(1, labels[:, None], grad.new_full((len(labels), 1), -alpha))
    loss, hits = alpha * ce + (1 - alpha) * heat**2 * kl, torch.stack((theirs.argmax(-1), labels)) == ours.argmax(-1)
    return torch.cat((torch.stack((loss, ce, kl)), hits.float())), grad
