"""A chapter of the demo: one stage with the held-out questions asked before and after it, as results and as report.

It knows how to question a checkpoint and tell what changed; which stages there are, the demo knows.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.checkpoint import load
from minimind.evaluation import tasks
from minimind.evaluation.report import Dialogue, Result, StageReport, read_jsonl, stage_from_run
from minimind.evaluation.tasks import Form, Record, Score, separated
from minimind.inference.chat import parse
from minimind.model.transformer import Transformer
from minimind.runtime.log import get_logger
from minimind.tokenizer.bpe import Tokenizer
from minimind.training.loop import FitResult
from minimind.world.graders import grade

ANSWER_TOKENS = 112  # the longest answer of the world, a sum with its steps, fits

_log = get_logger("demo")


@dataclass
class Chapter:
    """One stage: what it is, what came of it, and the answers before and after."""

    stage: str
    title: str
    what: str
    form: Form
    fitted: FitResult
    before: list[Score]
    after: list[Score]
    records: list[Record]
    """The answers after the stage."""
    facts: dict[str, str] = field(default_factory=dict[str, str])
    """What the report tells about the training."""
    floor: float | None = None
    """Entropy of the validation data in bits per byte, where it is known."""

    @property
    def run(self) -> Path:
        """The stage's run directory."""
        return self.fitted.checkpoint.parent.parent

    def results(self, targets: dict[str, float]) -> list[Result]:
        """Return the rows of results.json: every domain and language, and the bits per byte.

        A domain without a target (`targets` name -> accuracy) is met when its intervals before and after stand apart.
        """
        rows: list[Result] = []
        earlier = {(score.domain, score.language): score for score in self.before}
        for after in self.after:
            before = earlier[after.domain, after.language]
            target = targets.get(after.domain)
            is_better = after.accuracy > before.accuracy and separated(before, after)
            rows.append(
                Result(
                    stage=self.stage,
                    metric=f"{after.domain} {after.language}",
                    before=before.accuracy,
                    after=after.accuracy,
                    low=after.low,
                    high=after.high,
                    n=after.n,
                    target=target,
                    met=is_better if target is None else after.accuracy >= target,
                    seconds=round(after.seconds, 2),
                )
            )
        return [*rows, *self._bits_per_byte()]

    def _bits_per_byte(self) -> list[Result]:
        rows = [row for row in read_jsonl(self.run / "metrics.jsonl") if "val_bits_per_byte" in row]
        first, last = rows[0]["val_bits_per_byte"], rows[-1]["val_bits_per_byte"]
        numbers: dict[str, Any] = {"before": first, "after": last, "low": None, "high": None, "n": None}
        target = self.floor and round(1.15 * self.floor, 4)  # wanted: within 15 % of the entropy
        numbers |= {"target": target, "met": last < (target or first), "seconds": round(self.fitted.seconds, 1)}
        return [Result(stage=self.stage, metric="bits per byte", **numbers)]

    def report(self, results: Sequence[Result]) -> StageReport:
        """Return the chapter as drawn."""
        return stage_from_run(
            self.run,
            name=self.stage,
            title=self.title,
            what=self.what,
            before=self.before,
            after=self.after,
            seconds=self.fitted.seconds,
            tokens=self.fitted.tokens,
            headline=[row for row in results if row["stage"] == self.stage and row["metric"] == "bits per byte"],
            facts=self.facts,
            floor=self.floor,
        )

    def dialogues(self, questions: Sequence[dict[str, Any]]) -> list[Dialogue]:
        """Return one question of each domain with the model's answer, right or wrong, the languages in turn."""
        asked = {question["id"]: question for question in questions}
        chosen: dict[str, Dialogue] = {}
        for record in self.records:
            if record.domain in chosen or record.language != ("en", "zh")[len(chosen) % 2]:
                continue
            answer = parse(record.output)
            turn = {"role": "assistant", "content": answer.content, "reasoning_content": answer.reasoning}
            messages = [*asked[record.id]["messages"], {**turn, "tool_calls": list(answer.tool_calls)}]
            chosen[record.domain] = Dialogue(messages, f"{record.domain}, expected: {record.answer}", record.correct)
        return list(chosen.values())


def read_questions(path: Path, most: int) -> list[dict[str, Any]]:
    """Return the first `most` questions of the main set for each domain and language."""
    counts: Counter[tuple[str, str]] = Counter()
    chosen: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        key = (question["domain"], question["language"])
        if question["set"] == "main" and counts[key] < most:
            counts[key] += 1
            chosen.append(question)
    return chosen


def question_run(
    fitted: FitResult, questions: Sequence[dict[str, Any]], form: Form
) -> tuple[list[Score], list[Record]]:
    """Return `question` of the checkpoint as it was written: what is scored is what was saved."""
    model, tokenizer = load(fitted.checkpoint)
    return question_model(model, tokenizer, questions, form)


def question_model(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[dict[str, Any]], form: Form
) -> tuple[list[Score], list[Record]]:
    """Return the scores of greedy answers to `questions`, and the answers."""
    records: list[Record] = []
    start = time.monotonic()
    scores = tasks.ask(
        *(model, tokenizer, questions), form=form, grader=grade, max_tokens=ANSWER_TOKENS, on_record=records.append
    )
    share, seconds = 100 * tasks.overall(scores).accuracy, time.monotonic() - start
    _log.info("%d held-out questions, asked as %s: %.1f %% right, %.0f s", len(records), form, share, seconds)
    return scores, records
