"""Distillation: the chunked loss is the definition's, gradient too; a teacher equal to the student teaches nothing."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.objectives import distillation as module
from minimind.objectives.cross_entropy import cross_entropy
from minimind.objectives.distillation import Mixture, Taught, distillation, fused_distillation, reference_distillation
from minimind.objectives.divergence import Kind, divergence, reference_divergence

KINDS: tuple[Kind, ...] = ("forward", "reverse", "jensen-shannon")
N, WIDTH, THEIR_WIDTH, VOCAB = 37, 16, 24, 50


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return (hidden, head, the teacher's hidden and head, labels, weights); the teacher is wider."""
    torch.manual_seed(0)
    hidden = torch.randn(N, WIDTH, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH, requires_grad=True)
    theirs, their_head = torch.randn(N, THEIR_WIDTH, dtype=dtype), torch.randn(VOCAB, THEIR_WIDTH)
    labels = torch.randint(VOCAB, (N,))
    labels[::3] = (hidden.float() @ head.T).argmax(-1)[::3]
    return hidden, head, theirs, their_head, labels, torch.rand(N) * (torch.rand(N) > 0.4)


def fused(mixture: Mixture, *arguments: Tensor) -> Tensor:
    hidden, head, theirs, their_head, labels, weights = arguments
    logits_of = partial(F.linear, weight=their_head)
    return fused_distillation(hidden, head, theirs, logits_of, labels, weights, mixture)[0]


def reference(mixture: Mixture, *arguments: Tensor) -> Tensor:
    hidden, head, theirs, their_head, labels, weights = arguments
    return reference_distillation(hidden, head, F.linear(theirs, their_head), labels, weights, mixture)


def found(function, mixture: Mixture, arguments: tuple[Tensor, ...], upstream: float = 1.0) -> list[Tensor]:
    """Return (loss, gradient of hidden, gradient of head)."""
    hidden, head = arguments[:2]
    hidden.grad = head.grad = None
    loss = function(mixture, *arguments)
    (loss * upstream).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [loss.detach(), hidden.grad, head.grad]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (1.5, 0.5), (4.0, 0.9), (1.5, 1.0)])
