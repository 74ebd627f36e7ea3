"""`NativeStep`: the decode step of a dense model on a CPU as one call into `native.cpp`, which holds the arithmetic.

Here is the rest: for which models it stands in, the packing of their weights, noticing that they changed, and the call.
The Transformer in PyTorch is the definition, and what runs where `prepare` says no.
"""

import ctypes
import mmap
import weakref
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from minimind.model.adapters import adapted
from minimind.model.attention import Attention
from minimind.model.cache import KVCache
from minimind.model.feed_forward import FeedForward
from minimind.model.lora import LoRALinear
from minimind.model.norm import RMSNorm
from minimind.model.rope import angles, inverse_frequencies
from minimind.model.transformer import Decoder, Layer, Transformer
from minimind.native.build import library

SOURCE = Path(__file__).with_name("native.cpp")

_PLAIN = {
    *(Transformer, Decoder, Layer, Attention, FeedForward, RMSNorm),
    *(nn.ModuleList, nn.Linear, nn.Embedding, LoRALinear),
}
_FLOATS = {torch.float32, torch.bfloat16}
_BYTES_PER_UNIT = 4


class _Format(NamedTuple):
    """How weights of one dtype lie in panels."""

    pack: str
    inputs_per_unit: int
    header: int
    """Units before the inputs of an output."""


_FORMATS = {
    torch.float32: _Format("pack_float32", inputs_per_unit=1, header=0),
    torch.bfloat16: _Format("pack_bfloat16", inputs_per_unit=2, header=0),
    torch.int8: _Format("pack_int8", inputs_per_unit=4, header=2),
}


class _Matrix(Structure):
    _fields_ = (("panels", c_void_p), ("outputs", c_int64), ("units", c_int64))


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "feed_forward_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "o", "gate", "up", "down")),
    )


