"""A conversation with a model, kept as ids over an engine.

`ChatSession` knows messages and their ids, when an answer ends, and when the context is full. How ids are chosen
(`inference.engine`), what the words mean (`inference.chat`), what a tool does and how all this looks on a screen
(`inference.terminal`) are not known here.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from minimind.errors import ConfigError, MinimindError
from minimind.inference.chat import ChatDelta, FinishReason, StreamParser
from minimind.inference.sampling import SamplingParams
from minimind.tokenizer.bpe import END_OF_TEXT, TURN_START, Tokenizer
from minimind.tokenizer.chat import render

if TYPE_CHECKING:
    from minimind.inference.engine import Event
    from minimind.model.adapters import Adapters


class TokenStream(Protocol):
    """The part of `inference.engine.Engine` that a conversation needs."""

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Iterator["Event"]:
        """Yield the chosen tokens of one prompt."""
        ...


@dataclass
class Speed:
    """Tokens and seconds of the last answer, its tool rounds included."""

    num_prompt_tokens: int = 0
    num_tokens: int = 0
    first_seconds: float = 0.0
    """Until the first token."""
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens chosen for each second of the whole answer."""
        return self.num_tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Entry:
    """A message of the history; an answer of the model also has the ids it really consisted of."""

    message: dict[str, Any]
    prompt_ids: list[int] | None = None
    """What stood between the answer before and this one; None: what the template now says."""
    ids: list[int] = field(default_factory=list[int])
    """What was sampled, ended by the end of turn; never made from text again."""


