"""`minimind demo`: every stage on the built-in world, questioned before and after, and a report. Minutes on two cores.

One page to read: write the world, train a tokenizer, then one chapter after the other, each with its questions, and the
report. There is nothing here that the other commands do not do: it calls the stages.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.demo import settings
from minimind.demo.settings import Config
from minimind.demo.telling import summary, write_json, write_report

if TYPE_CHECKING:
    from minimind.demo.chapter import Chapter
    from minimind.demo.story import Story


def run(config: Config) -> Path:
    """Run the demo, write results.json and report.html into `config.out`, and return the report's path."""
    from minimind.demo.story import Story

    story = Story(config, settings.QUICK if config.quick else settings.FULL if config.full else settings.STANDARD)
    write_world(story)
    story.questions = story.read_questions()
    train_tokenizer(story)
    for stage, write_chapter in chapters().items():
        if stage in (*config.stages, *settings.FIRST) or "all" in config.stages:
            story.chapters[stage] = write_chapter(story)

    story.clock.heading("Report")
    results = story.results()
    write_json(config.out / "results.json", results)
    report = write_report(story, results)
    summary(story, results, report)
    return report


def chapters() -> "dict[str, Callable[[Story], Chapter]]":
    """Return the function that runs each stage and tells what it changed, in the order of the demo."""
    from minimind.demo import adapting, beginning, rewarding

    return {
        "pretrain": beginning.pretrain,
        "sft": beginning.sft,
        "lora": adapting.lora,
        "reason": adapting.reason,
        "dpo": adapting.dpo,
        "distill": adapting.distill,
        "grpo": rewarding.grpo,
        "ppo": rewarding.ppo,
        "spo": rewarding.spo,
        "agent": rewarding.agent,
    }


def write_world(story: "Story") -> None:
    """Write the world's files, unless this very world is there already; runs on another world are moved aside."""
    from minimind.training.run import RunDirectory
    from minimind.world.write import SIZES, write

    story.clock.heading("World: text, conversations and questions, all of them made up")
    about = {"seed": story.config.seed, "scale": story.budget.world}
    done = story.world / "demo.json"
    if not (done.is_file() and json.loads(done.read_text()) == about):
        runs = {folder.parent.name for folder in story.config.out.glob("*/checkpoints")}
        for name in sorted(runs | set(settings.FIRST)):
            RunDirectory(story.config.out / name).start_afresh()
        done.unlink(missing_ok=True)
        write(story.world, seed=story.config.seed, sizes=SIZES[story.budget.world])
        write_json(done, about)


def train_tokenizer(story: "Story") -> None:
    """Train the tokenizer that all models of the demo share."""
    from minimind.stages import train_tokenizer

    story.clock.heading("Tokenizer: which byte sequences deserve an id of their own")
    train_tokenizer.run(
        train_tokenizer.Config(
            files=(story.world / "pretrain.jsonl", story.world / "sft.jsonl"),
            out=story.config.out / "tokenizer",
            vocab_size=settings.VOCAB_SIZE,
            max_token_bytes=settings.LONGEST_TOKEN,
            max_rows=settings.TOKENIZER_ROWS,
        )
    )


def main(argv: Sequence[str]) -> None:
    """`minimind demo`."""
    run(parse(Config, argv, command="demo"))
