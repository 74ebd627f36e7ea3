"""Our preference losses on packed rows against TRL's own loss functions on padded ones: values and every gradient."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind.batch import Batch, Example
from minimind.data.collate import collate
from minimind.model.config import ModelConfig
from minimind.model.heads import ScalarModel
from minimind.model.transformer import Transformer
from minimind.objectives import dpo, kto, reward
from minimind.objectives.preference import DOCUMENTS, REF_LOG_PROBS, document_log_probs

transformers = pytest.importorskip("transformers", reason="parity needs the extra 'hf'")
trl: Any = pytest.importorskip("trl", reason="parity with TRL needs trl: pip install trl")

CONFIG = ModelConfig(
    vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=256, initializer_range=0.08, qk_norm=True,
)  # fmt: skip
LENGTHS = [((5, 4), (5, 7)), ((3, 6), (3, 2)), ((8, 1), (8, 3)), ((4, 9), (4, 9))]
"""(tokens of the prompt, of the answer) of both sides of four pairs."""


@pytest.fixture(autouse=True, scope="module")
def no_accelerate_state() -> None:
    """TRL logs through accelerate, which wants to have been started."""
    import_module("accelerate").PartialState(cpu=True)


def pairs(seed: int = 0) -> list[tuple[Example, Example]]:
    """Pairs of the lengths above that share their prompts; the answers are learned."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, CONFIG.vocab_size, (count,), generator=generator).tolist()

    made: list[tuple[Example, Example]] = []
    for (prompt_length, chosen), (_, rejected) in LENGTHS:
        prompt = ids(prompt_length)
        sides = [Example(prompt + ids(n), [0.0] * prompt_length + [1.0] * n) for n in (chosen, rejected)]
        made.append((sides[0], sides[1]))
    return made


def packed(documents: Sequence[Example], per_row: int) -> Batch:
    """Rows of `per_row` documents each, which need not have as many."""
    rows = [documents[i : i + per_row] for i in range(0, len(documents), per_row)]
    batch = collate(rows, 128, pad_id=0)
    ids = torch.full((len(rows), per_row), -1)
    for row, held in enumerate(rows):
        ids[row, : len(held)] = torch.arange(len(held)) + row * per_row
    batch.extras[DOCUMENTS] = ids
    return batch


def padded(documents: Sequence[Example]) -> dict[str, Tensor]:
    """What TRL's collator makes of the same documents."""
    longest = max(len(document.ids) for document in documents)
    fields = {name: torch.zeros(len(documents), longest, dtype=torch.int64) for name in ("ids", "attention", "learned")}
    for row, document in enumerate(documents):
        size = len(document.ids)
        fields["ids"][row, :size] = torch.tensor(document.ids)
        fields["attention"][row, :size] = 1
        fields["learned"][row, :size] = torch.tensor(document.loss_weights).long()
    return {
        "input_ids": fields["ids"],
        "attention_mask": fields["attention"],
        "completion_mask": fields["learned"],
    }


class Both:
    """One model in both libraries."""

    def __init__(self, folder: Path, seed: int) -> None:
        add_fused_lm_head = import_module("trl.trainer.utils").add_fused_lm_head

        torch.manual_seed(seed)
        self.ours = Transformer(CONFIG)
        save_file(dict(self.ours.state_dict_for_disk()), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).train()
        add_fused_lm_head(self.theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def output(self, batch: Batch) -> Any:
        return self.ours(batch.input_ids, positions=batch.positions, documents=batch.documents)

    def log_probs(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return document_log_probs(self.output(batch), batch)

    def their_log_probs(self, documents: Sequence[Example]) -> Tensor:
        inputs = padded(documents)
        learned = inputs.pop("completion_mask")
        with torch.no_grad():
            labels = inputs["input_ids"].masked_fill(learned == 0, -100)
            return self.theirs(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)

    def assert_equal(self, ours: Tensor, theirs: Tensor) -> None:
        """The loss and the gradient of every weight agree within 1e-6, or as much of the loss where it is above 1."""
        size = max(1.0, abs(float(theirs.detach())))
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6 * size)
        self.ours.zero_grad()
        self.theirs.zero_grad()
        ours.backward()
        theirs.backward()
        expected = {name: p.grad for name, p in self.theirs.named_parameters()}
        assert any(float(grad.abs().max()) > 1e-3 for grad in expected.values())
        for name, parameter in self.ours.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6 * size, msg=name)


