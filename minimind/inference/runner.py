"""The forward passes of an engine over one cache: prompts, then one token more for each of the first rows.

Prompts run through the Transformer. Single tokens run through it too, or through `NativeStep` where that can stand in:
on a CPU, for a dense model. Which request owns which row and how tokens are chosen is not known here.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from minimind.inference.native import NativeStep
from minimind.model.cache import KVCache
from minimind.model.transformer import Transformer
from minimind.runtime.device import autocast
from minimind.runtime.log import get_logger

_log = get_logger(__name__)

PREFILL_CHUNK = 512
"""Prompts are run this many positions at a time, so that a long one needs little memory."""


class Runner:
    """Runs `model` over a cache of `max_rows` rows of `max_length` positions; products and cache in `dtype`.

    int8 is for the native step alone: prompts and the cache stay in the dtype of the parameters, and so do tokens where
    there is no native step (a warning says so).
    """

    def __init__(
        self, model: Transformer, max_rows: int, max_length: int, dtype: torch.dtype | None, *, is_native: bool
    ) -> None:
        """Allocate the cache, on the model's device. `is_native` False: always through the Transformer."""
        weight = next(model.parameters())
        self.model = model
        self.device = weight.device
        self.dtype = weight.dtype if dtype is None or dtype == torch.int8 else dtype
        self._has_autocast = self.dtype != weight.dtype
        self._cache = KVCache(model.config, max_rows, max_length, device=self.device, dtype=self.dtype)
        self._native = NativeStep(model, self._cache, dtype or self.dtype) if is_native else None
        self._is_native_ready: bool | None = None
        self._is_int8 = dtype == torch.int8

    @contextmanager
    def deciding(self) -> Generator[None]:
        """Forwards inside record no gradients and drop nothing out; the model is handed back in its mode."""
        is_training = self.model.training
        if is_training:
            self.model.eval()
        try:
            with torch.inference_mode(), autocast(self.device, self.dtype if self._has_autocast else torch.float32):
                yield
        finally:
            if is_training:
                self.model.train()

    def begin(self) -> None:
        """Say that no row is in use: only then may the weights have changed, since what is cached came from them."""
        self._is_native_ready = None

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Float[Tensor, "B V"]:
        """Run each prompt into its cache row, right-padded together, and return the logits after its last token."""
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, : lengths[i]] = prompt
        positions = np.where(np.arange(width) < lengths[:, None], np.arange(width), -1)
        cache_rows = self.to_device(np.array(rows))
        last = torch.zeros(len(prompts), self.model.config.hidden_size, dtype=self.dtype, device=self.device)  # (B, D)
        for start in range(0, width, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, width)
            self._cache.extent = start  # the forward raises it to `end`
            hidden = self.model(
                self.to_device(ids[:, start:end]),
                positions=self.to_device(positions[:, start:end]),
                cache=self._cache,
                cache_rows=cache_rows,
            ).hidden
            ending = np.nonzero((lengths > start) & (lengths <= end))[0]
            index, column = self.to_device(ending), self.to_device(lengths[ending] - 1 - start)
            last[index] = hidden[index, column].to(last.dtype)
        return last @ self.model.head.to(last.dtype).T

    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Float[Tensor, "B V"]:
        """Return the logits after token i at position i of cache row i (-1: an idle row), until the next call."""
        if self._is_native_ready is None:
            self._is_native_ready = self._native is not None and self._native.prepare()
            if self._is_int8 and not self._is_native_ready:
                _log.warning(
                    "int8 needs the native step, which this model or machine does not have: using %s", self.dtype
                )
                self._is_int8 = False
        if self._is_native_ready and self._native is not None:
            return self._native(tokens, positions)
        cache = self._front(len(tokens))
        cache.extent = int(positions.max())  # the forward raises it by one
        output = self.model(self.to_device(tokens[:, None]), positions=self.to_device(positions[:, None]), cache=cache)
        return output.logits[:, 0]

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of cache rows to other rows."""
        for slots in (self._cache.keys, self._cache.values):  # (L, B, K, slots, Dh)
            slots[:, targets, :, :length] = slots[:, sources, :, :length]

    def to_device(self, array: NDArray[np.int64]) -> Tensor:
        """Return `array` as a tensor where the model is."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _front(self, width: int) -> KVCache:
        # A view of the same memory: named by `cache_rows`, the forward would copy these rows at every step.
        if width == self._cache.batch_size:
            return self._cache
        view = copy(self._cache)
        view.batch_size, view.keys, view.values = width, self._cache.keys[:, :width], self._cache.values[:, :width]
        return view
