"""Chapters that change how a fine-tuned model answers, from the same one each: adapter, thought, manners, a pupil."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from minimind.checkpoint import load
from minimind.data.jsonl import read_rows
from minimind.demo import settings
from minimind.demo.chapter import Aim, Chapter, plain_result, question_model, question_run
from minimind.demo.story import Story, facts_of
from minimind.evaluation.report import read_jsonl
from minimind.evaluation.tasks import Record
from minimind.model.adapter_config import LoraConfig
from minimind.model.transformer import Transformer
from minimind.stages import distill as distilling
from minimind.stages import dpo as preferring
from minimind.stages import lora as adapting
from minimind.stages import reason as reasoning
from minimind.stages import sft as tuning
from minimind.training.loop import FitResult
from minimind.world.graders import grade
from minimind.world.preference import POLITE, RUDE

ADAPTED = ("lora-identity", "lora-trade")
STEPWISE = ("sums-three", "shells")


def lora(story: Story) -> Chapter:
    """Give the model another name and a trade's jargon by an adapter; the control tunes every weight."""
    story.clock.heading("LoRA: a new name and a trade's jargon, in an adapter beside the frozen weights")
    base, world = story.chapters["sft"], story.world
    known = settings.taught("sft")
    questions = story.asked({*ADAPTED, *known})
    replay = excerpt(world / "sft.jsonl", story.config.out / "lora-replay.jsonl", settings.REPLAY_ROWS)
    files = [*(world / f"{name}.jsonl" for name in ADAPTED), replay]
    shared: dict[str, Any] = settings.training(
        story.config, "lora", story.budget.lora_tokens, files, "lora-trade", **settings.LORA_OPTIM
    )
    before, _ = question_run(base.fitted, questions)
    fitted = adapting.run(adapting.Config(init_from=base.run, lora=LoraConfig(**settings.LORA), **shared))
    after, records = question_run(fitted, questions)
    narrow = replace(shared["data"], files=tuple(files[:-1]))
    whole: dict[str, Any] = shared | {"out": story.config.out / "lora-control", "data": narrow}
    control, _ = question_run(tuning.run(tuning.Config(init_from=base.run, **whole)), questions)
    model, _ = load(base.fitted.checkpoint)
    facts = facts_of(model.config, fitted, control="every weight tuned on the new rows, as many tokens")
    aims = {
        "new name and jargon": Aim(ADAPTED, accuracy=0.95),
        "what it knew before": Aim(known, loss=0.02),
    }
    what = "Two thin matrices beside each frozen one learn who the model now is and what bakers call things."
    return Chapter("lora", "LoRA", what, "chat", fitted, before, after, records, facts, control=control, aims=aims)


def reason(story: Story) -> Chapter:
    """Teach sums of several steps with the steps thought aloud; the control learns the same answers without them."""
    story.clock.heading("Reasoning: think in tags first, then answer")
    base, world = story.chapters["sft"], story.world
    questions = story.asked(STEPWISE)
    shared: dict[str, Any] = settings.training(story.config, "reason", story.budget.reason_tokens)
    before, _ = question_run(base.fitted, questions)
    fitted = reasoning.run(reasoning.Config(init_from=base.run, **shared))
    after, records = question_run(fitted, questions)
    thought = (one.data for one in read_rows(world / "reason.jsonl"))
    at_once = write_rows(story.config.out / "reason-at-once.jsonl", map(answer_at_once, thought))
    same: dict[str, Any] = shared | {"out": story.config.out / "reason-control"}
    same["data"] = replace(shared["data"], files=(at_once,))
    control, _ = question_run(tuning.run(tuning.Config(init_from=base.run, **same)), questions)
    model, _ = load(base.fitted.checkpoint)
    facts = facts_of(model.config, fitted, control="the same sums answered at once, as many tokens")
    aims = {"sums of several steps": Aim(STEPWISE, gain=0.10)}
    what = "The four tags, ten times as heavy as other tokens, make the model write its steps before it answers."
    return Chapter(
        "reason", "Reasoning", what, "chat", fitted, before, after, records, facts, control=control, aims=aims
    )


