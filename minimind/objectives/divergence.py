"""How far a student's distribution is from its teacher's, with the gradient, token by token.

    forward          KL(p || q) = sum_v p_v (ln p_v - ln q_v)             d/dz = q - p
    reverse          KL(q || p)                                           d/dz = q (ln q - ln p - KL(q || p))
    jensen-shannon   (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2      d/dz = q (ln q - ln m - KL(q || m)) / 2

p is the teacher's, q = softmax(z) the student's. They are GKD's divergence (arXiv 2306.13649, section 3): its limits at
beta 0 and 1, and beta 1/2. Forward spreads the student over all that the teacher may say, reverse keeps it to what the
teacher surely says. `reference_divergence` is the definition, with autograd's gradient.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["forward", "reverse", "jensen-shannon"]


def divergence(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], kind: Kind
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """Return (divergence in nats, its gradient for the student's logits); both arguments are log-probabilities.

    Equal arguments give exactly 0 and a gradient of exactly 0.
    """
    q = student.exp()
    if kind == "forward":
        p = teacher.exp()
        return (p * (teacher - student)).sum(-1), q.sub_(p)
    centre = teacher
    if kind == "jensen-shannon":  # exact where both are equal; the sum would round
        centre = torch.where(teacher == student, student, torch.logaddexp(teacher, student) - math.log(2))
    gaps = student - centre
    values = (q * gaps).sum(-1)
    grad = q.mul_(gaps.sub_(values[:, None]))
    if kind == "reverse":
        return values, grad
    return ((teacher.exp() * (teacher - centre)).sum(-1) + values) / 2, grad.div_(2)


def reference_divergence(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], kind: Kind
) -> Float[Tensor, " N"]:
    """Return the divergence as the equations above have it, differentiable."""

    def kl(of: Tensor, against: Tensor) -> Tensor:
        return (of.exp() * (of - against)).sum(-1)

    if kind == "jensen-shannon":
        middle = torch.logaddexp(teacher, student) - math.log(2)
        return (kl(teacher, middle) + kl(student, middle)) / 2
    return kl(teacher, student) if kind == "forward" else kl(student, teacher)