@pytest.mark.parametrize(("chunk", "upstream"), [(1, 1.0), (8, 0.0125), (1024, 65536.0)])
def test_chunked_equals_the_definition_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, temperature: float, alpha: float, chunk: int, upstream: float
):
    monkeypatch.setattr(module, "CHUNK", chunk)
    arguments, mixture = inputs(), Mixture(temperature, alpha, kind)
    want = found(reference, mixture, arguments, upstream)
    for ours, theirs in zip(found(fused, mixture, arguments, upstream), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=5e-6 * upstream)


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_the_definition_in_bfloat16(kind: Kind):
    arguments, mixture = inputs(torch.bfloat16), Mixture(1.5, 0.5, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, want = found(fused, mixture, arguments), found(reference, mixture, arguments)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], want[0], rtol=1e-5, atol=0)  # the logits are the same, and summed in float32
    for mine, theirs in zip(ours[1:], want[1:], strict=True):  # gradients of logits are rounded to 8 bits by both
        assert (mine.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


def test_the_divergences_by_hand():
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    middle = (3 / 8, 5 / 8)
    between = 0.5 * sum(0.5 * math.log(0.5 / m) for m in middle)
    between += 0.5 * (0.25 * math.log(0.25 / middle[0]) + 0.75 * math.log(0.75 / middle[1]))
    for kind, want in zip(KINDS, (forward, reverse, between), strict=True):
        assert divergence(teacher, student, kind)[0].item() == pytest.approx(want, abs=1e-6)
        assert reference_divergence(teacher, student, kind).item() == pytest.approx(want, abs=1e-6)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    # For large T both distributions are nearly even: T^2 KL tends to the variance of the difference of logits / 2.
    torch.manual_seed(0)
    ours, theirs = torch.randn(1, 1000), torch.randn(1, 1000)
    limit = (theirs - ours).var(unbiased=False).item() / 2
    values = [
        t**2 * divergence((theirs / t).log_softmax(-1), (ours / t).log_softmax(-1), "forward")[0].item()
        for t in (20.0, 50.0)
    ]
    assert values == pytest.approx([limit, limit], rel=0.05)


def batch_of(weights: Tensor, labels: Tensor) -> Batch:
    rows, length = labels.shape
    positions, documents = torch.arange(length).expand(rows, -1), torch.zeros(rows, length, dtype=torch.long)
    return Batch(labels, labels, positions, documents, weights, float(weights.sum()))


def test_objective_counts_learned_tokens_only():
    hidden, head, theirs, their_head, labels, weights = inputs()
    mixture, size = Mixture(1.5, 0.5, "forward"), 36
    output = Output(hidden[:size].view(3, 12, -1), head, torch.zeros(()))
    taught = Taught(theirs[:size].view(3, 12, -1), partial(F.linear, weight=their_head))
    batch = batch_of(weights[:size].view(3, 12), labels[:size].view(3, 12))
    loss, metrics = distillation(output, batch, teacher=lambda _: taught, mixture=mixture)
    whole = [each[:size] for each in (hidden, theirs, labels, weights)]
    logits, their_logits = whole[0] @ head.T, whole[1] @ their_head.T
    torch.testing.assert_close(loss, reference(mixture, whole[0], head, whole[1], their_head, *whole[2:]))
    ce, correct = cross_entropy(output, batch)
    torch.testing.assert_close(metrics["ce_loss"], ce)
    torch.testing.assert_close(metrics["correct"], correct["correct"])
    torch.testing.assert_close(loss, 0.5 * metrics["ce_loss"] + 0.5 * 1.5**2 * metrics["kl"])
    agreement = (whole[3] * (logits.argmax(-1) == their_logits.argmax(-1))).sum()
    assert agreement > 0  # else it is not tested
    torch.testing.assert_close(metrics["teacher_agreement"], agreement)
    loss.backward()
    assert hidden.grad is not None
    assert (hidden.grad[:size][whole[3] == 0] == 0).all()
    assert (hidden.grad[:size][whole[3] > 0] != 0).any(1).all()
    assert not any(value.requires_grad for value in metrics.values())


def test_a_teacher_with_more_columns_is_cut_to_the_students_vocabulary():
    hidden, head, theirs, their_head, labels, weights = inputs()
    mixture = Mixture(1.5, 0.5, "forward")
    wider = torch.cat((their_head, torch.full((6, THEIR_WIDTH), 9.0)))
    torch.testing.assert_close(
        fused(mixture, hidden, head, theirs, wider, labels, weights),
        fused(mixture, hidden, head, theirs, their_head, labels, weights),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_equal_to_the_student_teaches_nothing(kind: Kind, dtype: torch.dtype):
    hidden, head, _, _, labels, weights = inputs()
    output = Output(hidden[:36].view(3, 12, -1), head, torch.zeros(()))
    copies = hidden.detach()[:36].view(3, 12, -1).clone(), head.detach().clone()
    batch = batch_of(weights[:36].view(3, 12), labels[:36].view(3, 12))

    def teacher(_: Batch) -> Taught:
        return Taught(copies[0], partial(F.linear, weight=copies[1]))

    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss, metrics = distillation(output, batch, teacher=teacher, mixture=Mixture(2.0, 0.0, kind))
    loss.backward()
    assert (loss.item(), metrics["kl"].item()) == (0.0, 0.0)
    torch.testing.assert_close(metrics["teacher_agreement"], batch.loss_weights.sum())
    assert hidden.grad is not None
    assert head.grad is not None
    assert hidden.grad.abs().max() < 1e-6
    assert head.grad.abs().max() < 1e-6


def test_split_into_micro_batches_sums_to_the_whole():
    hidden, head, theirs, their_head, labels, weights = inputs()
    mixture = Mixture(1.5, 0.5, "forward")
    whole = fused(mixture, hidden, head, theirs, their_head, labels, weights)
    parts = [
        fused(mixture, hidden[i::3], head, theirs[i::3], their_head, labels[i::3], weights[i::3]) for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_nothing_to_learn_is_zero_with_zero_gradients():
    hidden, head, theirs, their_head, labels, _ = inputs()
    output = Output(hidden[:12].view(2, 6, -1), head, torch.zeros(()))
    batch = batch_of(torch.zeros(2, 6), labels[:12].view(2, 6))
    batch.documents.fill_(PAD_DOCUMENT)
    taught = Taught(theirs[:12].view(2, 6, -1), partial(F.linear, weight=their_head))
    loss, metrics = distillation(output, batch, teacher=lambda _: taught, mixture=Mixture(1.5, 0.5, "forward"))
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0
