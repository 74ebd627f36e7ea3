"""A chapter of the demo: one stage with held-out questions asked before and after it and of a control, as results.

A control spends the same on something else, so that what is claimed for a stage is not only a matter of time. It knows
how to question a checkpoint and tell what changed; which stages there are, the pipeline knows.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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


@dataclass(frozen=True)
class Aim:
    """What a group of questions is held to after a stage; every condition that is given must hold."""

    domains: Collection[str]
    accuracy: float | None = None
    """At least this much."""
    gain: float | None = None
    """At least so much more than the control (than before, where there is none), the two 95 % intervals apart."""
    rise: float | None = None
    """At least so much more than before, the two 95 % intervals apart."""
    loss: float | None = None
    """At most so much less than before."""

    def judge(self, before: Score, after: Score, control: Score | None) -> tuple[float | None, bool]:
        """Return (the accuracy asked for, whether it is reached)."""
        other = control or before
        asked = [self.accuracy] if self.accuracy is not None else []
        asked += [other.accuracy + self.gain] if self.gain is not None else []
        asked += [before.accuracy + self.rise] if self.rise is not None else []
        asked += [before.accuracy - self.loss] if self.loss is not None else []
        is_apart = (self.gain is None or separated(other, after)) and (self.rise is None or separated(before, after))
        return max(asked, default=None), is_apart and after.accuracy >= max(asked, default=0.0) - 1e-9


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
    control: list[Score] = field(default_factory=list[Score])
    """The answers of a model that spent the same otherwise."""
    aims: Mapping[str, Aim] = field(default_factory=dict[str, Aim])
    """Name of a pooled measure -> what is asked of it."""
    measures: list[Result] = field(default_factory=list[Result])
    """Results that are no answers to questions."""

    @property
    def run(self) -> Path:
        """The stage's run directory."""
        return self.fitted.checkpoint.parent.parent

    def results(self, targets: Mapping[str, float]) -> list[Result]:
        """Return the rows of results.json: pooled measures, other measures, then every domain and language.

        A domain is held to its target (`targets` name -> accuracy), where it has one; else to having become better
        (intervals apart), where the chapter has no aims of its own.
        """
        rows = [self._pooled(name, aim) for name, aim in self.aims.items()] + self.measures
        earlier, control = ({(score.domain, score.language): score for score in side} for side in self._sides())
        for after in self.after:
            before = earlier[after.domain, after.language]
            target = targets.get(after.domain)
            met = after.accuracy >= target if target is not None else _is_better(before, after)
            judged = target is not None or not self.aims
            name = f"{after.domain} {after.language}"
            rows.append(
                self._row(name, before, after, control.get((after.domain, after.language)), target, met, judged)
            )
        return rows

    def _sides(self) -> tuple[list[Score], list[Score]]:
        return self.before, self.control

    def _pooled(self, name: str, aim: Aim) -> Result:
        before, after = (pooled(side, aim.domains) for side in (self.before, self.after))
        control = pooled(self.control, aim.domains) if self.control else None
        target, met = aim.judge(before, after, control)
        return self._row(name, before, after, control, target, met, True)

    def _row(
        self,
        metric: str,
        before: Score,
        after: Score,
        control: Score | None,
        target: float | None,
        met: bool,
        judged: bool,
    ) -> Result:
        return Result(
            stage=self.stage,
            metric=metric,
            before=before.accuracy,
            after=after.accuracy,
            control=control.accuracy if control else None,
            low=after.low,
            high=after.high,
            n=after.n,
            target=target,
            met=met if judged else None,
            seconds=round(after.seconds, 2),
        )

    def bits_per_byte(self) -> Result:
        """Return the bits per byte of the validation data, before and after, as a result."""
        rows = [row for row in read_jsonl(self.run / "metrics.jsonl") if "val_bits_per_byte" in row]
        first, last = rows[0]["val_bits_per_byte"], rows[-1]["val_bits_per_byte"]
        target = self.floor and round(1.15 * self.floor, 4)  # wanted: within 15 % of the entropy
        return plain_result(
            self.stage,
            "bits per byte",
            first,
            last,
            target=target,
            met=last < (target or first),
            seconds=self.fitted.seconds,
        )

    def report(self, results: Sequence[Result]) -> StageReport:
        """Return the chapter as drawn."""
        headline = [*self.aims, *(row["metric"] for row in self.measures)]
        return stage_from_run(
            self.run,
            name=self.stage,
            title=self.title,
            what=self.what,
            before=self.before,
            after=self.after,
            seconds=self.fitted.seconds,
            tokens=self.fitted.tokens,
            headline=[row for row in results if row["stage"] == self.stage and row["metric"] in headline],
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


def plain_result(
    stage: str,
    metric: str,
    before: float,
    after: float,
    *,
    control: float | None = None,
    target: float | None = None,
    met: bool | None = None,
    seconds: float = 0.0,
) -> Result:
    """Return a row of results.json for a number that is no share of answers."""
    numbers: dict[str, Any] = {"before": before, "after": after, "control": control, "low": None, "high": None}
    return Result(stage=stage, metric=metric, **numbers, n=None, target=target, met=met, seconds=round(seconds, 1))


def pooled(scores: Sequence[Score], domains: Collection[str]) -> Score:
    """Return the scores of some domains as one."""
    return tasks.overall([score for score in scores if score.domain in domains])


def _is_better(before: Score, after: Score) -> bool:
    return after.accuracy > before.accuracy and separated(before, after)


def read_questions(path: Path, most: int) -> list[dict[str, Any]]:
    """Return the first `most` questions of each domain and language."""
    counts: Counter[tuple[str, str]] = Counter()
    chosen: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        key = (question["domain"], question["language"])
        if counts[key] < most:
            counts[key] += 1
            chosen.append(question)
    return chosen


def question_run(
    run: FitResult | Path, questions: Sequence[dict[str, Any]], form: Form = "chat"
) -> tuple[list[Score], list[Record]]:
    """Return `question_model` of a checkpoint as it was written: what is scored is what was saved."""
    model, tokenizer = load(run if isinstance(run, Path) else run.checkpoint)
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
