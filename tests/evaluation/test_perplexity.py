import math
from dataclasses import replace

import pytest
import torch

from minimind.batch import PAD_DOCUMENT, Batch
from minimind.errors import DataError
from minimind.evaluation.perplexity import evaluate_loss
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.runtime import distributed
from minimind.runtime.device import autocast

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    dropout=0.1,
    initializer_range=0.2,
)
TOKEN_BYTES = [0, 0, 0, *(1 + i % 4 for i in range(47))]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def batch_of(rows: int, length: int, *, seed: int = 0, padding: int = 0, weight: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (rows, length + 1), generator=generator)
    weights = (torch.rand(rows, length, generator=generator) < 0.7).float() * weight
    documents = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).repeat(rows, 1)
    if padding:
        documents[:, -padding:] = PAD_DOCUMENT
        positions[:, -padding:] = 0
        weights[:, -padding:] = 0
    return Batch(ids[:, :-1], ids[:, 1:], positions, documents, weights, float(weights.sum()))


def by_hand(model: Transformer, batches: list[Batch]) -> dict[str, float]:
    loss_sum = weight_sum = bits = num_bytes = correct = 0.0
    for batch in batches:
        for row in range(len(batch.input_ids)):
            real = int((batch.documents[row] != PAD_DOCUMENT).sum())
            with torch.no_grad():
                logits = model(batch.input_ids[row : row + 1, :real]).logits[0].double()
            for t in range(real):
                weight, label = float(batch.loss_weights[row, t]), int(batch.labels[row, t])
                if weight:
                    nats = -float(logits[t].log_softmax(-1)[label])
                    loss_sum += weight * nats
                    weight_sum += weight
                    bits += nats / math.log(2)
                    num_bytes += TOKEN_BYTES[label]
                    correct += weight * (int(logits[t].argmax()) == label)
    return {
        "val_loss": loss_sum / weight_sum,
        "val_bits_per_byte": bits / num_bytes,
        "val_accuracy": correct / weight_sum,
    }


def test_metrics_are_exact_token_means_over_unequal_batches(model: Transformer) -> None:
    batches = [batch_of(3, 12), batch_of(1, 30, seed=1, padding=11), batch_of(2, 5, seed=2)]
    found = evaluate_loss(model, batches, TOKEN_BYTES)
    model.eval()
    expected = by_hand(model, batches)
    model.train()
    assert found == pytest.approx(expected, rel=1e-6)
    assert model.training
    means = [evaluate_loss(model, [batch], TOKEN_BYTES)["val_loss"] for batch in batches]
    assert sum(means) / 3 != pytest.approx(expected["val_loss"], rel=1e-4)  # what it must not be


def test_weights_change_the_loss_but_not_the_bits(model: Transformer) -> None:
    plain = batch_of(3, 20, seed=4)
    weights = plain.loss_weights.clone()
    weights[:, :10] *= 10.0
    heavy = replace(plain, loss_weights=weights)
    once, emphasised = evaluate_loss(model, [plain], TOKEN_BYTES), evaluate_loss(model, [heavy], TOKEN_BYTES)
    assert emphasised["val_bits_per_byte"] == pytest.approx(once["val_bits_per_byte"], rel=1e-6)
    assert emphasised["val_loss"] != pytest.approx(once["val_loss"], rel=1e-3)
    model.eval()
    assert emphasised == pytest.approx(by_hand(model, [heavy]), rel=1e-6)


def test_an_untrained_uniform_model_needs_log2_v_bits_per_token() -> None:
    model = Transformer(replace(CONFIG, initializer_range=0.0))
    batch = batch_of(2, 16)
    found = evaluate_loss(model, [batch], [1] * 50)
    assert found["val_loss"] == pytest.approx(math.log(50), rel=1e-6)
    assert found["val_bits_per_byte"] == pytest.approx(math.log2(50), rel=1e-6)


def test_each_process_gives_its_share(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch_of(2, 9, seed=seed) for seed in range(4)]
    whole = evaluate_loss(model, batches, TOKEN_BYTES)
    shares: list[torch.Tensor] = []

    def keep(sums: torch.Tensor) -> torch.Tensor:
        shares.append(sums.clone())
        return sums

    monkeypatch.setattr(distributed, "all_reduce_sum", keep)
    evaluate_loss(model, batches[1:], TOKEN_BYTES)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda sums: sums.add_(shares[0]))
    assert evaluate_loss(model, batches[:1], TOKEN_BYTES) == pytest.approx(whole, rel=1e-12)
    # a process whose share is empty still takes part
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda sums: sums.add_(shares[0]))
    assert math.isfinite(evaluate_loss(model, [], TOKEN_BYTES)["val_loss"])


def test_under_autocast_it_is_nearly_the_same(model: Transformer) -> None:
    batches = [batch_of(4, 24)]
    exact = evaluate_loss(model, batches, TOKEN_BYTES)
    rounded = evaluate_loss(model, batches, TOKEN_BYTES, autocast=autocast(torch.device("cpu"), torch.bfloat16))
    assert rounded["val_loss"] != exact["val_loss"]
    assert rounded["val_loss"] == pytest.approx(exact["val_loss"], rel=0.02)


def test_nothing_to_learn_is_an_error_and_not_nan(model: Transformer) -> None:
    with pytest.raises(DataError, match="no token is learned"):
        evaluate_loss(model, [batch_of(2, 5, weight=0.0)], TOKEN_BYTES)


def test_training_goes_on_after_a_validation(model: Transformer) -> None:
    batch = batch_of(2, 9)
    evaluate_loss(model, [batch], TOKEN_BYTES)
    model(batch.input_ids, positions=batch.positions, documents=batch.documents).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
