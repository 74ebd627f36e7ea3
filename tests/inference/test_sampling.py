import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimind.errors import ConfigError
from minimind.inference.sampling import RowParams, SamplingParams, key_of, sample, truncate, uniforms_of

CPU = torch.device("cpu")


def draw(logits: Tensor, params: list[SamplingParams], u: np.ndarray, seen: Tensor | None = None) -> list[int]:
    return sample(logits, RowParams.of(params, CPU), u, seen)[0].tolist()


def many(logits: list[float], params: SamplingParams, n: int = 20_000, seed: int = 1) -> np.ndarray:
    """Counts of n draws from one distribution, one row per draw."""
    rows = torch.tensor([logits]).expand(n, -1)
    u = uniforms_of(np.full(n, key_of(seed), np.uint64), np.arange(n, dtype=np.uint64))
    ids, _ = sample(rows, RowParams.of([params] * n, CPU), u)
    return np.bincount(ids.numpy(), minlength=len(logits))


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    expected = probs * counts.sum()
    assert counts[probs == 0].sum() == 0
    keep = probs > 0
    return float((((counts - expected) ** 2)[keep] / expected[keep]).sum())


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -math.inf])
# 99.9 % points of chi-square with 1..4 degrees of freedom; the seed is fixed, so this either always or never passes
CHI_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}


@pytest.mark.parametrize(
    ("params", "probs"),
    [
        (SamplingParams(), softmax(LOGITS)),
        (SamplingParams(temperature=0.5), softmax(LOGITS / 0.5)),
        (SamplingParams(temperature=3.0), softmax(LOGITS / 3.0)),
        (SamplingParams(top_k=2), softmax(np.where(LOGITS >= 1.5, LOGITS, -math.inf))),
        # probabilities 0.46 0.17 0.06 0.02 0.28 0: 0.46 + 0.28 = 0.74 < 0.8 <= 0.91
        (SamplingParams(top_p=0.8), softmax(np.where(LOGITS >= 1.0, LOGITS, -math.inf))),
        # e^(0 - 2) = 0.135 < 0.2 < e^(1 - 2) = 0.37
        (SamplingParams(min_p=0.2), softmax(np.where(LOGITS >= 1.0, LOGITS, -math.inf))),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, probs: np.ndarray) -> None:
    counts = many(LOGITS.tolist(), params)
    assert chi_square(counts, probs) < CHI_999[int((probs > 0).sum()) - 1]


def test_the_chi_square_test_can_fail() -> None:
    counts = many(LOGITS.tolist(), SamplingParams(temperature=1.1))
    assert chi_square(counts, softmax(LOGITS)) > 18.47


def test_uniforms_are_uniform_over_counters_and_over_seeds() -> None:
    n = 100_000
    over_counters = uniforms_of(np.full(n, key_of(3), np.uint64), np.arange(n, dtype=np.uint64))
    over_seeds = uniforms_of(np.array([key_of(s) for s in range(n)], np.uint64), np.zeros(n, np.uint64))
    for u in (over_counters, over_seeds):
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.bincount((u * 10).astype(int), minlength=10)
        assert chi_square(counts, np.full(10, 0.1)) < 27.88  # 99.9 % with 9 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(over_counters, over_seeds)[0, 1]) < 0.01


def test_seeds_of_any_size_and_sign_are_allowed_and_differ() -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 2, -(2**62)]
    keys = {key_of(seed) for seed in seeds}
    assert len(keys) == len(seeds)
    assert all(0 <= key < 2**64 for key in keys)


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40),
    p=st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 4),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_top_p_keeps_the_smallest_set_with_mass_p(logits: list[float], p: float, temperature: float) -> None:
    scaled = torch.tensor([logits]) / temperature
    kept = truncate(scaled, RowParams.of([SamplingParams(top_p=p)], CPU)).isfinite()[0].numpy()
    probs = softmax(scaled[0].double().numpy())
    mass, least = probs[kept].sum(), probs[kept].min()
    tied = probs[kept][probs[kept] <= least * (1 + 1e-5)].sum()
    assert mass >= p - 1e-6
    assert mass - tied < p + 1e-6  # without its least likely token (and ties) it would not do
    assert kept.all() or probs[~kept].max() <= least + 1e-7


def test_top_p_is_the_same_whether_the_set_is_found_at_once_or_by_sorting_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 4, 8)[:, None]
    params = RowParams.of([SamplingParams(top_p=p) for p in (0.5, 0.9, 0.99, 1.0, 0.1, 0.7, 0.95, 0.999)], CPU)
    quick = truncate(logits, params)
    monkeypatch.setattr("minimind.inference.sampling._TOP_P_GUESS", 300)
    assert torch.equal(quick, truncate(logits, params))
    monkeypatch.setattr("minimind.inference.sampling._TOP_P_GUESS", 1)
    assert torch.equal(quick, truncate(logits, params))
    assert quick[3].isfinite().all()
    assert not quick[0].isfinite().all()


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40), st.integers(1, 50))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_top_k_keeps_the_k_largest_and_ties(logits: list[float], k: int) -> None:
    row = torch.tensor([logits])
    kept = truncate(row, RowParams.of([SamplingParams(top_k=k)], CPU)).isfinite()[0]
    limit = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    assert kept.tolist() == [value >= limit for value in logits]


