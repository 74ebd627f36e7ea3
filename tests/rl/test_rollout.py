"""Samples through the engine: what is noted about them is what the policy says."""

from collections.abc import Sequence

import pytest
import torch

from minimind.errors import ConfigError
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.rl.credit import log_probs_at
from minimind.rl.rollout import Sample, rollout, seed_of
from minimind.rl.trajectory import Meter, Packer, Trajectory

PROMPTS = [[1, 5, 9, 11], [1, 7], [1, 30, 31, 32, 33, 34, 35]]
END = 2


def tiny(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform
    )
    return Transformer(config)


def play(
    model: Transformer, params: SamplingParams, *, samples: int = 3, seed: int = 0, native: bool = True
) -> list[Sample]:
    engine = Engine(model, max_batch_size=4, max_length=64, native=native)
    seeds = [seed_of(seed, place, k) for place in range(len(PROMPTS)) for k in range(samples)]
    return rollout(engine, PROMPTS, samples_per_prompt=samples, params=params, seeds=seeds)


def test_samples_of_a_prompt_stand_side_by_side_and_seeds_decide() -> None:
    model, params = tiny(), SamplingParams(max_tokens=20, stop_ids=(END,))
    found = play(model, params)
    assert [one.prompt_index for one in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [one.prompt_ids for one in found] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(one.ids) for one in found}) == 9
    assert play(model, params) == found
    assert play(model, params, seed=1) != found
    for one in found:
        assert one.mask == [1] * len(one.ids)
        assert (one.ids[-1] == END) is (one.finish_reason == "stop")  # the end is chosen, so it is learned
        assert one.is_truncated is (END not in one.ids)
        assert one.num_chosen == len(one.ids) <= 20


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_log_probs_equal_recomputed_ones(temperature: float, native: bool) -> None:
    model = tiny()
    found = play(model, SamplingParams(temperature=temperature, max_tokens=40), native=native)
    meter = Meter(Packer(64, 128, 0), torch.device("cpu"), torch.float32)  # other rows, other batches
    again = meter(model, [Trajectory(one) for one in found], log_probs_at(temperature))
    for one, log_probs in zip(found, again, strict=True):
        assert log_probs == pytest.approx(one.log_probs, abs=1e-4)
    other = meter(model, [Trajectory(one) for one in found], log_probs_at(temperature + 0.2))
    assert other[0] != pytest.approx(found[0].log_probs, abs=1e-2)


def test_the_live_weights_are_asked() -> None:
    model, params = tiny(), SamplingParams(max_tokens=20)
    engine = Engine(model, max_batch_size=4, max_length=64)

    def ask() -> list[Sample]:
        return rollout(engine, PROMPTS, samples_per_prompt=1, params=params, seeds=[1, 2, 3])

    before = ask()
    with torch.no_grad():
        model.head.add_(torch.randn_like(model.head))
    after = ask()
    assert after != before
    fresh = Engine(model, max_batch_size=4, max_length=64)
    assert rollout(fresh, PROMPTS, samples_per_prompt=1, params=params, seeds=[1, 2, 3]) == after


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_a_filter_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="from the policy itself"):
        play(tiny(), SamplingParams(**fields))  # pyright: ignore[reportArgumentType]


def test_every_sample_needs_its_seed_and_its_numbers() -> None:
    engine = Engine(tiny(), max_batch_size=1, max_length=64)
    with pytest.raises(ConfigError, match="3 prompts x 2 samples but 5 seeds"):
        rollout(engine, PROMPTS, samples_per_prompt=2, params=SamplingParams(), seeds=range(5))
    with pytest.raises(ValueError, match="2 ids, 1 in mask"):
        Sample(0, [1], [2, 3], [1], [0.0, 0.0], "stop")


def test_seeds_belong_to_their_names_alone() -> None:
    seeds: Sequence[int] = [seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    assert len(set(seeds)) == 512
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)
