"""`minimind eval RUN`: a model put to the question, its scores as a table and as JSON.

It plugs the parts together: a checkpoint, question files (the world's, short answers, multiple choice) or the world's
own test questions, and text files for bits per byte. It grades nothing itself.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from minimind.config import parse
from minimind.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from minimind.evaluation.questions import ChoiceQuestion, Question
    from minimind.evaluation.tasks import Form, Grader, Record, Score
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

DEFAULT_ROW_LENGTH = 512
SETS = ("main", "reason", "preference", "agent", "lora-identity", "lora-trade")
QUESTIONS_EACH = 60
"""Questions of the built-in world per domain and language, where `--limit` does not say."""


@dataclass(frozen=True)
class EvalConfig:
    """Score a model on held-out questions, with 95 % intervals, chance and the best shortcut beside."""

    run: tyro.conf.Positional[Path]
    """A run, a checkpoint directory or a Transformers directory."""
    questions: tuple[Path, ...] = ()
    """Question files (JSON Lines); without any, the test questions of the built-in world."""
    form: Literal["chat", "completion"] = "chat"
    """chat: the model answers a conversation. completion: it continues plain text, as one only pretrained can."""
    limit: int = 0
    """Questions per domain and language, the first ones; 0 asks all."""
    data: tuple[Path, ...] = ()
    """Text or conversation files to measure loss and bits per byte on; without --questions only that is done."""
    on_error: Literal["raise", "skip"] = "raise"
    """A malformed question stops the evaluation (raise), or is named on stderr and left out (skip)."""
    world_seed: int = 0
    """Seed of the built-in world that the model was trained on."""
    sets: tuple[str, ...] = ("main",)
    """Sets of the built-in world's questions: main, reason, preference, agent, lora-identity, lora-trade."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether answers begin with a thought; auto leaves it to the model."""
    temperature: float = 0.0
    """0 takes the most likely token; above, answers are sampled."""
    max_tokens: int = 0
    """Tokens of an answer at most; 0: 256 in a chat, 128 in a completion."""
    batch_size: int = 64
    """Questions answered at the same time. Changes memory and speed only."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto (the best at hand)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; auto: float32 on a CPU, where it is exact and as fast for a small model."""
    out: Path | None = None
    """JSON file for scores and every question with its answer."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        least = {"limit": 0, "max_tokens": 0, "batch_size": 1, "temperature": 0}
        found = [f"{n} is {getattr(self, n)}; it must be {k} or more" for n, k in least.items() if getattr(self, n) < k]
        known = ", ".join(SETS)
        found += [f"sets: {name!r} does not exist; choose of {known}" for name in self.sets if name not in SETS]
        if self.out is not None and self.out.is_dir():
            found.append(f"out: {self.out} is a folder; name a file")
        return found


def main(argv: Sequence[str]) -> int:
    """Run `minimind eval` and return its exit code. Errors are MinimindErrors with their codes (see `errors`)."""
    config = parse(EvalConfig, argv, command="eval")
    from minimind import checkpoint
    from minimind.evaluation.score_table import print_scores
    from minimind.runtime.device import pick_device, pick_dtype
    from minimind.runtime.log import get_logger

    log = get_logger("eval")
    files = [_questions(config)] if not config.questions and not config.data else _read(config)
    device = pick_device(config.device)
    model, tokenizer = checkpoint.load(config.run, device=device)
    dtype = pick_dtype("float32" if config.dtype == "auto" and device.type == "cpu" else config.dtype, device)
    records: list[Record] = []
    scores: list[Score] = []
    for questions in files:
        questions = first_of_each(questions, config.limit)
        log.info("asking %d questions", len(questions))
        scores += evaluate(
            model,
            tokenizer,
            questions,
            config.form,
            max_tokens=config.max_tokens or None,
            batch_size=config.batch_size,
            dtype=dtype,
            enable_thinking={"auto": None, "on": True, "off": False}[config.thinking],
            temperature=config.temperature,
            seed=config.seed,
            on_record=records.append,
        )
    losses = {str(path): measure(model, tokenizer, path, dtype=dtype) for path in config.data}
    if files and not scores:
        raise ConfigError(f"no question has the form {config.form!r}: --form chat asks those without a plain prompt")
    if scores:
        print_scores(scores, sys.stdout)
        log.info("%d answers in %.1f s", len(records), sum(score.seconds for score in scores))
        if config.form == "chat" and not any(score.correct for score in scores):
            log.info("nothing was right: a model that was only pretrained wants --form completion")
    for path, loss in losses.items():
        sys.stdout.write(f"{path}: " + ", ".join(f"{name} {value:.4f}" for name, value in loss.items()) + "\n")
    if config.out is not None:
        result = {
            "run": str(config.run),
            "form": config.form,
            "scores": [asdict(score) for score in scores],
            "losses": losses,
            "records": [asdict(record) for record in records],
        }
        _write(config.out, result)
        log.info("wrote %s", config.out)
    return 0


def evaluate(
    model: "Transformer",
    tokenizer: "Tokenizer",
    questions: "Sequence[Question]",
    form: "Form",
    *,
    grader: "Grader | None" = None,
    max_tokens: int | None = None,
    batch_size: int = 64,
    dtype: "torch.dtype | None" = None,
    enable_thinking: bool | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_record: "Callable[[Record], object] | None" = None,
) -> "list[Score]":
    """Return a score for each (domain, language) of `questions`, in order of appearance.

    `grader` judges the answers of question rows (default: the world's graders, and `short_answer`); multiple choice is
    weighed by log-probability instead, and has two scores each. `on_record` is given every question with its answer.
    """
    from minimind.evaluation.choices import score_choices
    from minimind.evaluation.questions import ChoiceQuestion
    from minimind.evaluation.tasks import ask
    from minimind.runtime.device import autocast

    weighed = [question for question in questions if isinstance(question, ChoiceQuestion)]
    scores = ask(
        model,
        tokenizer,
        [question for question in questions if not isinstance(question, ChoiceQuestion)],
        form=form,
        grader=grader or grade,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        enable_thinking=enable_thinking,
        temperature=temperature,
        seed=seed,
        on_record=on_record,
    )
    if weighed:
        weight = next(model.parameters())
        context = autocast(weight.device, dtype or weight.dtype) if dtype != weight.dtype else None
        scores += score_choices(model, tokenizer, weighed, form=form, autocast=context, on_record=on_record)
    return scores


def grade(question: dict[str, Any], text: str, reasoning: str = "", tool_calls: Sequence[dict[str, Any]] = ()) -> bool:
    """Return whether an answer is right: the world's graders, and short answers of other files."""
    from minimind.evaluation.questions import SHORT_ANSWER, short_answer
    from minimind.world import graders

    judge = short_answer if question["grader"] == SHORT_ANSWER else graders.grade
    return judge(question, text, reasoning, tool_calls)


def measure(
    model: "Transformer", tokenizer: "Tokenizer", path: Path, *, dtype: "torch.dtype | None" = None
) -> dict[str, float]:
    """Return loss, accuracy and bits per byte on a file of texts or conversations, packed as in training.

    Rows are as long as the model was trained on. Raises DataError for bad rows, ConfigError for a missing file.
    """
    from minimind.data.dataset import prepare
    from minimind.data.jsonl import read_rows
    from minimind.data.loader import Loader
    from minimind.data.packing import pack
    from minimind.evaluation.perplexity import evaluate_loss
    from minimind.runtime.device import autocast

    first = next(read_rows(path), None)
    kind = "pretrain" if first is not None and "text" in first.data else "conversation"
    trained = model.config.original_max_position_embeddings or DEFAULT_ROW_LENGTH
    length = min(trained, model.config.max_position_embeddings)
    weight = next(model.parameters())
    with tempfile.TemporaryDirectory(prefix="minimind-eval-") as folder:
        dataset = prepare([path], tokenizer, kind=kind, cache_dir=Path(folder), max_length=length + 1)
        micro_rows = max(1, 16384 // length)
        loader = Loader(
            pack(dataset, length), batch_rows=micro_rows, micro_rows=micro_rows, seed=0, pad_id=tokenizer.pad_id
        )
        context = autocast(weight.device, dtype or weight.dtype) if dtype != weight.dtype else None
        return evaluate_loss(model, loader.all_batches(), tokenizer.token_bytes, autocast=context)


def _questions(config: EvalConfig) -> list[dict[str, Any]]:
    from minimind.world.facts import World
    from minimind.world.rows import questions

    rows = questions(World(config.world_seed), "test", config.limit or QUESTIONS_EACH)
    return [row for row in rows if row["set"] in config.sets]


def _read(config: EvalConfig) -> "list[list[dict[str, Any]] | list[ChoiceQuestion]]":
    from minimind.evaluation.questions import SHORT_ANSWER, read_questions
    from minimind.world.graders import GRADERS

    graders = {*GRADERS, "tool_call", SHORT_ANSWER}
    return [read_questions(path, graders=graders, on_error=config.on_error) for path in config.questions]


def first_of_each(questions: "Sequence[Question]", limit: int) -> "list[Question]":
    """Return the first `limit` questions of each (domain, language); all of them for 0."""
    from minimind.evaluation.questions import ChoiceQuestion

    counts: dict[tuple[str, str], int] = {}
    kept: list[Question] = []
    for question in questions:
        if isinstance(question, ChoiceQuestion):
            key = question.domain, question.language
        else:
            key = question["domain"], question["language"]
        counts[key] = counts.get(key, 0) + 1
        if not limit or counts[key] <= limit:
            kept.append(question)
    return kept


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error}") from error
