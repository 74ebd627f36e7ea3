"""A stand-in for a trained model: it continues texts it was told, through the real cache and the real engine."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minimind.batch import Output
from minimind.model.cache import KVCache
from minimind.model.config import ModelConfig

SCALE = 30.0


class ScriptedModel(nn.Module):
    """After exactly the ids of a prompt it says the answer; after anything else, `otherwise`.

    The ids it has read stand in the first key slot, so a row that is copied, moved or used again behaves as it should.
    """

    def __init__(
        self, script: Mapping[tuple[int, ...], Sequence[int]], vocab_size: int, *, otherwise: int, positions: int = 512
    ) -> None:
        super().__init__()
        self.config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=vocab_size + vocab_size % 2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=positions,
        )
        self.identity = nn.Parameter(torch.eye(vocab_size, self.config.hidden_size))
        self.otherwise = otherwise
        self.next: dict[tuple[int, ...], int] = {}
        for prompt, answer in script.items():
            for i, token in enumerate(answer):
                self.next[(*prompt, *answer[:i])] = token

    @property
    def head(self) -> Tensor:
        return self.identity

    def forward(
        self, input_ids: Tensor, *, positions: Tensor, cache: KVCache, cache_rows: Tensor | None = None
    ) -> Output:
        rows = list(range(len(input_ids))) if cache_rows is None else cache_rows.tolist()
        hidden = torch.zeros(*input_ids.shape, self.config.hidden_size)
        memory = cache.keys[0, :, 0, :, 0]  # (rows, slots)
        for b, row in enumerate(rows):
            for t, position in enumerate(positions[b].tolist()):
                if position < 0:
                    continue
                memory[row, position] = input_ids[b, t]
                told = tuple(memory[row, : position + 1].long().tolist())
                hidden[b, t, self.next.get(told, self.otherwise)] = SCALE
        return Output(hidden=hidden, head=self.identity, aux_loss=torch.zeros(()))
