"""The one decode loop: prompts of token ids in, chosen token ids out, many requests at once over one cache.

Continuous batching: each `step` first moves waiting requests into free rows of the cache (their prompts run together,
right-padded, equal prompts once), then adds one token to every running row. It knows token ids only: no text, no
template, no tokenizer. It is not thread-safe: one thread calls it.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind.errors import ConfigError
from minimind.inference.request import Completion, Event, FinishReason, Request, prefill_batches
from minimind.inference.runner import Runner
from minimind.inference.sampling import RowParams, SamplingParams, key_of, sample, uniforms_of
from minimind.model.transformer import Transformer

DEFAULT_MAX_LENGTH = 2048
"""Positions per cache row when `max_length` is not given (and the model allows as many)."""

_PREFILL_TOKENS = 8192
"""The most token slots (rows x length) of one prefill batch."""


class Engine:
    """Decodes with `model` in up to `max_batch_size` rows of `max_length` positions (prompt and answer).

    `device` moves the model there. `dtype` is what products and the cache use (default: the parameters'): float32,
    bfloat16, float16, or int8 for the native step's weights. `native` False keeps everything in PyTorch (see
    `inference.native`). The weights may be trained whenever no request is running, since a running one has keys and
    values of the old ones; no gradients are recorded.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch_size: int = 8,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        native: bool = True,
    ) -> None:
        """Allocate the cache. Raises ConfigError for sizes that cannot be."""
        limit = model.config.max_position_embeddings
        max_length = min(limit, DEFAULT_MAX_LENGTH) if max_length is None else max_length
        if max_batch_size < 1:
            raise ConfigError(f"engine: max_batch_size {max_batch_size}: use at least 1")
        if not 2 <= max_length <= limit:
            raise ConfigError(f"engine: max_length {max_length}: use 2 to {limit}, the model's max_position_embeddings")
        if device is not None:
            model.to(torch.device(device))
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self._runner = Runner(model, max_batch_size, max_length, dtype, is_native=native)
        self.device, self.dtype = self._runner.device, self._runner.dtype
        self._waiting: deque[Request] = deque()
        self._requests: dict[int, Request] = {}
        self._next_id = 0
        self._undelivered: list[Event] = []
        # Row i of the cache belongs to _rows[i]; its next input is _tokens[i] at _positions[i] (-1: the row is free).
        self._rows: list[Request | None] = [None] * max_batch_size
        self._tokens = np.zeros(max_batch_size, dtype=np.int64)
        self._positions = np.full(max_batch_size, -1, dtype=np.int64)
        self._keys = np.zeros(max_batch_size, dtype=np.uint64)
        self._counters = np.zeros(max_batch_size, dtype=np.uint64)
        self._seen: Tensor | None = None
        self._row_params: RowParams | None = None

    @property
    def num_running(self) -> int:
        """Number of requests that hold a cache row."""
        return len(self._requests) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a cache row."""
        return len(self._waiting)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a prompt and return the id of the request; its events come out of `step`.

        An answer ends with finish reason "length" where the row is full, whatever `max_tokens` says. Raises ConfigError
        at once for a prompt that is empty, leaves no room for a token, or holds ids outside the vocabulary.
        """
        return self._submit(prompt_ids, params or SamplingParams(), has_events=True).id

    def cancel(self, request_id: int) -> bool:
        """Stop a request, freeing its row now; return False when it is unknown or already finished.

        The next `step` reports the end of it with an event of token -1 and finish reason "cancelled".
        """
        if (request := self._requests.get(request_id)) is None:
            return False
        if request.row < 0:
            self._waiting.remove(request)
        self._finish(request, "cancelled")
        if request.has_events:
            self._undelivered.append(Event(request_id, -1, None, "cancelled"))
        return True

    def step(self) -> list[Event]:
        """Advance every running request by one token, starting waiting ones; return what happened, in order.

        An empty list means that nothing is left to do.
        """
        with self._runner.deciding():
            self._advance()
        events, self._undelivered = self._undelivered, []
        return events

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Return the answer to each prompt, in order; equal prompts (a group of samples) are run through once.

        One `params` serves all prompts: with a seed, equal prompts then get equal answers, so give a group one each.
        Nothing runs when a prompt is refused (see `submit`). Other requests advance too; `step` reports them later.
        """
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(prompts)
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"generate: {len(prompts)} prompts but {len(each)} sampling parameters")
        for index, prompt in enumerate(prompts):
            self._check(prompt, f"generate: prompt {index}")
        # Of one length together: little padding, and equal prompts side by side.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        by_index = {i: self._submit(prompts[i], each[i], has_events=False) for i in order}
        try:
            with self._runner.deciding():
                pending = list(by_index.values())
                while pending:
                    self._advance()
                    while pending and pending[-1].finish_reason:
                        pending.pop()
        finally:
            for request in by_index.values():
                self.cancel(request.id)
        return [
            Completion(request.ids, request.log_probs, request.finish_reason or "cancelled")
            for request in (by_index[i] for i in range(len(prompts)))
        ]

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[Event]:
        """Yield the events of one prompt as they come; closing the iterator cancels it. Refuses like `submit`, at once.

        Several streams may be read in turn; each step serves all of them.
        """
        return self._stream(self.submit(prompt_ids, params))

    def _stream(self, request_id: int) -> Iterator[Event]:
        try:
            while True:
                events = [event for event in self._undelivered if event.request_id == request_id]
                if events:
                    self._undelivered = [event for event in self._undelivered if event.request_id != request_id]
                else:
                    with self._runner.deciding():
                        self._advance()
                for event in events:
                    yield event
                    if event.finish_reason:
                        return
        finally:
            if self.cancel(request_id):
                self._undelivered = [event for event in self._undelivered if event.request_id != request_id]

    def _check(self, prompt: Sequence[int], where: str) -> None:
        if not prompt:
            raise ConfigError(f"{where} is empty: give at least one token (the bos id)")
        if len(prompt) >= self.max_length:
            raise ConfigError(
                f"{where} has {len(prompt)} tokens, but a row of this engine holds {self.max_length} and the answer "
                "needs at least one: shorten the prompt or raise max_length"
            )
        if min(prompt) < 0 or max(prompt) >= self.model.config.vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < self.model.config.vocab_size)
            raise ConfigError(f"{where}: id {wrong} is outside the vocabulary of {self.model.config.vocab_size}")

    def _submit(self, prompt: Sequence[int], params: SamplingParams, *, has_events: bool) -> Request:
        self._check(prompt, "submit: prompt")
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, ())) if params.temperature else 0
        request = Request(
            id=self._next_id,
            prompt=tuple(prompt),
            params=params,
            limit=min(params.max_tokens, self.max_length - len(prompt)),
            key=key_of(seed),
            stop=frozenset(params.stop_ids),
            has_events=has_events,
        )
        self._next_id += 1
        self._requests[request.id] = request
        self._waiting.append(request)
        return request

    def _advance(self) -> None:
        self._admit()
        self._decode()

    def _admit(self) -> None:
        free = self.max_batch_size - self.num_running
        # With many rows, wait for a few to be free: a forward pass for one prompt costs nearly as much as for eight.
        if not self._waiting or free < min(len(self._waiting), max(1, self.max_batch_size // 8)):
            return
        if free == self.max_batch_size:
            self._runner.begin()
        rows = [row for row in range(self.max_batch_size) if self._rows[row] is None]
        admitted = [self._waiting.popleft() for _ in rows[: len(self._waiting)]]
        admitted.sort(key=lambda request: len(request.prompt))  # batches of like length, of rows in order
        groups: dict[tuple[int, ...], list[Request]] = {}
        for row, request in zip(rows, admitted, strict=False):
            request.row = row
            self._rows[row] = request
            self._keys[row] = request.key
            self._counters[row] = 0
            groups.setdefault(request.prompt, []).append(request)
        self._row_params = None
        try:
            for batch in prefill_batches(list(groups.values()), _PREFILL_TOKENS):
                self._prefill(batch)
        except BaseException:  # out of memory, Ctrl-C: a row without its prompt must not be decoded
            for request in admitted:
                self.cancel(request.id)
            raise

    def _prefill(self, groups: list[list[Request]]) -> None:
        """Run the prompt of each group once, copy its cache row to the others, and choose everyone's first token."""
        leaders = [group[0] for group in groups]
        logits = self._runner.prefill([leader.prompt for leader in leaders], [leader.row for leader in leaders])
        requests = [request for group in groups for request in group]
        if len(requests) > len(leaders):
            self._runner.copy_rows(
                [group[0].row for group in groups for _ in group[1:]],
                [request.row for group in groups for request in group[1:]],
                max(len(leader.prompt) for leader in leaders),
            )
            logits = logits.repeat_interleave(self._runner.to_device(np.array([len(group) for group in groups])), dim=0)
        owned = np.array([request.row for request in requests])
        row_params = RowParams.of([request.params for request in requests], self.device)
        if any(request.params.repetition_penalty != 1 for request in requests):
            if self._seen is None:
                shape = self.max_batch_size, self.model.config.vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            for request in requests:
                self._seen[request.row] = False
                self._seen[request.row, list(request.prompt)] = True
        self._positions[owned] = [len(request.prompt) - 1 for request in requests]
        self._choose(requests, owned, logits, row_params)

    def _decode(self) -> None:
        if not self._waiting:
            self._compact()
        width = self.max_batch_size
        while width and self._rows[width - 1] is None:
            width -= 1
        if not width:
            return
        logits = self._runner.decode(self._tokens[:width], self._positions[:width])
        requests = self._rows[:width]
        if self._row_params is None:
            default = next(request.params for request in requests if request)
            self._row_params = RowParams.of(
                [request.params if request else default for request in requests], self.device
            )
        self._choose(requests, np.arange(width), logits, self._row_params)

    def _choose(
        self, requests: Sequence[Request | None], rows: NDArray[np.int64], logits: Tensor, params: RowParams
    ) -> None:
        """Sample one token for each row (`logits[i]` belongs to `requests[i]` in cache row `rows[i]`) and book it."""
        uniforms = None if params.is_greedy is True else uniforms_of(self._keys[rows], self._counters[rows])
        seen = None
        if params.repetition_penalty is not None and self._seen is not None:
            seen = self._seen[self._runner.to_device(rows)]
        token_tensor, log_prob_tensor = sample(logits, params, uniforms, seen)
        if self._seen is not None:
            self._seen[self._runner.to_device(rows), token_tensor] = True
        token_ids: list[int] = token_tensor.tolist()
        log_probs: list[float] | None = log_prob_tensor.tolist() if log_prob_tensor is not None else None
        self._tokens[rows] = token_ids
        self._positions[rows] += self._positions[rows] >= 0
        self._counters[rows] += np.uint64(1)
        for i, request in enumerate(requests):
            if request is None:
                continue
            token_id = token_ids[i]
            request.ids.append(token_id)
            log_prob = None
            if log_probs is not None and request.params.logprobs:
                log_prob = log_probs[i]
                request.log_probs.append(log_prob)
            reason: FinishReason | None = None
            if token_id in request.stop:
                reason = "stop"
            elif len(request.ids) == request.limit:
                reason = "length"
            if reason:
                self._finish(request, reason)
            if request.has_events:
                self._undelivered.append(Event(request.id, token_id, log_prob, reason))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        del self._requests[request.id]
        if request.row >= 0:
            self._rows[request.row] = None
            self._positions[request.row] = -1
            self._row_params = None

    def _compact(self) -> None:
        """Move the last rows into the holes once an eighth of the rows are holes, so that stragglers run alone."""
        running = [row for row, request in enumerate(self._rows) if request is not None]
        if not running:
            return
        width, num_running = running[-1] + 1, len(running)
        holes = [row for row in range(num_running) if self._rows[row] is None]
        if (width - num_running) * 8 < width:
            return
        sources = running[num_running - len(holes) :]
        self._runner.copy_rows(sources, holes, int(self._positions.max()))
        for state in (self._tokens, self._positions, self._keys, self._counters):
            state[holes] = state[sources]
        if self._seen is not None:
            self._seen[holes] = self._seen[sources]
        for source, hole in zip(sources, holes, strict=True):
            request = self._rows[source]
            assert request is not None
            request.row = hole
            self._rows[hole], self._rows[source] = request, None
            self._positions[source] = -1
        self._row_params = None
