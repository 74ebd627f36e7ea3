"""What the chapters of the demo share: the settings, the questions, the clock, and what the chapters before made."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.demo import settings
from minimind.demo.chapter import Chapter, read_questions
from minimind.demo.settings import Budget, Config
from minimind.demo.telling import Clock
from minimind.evaluation.report import Result
from minimind.evaluation.tasks import Score
from minimind.evaluation.wording import memory, quantity
from minimind.model.config import ModelConfig
from minimind.training.loop import FitResult


@dataclass
class Story:
    """One run of the demo."""

    config: Config
    budget: Budget
    clock: Clock = field(default_factory=Clock)
    questions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The held-out questions, of every domain as many as the budget says."""
    chapters: dict[str, Chapter] = field(default_factory=dict[str, Chapter])
    scores: dict[str, list[Score]] = field(default_factory=dict[str, list[Score]])
    """Answers of models that several chapters are compared with."""
    early: Path | None = None
    """The run of a fine-tuning that was stopped early, once there is one."""
    later: Path | None = None
    """The run in which that fine-tuning goes on, once there is one."""

    @property
    def world(self) -> Path:
        """The folder of the world's files."""
        return self.config.out / "world"

    def read_questions(self) -> list[dict[str, Any]]:
        """Return the held-out questions that the demo asks."""
        return read_questions(self.world / "questions-test.jsonl", self.budget.questions)

    def asked(self, domains: Collection[str]) -> list[dict[str, Any]]:
        """Return the questions of some domains."""
        return [question for question in self.questions if question["domain"] in domains]

    def results(self) -> list[Result]:
        """Return the rows of results.json, chapter by chapter."""
        return [
            row
            for name, chapter in self.chapters.items()
            for row in chapter.results(settings.TARGETS if name == "sft" else {})
        ]


def facts_of(model: ModelConfig, fitted: FitResult, **more: str) -> dict[str, str]:
    """Return what the report tells about a training; `more` are further facts."""
    return {
        "Parameters": model.describe(),
        "Shape": f"{model.num_hidden_layers} layers of {model.hidden_size}",
        "Steps": f"{fitted.steps:,} of {settings.BATCH_TOKENS:,} tokens",
        "Speed": f"{quantity(fitted.metrics.get('tokens_per_second'))} tokens/s",
        "Peak memory": memory(fitted.metrics.get("memory_bytes")),
    } | {name.replace("_", " ").capitalize(): text for name, text in more.items()}
