"""The Transformer: token ids in, final hidden states and the head out. Llama's names, Qwen3's QK-norm, dense or MoE.

It knows no text, no optimizer and no sampling. Logits are the `Output`'s to compute, so training never holds them.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind.batch import PAD_DOCUMENT, Output
from minimind.errors import ConfigError
from minimind.model import disk, layout
from minimind.model.attention import Attention
from minimind.model.cache import KVCache
from minimind.model.config import ModelConfig
from minimind.model.feed_forward import FeedForward
from minimind.model.layout import Layout
from minimind.model.moe import ExpertWeights, MixtureOfExperts
from minimind.model.norm import RMSNorm
from minimind.model.rope import angles, inverse_frequencies
from minimind.model.weights import WeightsOnDisk


class Layer(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MixtureOfExperts(config) if config.use_moe else FeedForward(config.hidden_size, config.feed_forward_size)
        )
        self.dropout = config.dropout

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        cos: Float[Tensor, "rows T 1 half"],
        sin: Float[Tensor, "rows T 1 half"],
        arranged: Layout,
        real: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, ""] | None]:
        """Return (hidden, balance loss); the loss is None for a dense layer."""
        normed = self.input_layernorm(hidden, for_product=True)
        hidden = hidden + self._drop(self.self_attn(normed, cos, sin, arranged))
        if isinstance(self.mlp, MixtureOfExperts):
            update, aux_loss = self.mlp(self.post_attention_layernorm(hidden), real)  # the router wants float32
        else:
            update, aux_loss = self.mlp(self.post_attention_layernorm(hidden, for_product=True)), None
        return hidden + self._drop(update), aux_loss

    def _drop(self, update: Tensor) -> Tensor:
        return F.dropout(update, self.dropout, self.training) if self.dropout else update


class Decoder(nn.Module):
    """Embedding, layers and the last norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(WeightsOnDisk):
    """A causal language model of the shape `config`, initialised; the names of its weights are Hugging Face's."""

    def __init__(self, config: ModelConfig) -> None:
        """Build and initialise from torch's current random state. ConfigError listing every problem of `config`."""
        super().__init__()
        problems = config.problems()
        if problems:
            raise ConfigError("model: " + "; ".join(problems))
        self.config = config
        self.gradient_checkpointing = False
        """Recompute each layer in the backward instead of keeping its activations; slower, less memory."""
        self.model = Decoder(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # Kept in float32 whatever the weights' dtype: `.to(bfloat16)` would round the angles of far positions.
        self._frequencies, self._rope_factor = inverse_frequencies(config)
        self.initialize()

    @classmethod
    def from_config(cls, config: ModelConfig) -> "Transformer":
        """Return a new, initialised model."""
        return cls(config)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw every weight: normal(0, initializer_range), residual projections divided by sqrt(2 L), norms at 1.

        The residual stream is a sum of 2 L branches; scaled so, its variance does not grow with depth (GPT-2, section
        2.3), the logits start near 0 and the first loss is ln(vocab_size).
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_residual = name.endswith((".o_proj", ".down_proj"))
                module.weight.normal_(0.0, residual_std if is_residual else std)
            elif isinstance(module, ExpertWeights):
                module.gate_up_proj.normal_(0.0, std)
                module.down_proj.normal_(0.0, residual_std)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    @property
    def head(self) -> Float[Tensor, "V D"]:
        """Weight of the output projection: the embedding's when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        positions: Int[Tensor, "rows T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T_mask"] | Bool[Tensor, "B T_mask"] | None = None,
        cache: KVCache | None = None,
        cache_rows: Int[Tensor, " B"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        logits_to_keep: int | Int[Tensor, "..."] = 0,
    ) -> Output:
        """Return the final hidden states and the head.

        `positions`: of each token, for the rotation; with a cache also the slot it is written to, -1 for padding.
        Default: counted from 0 per row (per document with `documents`, from the cache's extent with `cache`).
        `documents`: number of the document each token belongs to, `PAD_DOCUMENT` at padding; attention stays inside.
        `attention_mask`: 1 at real tokens, 0 at padding, left or right.
        `cache_rows`: the cache row of each batch row; default all rows in order.
        `labels`: Hugging Face's convention (not shifted, -100 ignored); fills `Output.loss`.
        `logits_to_keep`: the last n positions (0: all), or indices, (n) for all rows or (B, n) row by row.

        ConfigError past `max_position_embeddings` or the cache's length, and where arguments exclude each other.
        """
        arranged, positions, real = self._arrange(input_ids, positions, documents, attention_mask, cache, cache_rows)
        if self._frequencies.device != input_ids.device:
            self._frequencies = self._frequencies.to(input_ids.device)
        cos, sin = angles(positions, self._frequencies, self._rope_factor)
        hidden = self.model.embed_tokens(input_ids)  # (B, T, D)
        aux_losses: list[Tensor] = []
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.model.layers:
            if recompute:
                hidden, aux_loss = checkpoint(layer, hidden, cos, sin, arranged, real, use_reentrant=False)
            else:
                hidden, aux_loss = layer(hidden, cos, sin, arranged, real)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        hidden = self.model.norm(hidden)
        aux_loss = torch.stack(aux_losses).mean() if aux_losses else torch.zeros((), device=hidden.device)
        loss = None if labels is None else self._loss(hidden, labels) + aux_loss
        return Output(hidden=_keep(hidden, logits_to_keep), head=self.head, aux_loss=aux_loss, loss=loss)

    def _arrange(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        cache_rows: Tensor | None,
    ) -> tuple[Layout, Tensor, Tensor | None]:
        """Return (layout, positions for the rotation, mask of real tokens or None)."""
        batch, length = input_ids.shape
        if documents is not None and (cache is not None or attention_mask is not None):
            raise ConfigError("Transformer: documents exclude cache and attention_mask; padding is a document of -1")
        if cache is None and cache_rows is not None:
            raise ConfigError("Transformer: cache_rows without cache; pass the cache as well")
        if attention_mask is not None:
            mask_documents, mask_positions = layout.documents_of_mask(attention_mask)
            mask_positions = mask_positions[:, -length:]  # with a cache the mask may cover the past as well
            positions = mask_positions if positions is None else positions
            documents = mask_documents if cache is None else None
        if cache is not None:
            arranged, rotation = layout.cached(cache, (batch, length), positions, cache_rows)
            return arranged, rotation, None if positions is None else positions >= 0
        self._check_positions(length, positions)
        device = input_ids.device
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else self.model.embed_tokens.weight.dtype
        dropout = self.config.dropout if self.training else 0.0
        head_dim, is_packed = self.config.size_per_head, documents is not None
        kernel = layout.pick_kernel(device, dtype, length, head_dim, is_packed=is_packed, dropout=dropout)
        if documents is None:
            positions = torch.arange(length, device=device)[None] if positions is None else positions.clamp(min=0)
            return layout.causal((batch, length), kernel), positions, None
        positions = layout.positions_in_documents(documents) if positions is None else positions.clamp(min=0)
        return layout.packed(documents, kernel), positions, documents != PAD_DOCUMENT

    def _check_positions(self, length: int, positions: Tensor | None) -> None:
        limit = self.config.max_position_embeddings
        highest = length - 1
        if positions is not None:
            if length <= limit and (positions.is_cuda or torch.compiler.is_compiling()):
                return  # reading them would wait for the device; documents of rows this short cannot pass the limit
            highest = int(positions.max())
        if highest >= limit:
            raise ConfigError(
                f"Transformer: position {highest} is beyond max_position_embeddings {limit}; shorten the sequence to "
                f"{limit} tokens, or stretch the context with rope_scaling 'yarn' and a larger max_position_embeddings"
            )

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of predicting `labels[:, 1:]`, -100 ignored; 0 when all are."""
        logits = F.linear(hidden[:, :-1], self.head).float().flatten(0, 1)  # (B * (T - 1), V)
        targets = labels[:, 1:].flatten()
        loss_sum = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return loss_sum / (targets != -100).sum().clamp(min=1)

    def state_dict_for_disk(self) -> dict[str, Tensor]:
        """Return the weights under the names of `model.safetensors`: those that Transformers and vLLM load."""
        return disk.to_disk(self.state_dict(), self.config.family)

    def load_disk_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights named as on disk, all of them and nothing else. CheckpointError naming every difference."""
        disk.check(state, self.state_dict_for_disk())
        self.load_state_dict(disk.from_disk(state, self.config.family))


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]  # -0 keeps all
    if logits_to_keep.dim() == 1:
        return hidden[:, logits_to_keep]
    return hidden.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, n, D)