@pytest.fixture
def policy(tmp_path: Path) -> Both:
    (tmp_path / "policy").mkdir()
    return Both(tmp_path / "policy", 0)


@pytest.fixture
def frozen(tmp_path: Path) -> Both:
    (tmp_path / "frozen").mkdir()
    return Both(tmp_path / "frozen", 1)


def trainer(model: Any, **settings: Any) -> SimpleNamespace:
    """As much of a trainer as TRL's loss functions look at."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    return SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False, label_smoothing=0.0, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, **settings,
    )  # fmt: skip


def their_dpo(policy: Both, frozen: Both, loss: str, beta: float) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss of TRL's DPOTrainer on the four pairs, and what it logs."""

    documents = [side[0] for side in pairs()] + [side[1] for side in pairs()]
    ref = frozen.their_log_probs(documents)
    inputs = padded(documents) | {"ref_chosen_logps": ref[:4], "ref_rejected_logps": ref[4:]}
    fake = trainer(policy.theirs, loss_types=[loss], beta=beta)
    return trl.DPOTrainer._compute_loss(fake, policy.theirs, inputs, False), fake._metrics["train"]


@pytest.mark.parametrize("per_row", [8, 6, 2])
@pytest.mark.parametrize(
    ("ours", "loss"),
    [(dpo.dpo, "sigmoid"), (partial(dpo.dpo, length_averaged=True), "sigmoid_norm"), (dpo.ipo, "ipo")],
    ids=["summed", "averaged", "ipo"],
)
def test_dpo(ours: Callable[..., Any], loss: str, per_row: int, policy: Both, frozen: Both) -> None:
    batch = packed([side for pair in pairs() for side in pair], per_row)
    batch.extras[REF_LOG_PROBS] = frozen.log_probs(batch)
    found, metrics = ours(policy.output(batch), batch, beta=0.3)
    theirs, logged = their_dpo(policy, frozen, loss, 0.3)
    policy.assert_equal(found / 4, theirs)
    if loss == "sigmoid":
        names = {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected"}
        names |= {"reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies"}
        names |= {"chosen_log_prob": "logps/chosen", "rejected_log_prob": "logps/rejected"}
        for name, their_name in names.items():
            assert float(metrics[name]) / 4 == pytest.approx(logged[their_name][0], rel=1e-5, abs=1e-5), name


def test_simpo(policy: Both) -> None:
    cpo = import_module("trl.experimental.cpo").CPOTrainer

    batch = packed([side for pair in pairs() for side in pair], 8)
    found, _ = dpo.simpo(policy.output(batch), batch, beta=2.0, gamma=0.7)
    fake = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    chosen, rejected = (their_means(policy, [pair[side] for pair in pairs()]) for side in (0, 1))
    losses, _, _ = cpo.cpo_loss(fake, chosen, rejected)
    policy.assert_equal(found / 4, losses.mean())


def test_orpo(policy: Both) -> None:
    orpo = import_module("trl.experimental.orpo").ORPOTrainer

    batch = packed([side for pair in pairs() for side in pair], 6)
    found, metrics = dpo.orpo(policy.output(batch), batch, beta=0.4)
    fake = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=torch.device("cpu")))
    chosen, rejected = (their_means(policy, [pair[side] for pair in pairs()]) for side in (0, 1))
    losses = orpo.odds_ratio_loss(fake, chosen, rejected)[0]
    policy.assert_equal(found / 4, -chosen.mean() - losses.mean())  # theirs is to be subtracted; the answer alone
    assert float(metrics["chosen_nll"].detach()) / 4 == pytest.approx(-float(chosen.mean().detach()), rel=1e-5)


