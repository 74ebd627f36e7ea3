"""The teacher writes the answers (sequence-level distillation, arXiv 1606.07947): prompts -> answers.jsonl in the run.

    RUN/answers.jsonl    conversations: the prompt's messages, then the teacher's answer
    RUN/answers.json     who wrote them and how, how far it is, and what was left out

Prompts are answered a block at a time, each answer with a seed of its own, so the file is the same however often it was
interrupted and on however many processes. It holds text: the teacher may have another tokenizer than the student.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimind.errors import ConfigError, DataError

if TYPE_CHECKING:
    from minimind.stages.distill import Config
    from minimind.stages.teacher import Teacher

BLOCK = 256
"""Answers that are written, or lost by a crash, together."""


@dataclass(frozen=True)
class AnswersConfig:
    """How answers are sampled: the teacher's (black-box), or the student's own (on-policy)."""

    samples: int = 1
    """Answers to each prompt."""
    temperature: float = 1.0
    """Of the sampling; 0 takes the likeliest token (black-box only)."""
    max_tokens: int = 256
    """The most tokens of an answer. The teacher's answers that are cut off there are left out, and counted."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether answers begin with a thought: the model decides (auto), always (on), never (off)."""
    rows: int = 64
    """Answers that are generated side by side."""
    prompts: int = 16
    """On-policy: prompts of one step, over all processes."""
    watch: tuple[str, ...] = ("length",)
    """On-policy: rewards (see docs/rewards.md) of the student's answers that are logged; they teach nothing."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        names = ("samples", "max_tokens", "rows", "prompts")
        found = [f"answers.{name} = {getattr(self, name)}: at least 1" for name in names if getattr(self, name) < 1]
        return found + ([] if self.temperature >= 0 else [f"answers.temperature = {self.temperature}: 0 or more"])

    @property
    def enable_thinking(self) -> bool | None:
        """What the chat template is told."""
        return {"auto": None, "on": True, "off": False}[self.thinking]


def write_answers(config: "Config", teacher: "Teacher") -> Path:
    """Return the file of the teacher's answers to the prompts of `config.data`, finished, by going on where it stands.

    Raises ConfigError when the file there was written by another teacher, or to other prompts; DataError for bad
    prompts, and when no answer came to its end.
    """
    from minimind.evaluation.tasks import answer_text, stop_ids
    from minimind.inference.chat import parse
    from minimind.inference.engine import Engine
    from minimind.inference.sampling import SamplingParams
    from minimind.rl.prompts import read_prompts
    from minimind.rl.rollout import seed_of
    from minimind.runtime import distributed
    from minimind.runtime.device import pick_dtype
    from minimind.runtime.log import get_logger
    from minimind.stages.answer_file import AnswerFile
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.run import RunDirectory

    if teacher.model is None:
        raise ConfigError(f"{teacher.directory}: only a model that `minimind chat` runs can write answers")
    model, how, tokenizer = teacher.model, config.answers, Tokenizer.load(teacher.directory)
    room = model.config.max_position_embeddings - how.max_tokens
    data = replace(config.data, validation=(), validation_fraction=0.0)
    asked = read_prompts(data, tokenizer, room=room, enable_thinking=how.enable_thinking)[0]
    jobs = [(prompt, sample) for prompt in range(len(asked)) for sample in range(how.samples)]
    device = next(model.parameters()).device
    dtype = pick_dtype(config.dtype, device, num_parameters=model.config.num_parameters()[0])
    most = asked.longest + how.max_tokens
    engine = cache(lambda: Engine(model, max_batch_size=min(how.rows, len(jobs)), max_length=most, dtype=dtype))
    params = SamplingParams(
        temperature=how.temperature, max_tokens=how.max_tokens, stop_ids=stop_ids(tokenizer, "chat")
    )

    def answer(block: list[tuple[int, int]]) -> list[dict[str, Any] | str]:
        """Return a row for each job, or why there is none."""
        seeds = [replace(params, seed=seed_of("answer", config.seed, *job)) for job in block]
        rows: list[dict[str, Any] | str] = []
        for (index, _), found in zip(block, engine().generate([asked.ids[i] for i, _ in block], seeds), strict=True):
            said = parse(answer_text(tokenizer, found, "chat"), in_reasoning=how.thinking == "on")
            if found.finish_reason == "length" or not (said.content.strip() or said.tool_calls):
                rows.append("cut" if found.finish_reason == "length" else "empty")
                continue
            prompt = asked.prompts[index]
            row = {"messages": [*prompt.messages, said.message()]}
            rows.append(row | ({"tools": prompt.tools} if prompt.tools else {}))
        return rows

    with (run := RunDirectory(config.out)):
        if config.fresh or not config.resume:
            run.start_afresh()
        manner = {name: getattr(how, name) for name in ("samples", "temperature", "max_tokens", "thinking")}
        identity = {"teacher_sha256": teacher.sha256, "prompts": asked.fingerprint, "seed": config.seed, **manner}
        book = AnswerFile(run.path, identity | {"dtype": str(dtype)}, {"teacher": str(teacher.directory)})
        stride = BLOCK * distributed.world_size()
        for first in range(book.counts["done"], len(jobs), stride):
            start = first + BLOCK * distributed.rank()
            for rows in distributed.all_gather_object(answer(jobs[start : start + BLOCK])):
                book.add(rows)
            get_logger("answers").info("%s of %d answers: %s", book.path, len(jobs), book.counts)
    if not book.counts["written"]:
        raise DataError(
            f"{book.path}: none of {len(jobs)} answers is of use ({book.counts}); give more --answers.max-tokens"
        )
    return book.path