class _Model(Structure):
    _fields_ = (
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("embedding", "norm")),
        ("head", _Matrix),
        *((name, c_void_p) for name in ("cos", "sin", "keys", "values")),
        *((name, c_int64) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "max_rows", "slots")),
        *((name, c_int64) for name in ("inputs_per_unit", "has_bfloat16_cache")),
        ("eps", c_float),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """Return `native.cpp`, compiled, with the types of its functions; None where it cannot be had."""
    code = library(SOURCE)
    if code is not None:
        pack = (c_void_p, c_int64, c_int64, c_void_p)
        for name, result, arguments in (
            ("panel_width", c_int64, ()),
            *((form.pack, None, pack) for form in _FORMATS.values()),
            ("digest", c_uint64, (c_void_p, c_int64)),
            ("begin", c_void_p, (POINTER(_Model), c_int64)),
            ("step", None, (c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
            ("end", None, (c_void_p,)),
        ):
            function = getattr(code, name)  # kept by the library, unlike code[name]
            function.restype, function.argtypes = result, arguments
    return code


class NativeStep:
    """Adds a token to each of the first rows of `cache`, with matrix products in `dtype`.

    float32 agrees with the Transformer but for the order of its sums. bfloat16 rounds weights and the inputs of each
    product as autocast does, but keeps everything between products in float32. int8 rounds both to 255 levels, with
    one scale for each output and for each token.
    """

    def __init__(self, model: Transformer, cache: KVCache, dtype: torch.dtype) -> None:
        """Remember what for; nothing is built or packed before `prepare`."""
        self._model, self._cache, self._dtype = model, cache, dtype
        self._packed: _Packed | None = None

    def prepare(self) -> bool:
        """Return whether the step can be used now; if so, it has the weights of now, whoever changed them and how.

        It cannot on another device or in another dtype, for a mixture of experts, where a module was replaced by one
        it does not know or is watched by hooks, and without a compiler. Adapters (LoRA) are merged into the weights it
        packs, not into the model's. Costs one read of the weights, and their packing where they changed.
        """
        if not is_plain(self._model, self._cache, self._dtype) or (code := _library()) is None:
            return False
        # Version counters would be cheaper to read, but torch's fused optimizers and writes to `.data` pass them by.
        weights = [weight.detach() for weight in self._model.parameters()]
        fingerprint: list[tuple[float, ...]] = [(w.data_ptr(), code.digest(w.data_ptr(), w.nbytes)) for w in weights]
        fingerprint += [(layer.scaling,) for layer in adapted(self._model).values()]
        if self._packed is None or self._packed.fingerprint != fingerprint:
            self._packed = None  # the memory of the old ones first
            self._packed = _Packed(code, self._model, self._cache, self._dtype, fingerprint)
        return self._packed.is_ready

    def __call__(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Float[Tensor, "B V"]:
        """Return the logits after `tokens[i]` at `positions[i]` of cache row i, and extend that row; -1: an idle row.

        Only after `prepare` said yes. The next call overwrites the result.
        """
        assert self._packed is not None
        assert positions.max() < self._cache.max_length
        return self._packed.step(tokens, positions)


def is_plain(model: Transformer, cache: KVCache, dtype: torch.dtype) -> bool:
    """Return whether `native.cpp` computes what `model` does, forward hooks and replaced modules included."""
    return (
        not model.config.use_moe
        and dtype in _FORMATS
        and cache.keys.dtype in _FLOATS
        and all(type(module) in _PLAIN for module in model.modules())
        and not any(_is_watched(module) for module in model.modules())
        and all(p.is_cpu and p.dtype in _FLOATS and p.is_contiguous() for p in model.parameters())
    )


class _Packed:
    """One state of the weights, in panels, and the C++ step over them."""

    def __init__(
        self,
        code: ctypes.CDLL,
        model: Transformer,
        cache: KVCache,
        dtype: torch.dtype,
        fingerprint: list[tuple[float, ...]],
    ) -> None:
        self.fingerprint = fingerprint
        self._code, self._format = code, _FORMATS[dtype]
        self._width = int(code.panel_width())
        config = model.config
        layers = [layer for layer in model.model.layers if isinstance(layer, Layer)]
        matrices = [*(matrix for layer in layers for matrix in _matrices(layer)), [model.head]]
        self._panels = _reserve(sum(map(self._num_units, matrices)))
        self._place = 0
        self._kept: list[object] = [cache]  # C++ has their addresses
        frequencies, factor = inverse_frequencies(config)
        cos, sin = angles(torch.arange(cache.max_length)[None], frequencies, factor)
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self._model = _Model(
            layers=self._layers,
            embedding=self._floats(model.model.embed_tokens.weight),
            norm=self._floats(model.model.norm.weight),
            head=self._matrix([model.head]),
            cos=self._floats(cos),
            sin=self._floats(sin),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            num_layers=len(layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.size_per_head,
            max_rows=cache.batch_size,
            slots=cache.max_length + 1,
            inputs_per_unit=self._format.inputs_per_unit,
            has_bfloat16_cache=cache.keys.dtype == torch.bfloat16,
            eps=config.rms_norm_eps,
        )
        self._logits = torch.empty(cache.batch_size, self._padded(config.vocab_size))
        self._vocab_size = config.vocab_size
        self._handle = code.begin(byref(self._model), torch.get_num_threads())
        self.is_ready = self._handle is not None
        if self.is_ready:
            weakref.finalize(self, code.end, self._handle)

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        rows = len(tokens)
        self._code.step(self._handle, rows, tokens.ctypes.data, positions.ctypes.data, self._logits.data_ptr())
        return self._logits[:rows, : self._vocab_size]

    def _layer(self, layer: Layer) -> _Layer:
        attention = layer.self_attn
        qkv, o, gate, up, down = map(self._matrix, _matrices(layer))
        return _Layer(
            attention_norm=self._floats(layer.input_layernorm.weight),
            feed_forward_norm=self._floats(layer.post_attention_layernorm.weight),
            q_norm=self._floats(attention.q_norm.weight) if attention.q_norm is not None else None,
            k_norm=self._floats(attention.k_norm.weight) if attention.k_norm is not None else None,
            qkv=qkv,
            o=o,
            gate=gate,
            up=up,
            down=down,
        )

    def _floats(self, numbers: Tensor) -> int:
        """Return the address of `numbers` in float32: of themselves, or of a copy if they are narrower."""
        wide = numbers.detach().float().contiguous()
        self._kept.append(wide)
        return wide.data_ptr()

    def _matrix(self, parts: list[Tensor]) -> _Matrix:
        """Pack `parts`, one below the other, behind what was packed last."""
        weight = torch.cat([part.detach().float() for part in parts]) if len(parts) > 1 else parts[0].detach().float()
        outputs, inputs = weight.shape
        panels = self._panels.data_ptr() + _BYTES_PER_UNIT * self._place
        getattr(self._code, self._format.pack)(weight.data_ptr(), outputs, inputs, panels)
        self._place += self._num_units(parts)
        return _Matrix(panels, self._padded(outputs), self._padded(inputs) // self._format.inputs_per_unit)

    def _num_units(self, parts: list[Tensor]) -> int:
        outputs, inputs = sum(len(part) for part in parts), parts[0].shape[1]
        return self._padded(outputs) * (self._format.header + self._padded(inputs) // self._format.inputs_per_unit)

    def _padded(self, width: int) -> int:
        return -(-width // self._width) * self._width


def _matrices(layer: Layer) -> list[list[Tensor]]:
    """Return the matrices of a layer in the order in which a step reads them; those of one list are one product.

    Where a layer has an adapter, its `weight` is the merged one.
    """
    attention, feed_forward = layer.self_attn, layer.mlp
    assert isinstance(feed_forward, FeedForward)
    return [
        [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
        [attention.o_proj.weight],
        [feed_forward.gate_proj.weight],
        [feed_forward.up_proj.weight],
        [feed_forward.down_proj.weight],
    ]


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]


def _reserve(num_units: int) -> Tensor:
    """Return memory for the panels, in one piece: in large pages, where there are any, it is read a fifth faster."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_units, dtype=torch.int32)
    memory = mmap.mmap(-1, _BYTES_PER_UNIT * num_units, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32)
