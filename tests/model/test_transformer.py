import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.errors import CheckpointError, ConfigError
from minimind.model.cache import KVCache
from minimind.model.config import PRESETS, ModelConfig
from minimind.model.transformer import Transformer

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "initializer_range": 0.15,
}
CONFIGS = {name: replace(PRESETS[name], **SMALL) for name in ("small", "v3", "moe", "v3-moe")}
CONFIGS["mixtral"] = replace(CONFIGS["moe"], n_shared_experts=0)


def build(name: str = "small", **changes) -> tuple[Transformer, torch.Tensor]:
    torch.manual_seed(0)
    config = replace(CONFIGS[name], **changes)
    return Transformer(config).eval(), torch.randint(3, config.vocab_size, (3, 30))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_changes_nothing_before_it(name: str):
    model, ids = build(name)
    changed = ids.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 90
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :17], after[:, :17])
    assert not torch.allclose(before[:, 17:], after[:, 17:], atol=1e-3)
    documents = torch.zeros_like(ids)
    documents[:, 20:] = 1
    packed_before, packed_after = (model(x, documents=documents).logits for x in (ids, changed))
    torch.testing.assert_close(packed_before[:, 20:], packed_after[:, 20:])  # nor after its document


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_batched_equals_single(name: str):
    model, ids = build(name)
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, together[row : row + 1])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cache_with_unequal_rows_padding_and_reuse_equals_full(name: str):
    """Right-padded prefill into chosen rows, then chunks of unequal length: each query sees slots 0..p of its row."""
    model, ids = build(name)
    full = model(ids).logits
    cache = KVCache(model.config, 5, 40)
    model(torch.randint(3, 90, (5, 33)), cache=cache)  # something older in every row
    rows = torch.tensor([4, 0, 2])
    got = torch.zeros_like(full)
    done = [0, 0, 0]
    for chunk in ((9, 4, 1), (1, 1, 1), (3, 0, 7), (1, 2, 2)):
        width = max(chunk)
        window, positions = torch.zeros(3, width, dtype=torch.long), torch.full((3, width), -1)
        for row, count in enumerate(chunk):
            window[row, :count] = ids[row, done[row] : done[row] + count]
            positions[row, :count] = torch.arange(done[row], done[row] + count)
        logits = model(window, positions=positions, cache=cache, cache_rows=rows).logits
        assert torch.isfinite(logits).all()
        for row, count in enumerate(chunk):
            got[row, done[row] : done[row] + count] = logits[row, :count]
            done[row] += count
    for row, count in enumerate(done):
        torch.testing.assert_close(got[row, :count], full[row, :count], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prompts_fill_the_cache_compactly(side: str):
    model, ids = build()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 8) if side == "left" else slice(22, 30)] = 0
    cache = KVCache(model.config, 3, 40)
    prefill = model(ids, attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(prefill[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])
    new = torch.tensor([[5], [6], [7]])
    logits = model(new, positions=torch.tensor([[30], [22], [30]]), cache=cache).logits
    alone = torch.cat((ids[1:2][mask[1:2].bool()], new[1]))[None]
    torch.testing.assert_close(logits[1], model(alone).logits[0, -1:])
    # The same through a mask over past and present, as Hugging Face's generate passes it.
    cache = KVCache(model.config, 3, 40)
    model(ids, attention_mask=mask, cache=cache)
    longer = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
    torch.testing.assert_close(model(new, attention_mask=longer, cache=cache).logits, logits)


@torch.no_grad()
def test_packed_equals_alone_for_many_random_packings():
    model, ids = build("moe")
    for seed in range(5):
        torch.manual_seed(seed)
        lengths = torch.randint(1, 9, (3, 30))
        documents = torch.stack([torch.arange(30).repeat_interleave(row)[:30] for row in lengths])
        packed = model(ids, documents=documents).logits
        for row in range(3):
            for number in documents[row].unique():
                inside = documents[row] == number
                torch.testing.assert_close(packed[row, inside], model(ids[row, inside][None]).logits[0])


@torch.no_grad()
def test_positions_are_derived_where_not_given():
    model, ids = build()
    documents = torch.tensor([[0] * 12 + [1] * 10 + [-1] * 8] * 3)
    positions = torch.tensor([[*range(12), *range(10), *[0] * 8]] * 3)
    derived, given = model(ids, documents=documents), model(ids, documents=documents, positions=positions)
    torch.testing.assert_close(derived.logits[:, :22], given.logits[:, :22])
    shifted = model(ids, positions=torch.arange(30)[None] + 20).logits  # rotation is relative
    torch.testing.assert_close(shifted, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite_with_padding_and_cache(name: str, dtype: torch.dtype):
    model, ids = build(name)
    exact = model(ids).logits
    model.to(dtype)
    mask = torch.ones_like(ids)
    mask[0] = 0  # nothing but padding
    mask[1, :9] = 0
    assert torch.isfinite(model(ids, attention_mask=mask).logits).all()
    cache = KVCache(model.config, 3, 40, dtype=dtype)
    assert torch.isfinite(model(ids, attention_mask=mask, cache=cache).logits).all()
    assert torch.isfinite(model(ids[:, :1], positions=torch.full((3, 1), -1), cache=cache).logits).all()
    half = model(ids).logits
    assert half.dtype == dtype
    if not model.config.use_moe:  # a rounded router may choose another expert
        assert (half - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", ["small", "base", "large", "moe", "v3"])
def test_first_loss_is_ln_vocab(name: str):
    """Logits are a normalised vector (squared norm D) times weights of variance s^2, so their variance is D s^2 and the
    expected loss ln V + D s^2 / 2 (log of the mean of exp of a normal)."""
    torch.manual_seed(0)
    config = replace(PRESETS[name], num_hidden_layers=2, vocab_size=3000, intermediate_size=128)
    ids = torch.randint(3000, (2, 64))
    output = Transformer(config)(ids, labels=torch.randint(3000, (2, 64)))
    assert output.loss is not None
    want = math.log(3000) + config.hidden_size * 0.02**2 / 2
    assert abs(output.loss - output.aux_loss - want) < 0.12
    assert want - math.log(3000) < 0.21


def test_initial_weights_have_the_scale_they_should():
    torch.manual_seed(0)
    for name in ("small", "moe"):
        config = replace(PRESETS[name], num_hidden_layers=2, vocab_size=500, hidden_size=128)
        for key, weight in Transformer(config).named_parameters():
            if weight.dim() == 1:
                assert (weight == 1).all()
                continue
            is_residual = "o_proj" in key or "down_proj" in key
            torch.testing.assert_close(
                weight.std(), torch.tensor(0.02 / (2.0 if is_residual else 1.0)), rtol=0.06, atol=0, msg=key
            )


def test_labels_follow_hugging_face_and_ignoring_all_is_zero():
    model, ids = build()
    labels = ids.clone()
    labels[:, :10] = -100
    output = model(ids, labels=labels)
    log_probs = output.logits[:, 9:-1].log_softmax(-1).gather(-1, ids[:, 10:, None])
    torch.testing.assert_close(output.loss, -log_probs.mean())
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


@torch.no_grad()
def test_logits_to_keep():
    model, ids = build()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=0).logits, full)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([4, 1])).logits, full[:, [4, 1]])
    per_row = torch.tensor([[4], [29], [0]])
    want = torch.stack([full[0, 4], full[1, 29], full[2, 0]])[:, None]
    torch.testing.assert_close(model(ids, logits_to_keep=per_row).logits, want)


