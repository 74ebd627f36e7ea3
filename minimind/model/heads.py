"""A Transformer that says one number at each position instead of a next token: reward model, or critic.

    value_t = w . h_t        h_t the final hidden state of token t, which has seen the tokens up to t

The value of a sequence's last token is its reward. On disk it is the `...ForSequenceClassification` with one label of
Transformers (Llama, Qwen3, Mixtral, Qwen3-MoE), which reads the last token that is not padding. It knows no loss.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minimind.batch import PAD_DOCUMENT, Output
from minimind.errors import CheckpointError
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer

ARCHITECTURE = "ForSequenceClassification"
"""How the architecture that config.json names ends, where a language model's ends in ForCausalLM."""


class ScalarModel(Transformer):
    """The decoder of `config` under a scalar head, which starts at 0: so does every value, and the first loss is ln 2.

    It has no output head: `tie_word_embeddings` is true whatever `config` says.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Build and initialise from torch's current random state. ConfigError listing every problem of `config`."""
        super().__init__(replace(config, tie_word_embeddings=True))
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    @classmethod
    def from_transformer(cls, model: Transformer) -> "ScalarModel":
        """Return a new model with a copy of the decoder of `model`, on its device and in its dtype."""
        made = cls(model.config)
        made.model.load_state_dict(model.model.state_dict())
        weight = model.model.embed_tokens.weight
        return made.to(device=weight.device, dtype=weight.dtype).train(model.training)

    def forward(self, *arguments: Any, **options: Any) -> Output:
        """Return what `Transformer.forward` returns, with `values` (B, T) float32 of the positions kept."""
        output = super().forward(*arguments, **options)
        # A product and a sum, which autocast leaves in float32: rewards are compared, and bfloat16 has three digits.
        output.values = (output.hidden.float() * self.score.weight[0].float()).sum(-1)
        return output

    @torch.no_grad()
    def rewards(self, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 16384) -> list[float]:
        """Return the value of each sequence's last token: ids of a prompt and its answer, the end token included.

        Sequences of like length are computed together, `batch_tokens` or less with their padding (one at least).
        Dropout is off. Raises ValueError for an empty sequence, ConfigError for one beyond the longest position.
        """
        if not all(map(len, sequences)):
            raise ValueError(f"sequence {[len(ids) for ids in sequences].index(0)} is empty: there is nothing to value")
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        found = [0.0] * len(sequences)
        was_training = self.training
        self.eval()
        while order:
            longest = len(sequences[order[-1]])
            size = max(1, batch_tokens // longest)
            chosen, order = order[-size:], order[:-size]
            for index, value in zip(chosen, self._last_values([sequences[i] for i in chosen], longest), strict=True):
                found[index] = value
        self.train(was_training)
        return found

    def _last_values(self, sequences: list[Sequence[int]], longest: int) -> list[float]:
        device = self.score.weight.device
        ids = torch.full((len(sequences), longest), self.config.pad_token_id)
        documents = torch.full_like(ids, PAD_DOCUMENT)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            documents[row, : len(sequence)] = 0
        last = torch.tensor([[len(sequence) - 1] for sequence in sequences], device=device)
        output = self(ids.to(device), documents=documents.to(device), logits_to_keep=last)
        assert output.values is not None
        return output.values[:, 0].tolist()

    def texts_for_disk(self) -> dict[str, str]:
        """Return the config.json that Transformers reads as a classifier with one label."""
        config = self.config.to_hf()
        config["architectures"] = [name.replace("ForCausalLM", ARCHITECTURE) for name in config["architectures"]]
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        return {"config.json": json.dumps(config, indent=2) + "\n"}


def check_kind(config: dict[str, Any], *, is_scalar: bool, where: str) -> None:
    """Raise CheckpointError unless the `config.json` at `where` is (or is not) that of a model with a scalar head."""
    names = config.get("architectures") or ["a language model"]
    if any(str(name).endswith(ARCHITECTURE) for name in names) == is_scalar:
        return
    if is_scalar:
        raise CheckpointError(
            f"{where}: holds a language model ({names[0]}), not a reward model; "
            f"train one from it: minimind reward-model --init-from {where} --data PAIRS"
        )
    raise CheckpointError(
        f"{where}: holds a reward model ({names[0]}), which cannot write; name a language model, "
        "and this one where a reward model is asked for"
    )