def dpo(story: Story) -> Chapter:
    """Prefer polite and right to rude or wrong, from a model that has heard both; the control hears more of both."""
    story.clock.heading("DPO: prefer polite and right to rude or wrong")
    base, budget = story.chapters["sft"], story.budget
    questions = [one for one in story.questions if one["set"] == "preference"]
    mixed = mix_sides(story.world / "preference.jsonl", story.config.out / "manners.jsonl")

    def hear_both(name: str, start: Path, tokens: int) -> FitResult:
        settled = settings.training(story.config, name, tokens, [mixed], "sft", **settings.MANNERS_OPTIM)
        return tuning.run(tuning.Config(init_from=start, **settled))

    heard = hear_both("manners", base.run, budget.manners_tokens)
    before, records_before = question_run(heard, questions)
    pairs = settings.training(
        story.config, "dpo", budget.dpo_tokens, [story.world / "preference.jsonl"], "preference", **settings.DPO_OPTIM
    )
    fitted = preferring.run(preferring.Config(init_from=run_of(heard), **settings.DPO, **pairs))
    after, records = question_run(fitted, questions)
    control, records_control = question_run(hear_both("dpo-control", run_of(heard), budget.dpo_tokens), questions)
    model, _ = load(fitted.checkpoint)
    facts = facts_of(model.config, fitted, control="more of both sides of the pairs, as many tokens")
    asked = {question["id"]: question for question in questions}
    right = [share_right(asked, side) for side in (records_before, records, records_control)]
    what = "Pairs of answers, one better than the other, move the model towards the better; no reward model is needed."
    return Chapter(
        *("dpo", "DPO", what, "chat", fitted, before, after, records, facts),
        control=control,
        aims={"polite and right": Aim({score.domain for score in after}, gain=0.20)},
        measures=[
            plain_result(
                *("dpo", "right, in whatever manner", right[0], right[1]),
                control=right[2],
                target=right[0],
                met=right[1] >= right[0],
            )
        ],
    )


def mix_sides(source: Path, target: Path) -> Path:
    """Write conversations that end as the pairs of a file do: one in three with the chosen side, the others not."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return write_rows(target, ({"conversations": row["rejected" if i % 3 else "chosen"]} for i, row in enumerate(rows)))


def share_right(questions: dict[str, dict[str, Any]], records: Sequence[Record]) -> float:
    """Return the share of answers that are right once every polite and rude phrase is taken out."""
    phrases = [phrase for manners in (POLITE, RUDE) for some in manners.values() for phrase in some]
    hits = 0
    for record in records:
        args, said = questions[record.id]["grader_args"], record.output
        for phrase in phrases:
            said = said.replace(phrase, " ")
        inner = {"answer": record.answer, "grader": args["grader"], "grader_args": args["grader_args"]}
        hits += grade(inner, said)
    return hits / len(records)


def distill(story: Story) -> Chapter:
    """Teach a small student what the model thinks of every token; the control learns from the rows alone."""
    story.clock.heading("Distillation: a student of a quarter of the weights learns from the model")
    base, questions = story.chapters["sft"], story.asked(settings.taught("sft"))
    shape, files = settings.student_model(), [story.world / "sft.jsonl"]
    shared: dict[str, Any] = settings.training(story.config, "distill", story.budget.distill_tokens, files, "sft")
    taught = distilling.Config(teacher=base.run, model=shape, **shared)
    fitted = distilling.run(taught)
    alone = replace(taught, alpha=1.0, out=story.config.out / "distill-control")
    control_run = distilling.run(alone)
    after, records = question_run(fitted, questions)
    control, _ = question_run(control_run, questions)
    model, tokenizer = load(fitted.checkpoint)
    before, _ = question_model(Transformer(model.config), tokenizer, questions, "chat")
    first, last = (validations(run_of(fitted))[i]["val_kl"] for i in (0, -1))
    other = validations(alone.out)[-1]["val_kl"]
    facts = facts_of(model.config, fitted, teacher=base.facts["Parameters"], control="the same without a teacher")
    what = "A quarter as large, it learns the whole distribution of the larger model and not only which word was right."
    return Chapter(
        *("distill", "Distillation", what, "chat", fitted, before, after, records, facts),
        control=control,
        aims={"all questions, by the student": Aim({score.domain for score in after})},
        measures=[
            plain_result(
                *("distill", "KL to the teacher (loss, nats)", first, last),
                control=other,
                target=other,
                met=last < other,
                seconds=fitted.seconds,
            )
        ],
    )


def validations(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's validations."""
    return [row for row in read_jsonl(run / "metrics.jsonl") if "val_loss" in row]


def excerpt(source: Path, target: Path, rows: int) -> Path:
    """Write the first `rows` rows of a file to another and return that."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, rows)), encoding="utf-8")
    return target


def write_rows(target: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows to a file and return that."""
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return target


def answer_at_once(row: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation of the reason file without its steps and tags."""
    *before, last = row["conversations"]
    answer = last["content"].partition("<answer>")[2].removesuffix("</answer>").strip()
    return {"conversations": [*before, {"role": "assistant", "content": answer}]}


def run_of(fitted: FitResult) -> Path:
    """Return the directory of a run."""
    return fitted.checkpoint.parent.parent
