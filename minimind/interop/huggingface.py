"""A causal language model of any architecture that Transformers knows, as a teacher: batches in, what it says out.

Only here is `transformers` imported. The model is read from a local directory, safetensors only, and never trained.
What stands between a model's body and its logits (a bias, a scale, a softcap), its own forward knows: it is called with
a body whose hidden states are there already. So logits can be had chunk by chunk, and loading checks that they are the
same as in one piece. Models of the families that `minimind.checkpoint` reads need nothing of this.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.batch import PAD_DOCUMENT, Batch
from minimind.errors import CheckpointError, ConfigError
from minimind.objectives.distillation import Taught

PROBE_TOKENS = 8


class HuggingFaceTeacher:
    """A frozen model in evaluation mode, float32: `teacher(batch)` under the caller's autocast and inference mode."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Load it. ConfigError without Transformers installed, CheckpointError when it cannot be read or cut in two."""
        transformers = _transformers(directory)
        try:
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f"{directory}: Transformers cannot read it as a causal model: {error}") from error
        self.model.to(device).eval().requires_grad_(False)
        config = self.model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        """Tokens of one document at most, where the model has a limit."""
        self.description = f"{type(self.model).__name__}, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f}M"
        self._body: Any = self.model.get_decoder()
        self._check(directory, device)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Taught:
        """Return hidden states (B, T, D), 0 at padding, and the function from hidden states to logits.

        Each document is a row of its own here, filled up on its right: no causal model, whatever it mixes tokens with,
        can then see another document.
        """
        tokens = batch.input_ids.flatten()  # (N,)
        hidden: Tensor | None = None
        for index, mask in _documents(batch):
            found = self._hidden(tokens[index], mask)
            if hidden is None:
                hidden = found.new_zeros(len(tokens), found.shape[-1])
            hidden[index[mask]] = found[mask]
        if hidden is None:  # nothing but padding
            hidden = self._hidden(tokens[:1, None], tokens.new_ones(1, 1))[0].expand(len(tokens), -1)
        return Taught(hidden.unflatten(0, batch.input_ids.shape), self.logits_of)

    @torch.inference_mode()
    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, V) of hidden states (n, D)."""
        self._body.forward = lambda *_arguments, **_options: _Body((hidden[None],))  # pyright: ignore[reportUnknownLambdaType]
        try:
            return self.model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits[0]
        finally:
            del self._body.forward  # the class has the real one

    def _hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self._body(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)[0]

    @torch.inference_mode()
    def _check(self, directory: Path, device: torch.device) -> None:
        """Raise CheckpointError unless body and head, one after the other, are the model."""
        input_ids = torch.arange(PROBE_TOKENS, device=device)[None] % self.vocab_size
        want = self.model(input_ids=input_ids, use_cache=False).logits[0]
        try:
            found = self.logits_of(self._hidden(input_ids, torch.ones_like(input_ids))[0])
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{directory}: {self.description} cannot teach here: {error}") from error
        if found.shape != want.shape or not torch.allclose(found, want, rtol=1e-4, atol=1e-4):
            raise CheckpointError(
                f"{directory}: {self.description} cannot teach here: its logits are more than a function of the last "
                "hidden states; take another teacher"
            )


def vocabulary(directory: Path) -> list[str]:
    """Return the tokens of a directory's tokenizer by id; "" for an id without one. CheckpointError: none readable."""
    try:
        tokenizer: Any = _transformers(directory).AutoTokenizer.from_pretrained(directory, local_files_only=True)
        token_of = {index: token for token, index in tokenizer.get_vocab().items()}
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{directory}: Transformers cannot read its tokenizer: {error}") from error
    return [token_of.get(index, "") for index in range(max(token_of, default=-1) + 1)]


class _Body(tuple[Tensor, ...]):
    """What a model's body returns: the last hidden states, as first item and by name; it has nothing else."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (places in the flat batch, which of them are real), (m, L) each: every document once, the longest first.

    No group has more slots than the batch, or it is one document.
    """
    is_real = (batch.documents != PAD_DOCUMENT).flatten()
    is_first = is_real & (batch.positions.flatten() == 0)
    starts = is_first.nonzero()[:, 0]  # (M,)
    lengths = torch.bincount(is_first.cumsum(0)[is_real] - 1, minlength=len(starts))
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        longest = int(lengths[order[0]])
        count = max(1, len(is_real) // longest)
        chosen, order = order[:count], order[count:]
        steps = torch.arange(longest, device=starts.device)
        mask = steps < lengths[chosen, None]
        yield starts[chosen, None] + steps * mask, mask


def _transformers(directory: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"{directory}: to read it takes Transformers: pip install 'minimind[hf]'") from None
    return transformers