def test_filters_of_transformers_agree() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.rand(6, 50, generator=torch.Generator().manual_seed(1)) < 0.2
    seen[:, 0] = True  # a row of ids is needed below
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.85, min_p=0.03, repetition_penalty=1.3)
    expected = logits
    ids = [seen[b].nonzero()[:, 0] for b in range(6)]
    expected = torch.cat(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3)(i[None], logits[b : b + 1].clone())
            for b, i in enumerate(ids)
        ]
    )
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.85),
        transformers.MinPLogitsWarper(0.03),
    ):
        expected = warper(None, expected)
    penalised = torch.where(seen, torch.where(logits < 0, logits * 1.3, logits / 1.3), logits)
    ours = truncate(penalised / 0.7, RowParams.of([params], CPU))
    assert 1 < ours.isfinite().sum() < 6 * 20
    torch.testing.assert_close(ours, expected)
    # and `sample` draws from just that
    u = np.random.default_rng(0).random((200, 6))
    for row in u:
        drawn = draw(logits, [params] * 6, row, seen)
        assert all(expected[b, token].isfinite() for b, token in enumerate(drawn))


def mixed_params() -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0.3, top_p=0.7),
        SamplingParams(temperature=2.0, min_p=0.1),
        SamplingParams(repetition_penalty=1.8),
        SamplingParams(temperature=0, repetition_penalty=2.5),
        SamplingParams(temperature=0.9, top_k=200, top_p=0.9, min_p=0.05, repetition_penalty=0.8, logprobs=True),
    ]


def test_a_row_alone_equals_the_row_in_a_mixed_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    params = mixed_params()
    for _ in range(30):
        logits = torch.randn(len(params), 64, generator=generator) * 2
        seen = torch.rand(len(params), 64, generator=generator) < 0.3
        u = torch.rand(len(params), generator=generator, dtype=torch.float64).numpy()
        together = draw(logits, params, u, seen)
        alone = [draw(logits[b : b + 1], [p], u[b : b + 1], seen[b : b + 1])[0] for b, p in enumerate(params)]
        assert together == alone


def test_temperature_zero_takes_the_most_likely_and_needs_no_randomness() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9], [-math.inf, -2.0, -1.0]])
    ids, log_probs = sample(logits, RowParams.of([SamplingParams(temperature=0, logprobs=True)] * 2, CPU))
    assert ids.tolist() == [1, 2]
    assert log_probs is not None
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    with pytest.raises(ValueError, match="uniforms"):
        sample(logits, RowParams.of([SamplingParams()] * 2, CPU))


def test_log_probs_are_of_the_temperature_and_of_no_filter() -> None:
    logits = torch.tensor([[1.0, 0.5, -1.0, 0.0]])
    params = SamplingParams(temperature=0.5, top_k=1, repetition_penalty=1.5, logprobs=True)
    seen = torch.tensor([[True, False, False, False]])
    ids, log_probs = sample(logits, RowParams.of([params], CPU), np.array([0.3]), seen)
    assert ids.tolist() == [0]
    assert log_probs is not None
    assert log_probs.item() == pytest.approx((logits / 0.5).log_softmax(-1)[0, 0].item(), abs=1e-6)


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = torch.tensor([[1.0, 0.9, -1.0], [-1.0, -1.1, -5.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    greedy = SamplingParams(temperature=0, repetition_penalty=1.2)
    assert draw(logits, [greedy] * 2, np.zeros(2), seen) == [1, 1]  # 1/1.2 < 0.9 and -1 * 1.2 < -1.1


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1.0, 1e6])
def test_hostile_logits_never_become_nan(temperature: float) -> None:
    logits = torch.tensor([[-math.inf, 4e38 / 2, -math.inf, -1e38], [0.0, -math.inf, -math.inf, -math.inf]])
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1, logprobs=True)
    for u in (0.0, 0.5, 1 - 2.0**-53):
        ids, log_probs = sample(logits, RowParams.of([params] * 2, CPU), np.array([u, u]))
        assert ids.tolist() == [1, 0]
        assert log_probs is not None
        assert log_probs.isfinite().all()


def test_a_token_of_probability_zero_is_never_drawn_at_the_ends() -> None:
    logits = torch.full((1, 9), -math.inf)
    logits[0, 3:6] = torch.tensor([0.3, 0.1, 0.2])
    assert draw(logits, [SamplingParams()], np.array([0.0])) == [3]
    assert draw(logits, [SamplingParams()], np.array([1 - 2.0**-53])) == [5]


def test_impossible_parameters_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(temperature=-1, top_k=-2, top_p=0, min_p=2, repetition_penalty=0, max_tokens=0)
    for name in ("temperature -1", "top_k -2", "top_p 0", "min_p 2", "repetition_penalty 0", "max_tokens 0"):
        assert name in str(error.value)
    with pytest.raises(ConfigError, match="temperature nan"):
        SamplingParams(temperature=math.nan)
