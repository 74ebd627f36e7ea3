"""The first two chapters: from random weights to a model that continues text, and on to one that answers."""

import json
from pathlib import Path

from minimind.checkpoint import load
from minimind.demo import settings
from minimind.demo.chapter import Chapter, question_model, question_run
from minimind.demo.story import Story, facts_of
from minimind.stages import pretrain as pretraining
from minimind.stages import sft as tuning


def pretrain(story: Story) -> Chapter:
    """Train random weights on plain text; questions are lines to be continued."""
    story.clock.heading("Pretraining: predict the next token of plain text")
    shape, questions = settings.demo_model(), story.asked(settings.taught("pretrain"))
    config = pretraining.Config(
        tokenizer=story.config.out / "tokenizer",
        model=shape,
        **settings.training(story.config, "pretrain", story.budget.pretrain_tokens),
    )
    before, _ = question_model(*pretraining.new_model(config), questions, "completion")
    fitted = pretraining.run(config)
    after, records = question_run(fitted, questions, "completion")
    chapter = Chapter(
        *("pretrain", "Pretraining", "Random weights read stories, biographies and sums, and learn to continue them."),
        *("completion", fitted, before, after, records, facts_of(shape, fitted), entropy_floor(story.world)),
    )
    chapter.measures.append(chapter.bits_per_byte())
    return chapter


def sft(story: Story) -> Chapter:
    """Fine-tune the pretrained model on conversations."""
    story.clock.heading("Fine-tuning: learn to answer, to think first, to call tools")
    base, questions = story.chapters["pretrain"], story.asked(settings.taught("sft"))
    config = tuning.Config(init_from=base.run, **settings.training(story.config, "sft", story.budget.sft_tokens))
    before, _ = question_run(base.fitted, questions)
    fitted = tuning.run(config)
    after, records = question_run(fitted, questions)
    model, _ = load(fitted.checkpoint)
    chapter = Chapter(
        *("sft", "Fine-tuning", "The same loss on the assistant's words only: the model learns to answer in a chat."),
        *("chat", fitted, before, after, records, facts_of(model.config, fitted)),
    )
    chapter.measures.append(chapter.bits_per_byte())
    return chapter


def entropy_floor(world: Path) -> float | None:
    """Return the entropy of the validation text in bits per byte: no model can be better."""
    about = json.loads((world / "world.json").read_text(encoding="utf-8"))
    return about["floor"].get("pretrain-validation.jsonl", {}).get("bits_per_byte")
