"""Losses and gradients of the GRPO family equal those of TRL's trainer, whose own `_compute_loss` is called.

Only the trainer's attributes are made up here: everything that computes is TRL's. It sees a padded batch, we see packed
rows of the same answers, one of which holds an observation that nobody learns.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind.batch import PAD_DOCUMENT, Batch
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.objectives.advantages import group_advantages
from minimind.objectives.grpo import grpo
from minimind.objectives.logprobs import learned_log_probs

transformers = pytest.importorskip("transformers", reason="parity needs the extra 'hf'")
pytest.importorskip("trl", minversion="1.16", reason="parity needs trl 1.16: its loss calls the model in its own way")
from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

TEMPERATURE, MAX_TOKENS = 0.9, 8
CONFIG = ModelConfig(
    vocab_size=120,
    hidden_size=64,
    num_hidden_layers=2,
    max_position_embeddings=64,
    intermediate_size=96,
    initializer_range=0.05,
)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
ANSWERS = [[20, 21, 22, 23, 2], [24, 2], [25, 26, 27, 28, 29, 30, 2], [31, 32, 33]]
MASKS = [[1] * 5, [1] * 2, [1, 1, 0, 0, 1, 1, 1], [1] * 3]  # the third was told two tokens by a tool
ROWS = [[0, 1], [2], [3]]
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]


def models() -> tuple[Transformer, Any]:
    torch.manual_seed(1)
    ours = Transformer(CONFIG)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**CONFIG.to_hf()), dtype=torch.float32
    )
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    theirs.tie_weights()
    return ours.train(), theirs.train()


def near(log_probs: list[list[float]], seed: int, width: float = 0.6) -> list[list[float]]:
    """Return log-probabilities that lie within `width` of these."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [value + width * (2 * float(torch.rand((), generator=generator)) - 1) for value in row] for row in log_probs
    ]


def own_log_probs(model: Transformer) -> list[list[float]]:
    """Return the model's own log-probability of each token of each answer."""
    batch = packed(everywhere=[[1.0] * len(ids) for ids in ANSWERS])
    batch.loss_weights = batch.extras["everywhere"]
    output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
    found, _ = learned_log_probs(output, batch, temperature=TEMPERATURE)
    rows = [iter(row[weights > 0].tolist()) for row, weights in zip(found, batch.loss_weights, strict=True)]
    return [[next(rows[row]) for _ in ANSWERS[i]] for row, members in enumerate(ROWS) for i in members]


def packed(**extras: list[list[float]]) -> Batch:
    """Return the answers in packed rows, weights 1 where the policy chose."""
    length = 16
    names = ("input_ids", "labels", "positions", "loss_weights", *extras)
    columns: dict[str, list[list[float]]] = {name: [[] for _ in ROWS] for name in names}
    documents: list[list[int]] = [[] for _ in ROWS]
    for row, members in enumerate(ROWS):
        for number, i in enumerate(members):
            ids, before = [*PROMPTS[i], *ANSWERS[i]], len(PROMPTS[i])
            columns["input_ids"][row] += ids
            columns["labels"][row] += [*ids[1:], 0]
            columns["positions"][row] += range(len(ids))
            for name, values in {"loss_weights": MASKS, **extras}.items():
                columns[name][row] += [*[0.0] * (before - 1), *values[i], 0.0]
            documents[row] += [number] * len(ids)
    filled = {name: [[*row, *[0.0] * (length - len(row))] for row in rows] for name, rows in columns.items()}
    ids = {name: torch.tensor(filled[name]).long() for name in ("input_ids", "labels", "positions")}
    weights = torch.tensor(filled["loss_weights"])
    return Batch(
        **ids,
        documents=torch.tensor([[*row, *[PAD_DOCUMENT] * (length - len(row))] for row in documents]),
        loss_weights=weights,
        weight=float(weights.sum()),
        extras={name: torch.tensor(filled[name]) for name in extras},
    )


def padded(values: list[list[float]] | list[list[int]], *, is_left: bool = False) -> Tensor:
    longest = max(map(len, values))
    return torch.tensor(
        [[*[0] * (longest - len(row)), *row] if is_left else [*row, *[0] * (longest - len(row))] for row in values]
    )


def trainer_of(model: Any, **settings: Any) -> Any:
    """Return TRL's trainer without its data, engine and optimizer: the attributes that the loss reads."""
    args = GRPOConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False, temperature=TEMPERATURE,
                      max_completion_length=MAX_TOKENS, **settings)  # fmt: skip
    trainer: Any = GRPOTrainer.__new__(GRPOTrainer)
    trainer.model = model
    trainer.args = args
    for name in ("beta", "temperature", "loss_type", "importance_sampling_level", "max_completion_length",
                 "top_entropy_quantile", "use_vllm", "off_policy_mask_threshold"):  # fmt: skip
        setattr(trainer, name, getattr(args, name))
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.vllm_importance_sampling_correction = True
    trainer._entropy_bonus_enabled = trainer.aux_loss_enabled = False
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics = {"train": _Lists(), "eval": _Lists()}
    trainer.accelerator = SimpleNamespace(
        num_processes=1,
        is_main_process=True,
        autocast=contextlib.nullcontext,
        gather=lambda values: values,
        reduce=lambda values, **_: values,
    )
    add_fused_lm_head(model, temperature=args.temperature, outputs=("log_probs", "entropy"))
    return trainer


