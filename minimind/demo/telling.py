"""How the demo speaks: headings while it runs, the report and the summary when it is done."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimind.demo.story import Story
    from minimind.evaluation.report import Result


QUESTIONS = "questions-test.jsonl"
REWARDED = ("grpo", "ppo", "spo")
"""The stages that are compared in one picture: the same prompts, rewards and number of answers."""


def write_report(story: "Story", results: "list[Result]") -> Path:
    """Write report.html, and its two main pictures as files, and return the report's path."""
    from minimind.evaluation import plots, report
    from minimind.evaluation.wording import duration
    from minimind.training.run import environment

    out, clock, tuned = story.config.out, story.clock, story.chapters["sft"]
    domains = json.loads((story.world / "world.json").read_text(encoding="utf-8"))["domains"]
    chapters = list(story.chapters.values())
    stages = [chapter.report(results) for chapter in chapters]
    first = [stage for stage in stages if stage.name in ("pretrain", "sft")]
    plots.save_loss(out / "images" / "loss.png", first)
    plots.save_scores(out / "images" / "scores.png", first[-1])
    rewarded = {stage.title: plots.rewards_over_tokens(stage.metrics) for stage in stages if stage.name in REWARDED}
    if rewarded:
        plots.save_rewards(out / "images" / "rewards.png", rewarded)
    return report.write_report(
        out / "report.html",
        title="A small language model, from noise to answers",
        subtitle=(
            f"{tuned.facts['Parameters']} weights were trained on an invented town and then asked about things that "
            "its training files never say. Every answer was graded by a program."
        ),
        stages=stages,
        results=results,
        dialogues=[
            talk for chapter in list(story.chapters.values())[1:] for talk in chapter.dialogues(story.questions)
        ],
        cost={"In all": duration(clock.total())} | {name: duration(part) for name, part in clock.parts.items()},
        environment={key: str(value) for key, value in environment().items()},
        limits=[
            "The town is small and its language simple: these scores say nothing about open conversation.",
            "One seed, one run. The intervals cover the choice of questions, not the luck of training.",
            "What the model was not shown, it makes up with the same confidence.",
        ],
        commands=[
            ("Chat with the model", f"minimind chat {tuned.run}"),
            ("Let it call the calculator, the clock and the weather", f"minimind chat {tuned.run} --tools"),
            (
                "Ask it all held-out questions",
                f"minimind eval {tuned.run} --questions {story.world}/questions-test.jsonl",
            ),
            ("Train it for an hour", "minimind demo --full --out runs/demo-full"),
            ("Train on your own text", f"minimind pretrain --data FILE --tokenizer {out}/tokenizer"),
        ],
        main="sft",
        domains={name: f"{domain['about']} Held out: {domain['held_out']}" for name, domain in domains.items()},
    )


def summary(story: "Story", results: "list[Result]", report: Path) -> None:
    """Print what the stages changed, what it cost, and what to do now."""
    from minimind.evaluation.score_table import print_scores

    clock, tuned = story.clock, story.chapters["sft"]
    print_scores(tuned.after, sys.stdout)
    met = [row["met"] for row in results if row["met"] is not None]
    say(f"{sum(met)} of {len(met)} measures reached what was asked of them (results.json has them all).")
    minutes = clock.total() / 60
    parts = ", ".join(f"{name.lower()} {seconds:.0f} s" for name, seconds in clock.parts.items())
    say(f"Time: {minutes:.1f} minutes ({parts})")
    say(f"Report: {report}")
    say(f"Now talk to it: minimind chat {tuned.run} --temperature 0")


class Clock:
    """Announces the parts of the demo and knows how long each took."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.begin = self.mark = time.monotonic()
        self.part = ""

    def heading(self, text: str) -> None:
        """End the part before and announce the next one."""
        self.close()
        self.part = text.split(":", maxsplit=1)[0]
        say(f"\n── {text}   [{self.mark - self.begin:.0f} s]")

    def close(self) -> None:
        """End the part at hand."""
        now = time.monotonic()
        if self.part:
            self.parts[self.part] = self.parts.get(self.part, 0.0) + now - self.mark
        self.mark = now

    def total(self) -> float:
        """Return the seconds since the beginning."""
        self.close()
        return time.monotonic() - self.begin


def write_json(path: Path, content: Any) -> None:
    """Write `content`, whole or not at all."""
    partial = path.with_name(f".{path.name}-partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def say(text: str) -> None:
    """Print a line of the story."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the demo speaks
