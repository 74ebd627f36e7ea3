"""The nouns of the engine: a `Request` goes in, `Event`s come out, or one `Completion`. They know token ids only."""

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
