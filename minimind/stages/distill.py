"""Distillation: a student learns from a teacher, in one of three ways.

    white-box   loss = alpha CE + (1 - alpha) T^2 KL(teacher_T || student_T) on the learned tokens of the data
    black-box   the teacher writes the answers to the data's prompts, and the student is fine-tuned on them
    on-policy   KL(student || teacher) on what the student itself answers (GKD, arXiv 2306.13649)

The student is a model (--init-from), or a new one (--model.preset) with the teacher's tokenizer.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minimind.config import parse
from minimind.errors import ConfigError
from minimind.model.config import ModelConfig
from minimind.stages import pretrain
from minimind.stages.answers import AnswersConfig, write_answers
from minimind.stages.base import TrainingConfig, start
from minimind.stages.supervised import train
from minimind.training.config import OptimConfig

if TYPE_CHECKING:
    from minimind.batch import Batch
    from minimind.data.build import Kind
    from minimind.model.transformer import Transformer
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Teach a student: --teacher RUN --data FILE ... [--init-from RUN | --model.preset NAME] [--method NAME]."""

    out: Path = Path("runs/distill")
    """Directory of the run: configuration, metrics, samples, checkpoints, the teacher's answers."""
    method: Literal["white-box", "black-box", "on-policy"] = "white-box"
    """The teacher's distribution on the data (white-box), its answers to the data's prompts (black-box), or its
    distribution on the student's answers to them (on-policy)."""
    teacher: Path | None = None
    """A run, checkpoint or Transformers directory of any architecture; same vocabulary, or --method black-box."""
    kind: Literal["auto", "conversation", "pretrain"] = "auto"
    """White-box: what the rows are; auto goes by the first one."""
    temperature: float | None = None
    """T of both distributions in the loss; 1.5, on-policy 1."""
    alpha: float | None = None
    """Share of the cross-entropy with the label; 0.5, on-policy 0, where labels are the student's own."""
    divergence: Literal["forward", "reverse", "jensen-shannon"] | None = None
    """forward KL(teacher || student), reverse KL(student || teacher), or between; on-policy reverse, else forward."""
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    """Black-box and on-policy: how answers are sampled."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig.from_preset("small"))
    """Shape of a new student, without --init-from."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5, weight_decay=0.0))
    """Optimizer and schedule."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        if self.teacher is None:
            found.append("teacher: nobody to learn from; give --teacher RUN")
        given = [name for name in ("temperature", "alpha", "divergence") if getattr(self, name) is not None]
        if self.method == "black-box" and given:
            found.append(f"{', '.join(given)}: of no use with --method black-box, which learns the teacher's words")
        if self.temperature is not None and not self.temperature > 0:
            found.append(f"temperature = {self.temperature}: must be above 0")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            found.append(f"alpha = {self.alpha}: must lie between 0 and 1")
        if self.method == "on-policy":
            if self.alpha:
                found.append(f"alpha = {self.alpha}: 0 with --method on-policy, where labels are the student's own")
            if not self.answers.temperature > 0:
                found.append("answers.temperature = 0: above 0 with --method on-policy, for a student must explore")
            if self.init_from is None:
                found.append("init_from: --method on-policy takes a student that answers; give --init-from RUN")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.evaluation.perplexity import evaluate_loss
    from minimind.objectives.cross_entropy import cross_entropy
    from minimind.objectives.distillation import Mixture, distillation
    from minimind.runtime import distributed
    from minimind.runtime.device import pick_device
    from minimind.stages.lessons import TaughtLoader, distance
    from minimind.stages.teacher import check_vocabulary, load_teacher

    if config.teacher is None:
        raise ConfigError("teacher: nobody to learn from; give --teacher RUN")
    device = pick_device(config.device)
    distributed.init(device)
    kind = kind_of(config)
    teacher = load_teacher(config.teacher, device)
    new = pretrain.Config(tokenizer=teacher.directory, model=config.model, seed=config.seed)
    model, tokenizer = start(config) if config.init_from else pretrain.new_model(new)
    if config.method == "black-box":
        data = replace(config.data, files=(write_answers(config, teacher),))
        goes_on = replace(config, data=data, fresh=False, resume=True)  # the answers already made the run a fresh one
        return _as_asked(config, train(goes_on, "conversation", model, tokenizer, cross_entropy))
    check_vocabulary(teacher, model, tokenizer, str(config.init_from or "a new model"))
    mixture = Mixture(1.0, 0.0, "reverse") if config.method == "on-policy" else Mixture(1.5, 0.5, "forward")
    given = {name: value for name in Mixture._fields if (value := getattr(config, name)) is not None}
    objective = partial(distillation, teacher=teacher.ask, mixture=mixture._replace(**given))
    if config.method == "on-policy":
        from minimind.stages.on_policy import train_on_policy

        return _as_asked(config, train_on_policy(config, model, tokenizer, teacher, objective))

    def evaluate(
        model: "Transformer", batches: "Iterable[Batch]", *, autocast: AbstractContextManager[object]
    ) -> dict[str, float]:
        rows = list(batches)
        losses = evaluate_loss(model, rows, tokenizer.token_bytes, autocast=autocast)
        return losses | distance(model, teacher, rows, autocast=autocast)

    loader = partial(TaughtLoader, teacher=teacher)
    return train(config, kind, model, tokenizer, objective, make_loader=loader, evaluate=evaluate)


def _as_asked(config: Config, result: "FitResult") -> "FitResult":
    """Return `result`, the run's configuration put as it was given: what trained was derived from it."""
    from minimind.config import to_toml
    from minimind.training.run import RunDirectory

    RunDirectory(config.out).write_config(to_toml(config))
    return result


def kind_of(config: Config) -> "Kind":
    """Return what the rows of the first training file are: as configured, or as the first one looks."""
    from minimind.data.check import detect
    from minimind.data.jsonl import read_rows

    if config.kind != "auto":
        return config.kind
    first = next(read_rows(config.data.files[0]), None)
    return "pretrain" if first and detect(first.data) == "pretrain" else "conversation"


def main(argv: Sequence[str]) -> None:
    """`minimind distill`."""
    run(parse(Config, argv, command="distill"))