@pytest.mark.parametrize("name", ["small", "moe"])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(name: str):
    model, ids = build(name)
    model.train()
    results = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: (s.append(x.numel()), x)[1], lambda x: x):
            loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()], sum(saved)))
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert results[1][2] < results[0][2] / 2


def test_dropout_acts_in_training_only_and_on_every_path():
    model, ids = build(dropout=0.3)
    documents = torch.zeros_like(ids)
    torch.testing.assert_close(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)
    assert not torch.allclose(model(ids, documents=documents).logits, model(ids, documents=documents).logits)


def test_positions_beyond_the_limit_are_refused_with_numbers_and_advice():
    model, _ = build()
    with pytest.raises(ConfigError, match=r"position 64 is beyond max_position_embeddings 64.*yarn"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ConfigError, match="position 70 is beyond"):
        model(torch.zeros(1, 2, dtype=torch.long), positions=torch.tensor([[3, 70]]))
    long_row = torch.zeros(1, 80, dtype=torch.long)  # of short documents
    documents = torch.arange(80)[None] // 40
    assert model(long_row, documents=documents, positions=torch.arange(80)[None] % 40).hidden.shape[1] == 80
    with pytest.raises(ConfigError, match=r"max_length 65 is more than .* 64"):
        KVCache(model.config, 1, 65)


