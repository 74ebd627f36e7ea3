"""The prompts of a run: read, rendered as training renders them, and checked against the room there is for them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind.data.build import in_validation
from minimind.data.config import DataConfig
from minimind.data.prompt import Prompt, load
from minimind.errors import DataError
from minimind.runtime.log import get_logger
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import Conversation, render_batch

_log = get_logger("prompts")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts, and the ids that the policy continues for each."""

    prompts: list[Prompt]
    ids: list[list[int]]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids), default=0)

    @property
    def fingerprint(self) -> str:
        """Sha256 over what a reward may see and what the policy sees of each, in order."""
        digest = hashlib.sha256()
        for prompt, ids in zip(self.prompts, self.ids, strict=True):
            digest.update(repr((prompt.answer, prompt.gt, len(ids))).encode())
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def only(self, places: Iterable[int]) -> "PromptSet":
        """Return the prompts at these places."""
        places = list(places)
        return PromptSet([self.prompts[i] for i in places], [self.ids[i] for i in places])


def read_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    room: int,
    enable_thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[PromptSet, PromptSet]:
    """Return (the prompts to learn from, those held out for validation).

    `room` is what a prompt may have of tokens. `tools`: every prompt must offer some; one that names none offers these.
    The held-out ones are those of `data.validation`, else the share
    `data.validation_fraction`, chosen by the hash of their content. DataError for a bad row or a prompt that does not
    fit, naming file and line (`data.on_error` "skip" leaves them out and counts them), and when none is left.
    """

    def read(files: Sequence[Path]) -> PromptSet:
        prompts, _ = load(files, needs_tools=tools is not None and not tools, on_error=data.on_error)
        for prompt in prompts:
            prompt.tools = prompt.tools or (list(tools) if tools else None)
        asked = [Conversation(prompt.messages, prompt.tools, True, enable_thinking) for prompt in prompts]
        found = PromptSet(prompts, [example.ids for example in render_batch(tokenizer, asked)])
        return _fitting(found, room, data.on_error)

    found = read(data.files)
    if data.validation:
        return found, read(data.validation)
    is_held_out = [in_validation(_content(prompt), data.validation_fraction) for prompt in found.prompts]
    train = found.only(i for i, is_out in enumerate(is_held_out) if not is_out)
    if not len(train):
        raise DataError(
            f"{', '.join(map(str, data.files))}: all {len(found)} prompts are held out by data.validation_fraction = "
            f"{data.validation_fraction}; give more prompts, or --data.validation-fraction 0"
        )
    return train, found.only(i for i, is_out in enumerate(is_held_out) if is_out)


def _content(prompt: Prompt) -> str:
    return "\n".join(str(message.get("content") or "") for message in prompt.messages)


def _fitting(found: PromptSet, room: int, on_error: str) -> PromptSet:
    too_long = [i for i, ids in enumerate(found.ids) if len(ids) > room]
    if not too_long:
        return found
    places = [f"{found.prompts[i].place}: the prompt has {len(found.ids[i])} tokens" for i in too_long]
    if on_error == "raise" or len(too_long) == len(found):
        raise DataError(
            f"{places[0]}, but beside the longest answer there is room for {room} ({len(too_long)} such prompts in "
            "all); lower --max-tokens, shorten the prompts, or leave them out: --data.on-error skip"
        )
    _log.warning("%d prompts longer than %d tokens are left out: %s", len(too_long), room, "; ".join(places[:5]))
    left_out = set(too_long)
    return found.only(i for i in range(len(found)) if i not in left_out)
