import pytest
import torch

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.objectives import cross_entropy as module
from minimind.objectives.cross_entropy import cross_entropy, fused_linear_cross_entropy, reference_cross_entropy


def inputs(n: int = 37, width: int = 16, vocab: int = 50):
    torch.manual_seed(0)
    hidden = torch.randn(n, width, requires_grad=True)
    head = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (n,))
    labels[::3] = (hidden @ head.T).argmax(-1)[::3]
    weights = torch.rand(n) * (torch.rand(n) > 0.4)
    return hidden, head, labels, weights


def gradients(function, hidden, head, labels, weights, upstream: float):
    hidden.grad = head.grad = None
    loss_sum, correct = function(hidden, head, labels, weights)
    (loss_sum * upstream).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return loss_sum.detach(), correct, hidden.grad, head.grad


@pytest.mark.parametrize("chunk", [1, 8, 1024])
@pytest.mark.parametrize("upstream", [1.0, 0.0125, 65536.0])
def test_fused_equals_reference_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch, chunk: int, upstream: float):
    monkeypatch.setattr(module, "CHUNK", chunk)
    arguments = inputs()
    fused = gradients(fused_linear_cross_entropy, *arguments, upstream)
    reference = gradients(reference_cross_entropy, *arguments, upstream)
    assert fused[1] > 0  # some label is the likeliest, or "correct" is not tested
    for ours, theirs in zip(fused, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6 * upstream)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_frozen_sides_get_no_gradient_and_the_other_the_same(frozen: str):
    hidden, head, labels, weights = inputs()
    want = gradients(reference_cross_entropy, hidden, head, labels, weights, 1.0)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    head.requires_grad_(frozen not in ("head", "both"))
    hidden.grad = head.grad = None
    loss_sum, _ = fused_linear_cross_entropy(hidden, head, labels, weights)
    torch.testing.assert_close(loss_sum.detach(), want[0])
    if frozen == "both":
        assert not loss_sum.requires_grad
        return
    loss_sum.backward()
    learning, grad = (head, want[3]) if frozen == "hidden" else (hidden, want[2])
    torch.testing.assert_close(learning.grad, grad, rtol=2e-5, atol=2e-6)
    assert (hidden if frozen == "hidden" else head).grad is None


def make_batch(weights: torch.Tensor, labels: torch.Tensor) -> Batch:
    batch, length = labels.shape
    return Batch(
        input_ids=labels,
        labels=labels,
        positions=torch.arange(length).expand(batch, -1),
        documents=torch.zeros(batch, length, dtype=torch.long),
        loss_weights=weights,
        weight=float(weights.sum()),
    )


def test_objective_counts_learned_tokens_only():
    hidden, head, labels, weights = inputs(36)
    output = Output(hidden.view(3, 12, -1), head, torch.zeros(()))
    batch = make_batch(weights.view(3, 12), labels.view(3, 12))
    loss_sum, metrics = cross_entropy(output, batch)
    want_loss, want_correct = reference_cross_entropy(hidden, head, labels, weights)
    torch.testing.assert_close(loss_sum, want_loss)
    torch.testing.assert_close(metrics["correct"], want_correct)
    torch.testing.assert_close(metrics["loss_weight"], weights.sum())
    loss_sum.backward()
    assert hidden.grad is not None
    assert (hidden.grad[weights == 0] == 0).all()
    assert (hidden.grad[weights > 0] != 0).any(1).all()


def test_split_into_micro_batches_sums_to_the_whole():
    hidden, head, labels, weights = inputs(36)
    whole, _ = fused_linear_cross_entropy(hidden, head, labels, weights)
    parts = [fused_linear_cross_entropy(hidden[i::3], head, labels[i::3], weights[i::3])[0] for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_nothing_to_learn_is_zero_with_zero_gradients():
    hidden, head, labels, _ = inputs(12)
    output = Output(hidden.view(2, 6, -1), head, torch.zeros(()))
    batch = make_batch(torch.zeros(2, 6), labels.view(2, 6))
    batch.documents.fill_(PAD_DOCUMENT)
    loss_sum, metrics = cross_entropy(output, batch)
    loss_sum.backward()
    assert loss_sum == 0
    assert metrics["correct"] == 0
    assert hidden.grad is not None
    assert head.grad is not None
    assert (hidden.grad == 0).all()
    assert (head.grad == 0).all()


def test_autocast_rounds_the_products_only():
    hidden, head, labels, weights = inputs()
    exact = gradients(fused_linear_cross_entropy, hidden, head, labels, weights, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(fused_linear_cross_entropy, hidden, head, labels, weights, 1.0)
    assert rounded[0].dtype == rounded[2].dtype == rounded[3].dtype == torch.float32
    assert (rounded[0] - exact[0]).abs() > 0
    for ours, theirs in zip(rounded[2:], exact[2:], strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 0.02


def test_large_logits_stay_finite():
    hidden, head, labels, weights = inputs()
    loss_sum, _ = fused_linear_cross_entropy(hidden * 1e4, head, labels, weights)
    loss_sum.backward()
    assert torch.isfinite(loss_sum)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