class _Lists(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # name: (TRL's settings, ours, how we average)
    "grpo": ({"loss_type": "grpo", "epsilon": 0.2}, {}, "sequence"),
    "grpo, KL": ({"loss_type": "grpo", "beta": 0.02, "use_bias_correction_kl": False}, {"beta": 0.02}, "sequence"),
    "grpo, unbiased KL": (
        {"loss_type": "bnpo", "beta": 0.02, "use_bias_correction_kl": True},
        {"beta": 0.02, "use_unbiased_kl": True},
        "token",
    ),
    "bnpo": ({"loss_type": "bnpo", "epsilon": 0.2}, {}, "token"),
    "dapo": ({"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}, {"clip_high": 0.28}, "token"),
    "dapo, KL": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.1, "use_bias_correction_kl": False},
        {"clip_high": 0.28, "beta": 0.1},
        "token",
    ),
    "dr_grpo": ({"loss_type": "dr_grpo", "epsilon": 0.2}, {}, "fixed"),
    # TRL's epsilon_high is the bound itself there, and there is no lower one.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"variant": "cispo", "clip_low": 1.0, "clip_high": 0.2},
        "token",
    ),
    "rollouts of another engine": ({"loss_type": "bnpo", "use_vllm": True}, {"importance_cap": 2.0}, "token"),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
        {"variant": "gspo", "clip_low": 0.05, "clip_high": 0.06},
        "sequence",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trls(case: str):
    settings, options, average = CASES[case]
    ours, theirs = models()
    old = near(own_log_probs(ours), seed=5)
    ref, other = near(old, seed=3), near(old, seed=4, width=1.2)
    batch = packed(
        old_log_probs=old,
        ref_log_probs=ref,
        advantages=[[a] * len(ids) for a, ids in zip(ADVANTAGES, ANSWERS, strict=True)],
    )
    lengths = [sum(mask) for mask in MASKS]
    if settings.get("use_vllm"):
        batch.extras["rollout_log_probs"] = packed(rollout_log_probs=other).extras["rollout_log_probs"]
    if average == "sequence":
        of_token = packed(length=[[1 / n] * len(ids) for n, ids in zip(lengths, ANSWERS, strict=True)])
        batch.loss_weights, batch.weight = of_token.extras["length"] * batch.loss_weights, 4.0
    elif average == "fixed":
        batch.weight = 4.0 * MAX_TOKENS

    output = ours(batch.input_ids, positions=batch.positions, documents=batch.documents)
    loss_sum, metrics = grpo(output, batch, temperature=TEMPERATURE, **options)
    loss = loss_sum / batch.weight
    loss.backward()

    inputs = {
        "prompt_ids": padded(PROMPTS, is_left=True),
        "prompt_mask": padded([[1] * len(ids) for ids in PROMPTS], is_left=True),
        "completion_ids": padded(ANSWERS),
        "completion_mask": padded([[1] * len(ids) for ids in ANSWERS]),
        "tool_mask": padded(MASKS),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(ref),
        "importance_sampling_ratio": (padded(old) - padded(other)).exp().clamp(max=2.0),
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
    }
    trainer = trainer_of(theirs, **settings)
    want = trainer._compute_loss(theirs, inputs)
    want.backward()

    assert float(loss.detach()) == pytest.approx(float(want.detach()), abs=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert any((gradient.abs() > 1e-3).any() for gradient in gradients.values() if gradient is not None)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    told = trainer._metrics["train"]
    if average == "token":
        assert float(metrics["entropy"] / batch.weight) == pytest.approx(told["entropy"][0], abs=1e-6)
        if options.get("beta"):
            assert float(metrics["kl"] / batch.weight) == pytest.approx(told["kl"][0], abs=1e-6)
        for ours_name, theirs_name in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean")):
            if theirs_name in told:
                assert float(metrics[ours_name] / batch.weight) == pytest.approx(told[theirs_name][0], abs=1e-6)


def test_the_cases_meet_every_branch():
    """Old log-probabilities are such that tokens are cut on either side, or the comparison would say little."""
    ours, _ = models()
    batch = packed(
        old_log_probs=near(own_log_probs(ours), seed=5),
        advantages=[[a] * len(ids) for a, ids in zip(ADVANTAGES, ANSWERS, strict=True)],
    )
    output = ours(batch.input_ids, positions=batch.positions, documents=batch.documents)
    for case in ("grpo", "cispo", "gspo"):
        options = CASES[case][1]
        _, metrics = grpo(output, batch, temperature=TEMPERATURE, **options)
        assert metrics["clip_high"] > 0
        assert metrics["clip_high"] + metrics["clip_low"] < batch.weight
    _, metrics = grpo(output, batch, temperature=TEMPERATURE)
    assert metrics["clip_low"] > 0


def test_group_advantages_equal_trls_formula():
    """`(r - mean) / (std + 1e-4)` as in `GRPOTrainer._generate_and_score_completions`, where it stands inline."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.0, 0.0, 1.0, 0.0]])
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    found, _ = group_advantages(rewards, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
