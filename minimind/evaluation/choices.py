"""Multiple choice by log-probability: the choice that the model finds most likely after the question is its answer.

Two readings are scored side by side: the sum of log p over the choice's tokens (short choices have it easier), and that
sum divided by the choice's UTF-8 bytes, which compares choices of unequal length. Chance is one over the number of
choices; the shortcuts are rules that read no question. It does not know files, nor how a model is loaded.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from minimind.data import text as document
from minimind.evaluation.questions import ChoiceQuestion
from minimind.evaluation.tasks import Form, Record, Score, Tally, scores_of
from minimind.model.transformer import Transformer
from minimind.objectives.logprobs import token_log_probs
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render

BATCH_TOKENS = 8192
"""Token slots (rows x length, padding included) of one forward pass."""

READINGS = ("sum", "per byte")


def score_choices(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[ChoiceQuestion],
    *,
    form: Form = "completion",
    autocast: AbstractContextManager[object] | None = None,
    on_record: Callable[[Record], object] | None = None,
) -> list[Score]:
    """Return two scores per (domain, language), "DOMAIN (sum)" and "DOMAIN (per byte)", in order of appearance.

    Form "completion" puts the choice after the question's text; "chat" makes it the assistant's turn. A question too
    long for the model loses its beginning.
    """
    start = time.perf_counter()
    pairs = [
        pair_ids(tokenizer, question.question, choice, form) for question in questions for choice in question.choices
    ]
    log_probs = log_likelihoods(model, pairs, autocast=autocast)
    tallies: dict[tuple[str, str], Tally] = {}
    at = 0
    for question in questions:
        sums = log_probs[at : at + len(question.choices)]
        num_tokens = sum(len(context) + len(choice) for context, choice in pairs[at : at + len(sums)])
        at += len(sums)
        sizes = [len(choice.encode()) for choice in question.choices]
        rates = [value / max(size, 1) for value, size in zip(sums, sizes, strict=True)]
        for reading, values in zip(READINGS, (sums, rates), strict=True):
            chosen = values.index(max(values))
            domain = f"{question.domain} ({reading})"
            tally = tallies.setdefault((domain, question.language), Tally())
            tally.n += 1
            tally.correct += chosen == question.answer
            tally.chance += 1 / len(sums)
            tally.num_tokens += num_tokens
            rules = {
                "the longest": sizes.index(max(sizes)),
                "the shortest": sizes.index(min(sizes)),
                **{f"always {chr(ord('A') + i)}": i for i in range(len(sums))},
            }
            for name, rule in rules.items():
                tally.shortcuts[name] = tally.shortcuts.get(name, 0) + (rule == question.answer)
            if on_record:
                on_record(
                    Record(
                        id=question.id,
                        domain=domain,
                        language=question.language,
                        form=form,
                        prompt=question.question,
                        output=question.choices[chosen],
                        answer=question.choices[question.answer],
                        correct=chosen == question.answer,
                    )
                )
    return scores_of(tallies, form, time.perf_counter() - start)


def pair_ids(tokenizer: Tokenizer, question: str, choice: str, form: Form) -> tuple[list[int], list[int]]:
    """Return (context ids, choice ids), tokenised apart so that the choice's tokens do not depend on the question.

    A space between the two belongs to the choice, as byte-level vocabularies have their words; Chinese needs none.
    """
    if form == "chat":
        messages = [{"role": "user", "content": question}]
        context = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=False).ids
        return context, tokenizer.encode(choice) or [tokenizer.eos_id]
    text = question.rstrip(" ")
    gap = " " if text and text[-1].isascii() and not text[-1].isspace() else ""
    return document.prompt_ids(tokenizer, text), tokenizer.encode(gap + choice) or [tokenizer.eos_id]


def log_likelihoods(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    autocast: AbstractContextManager[object] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """Return, for each (context, continuation), the sum of log p of the continuation's tokens (natural logarithm).

    Rows are right-padded with others of like length. A pair longer than the model's positions loses its first tokens.
    """
    limit = model.config.max_position_embeddings
    device = next(model.parameters()).device
    # The last token predicts nothing that is asked for, so `limit + 1` ids take `limit` positions.
    rows = [([*context, *continuation][-limit - 1 :], min(len(continuation), limit)) for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums = [0.0] * len(rows)
    is_training = model.training
    model.eval()
    try:
        for batch in _batches(order, [len(ids) - 1 for ids, _ in rows], batch_tokens):
            width = len(rows[batch[-1]][0]) - 1
            ids = torch.zeros(len(batch), width + 1, dtype=torch.int64)
            is_real = torch.zeros(len(batch), width, dtype=torch.int64)
            is_asked = torch.zeros(len(batch), width, dtype=torch.bool)
            for b, index in enumerate(batch):
                row, num_asked = rows[index]
                ids[b, : len(row)] = torch.tensor(row)
                is_real[b, : len(row) - 1] = 1
                is_asked[b, len(row) - 1 - num_asked : len(row) - 1] = True
            with torch.inference_mode(), autocast or nullcontext():
                output = model(ids[:, :-1].to(device), attention_mask=is_real.to(device))
                hidden = output.hidden[is_asked.to(device)][None]  # (1, N, D)
                log_probs = token_log_probs(hidden, output.head, ids[:, 1:][is_asked][None].to(device))
            found = torch.zeros(len(batch), width, dtype=torch.float64)
            found[is_asked] = log_probs[0].cpu().double()
            for index, value in zip(batch, found.sum(dim=1).tolist(), strict=True):
                sums[index] = value
    finally:
        model.train(is_training)
    return sums


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return `order` (ascending length) cut so that rows x longest stays within `batch_tokens` (one row is allowed)."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
