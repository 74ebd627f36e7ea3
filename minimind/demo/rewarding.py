"""Chapters in which nobody shows the answer: the model tries, a program says right or wrong, and it learns from that.

GRPO, PPO and SPO start from one model whose fine-tuning was stopped early, so that there is room; the tool agent from
one that was fine-tuned a little longer and knows the tools. Each control goes on with the fine-tuning instead.
"""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minimind.checkpoint import load
from minimind.data.jsonl import read_rows
from minimind.demo import settings
from minimind.demo.chapter import Aim, Chapter, question_run
from minimind.demo.story import Story, facts_of
from minimind.evaluation.tasks import Score, Tally
from minimind.rl.episodes import solve
from minimind.rl.rewards import grade
from minimind.stages import agent as acting
from minimind.stages import grpo as group
from minimind.stages import ppo as proximal
from minimind.stages import sft as tuning
from minimind.stages import spo as single
from minimind.training.loop import FitResult


def grpo(story: Story) -> Chapter:
    """Compare several answers to each question with each other."""
    story.clock.heading("GRPO: try eight answers to a question, and do more of what was right")
    config = group.Config(**rewarded(story, "grpo", settings.GRPO))
    what = "Eight answers to each question are sampled and graded; what was better than its group becomes likelier."
    return chapter(story, "grpo", "GRPO", what, lambda: group.run(config))


def ppo(story: Story) -> Chapter:
    """Compare each answer with what a critic expected."""
    story.clock.heading("PPO: a critic learns what to expect, the policy to do better")
    config = proximal.Config(**rewarded(story, "ppo", settings.PPO))
    what = "A second model learns how good each beginning is; what turned out better than it expected becomes likelier."
    return chapter(story, "ppo", "PPO", what, lambda: proximal.run(config))


def spo(story: Story) -> Chapter:
    """Compare each answer with what its own question has given before."""
    story.clock.heading("SPO: one answer to a question, compared with what the question gave before")
    config = single.Config(**rewarded(story, "spo", settings.SPO))
    what = "Every question remembers how often it was answered right; an answer that beats that becomes likelier."
    return chapter(story, "spo", "SPO", what, lambda: single.run(config))


def agent(story: Story) -> Chapter:
    """Let the model call tools, read what they say and answer; only the end is graded."""
    story.clock.heading("Agent: call tools, read their replies, answer")
    rows = [one.data for one in islice(read_rows(story.world / "agent-test.jsonl"), 8 * story.budget.questions)]
    start = later(story)
    shared: dict[str, Any] = rewarded(story, "agent", settings.AGENT, file="agent")
    shared |= settings.AGENT_SHARED | {"init_from": start}
    before, control = solved(start, rows), solved(more(story, "agent-control", start, story.budget.agent_tokens), rows)
    fitted = acting.run(acting.Config(**shared))
    after = solved(fitted.checkpoint, rows)
    model, _ = load(fitted.checkpoint)
    facts = facts_of(model.config, fitted, control="fine-tuning goes on for at least as long")
    what = "The model calls tools over several turns and is rewarded when its last words are right."
    return Chapter(
        *("agent", "Tool agent", what, "chat", fitted, before, after, [], facts),
        control=control,
        aims={"tasks solved with tools": Aim({score.domain for score in after}, rise=0.15, gain=0.0)},
    )


def solved(run: Path, rows: Sequence[dict[str, Any]]) -> list[Score]:
    """Return the scores of a model as an agent, by kind of task and language."""
    start, tallies = time.monotonic(), dict[tuple[str, str], Tally]()
    for one in solve(*load(run), rows, grader=grade, max_tokens=settings.ANSWER_TOKENS):
        tally = tallies.setdefault((one.row["domain"], one.row["language"]), Tally())
        tally.n, tally.correct = tally.n + 1, tally.correct + one.is_correct
    seconds = time.monotonic() - start
    return [tally.score(*key, "chat", seconds * tally.n / len(rows)) for key, tally in sorted(tallies.items())]


def chapter(story: Story, stage: str, title: str, what: str, fit: Callable[[], FitResult]) -> Chapter:
    """Return the chapter of an algorithm, its control being the fine-tuning that goes on."""
    start, questions = early(story), story.asked(settings.taught("prompts"))
    if "early" not in story.scores:
        story.scores["early"] = question_run(start, questions)[0]
        story.scores["later"] = question_run(later(story), questions)[0]
    fitted = fit()
    after, records = question_run(fitted, questions)
    model, _ = load(fitted.checkpoint)
    facts = facts_of(model.config, fitted, control="fine-tuning goes on for at least as long")
    domains = {score.domain for score in after}
    aims = {"greedy answers to all kinds of questions": Aim(domains, rise=0.08)}
    best = max(domains, key=lambda name: lead(story, after, name))
    aims[f"the kind it does best, {best}"] = Aim([best], gain=0.0)
    scores = story.scores
    return Chapter(
        *(stage, title, what, "chat", fitted, scores["early"], after, records, facts),
        control=scores["later"],
        aims=aims,
    )


def lead(story: Story, after: list[Score], domain: str) -> float:
    """Return by how much the accuracy in a domain is above the control's."""
    ours, control = ([s for s in side if s.domain == domain] for side in (after, story.scores["later"]))
    return sum(s.accuracy for s in ours) / len(ours) - sum(s.accuracy for s in control) / len(control)


def early(story: Story) -> Path:
    """Return the run of a fine-tuning that was stopped early, made by the first chapter that asks."""
    if story.early is None:
        base, files = story.chapters["pretrain"], [story.world / "sft.jsonl"]
        fewer = settings.training(story.config, "sft-early", story.budget.early_tokens, files, "sft")
        tuning.run(tuning.Config(init_from=base.run, **fewer))
        story.early = Path(fewer["out"])
    return story.early


def later(story: Story) -> Path:
    """Return the run in which that fine-tuning goes on: what time alone gives."""
    if story.later is None:
        story.later = more(story, "sft-later", early(story), story.budget.later_tokens)
    return story.later


def more(story: Story, name: str, start: Path, tokens: int) -> Path:
    """Return the run `name` that fine-tunes `start` by so many tokens more."""
    files = [story.world / "sft.jsonl"]
    shared = settings.training(story.config, name, tokens, files, "sft")
    tuning.run(tuning.Config(init_from=start, **shared))
    return shared["out"]


def rewarded(story: Story, name: str, own: dict[str, Any], *, file: str = "prompts") -> dict[str, Any]:
    """Return the settings of an algorithm: start, grades and number of answers are the same for all."""
    from minimind.data.config import DataConfig
    from minimind.training.config import OptimConfig

    steps = story.budget.rollouts * own.get("rollout_epochs", 1) * own.get("minibatches", 1)
    shared: dict[str, Any] = {
        "init_from": early(story),
        "out": story.config.out / name,
        "seed": story.config.seed,
        "device": story.config.device,
        "steps": steps,
        "rewards": ("grade",),
        "max_tokens": settings.ANSWER_TOKENS,
        "save_every": max(1, steps // 2),
        "eval_every": max(1, steps // 8),
        "sample_every": max(1, steps // 4),
        "log_every": 1,
        "eval_tokens": settings.ANSWER_TOKENS * 200,
        "data": DataConfig(
            files=(story.world / f"{file}.jsonl",),
            validation=(story.world / f"{file}-validation.jsonl",),
            cache_dir=story.config.out / "cache",
        ),
        "optim": OptimConfig(**settings.RL_OPTIM),
    }
    return shared | own
