"""The nouns of the engine: a `Request` goes in, `Event`s or one `Completion` come out; and which prompts run together.

They know token ids only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from minimind.inference.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


class Event(NamedTuple):
    """One token of one request, or (`token_id` -1) the news that it was cancelled."""

    request_id: int
    token_id: int
    log_prob: float | None
    """See `SamplingParams.logprobs`; None when not asked for."""
    finish_reason: FinishReason | None
    """Set on the last event of a request: a stop id (which is `token_id`), the limit reached, or cancelled."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt."""

    ids: list[int]
    """The chosen tokens, the stop id included when one was met."""
    log_probs: list[float]
    """One for each id when `SamplingParams.logprobs`, else empty."""
    finish_reason: FinishReason


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way through the engine, which alone changes it."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    """Tokens after which the answer ends: `max_tokens`, or less where the row is full."""
    key: int
    """Of the random numbers (see `sampling.key_of`)."""
    stop: frozenset[int]
    has_events: bool
    """Whether someone waits for its events (`generate` does not)."""
    row: int = -1
    """Cache row; -1 while waiting."""
    ids: list[int] = field(default_factory=list[int])
    log_probs: list[float] = field(default_factory=list[float])
    finish_reason: FinishReason | None = None


def prefill_batches(groups: list[list[Request]], most_slots: int) -> Iterator[list[list[Request]]]:
    """Yield `groups` (of equal prompts, the shortest prompt first) in batches whose right-padded prompts run together.

    A batch closes at `most_slots` (rows x length), or where padding would pass an eighth of it (64 are always allowed).
    """
    batch: list[list[Request]] = []
    num_tokens = 0
    for group in groups:
        length = len(group[0].prompt)
        slots = (len(batch) + 1) * length
        if batch and (slots > most_slots or slots - num_tokens - length > 64 + slots // 8):
            yield batch
            batch, num_tokens = [], 0
        batch.append(group)
        num_tokens += length
    if batch:
        yield batch