class ChatSession:
    """A conversation with a model: `send` a text, read the deltas; history, tools and thinking are kept here.

    An answer stays in the history as the ids that were sampled. When the context is full, the oldest turns are left out
    of the prompt; the system message and the newest turn always stay. Attributes may be changed between two calls.
    """

    def __init__(
        self,
        engine: TokenStream,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        run_tool: Callable[[str, dict[str, Any]], str] | None = None,
        sampling: SamplingParams | None = None,
        max_tool_rounds: int = 3,
        enable_thinking: bool | None = None,
        stop: Sequence[str] = (),
        context_length: int | None = None,
        adapters: "Adapters | None" = None,
    ) -> None:
        """Start an empty conversation. `context_length` (tokens, prompt and answer) defaults to the engine's.

        `adapters`: those of the engine's model, which may be switched between two answers.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.run_tool = run_tool
        self.sampling = sampling or SamplingParams()
        self.max_tool_rounds = max_tool_rounds
        self.enable_thinking = enable_thinking
        self.stop = tuple(stop)
        self.context_length: int | None = context_length or getattr(engine, "max_length", None)
        self.adapters = adapters
        self.speed = Speed()
        self._system = system
        self._tools = list(tools) if tools else None
        self._entries: list[_Entry] = []
        self._first = 0  # entries before this one no longer fit into the context
        self._num_answers = 0
        names = (TURN_START, END_OF_TEXT)
        self._ends = {
            tokenizer.eos_id,
            *(tokenizer.special_ids[name] for name in names if name in tokenizer.special_ids),
        }

    @property
    def system(self) -> str | None:
        """The system prompt; None for none. Setting it keeps the turns."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        self._forget_first_prompt()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation, as a data file has it."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *(entry.message for entry in self._entries)]

    @property
    def num_forgotten(self) -> int:
        """Number of messages at the beginning that no longer fit into the context."""
        return self._first

    def row(self) -> dict[str, Any]:
        """Return the conversation as a row of a data file."""
        return {"messages": self.messages} | ({"tools": self._tools} if self._tools else {})

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._entries, self._first = [], 0

    def undo(self) -> str | None:
        """Take back the last turn and return what the user had said in it; None if there is none."""
        while self._entries:
            message = self._entries.pop().message
            if message["role"] == "user":
                self._first = 0
                self._forget_first_prompt()
                return str(message["content"])
        return None

    def send(self, text: str) -> Generator[ChatDelta, None, None]:
        """Yield the answer to `text` as it comes, tool rounds included; each answer ends with a `finish_reason`.

        Closing the iterator stops the model; what it has said stays. ConfigError when `text` cannot fit the context;
        the conversation is then as before.
        """
        self.speed = Speed()
        begin, first = len(self._entries), self._first
        self._entries.append(_Entry({"role": "user", "content": text}))
        try:
            for tool_round in range(self.max_tool_rounds + 1):
                answer = yield from self._answer()
                if answer.finish_reason != "tool_calls" or self.run_tool is None or tool_round == self.max_tool_rounds:
                    return
                results = tuple(
                    {"name": call["name"], "content": _result(self.run_tool, call)} for call in answer.tool_calls
                )
                self._entries += [_Entry({"role": "tool", **result}) for result in results]
                yield ChatDelta(tool_results=results)
        finally:
            if len(self._entries) == begin + 1:  # nothing came of it
                del self._entries[begin:]
                self._first = first

    def _answer(self) -> Generator[ChatDelta, None, ChatDelta]:
        """Yield one answer of the model and return it (as the value of the generator)."""
        prompt, gap = self._prompt()
        params = replace(
            self.sampling,
            stop_ids=tuple({*self.sampling.stop_ids, *self._ends}),
            max_tokens=self._max_tokens(len(prompt)),
            seed=None if self.sampling.seed is None else self.sampling.seed + self._num_answers,
        )
        parser = StreamParser(stop=self.stop, in_reasoning=self.tokenizer.decode(prompt[-8:]).endswith("<think>\n"))
        decoder = self.tokenizer.stream_decoder()
        ids: list[int] = []
        answer, reason = ChatDelta(), None
        self._num_answers += 1
        self.speed.num_prompt_tokens += len(prompt)
        start = time.perf_counter()
        events = self.engine.stream(prompt, params)
        try:
            for event in events:
                if self.speed.num_tokens == 0:
                    self.speed.first_seconds = time.perf_counter() - start
                reason = event.finish_reason
                if event.token_id < 0 or (reason == "stop" and event.token_id in params.stop_ids):
                    break
                ids.append(event.token_id)
                self.speed.num_tokens += 1
                if delta := parser.push(decoder.push(event.token_id)):
                    answer += delta
                    yield delta
                if parser.stopped:
                    reason = "stop"
                    break
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()
            self.speed.seconds += time.perf_counter() - start
            last = parser.push(decoder.flush()) + parser.flush()
            answer += last
            if ids or reason:
                if not ids or ids[-1] != self.tokenizer.eos_id:
                    ids.append(self.tokenizer.eos_id)  # an answer cut short is closed like any other
                self._entries.append(_Entry(answer.message(), gap, ids))
        finish: FinishReason = "tool_calls" if answer.tool_calls and reason == "stop" else reason or "cancelled"
        yield replace(last, finish_reason=finish)
        return replace(answer, finish_reason=finish)

    # -- the prompt: what was sampled, and new text between ------------------------------------------------------------

    def _prompt(self) -> tuple[list[int], list[int] | None]:
        """Return the ids of the conversation up to the next answer, and those among them that follow the last answer.

        Turns that do not fit are left out, the oldest first.
        """
        while True:
            ids, gap = self._ids()
            if self.context_length is None:
                return ids, gap
            room = self.context_length - min(self.sampling.max_tokens, self.context_length // 2)
            starts = [i for i, entry in enumerate(self._entries) if entry.message["role"] == "user" and i > self._first]
            if len(ids) <= room or (not starts and len(ids) < self.context_length):
                return ids, gap
            if not starts:
                raise ConfigError(
                    f"the message and what must go with it take {len(ids)} tokens, but the context has "
                    f"{self.context_length}. Shorten it, or the system prompt."
                )
            self._first = starts[0]
            self._forget_first_prompt()

    def _ids(self) -> tuple[list[int], list[int] | None]:
        sent = self._entries[self._first :]
        system = [{"role": "system", "content": self._system}] if self._system else []
        example = render(
            self.tokenizer,
            [*system, *(entry.message for entry in sent)],
            tools=self._tools,
            add_generation_prompt=True,
            enable_thinking=self.enable_thinking,
        )
        answers = [entry for entry in sent if entry.message["role"] == "assistant"]
        runs = list(_runs(example.loss_weights))
        if len(runs) != len(answers):  # a template that rewrites earlier turns: what it renders is all there is
            return example.ids, None
        ids: list[int] = []
        place = 0
        for entry, (start, end) in zip(answers, runs, strict=True):
            ids += example.ids[place:start] if entry.prompt_ids is None else entry.prompt_ids
            ids += entry.ids
            place = end
        gap = example.ids[place:]
        return ids + gap, gap

    def _forget_first_prompt(self) -> None:
        for entry in self._entries[self._first :]:
            if entry.ids:
                entry.prompt_ids = None
                return

    def _max_tokens(self, num_prompt_tokens: int) -> int:
        if self.context_length is None:
            return self.sampling.max_tokens
        return max(1, min(self.sampling.max_tokens, self.context_length - num_prompt_tokens))


def _runs(weights: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each stretch of learned tokens."""
    start = None
    for place, weight in enumerate((*weights, 0.0)):
        if weight and start is None:
            start = place
        elif not weight and start is not None:
            yield start, place
            start = None


def _result(run_tool: Callable[[str, dict[str, Any]], str], call: dict[str, Any]) -> str:
    try:
        return str(run_tool(call["name"], call["arguments"]))
    except MinimindError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a tool raises, the model is told and the conversation goes on
        return f"error: {type(error).__name__}: {error}"
