"""Preference optimisation: answer as people chose, not as they rejected, without a reward model. DPO and its relatives.

    loss = -log sigmoid(beta * [log p/p_ref (chosen) - log p/p_ref (rejected)])        arXiv 2305.18290

The reference is the model started from, frozen; what it thinks of each answer is computed once, before training
(`data/pairs.py`). Which losses there are, and their equations: `objectives/dpo.py`, `objectives/kto.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimind.config import parse
from minimind.stages.base import TrainingConfig, start
from minimind.stages.reference import reference, scorer
from minimind.stages.supervised import train
from minimind.training.config import OptimConfig

if TYPE_CHECKING:
    from minimind.batch import Batch
    from minimind.model.transformer import Transformer
    from minimind.training.loop import FitResult

_WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Teach a model which of two answers is better: --init-from RUN --data FILE ..."""

    out: Path = Path("runs/dpo")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    """dpo; ipo: a squared loss, bounded margin; simpo, orpo: without a reference; kto: single answers, good or bad."""
    beta: float = 0.1
    """How strongly the policy is held to its reference; simpo: scale of its reward (2 or so); orpo: of its odds."""
    length_averaged: bool = False
    """dpo: log-probabilities are means over an answer's tokens instead of sums (ipo, simpo and orpo always average)."""
    nll_weight: float = 0.0
    """dpo: weight of fine-tuning on the chosen answer beside the preference (RPO); 1 keeps it fluent."""
    gamma: float = 1.0
    """simpo: the margin that the chosen answer should have."""
    desirable_weight: float = 1.0
    """kto: weight of a good answer."""
    undesirable_weight: float = 1.0
    """kto: weight of a bad answer."""
    reference: Path | None = None
    """The frozen model: a run or a directory with the same tokenizer; default: the model that is started from."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-6, weight_decay=0.0))
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.init_from is None:
            found.append("init_from: preferences are taught to a fine-tuned model; give --init-from RUN")
        if not self.beta > 0:
            found.append(f"beta = {self.beta}: must be above 0")
        found += [
            f"{name} = {getattr(self, name)}: must not be negative"
            for name in ("gamma", "nll_weight", "desirable_weight", "undesirable_weight")
            if not getattr(self, name) >= 0
        ]
        if self.length_averaged and self.loss != "dpo":
            found.append(f"length_averaged: is for loss dpo; {self.loss} has one form only")
        if self.nll_weight and self.loss != "dpo":
            found.append(f"nll_weight = {self.nll_weight}: is for loss dpo; {self.loss} is without")
        if self.loss == "kto" and self.data.packing != "packed":
            found.append(
                "data.packing: kto needs rows with several answers (packed), or there is none to another prompt"
            )
        if self.reference is not None and self.loss in _WITHOUT_REFERENCE:
            found.append(f"reference: {self.loss} has none; leave it out")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.data.pairs import PairLoader
    from minimind.data.unpaired import UnpairedLoader, with_kl
    from minimind.evaluation.objective import evaluate_objective
    from minimind.objectives import dpo, kto

    model, tokenizer = start(config)
    is_alone = config.loss in _WITHOUT_REFERENCE
    frozen = None if is_alone else reference(config.reference, model, tokenizer, config)
    if config.loss == "kto":
        assert frozen is not None
        weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
        objective, policy = partial(kto.kto, beta=config.beta, **weights), scorer(model, config)
        unpaired = partial(UnpairedLoader, reference=frozen, policy=policy)

        def evaluate(model: "Transformer", batches: "Iterable[Batch]", **options: Any) -> dict[str, float]:
            return evaluate_objective(model, with_kl([*batches], policy), objective, **options)

        return train(config, "unpaired", model, tokenizer, objective, make_loader=unpaired, evaluate=evaluate)
    objective = {
        "dpo": partial(dpo.dpo, beta=config.beta, length_averaged=config.length_averaged, nll_weight=config.nll_weight),
        "ipo": partial(dpo.ipo, beta=config.beta),
        "simpo": partial(dpo.simpo, beta=config.beta, gamma=config.gamma),
        "orpo": partial(dpo.orpo, beta=config.beta),
    }[config.loss]
    pairs = partial(PairLoader, reference=frozen)
    measure = partial(evaluate_objective, objective=objective)
    return train(config, "preference", model, tokenizer, objective, make_loader=pairs, evaluate=measure)


def main(argv: Sequence[str]) -> None:
    """`minimind dpo`."""
    run(parse(Config, argv, command="dpo"))
