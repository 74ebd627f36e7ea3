"""`KVCache`: the keys and values of B sequences, allocated once. The slot of a key is its position, always.

A query at position p sees slots 0..p of its row and nothing else, so a row is emptied by starting again at position 0,
and chunked prefill, right-padded prefill, decoding at unequal lengths and checking several tokens are the same code.
Which request owns which row is the engine's business.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimind.errors import ConfigError
from minimind.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values: `keys[layer]` and `values[layer]` are (B, K, max_length + 1, Dh).

    The last slot takes what padding (position -1) would write and is never read.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate. ConfigError when `max_length` exceeds the model's positions."""
        if batch_size < 1 or max_length < 1:
            raise ConfigError(f"KVCache: batch_size {batch_size} and max_length {max_length} must be at least 1")
        if max_length > config.max_position_embeddings:
            raise ConfigError(
                f"KVCache: max_length {max_length} is more than the model's max_position_embeddings "
                f"{config.max_position_embeddings}; ask for less, or stretch the context with rope_scaling 'yarn'"
            )
        self.batch_size = batch_size
        self.max_length = max_length
        self.extent = 0
        """Host-side upper bound of the used slots of any row: attention reads only slots below it. A caller that
        knows better (after freeing rows) may lower it by assigning."""
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length + 1, config.size_per_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def reset(self) -> None:
        """Forget every sequence. Slots keep their old values, which no query can see."""
        self.extent = 0

    def num_bytes(self) -> int:
        """Return the memory held, in bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def reserve(self, end: int) -> None:
        """Raise `extent` to `end`. ConfigError past `max_length`, before anything is written."""
        if end > self.max_length:
            raise ConfigError(
                f"KVCache: position {end - 1} does not fit: max_length is {self.max_length}; "
                "stop this sequence, or allocate a longer cache"
            )
        self.extent = max(self.extent, end)


@dataclass(frozen=True, slots=True)
class CacheAccess:
    """What one forward writes and reads. Without `slots`: slots `start` .. `start + T` of every cache row."""

    cache: KVCache
    start: int = 0
    slots: Int[Tensor, "B T"] | None = None
    """Slot of every new key; `max_length` for padding."""
    rows: Int[Tensor, " B"] | None = None
    """Cache row of every batch row; None: all, in order."""

    def exchange(
        self, layer: int, k: Float[Tensor, "B T K Dh"], v: Float[Tensor, "B T K Dh"]
    ) -> tuple[Float[Tensor, "B S K Dh"], Float[Tensor, "B S K Dh"]]:
        """Write the new keys and values, return the first `extent` slots of each row (S). No gradient flows through."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (rows, K, slots, Dh)
        with torch.no_grad():
            if self.slots is None:
                end = self.start + k.shape[1]
                keys[:, :, self.start : end] = k.transpose(1, 2)
                values[:, :, self.start : end] = v.transpose(1, 2)
            else:
                rows = torch.arange(k.shape[0], device=k.device) if self.rows is None else self.rows
                keys[rows[:, None], :, self.slots] = k.to(keys.dtype)
                values[rows[:, None], :, self.slots] = v.to(values.dtype)
        keys, values = keys[:, :, : self.cache.extent], values[:, :, : self.cache.extent]
        if self.rows is not None:
            keys, values = keys[self.rows], values[self.rows]
        return keys.transpose(1, 2).to(k.dtype), values.transpose(1, 2).to(v.dtype)
