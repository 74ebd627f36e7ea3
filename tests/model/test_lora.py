"""Adapters against their definition: values, gradients, merging, switching, and a base that never changes a bit."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.batch import PAD_DOCUMENT
from minimind.errors import CheckpointError, ConfigError
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.model.adapter_config import DENSE_LAYERS, LoraConfig
from minimind.model.adapters import (
    Adapters,
    adaptable,
    adapted,
    adapter_state,
    add_lora,
    load_adapter_state,
    merge_lora,
    merged,
    remove_lora,
)
from minimind.model.config import ModelConfig
from minimind.model.lora import LoRALinear, side_by_side
from minimind.model.transformer import Transformer

LLAMA = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=128,
    initializer_range=0.15,  # far from uniform, so that greedy choices are not ties
)
QWEN = replace(LLAMA, qk_norm=True, tie_word_embeddings=False)
MOE = replace(LLAMA, use_moe=True, moe_intermediate_size=48)
SHAPES = {"llama": LLAMA, "qwen3": QWEN, "moe": MOE}
ATTENTION = LoraConfig(rank=2, target_modules=("q_proj", "v_proj"))


def tiny(config: ModelConfig = LLAMA, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config).eval()


@torch.no_grad()
def trained(model: Transformer, config: LoraConfig, seed: int = 1) -> Transformer:
    """Put an adapter on that is not zero any more, as if it had been trained."""
    torch.manual_seed(seed)
    for layer in add_lora(model, config).values():
        layer.lora_B.normal_(0, 0.1)
    return model


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(5))


def logits(model: Transformer, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids_of(2, 24) if ids is None else ids).logits


def documents() -> Tensor:
    """Packed rows with padding at the end of one."""
    return torch.tensor([[0] * 9 + [1] * 15, [0] * 5 + [1] * 10 + [PAD_DOCUMENT] * 9])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(shape: str) -> None:
    model = tiny(SHAPES[shape])
    before, weights = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    layers = add_lora(model, LoraConfig(rank=4))
    assert torch.equal(logits(model), before)
    names = 4 if shape == "moe" else 7
    assert len(layers) == 2 * names
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
    for layer in layers.values():  # PEFT's kaiming_uniform_(a=sqrt(5)) is uniform within 1 / sqrt(in)
        bound = 1 / math.sqrt(layer.lora_A.shape[1])
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()
    remove_lora(model)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def one_by_one(x: Tensor, *layers: nn.Module) -> Tensor:
    """The definition of `side_by_side`."""
    return torch.cat([layer(x) for layer in layers], dim=-1)


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "up_proj"), ("k_proj",), ("o_proj", "down_proj")])
@pytest.mark.parametrize(("shape", "dtype"), [("llama", "float32"), ("qwen3", "float32"), ("qwen3", "bfloat16")])
def test_joined_layers_are_their_definition(
    shape: str, dtype: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny(SHAPES[shape]), LoraConfig(rank=3, alpha=5, target_modules=targets)).train()
    rows, narrow = documents(), getattr(torch, dtype)

    def outcome() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=narrow, enabled=dtype != "float32"):
            found = model(ids_of(2, 24), documents=rows).logits[rows >= 0].float()
        random = torch.Generator().manual_seed(2)
        (found * torch.randn(found.shape, generator=random)).sum().backward()
        return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    joined = outcome()
    model.gradient_checkpointing = True  # computed twice, the same numbers
    assert all(torch.equal(once, twice) for once, twice in zip(joined, outcome(), strict=True))
    for module in ("attention", "feed_forward"):
        monkeypatch.setattr(f"minimind.model.{module}.side_by_side", one_by_one)
    separate = outcome()
    assert len(joined) == len(separate) == 1 + 2 * len(adapted(model))
    for ours, theirs in zip(joined, separate, strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == "float32" else 0.05) * theirs.norm()


def test_the_layer_by_hand() -> None:
    base = nn.Linear(2, 1, bias=False)
    layer = LoRALinear(base, LoraConfig(rank=1, alpha=3))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[2.0, -1.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, 4.0]]))
        layer.lora_B.copy_(torch.tensor([[0.5]]))
    x = torch.tensor([[1.0, 2.0]])
    assert layer(x).item() == 2 - 2 + 3 * 0.5 * (1 + 8)
    assert layer.weight.tolist() == [[2 + 3 * 0.5, -1 + 3 * 0.5 * 4]]
    layer(x).sum().backward()
    assert base.weight.grad is not None  # who freezes the base is `add_lora`
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.item() == 3 * 9  # scaling * A x
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.tolist() == [[3 * 0.5 * 1, 3 * 0.5 * 2]]


def test_each_adapter_drops_inputs_of_its_own_and_only_in_training() -> None:
    torch.manual_seed(0)
    config = LoraConfig(rank=4, alpha=4, dropout=0.5)
    layers = [LoRALinear(nn.Linear(32, 8, bias=False), config) for _ in range(2)]
    plain = nn.Linear(32, 4, bias=False)
    x = torch.randn(5, 32)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
        nn.init.zeros_(layer.base_layer.weight)
    torch.manual_seed(3)
    dropped = side_by_side(x, *layers, plain)
    torch.manual_seed(3)
    by_hand = [F.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T for layer in layers]
    torch.testing.assert_close(dropped, torch.cat([*by_hand, plain(x)], dim=-1))
    for layer in layers:
        layer.eval()
    whole = torch.cat([x @ layer.lora_A.T @ layer.lora_B.T for layer in layers], dim=-1)
    torch.testing.assert_close(side_by_side(x, *layers), whole)
    assert not torch.equal(whole, dropped[:, :16])


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_is_the_same_model_without_adapter(shape: str) -> None:
    model = trained(tiny(SHAPES[shape]), LoraConfig(rank=3))
    plain, with_adapter = logits(tiny(SHAPES[shape])), logits(model)
    assert (with_adapter - plain).abs().max() > 0.1
    twin = merged(model)
    assert not adapted(twin)
    assert all(p.requires_grad for p in twin.parameters())
    torch.testing.assert_close(logits(twin), with_adapter, rtol=0, atol=1e-5)
    remove_lora(model)  # the copy was the twin's: the base is still here
    assert torch.equal(logits(model), plain)
    assert not merge_lora(model)


def test_merging_sums_in_float32_and_rounds_once() -> None:
    model = trained(tiny().to(torch.bfloat16), LoraConfig(rank=3))
    name, layer = next(iter(adapted(model).items()))
    assert layer.lora_A.dtype == torch.bfloat16
    exact = layer.base_layer.weight.float() + layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
    merge_lora(model)
    assert torch.equal(model.get_parameter(f"{name}.weight"), exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("target", "number"), [("q_proj", 2), ("self_attn.q_proj", 2), ("model.layers.1.mlp.up_proj", 1), ("layers.0", 0)]
)
def test_layers_are_named_from_the_end(target: str, number: int) -> None:
    model = tiny()
    if number:
        assert len(add_lora(model, LoraConfig(target_modules=(target,)))) == number
    else:
        with pytest.raises(ConfigError, match=r"no layer named layers\.0 can be adapted"):
            add_lora(model, LoraConfig(target_modules=(target,)))


@pytest.mark.parametrize(
    ("shape", "name"), [("llama", "proj"), ("moe", "gate_proj"), ("moe", "gate"), ("qwen3", "lm_head")]
)
def test_unknown_names_are_refused_with_those_that_exist(shape: str, name: str) -> None:
    model = tiny(SHAPES[shape])
    with pytest.raises(ConfigError) as refused:
        add_lora(model, LoraConfig(target_modules=("q_proj", name)))
    assert f"no layer named {name} can be adapted" in str(refused.value)
    known = DENSE_LAYERS[:4] if shape == "moe" else DENSE_LAYERS
    assert f"there are {', '.join(known)}, also with" in str(refused.value)
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_one_adapter_at_a_time() -> None:
    model = trained(tiny(), ATTENTION)
    assert len(adaptable(model)) == 14  # also those that have one
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(model, ATTENTION)


def test_a_seed_means_one_adapter_whatever_the_order_of_its_names() -> None:
    states: list[dict[str, Tensor]] = []
    for names in (("q_proj", "up_proj"), ("up_proj", "q_proj")):
        model = trained(tiny(), LoraConfig(target_modules=names))
        states.append(adapter_state(model))
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_its_tensors_are_named_as_peft_names_them_and_come_back() -> None:
    model = trained(tiny(), ATTENTION)
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    assert next(iter(state)) == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert state["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (32, 2)
    other = trained(tiny(), ATTENTION, seed=9)
    assert not torch.equal(logits(other), logits(model))
    load_adapter_state(other, state)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(CheckpointError, match=r"wrong shape: .*lora_A.weight is \(2, 64\), the model's is \(3, 64\)"):
        load_adapter_state(trained(tiny(), replace(ATTENTION, rank=3)), state)
    with pytest.raises(CheckpointError, match=r"missing: .*k_proj\.lora_A.* and 15 more"):
        load_adapter_state(trained(tiny(), LoraConfig(rank=2)), state)


def test_several_adapters_take_turns_on_one_base() -> None:
    model = tiny()
    kept = {name: p.clone() for name, p in model.named_parameters()}
    configs = {"red": ATTENTION, "blue": LoraConfig(rank=5, alpha=3)}
    alone = {name: trained(tiny(), config, seed) for seed, (name, config) in enumerate(configs.items())}
    adapters = Adapters(model)
    for name, config in configs.items():
        adapters.add(name, config, adapter_state(alone[name]))
    assert (adapters.names, adapters.active) == (("red", "blue"), "blue")
    plain = tiny()
    for name in ("red", "blue", None, "red", "red"):
        adapters.use(name)
        assert adapters.active == name
        assert torch.equal(logits(model), logits(alone[name] if name else plain))
    with pytest.raises(ConfigError, match="there is no adapter 'green'; known: red, blue"):
        adapters.use("green")
    with pytest.raises(CheckpointError, match="missing"):
        adapters.add("green", LoraConfig(rank=2), adapter_state(alone["red"]))
    assert (adapters.names, adapters.active) == (("red", "blue"), "red")
    assert torch.equal(logits(model), logits(alone["red"]))
    adapters.use(None)
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_native", [True, False])
def test_the_engine_answers_with_the_adapter_of_the_moment(shape: str, is_native: bool) -> None:
    model = tiny(SHAPES[shape])
    engine = Engine(model, max_batch_size=2, max_length=64, native=is_native)
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=True)
    prompts = [ids_of(1, 9)[0].tolist(), ids_of(2, 5)[1].tolist()]

    def check(reference: Transformer) -> list[list[int]]:
        answers = engine.generate(prompts, params)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer.ids]])
            found = logits(reference, ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = found.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=0, atol=1e-4)
            assert answer.ids == found.argmax(-1).tolist()
        return [answer.ids for answer in answers]

    adapters = Adapters(model)
    said = [check(model)]
    for seed in (1, 2):
        other = trained(tiny(SHAPES[shape]), ATTENTION, seed)
        adapters.add(str(seed), ATTENTION, adapter_state(other))
        said.append(check(merged(other)))
    with torch.no_grad():  # not a number of any tensor, and yet another model
        for layer in adapted(model).values():
            layer.scaling *= -1
    twin = merged(model)
    said.append(check(twin))
    adapters.use(None)
    assert check(model) == said[0]
    assert len({str(answers) for answers in said}) == 4
    if shape != "moe":
        assert engine._runner._is_native_ready is is_native


def test_impossible_settings_are_named_together() -> None:
    found = LoraConfig(rank=0, alpha=0.0, dropout=1.0).problems()
    assert [text.partition(" = ")[0] for text in found] == ["rank", "alpha", "dropout"]


def test_the_module_of_a_layer_follows_the_mode_of_its_model() -> None:
    model = copy.deepcopy(tiny()).train()
    assert all(layer.training for layer in add_lora(model, LoraConfig()).values())
    assert not any(layer.training for layer in add_lora(tiny().eval(), LoraConfig()).values())