def their_means(policy: Both, documents: Sequence[Example]) -> Tensor:
    """Mean log-probability of each answer, by TRL's head, with gradient."""
    inputs = padded(documents)
    learned = inputs.pop("completion_mask")
    labels = inputs["input_ids"].masked_fill(learned == 0, -100)
    return policy.theirs(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1) / learned.sum(1)


@pytest.mark.parametrize("nudge", [-6.0, 6.0], ids=["kl", "no kl"])
def test_kto(nudge: float, policy: Both, frozen: Both) -> None:

    labels = [True, False, False, True, True, True, False, True]
    documents = [side for pair in pairs() for side in pair]
    swapped = [  # the answer of the one before, as TRL hands them on
        Example([*one.ids[: starts(one)], *other.ids[starts(other) :]], one.loss_weights[: starts(one)] + [1.0] * n)
        for one, other in zip(documents, [documents[-1], *documents[:-1]], strict=True)
        for n in (len(other.ids) - starts(other),)
    ]
    batch, other = packed(documents, 8), packed(swapped, 8)
    ref_kl = frozen.their_log_probs(swapped) + nudge  # where the reference is likelier the mean is below 0, and cut
    batch.extras |= {REF_LOG_PROBS: frozen.log_probs(batch), kto.IS_DESIRABLE: torch.tensor([labels])}
    ratios = policy.log_probs(other) - ref_kl[None]
    batch.extras[kto.KL] = ratios.mean().clamp(min=0)[None, None]
    found, metrics = kto.kto(policy.output(batch), batch, beta=0.2, desirable_weight=1.3, undesirable_weight=0.8)
    inputs = padded(documents) | {f"KL_{name}": value for name, value in padded(swapped).items()}
    inputs |= {"label": torch.tensor(labels), "ref_KL_logps": ref_kl, "ref_logps": frozen.their_log_probs(documents)}
    fake = trainer(policy.theirs, calculate_KL=True, loss_type="kto", beta=0.2)
    fake.desirable_weight, fake.undesirable_weight = 1.3, 0.8
    fake._compute_kl_logps = MethodType(trl.KTOTrainer._compute_kl_logps, fake)
    policy.assert_equal(found / 8, trl.KTOTrainer._compute_loss(fake, policy.theirs, inputs, False))
    (kl,) = fake._metrics["train"]["kl"]
    assert (kl > 0) == (nudge < 0)
    assert float(metrics["kl"]) / 8 == pytest.approx(kl, abs=1e-5)


def starts(example: Example) -> int:
    """Where the answer begins."""
    return example.loss_weights.index(1.0)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, qk_norm=False)], ids=["qwen3", "llama"])
def test_reward_model(config: ModelConfig, tmp_path: Path) -> None:

    torch.manual_seed(0)
    model = ScalarModel(config)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    save_file(dict(model.state_dict_for_disk()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(model.texts_for_disk()["config.json"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).train()
    documents = [Example([*side.ids, 3], [*side.loss_weights, 0.0]) for pair in pairs() for side in pair]
    batch = packed(documents, 6)  # the last token of a document is a label only
    output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
    found, metrics = reward.bradley_terry(output, batch, centre=0.05)
    inputs = padded([side[0] for side in pairs()] + [side[1] for side in pairs()])
    del inputs["completion_mask"]
    fake = trainer(theirs, args=SimpleNamespace(center_rewards_coefficient=0.05))
    loss = trl.RewardTrainer.compute_loss(fake, theirs, inputs)
    assert float(found) / 4 == pytest.approx(float(loss), abs=1e-6)
    assert float(metrics["reward_margin"]) / 4 == pytest.approx(fake._metrics["train"]["margin"][0], abs=1e-5)
    assert float(metrics["reward_accuracy"]) / 4 == fake._metrics["train"]["accuracy"][0]
    (found / 4).backward()
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)
