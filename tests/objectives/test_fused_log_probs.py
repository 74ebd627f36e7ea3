"""The fast log-probabilities against the plain ones: values, both gradients, any number of tokens, both precisions."""

import pytest
import torch

from minimind.native import kernels
from minimind.objectives.fused_log_probs import fused_log_probs
from minimind.objectives.logprobs import CHUNK, reference_log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 130, CHUNK + 3])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_values_and_gradients(
    dtype: torch.dtype, count: int, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr(kernels, "usable", lambda *_: False)
    elif not kernels.usable(torch.device("cpu"), dtype):
        pytest.skip("needs the native kernels: a C++ compiler")
    torch.manual_seed(0)
    hidden = torch.randn(count, 24, requires_grad=True)
    head = torch.randn(77, 24, requires_grad=True)
    labels, upstream = torch.randint(77, (count,)), torch.randn(count)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found = fused_log_probs(hidden, head, labels)
    assert found.dtype == torch.float32
    expected = reference_log_probs(hidden[None], head, labels[None])[0][0]
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.03, 0.15)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    ours = torch.autograd.grad(found, [hidden, head], upstream)
    theirs = torch.autograd.grad(expected, [hidden, head], upstream)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < (1e-5 if dtype == torch.float32 else 0.02)


def test_a_frozen_head_gets_no_gradient() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
    fused_log_probs(hidden, head, torch.arange(5)).sum().backward()
    assert hidden.grad is not None
    assert head.grad is None