@torch.no_grad()
def test_a_full_cache_refuses_before_it_writes():
    model, ids = build()
    cache = KVCache(model.config, 3, 32)
    model(ids, cache=cache)
    before = cache.keys.clone()
    with pytest.raises(ConfigError, match=r"position 34 does not fit: max_length is 32"):
        model(ids[:, :5], cache=cache)
    with pytest.raises(ConfigError, match="position 32 does not fit"):
        model(ids[:, :1], positions=torch.tensor([[3], [32], [4]]), cache=cache)
    assert torch.equal(cache.keys, before)
    assert cache.extent == 30
    with pytest.raises(ConfigError, match="pass cache_rows"):
        model(ids[:2], cache=cache)
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits)


def test_arguments_that_exclude_each_other_are_refused():
    model, ids = build()
    with pytest.raises(ConfigError, match="documents exclude"):
        model(ids, documents=torch.zeros_like(ids), attention_mask=torch.ones_like(ids))
    with pytest.raises(ConfigError, match="cache_rows without cache"):
        model(ids, cache_rows=torch.arange(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_disk_names_round_trip_and_strictness(name: str):
    model, ids = build(name)
    state = {key: tensor.clone() for key, tensor in model.state_dict_for_disk().items()}
    torch.manual_seed(9)
    other = Transformer(model.config)
    other.load_disk_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert "lm_head.weight" not in state
    extra = state | {"model.rotary.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected: model\.rotary\.weight"):
        other.load_disk_state_dict(extra)
    lost = dict(state)
    del lost["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        other.load_disk_state_dict(lost)
    with pytest.raises(CheckpointError, match=r"wrong shape: model\.norm\.weight is \(5,\), the model's is \(32,\)"):
        other.load_disk_state_dict(state | {"model.norm.weight": torch.zeros(5)})


def test_weights_are_named_as_vllm_and_older_transformers_look_for_them():
    names = {name: set(build(name)[0].state_dict_for_disk()) for name in CONFIGS}
    layer = "model.layers.1."
    for found in names.values():
        assert {layer + "self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"} <= found
    assert layer + "mlp.gate_proj.weight" in names["small"]
    assert layer + "self_attn.q_norm.weight" in names["v3"]
    assert {layer + "block_sparse_moe.input_linear.weight", layer + "shared_mlp.input_linear.weight"} <= names["moe"]
    assert layer + "block_sparse_moe.router.layer.weight" in names["moe"]
    assert {layer + f"block_sparse_moe.experts.3.w{n}.weight" for n in (1, 2, 3)} <= names["mixtral"]
    assert {layer + "mlp.experts.7.gate_proj.weight", layer + "mlp.gate.weight"} <= names["v3-moe"]


def test_far_positions_keep_their_angles_in_half_precision():
    config = replace(CONFIGS["small"], max_position_embeddings=40_000)
    torch.manual_seed(0)
    model = Transformer(config)
    ids = torch.randint(3, 90, (1, 6))
    near, far = (model.bfloat16()(ids, positions=torch.arange(6)[None] + start).logits for start in (0, 39_000))
    assert (near - far).abs().max() < 0.05 * near.abs().max()  # rounded to bfloat16, position 39,005 would be 38,912


COMPILE = """
import sys, torch
from dataclasses import replace
from minimind.model.config import PRESETS
from minimind.model.transformer import Transformer
sizes = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, intermediate_size=48, moe_intermediate_size=24)
documents = torch.tensor([[0] * 12 + [1] * 10 + [-1] * 8] * 3)
model, ids = Transformer(replace(PRESETS["moe"], **sizes)), torch.randint(3, 90, (3, 30))
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
outcomes = []
for function in (model, compiled):
    model.zero_grad()
    output = function(ids, documents=documents)
    (output.hidden.square().sum() + output.aux_loss).backward()
    outcomes.append([output.hidden, *(parameter.grad for parameter in model.parameters())])
torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
print("same")
"""


def test_compile_has_no_graph_breaks_and_computes_the_same(repository: Path):
    """In a process of its own, because a graph cannot contain the run-time type checks of the tests."""
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=repository, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


def test_an_impossible_config_is_refused_at_once():
    with pytest.raises(ConfigError, match="num_attention_heads 8 does not divide"):
        Transformer(ModelConfig(num_key_value_heads=3))
