import math

import pytest
import torch

from minimind.objectives.logprobs import reference_log_probs, token_log_probs, token_log_probs_and_entropy


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(3, 11, 16, requires_grad=True)
    head = (torch.randn(50, 16) * 0.3).requires_grad_()
    return hidden, head, torch.randint(50, (3, 11))


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_equal_the_reference_in_value_and_gradient(chunk: int, temperature: float):
    hidden, head, labels = inputs()
    upstream = torch.randn(2, 3, 11)
    results = []
    for function, options in ((token_log_probs_and_entropy, {"chunk": chunk}), (reference_log_probs, {})):
        hidden.grad = head.grad = None
        log_probs, entropy = function(hidden, head, labels, temperature=temperature, **options)
        (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
        results.append((log_probs, entropy, hidden.grad, head.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    alone = token_log_probs(hidden, head, labels, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(alone, results[0][0])


def test_uniform_distribution_has_known_values():
    hidden, head, labels = inputs()
    log_probs, entropy = token_log_probs_and_entropy(hidden * 0, head, labels)
    torch.testing.assert_close(log_probs, torch.full((3, 11), -math.log(50)))
    torch.testing.assert_close(entropy, torch.full((3, 11), math.log(50)))


def test_probabilities_of_all_tokens_sum_to_one():
    hidden, head, _ = inputs()
    total = sum(token_log_probs(hidden, head, torch.full((3, 11), token), temperature=0.7).exp() for token in range(50))
    torch.testing.assert_close(total, torch.ones(3, 11))


def test_logits_of_all_tokens_are_never_alive_at_once():
    """What the backward keeps is (n, D) per chunk: no saved tensor has the vocabulary as its last axis."""
    hidden, head, labels = inputs()
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (shapes.append(tuple(x.shape)), x)[1], lambda x: x):
        token_log_probs(hidden, head, labels, chunk=4)
    assert not [shape for shape in shapes if shape[-1:] == (50,)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (shapes.append(tuple(x.shape)), x)[1], lambda x: x):
        reference_log_probs(hidden, head, labels)
    assert [shape for shape in shapes if shape[-1:] == (50,)]  # the check would have found them


def test_temperature_zero_is_refused():
    hidden, head, labels = inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        token_log_probs(hidden, head, labels, temperature=0.0)
