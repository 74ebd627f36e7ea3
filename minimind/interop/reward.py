"""An external reward model of Transformers (sequence classification with one output): conversations -> scores.

It is read from a local directory, safetensors only, together with its own tokenizer and chat template, and it is never
trained. What the score is used for is not known here. Our own reward models need nothing of this (`model.heads`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from minimind.errors import CheckpointError, ConfigError

BATCH = 8
"""Conversations scored together."""


class TransformersReward:
    """A frozen reward model: `scorer(conversations)` -> a score each; NaN for one longer than the model can read."""

    def __init__(self, directory: Path, device: torch.device, *, dtype: torch.dtype = torch.float32) -> None:
        """Load it. ConfigError without Transformers, CheckpointError when it is no reward model with a template."""
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                f'transformers:{directory} needs Transformers; install it with: pip install "minimind[hf]"'
            ) from error
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory} is no reward model: it has no config.json; name a local directory")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self._model: Any
            self._model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{directory}: Transformers cannot read it as a reward model: {error}") from error
        problems: list[str] = []
        if report["missing_keys"]:
            problems.append(f"it has no weights for {', '.join(sorted(report['missing_keys'])[:3])}")
        if self._model.config.num_labels != 1:
            problems.append(f"it has {self._model.config.num_labels} outputs, expected one")
        if not self._tokenizer.chat_template:
            problems.append("its tokenizer has no chat template")
        if problems:
            raise CheckpointError(f"{directory} is no reward model: {'; '.join(problems)}")
        self._model.to(device).eval().requires_grad_(False)
        self._longest: float = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        self._device = device

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[list[dict[str, Any]]]) -> list[float]:
        """Return the score of each conversation, which ends with the answer to be judged; NaN where it is too long."""
        ids = [self._ids(conversation) for conversation in conversations]
        scores = [math.nan] * len(ids)
        order = sorted((i for i in range(len(ids)) if len(ids[i]) <= self._longest), key=lambda i: len(ids[i]))
        pad = self._model.config.get_text_config().pad_token_id
        size = 1 if pad is None else BATCH  # the model finds the last token by the id of padding
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            input_ids = torch.full((len(chosen), len(ids[chosen[-1]])), pad or 0)
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(chosen):
                input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            input_ids, mask = input_ids.to(self._device), mask.to(self._device)
            logits = self._model(input_ids=input_ids, attention_mask=mask).logits  # (n, 1)
            for i, score in zip(chosen, logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _ids(self, conversation: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a conversation. A thought stays in the answer where the template knows no thoughts."""
        if "reasoning_content" not in str(self._tokenizer.chat_template):
            conversation = [_with_thought(message) for message in conversation]
        return self._tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]


def _with_thought(message: dict[str, Any]) -> dict[str, Any]:
    thought = message.get("reasoning_content")
    return {**message, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"} if thought else message
