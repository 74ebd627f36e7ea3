from collections.abc import Iterator, Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from minimind.errors import ConfigError
from minimind.inference.engine import Engine
from minimind.inference.request import Completion, Event
from minimind.inference.sampling import SamplingParams
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def tiny(seed: int = 0, **fields: object) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,  # far from uniform, so that greedy choices are not ties
            **fields,
        }  # pyright: ignore[reportArgumentType]
    )
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny()


def prompts_of(n: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def by_hand(model: Transformer, prompt: Sequence[int], n: int, stop: Sequence[int] = ()) -> list[int]:
    """Greedy decoding without cache and without engine."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stop:
                break
    return ids[len(prompt) :]


def log_softmax(model: Transformer, ids: Sequence[int], temperature: float) -> Tensor:
    with torch.no_grad():
        return (model(torch.tensor([list(ids)])).logits[0] / temperature).log_softmax(-1)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 32])
def test_greedy_equals_decoding_by_hand_whatever_the_number_of_rows(model: Transformer, rows: int) -> None:
    prompts = prompts_of(20)
    completions = Engine(model, max_batch_size=rows, max_length=64).generate(prompts, GREEDY)
    assert [c.ids for c in completions] == [by_hand(model, p, 12) for p in prompts]
    assert {c.finish_reason for c in completions} == {"length"}


def test_mixture_of_experts_decodes_the_same_alone_and_together() -> None:
    model = tiny(use_moe=True)
    prompts = prompts_of(9)
    together = Engine(model, max_batch_size=4, max_length=64).generate(prompts, GREEDY)
    assert [c.ids for c in together] == [by_hand(model, p, 12) for p in prompts]


def test_stop_ids_end_an_answer_and_are_its_last_id(model: Transformer) -> None:
    prompts = prompts_of(16)
    stop = tuple(range(3, 20))
    params = SamplingParams(temperature=0, max_tokens=30, stop_ids=stop)
    completions = Engine(model, max_batch_size=5, max_length=64).generate(prompts, params)
    assert [c.ids for c in completions] == [by_hand(model, p, 30, stop) for p in prompts]
    for completion in completions:
        assert (completion.finish_reason == "stop") == (completion.ids[-1] in stop)
        assert not set(completion.ids[:-1]) & set(stop)
    assert {c.finish_reason for c in completions} == {"stop", "length"} or all(c.ids[-1] in stop for c in completions)


def test_long_prompts_run_in_chunks(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(10, longest=60)
    whole = Engine(model, max_batch_size=4, max_length=80).generate(prompts, GREEDY)
    monkeypatch.setattr("minimind.inference.runner.PREFILL_CHUNK", 7)
    chunked = Engine(model, max_batch_size=4, max_length=80).generate(prompts, GREEDY)
    assert [c.ids for c in chunked] == [c.ids for c in whole]


def test_streams_read_in_turn_equal_the_batch(model: Transformer) -> None:
    prompts = prompts_of(3)
    expected = [c.ids for c in Engine(model, max_length=64).generate(prompts, GREEDY)]
    engine = Engine(model, max_batch_size=2, max_length=64)
    streams = [engine.stream(prompt, GREEDY) for prompt in prompts]
    streamed: list[list[int]] = [[], [], []]
    alive = set(range(3))
    while alive:
        for i in sorted(alive):
            event = next(streams[i], None)
            if event is None:
                alive.remove(i)
            else:
                streamed[i].append(event.token_id)
    assert streamed == expected
    assert engine.num_running == engine.num_waiting == 0
    assert engine.step() == []


SAMPLED = [
    SamplingParams(seed=1, max_tokens=15, logprobs=True),
    SamplingParams(seed=2, temperature=0.6, top_k=10, max_tokens=9, logprobs=True),
    SamplingParams(seed=3, temperature=1.5, top_p=0.7, max_tokens=20, logprobs=True),
    SamplingParams(seed=4, min_p=0.2, repetition_penalty=1.5, max_tokens=11, stop_ids=(5, 6, 7, 8, 9), logprobs=True),
    SamplingParams(temperature=0, repetition_penalty=1.7, max_tokens=14, logprobs=True),
    SamplingParams(temperature=0, max_tokens=3),
    SamplingParams(seed=-5, top_p=0.9, top_k=30, min_p=0.01, max_tokens=17, logprobs=True),
    SamplingParams(seed=1, max_tokens=15, logprobs=True),
]


@pytest.mark.parametrize("rows", [2, 8])
def test_a_seed_gives_the_same_tokens_alone_and_among_others(model: Transformer, rows: int) -> None:
    prompts = prompts_of(8)
    together = Engine(model, max_batch_size=rows, max_length=64).generate(prompts, SAMPLED)
    backwards = Engine(model, max_batch_size=rows, max_length=64).generate(prompts[::-1], SAMPLED[::-1])[::-1]
    alone = [
        Engine(model, max_batch_size=1, max_length=64).generate([p], s)[0]
        for p, s in zip(prompts, SAMPLED, strict=True)
    ]
    assert [c.ids for c in together] == [c.ids for c in alone] == [c.ids for c in backwards]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]


def test_log_probs_equal_those_of_a_forward_over_the_whole_answer(model: Transformer) -> None:
    prompts = prompts_of(8)
    for prompt, params, c in zip(
        prompts, SAMPLED, Engine(model, max_batch_size=3, max_length=64).generate(prompts, SAMPLED), strict=True
    ):
        if not params.logprobs:
            assert c.log_probs == []
            continue
        table = log_softmax(model, prompt + c.ids, params.temperature or 1.0)
        expected = [table[len(prompt) + t - 1, token].item() for t, token in enumerate(c.ids)]
        assert c.log_probs == pytest.approx(expected, abs=1e-4)


def test_samples_of_the_engine_follow_the_model(model: Transformer) -> None:
    prompt = [5, 9, 11]
    probs = log_softmax(model, prompt, 2.0)[-1].exp()
    n = 3000
    engine = Engine(model, max_batch_size=256, max_length=8)
    params = [SamplingParams(temperature=2.0, seed=seed, max_tokens=1) for seed in range(n)]
    counts = torch.zeros(97)
    for completion in engine.generate([prompt] * n, params):
        counts[completion.ids[0]] += 1
    is_common = probs * n >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([probs[is_common], probs[~is_common].sum()[None]]) * n
    chi_square = ((observed - expected) ** 2 / expected.clamp(min=1)).sum().item()
    freedom = len(observed) - 1
    assert freedom > 10
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean + 4 standard deviations


def test_groups_of_one_prompt_run_it_once_and_still_equal_single_runs(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=8, max_length=64)
    seen: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    prompts = [p for p in prompts_of(2, longest=9) for _ in range(4)]
    params = [SamplingParams(seed=seed, max_tokens=6) for seed in range(8)]
    completions = engine.generate(prompts, params)
    handle.remove()
    assert seen[0] == (2, max(map(len, prompts)))
    assert seen[1:] == [(8, 1)] * 5
    alone = [
        Engine(model, max_batch_size=1, max_length=64).generate([p], s)[0].ids
        for p, s in zip(prompts, params, strict=True)
    ]
    assert [c.ids for c in completions] == alone
    assert len({tuple(c.ids) for c in completions}) > 4


def test_stragglers_do_not_carry_the_finished_rows_along(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=16, max_length=64)
    widths: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    params = [SamplingParams(temperature=0, max_tokens=40 if i in (3, 9) else 4, logprobs=True) for i in range(16)]
    prompts = prompts_of(16, longest=20)
    completions = engine.generate(prompts, params)
    handle.remove()
    decode = widths[-39:]
    assert decode[:3] == [16] * 3
    assert decode[3:] == [2] * 36
    assert completions[3].ids == by_hand(model, prompts[3], 40)
    assert completions[9].ids == by_hand(model, prompts[9], 40)


def test_penalised_rows_survive_being_moved(model: Transformer) -> None:
    params = [SamplingParams(temperature=0, repetition_penalty=1.9, max_tokens=25 if i == 7 else 2) for i in range(8)]
    prompts = prompts_of(8, longest=6)
    together = Engine(model, max_batch_size=8, max_length=64).generate(prompts, params)[7]
    alone = Engine(model, max_batch_size=1, max_length=64).generate([prompts[7]], params[7])[0]
    assert together.ids == alone.ids
    assert len(set(alone.ids)) > len(set(by_hand(model, prompts[7], 25)))


def test_requests_that_come_later_join_the_running_ones(model: Transformer) -> None:
    prompts = prompts_of(6)
    engine = Engine(model, max_batch_size=3, max_length=64)
    answers: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    waiting = list(prompts)
    order: list[int] = []
    while waiting or engine.num_running or engine.num_waiting:
        if waiting:
            order.append(engine.submit(waiting.pop(0), GREEDY))
        for event in engine.step():
            answers.setdefault(event.request_id, []).append(event.token_id)
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
    assert [answers[i] for i in order] == [by_hand(model, p, 12) for p in prompts]
    assert set(ends.values()) == {"length"}
    assert len(set(order)) == 6


def test_prompts_of_any_order_of_lengths_fill_all_rows_at_once(model: Transformer) -> None:
    prompts = sorted(prompts_of(6), key=len)
    prompts = [prompts[i] for i in (4, 0, 5, 2, 3, 1)]
    engine = Engine(model, max_batch_size=6, max_length=64)
    order = [engine.submit(prompt, GREEDY) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    while events := engine.step():
        for event in events:
            answers.setdefault(event.request_id, []).append(event.token_id)
    assert [answers[i] for i in order] == [by_hand(model, p, 12) for p in prompts]


def test_cancel_frees_the_row_and_is_reported_once(model: Transformer) -> None:
    prompts = prompts_of(4)
    engine = Engine(model, max_batch_size=2, max_length=64)
    ids = [engine.submit(prompt, GREEDY) for prompt in prompts]
    engine.step()
    assert engine.cancel(ids[0])  # running
    assert engine.cancel(ids[3])  # waiting
    assert not engine.cancel(ids[3])
    assert not engine.cancel(12345)
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    events: list[Event] = []
    while step := engine.step():
        events += step
    cancelled = [event for event in events if event.finish_reason == "cancelled"]
    assert [event.request_id for event in cancelled] == [ids[0], ids[3]]
    assert {event.token_id for event in cancelled} == {-1}
    answer = [event.token_id for event in events if event.request_id == ids[2]]
    assert answer == by_hand(model, prompts[2], 12)


def test_closing_a_stream_cancels_it(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=2, max_length=64)
    stream: Iterator[Event] = engine.stream([5, 6], GREEDY)
    next(stream)
    assert engine.num_running == 1
    stream.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    assert engine.num_running == 0
    assert engine.step() == []


def test_a_row_used_again_remembers_nothing(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=1, max_length=64)
    long, short = [[7] * 40, [8, 9]]
    engine.generate([long], GREEDY)
    assert engine.generate([short], GREEDY)[0].ids == by_hand(model, short, 12)


def test_an_answer_ends_where_the_row_is_full(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=2, max_length=20)
    completions = engine.generate([[5] * 17, [5] * 19], SamplingParams(temperature=0, max_tokens=50))
    assert [len(c.ids) for c in completions] == [3, 1]
    assert [c.finish_reason for c in completions] == ["length", "length"]
    assert completions[0].ids == by_hand(model, [5] * 17, 3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([5] * 20, r"20 tokens.*holds 20"),
        ([5, 97], "id 97 is outside the vocabulary of 97"),
        ([5, -1], "id -1"),
    ],
)
def test_an_impossible_prompt_is_refused_before_anything_runs(
    model: Transformer, prompt: list[int], message: str
) -> None:
    engine = Engine(model, max_batch_size=2, max_length=20)
    for refused in (
        lambda: engine.submit(prompt),
        lambda: engine.stream(prompt),
        lambda: engine.generate([[5, 6], prompt]),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert engine.num_running == engine.num_waiting == 0


def test_impossible_engines_are_refused(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="max_batch_size 0"):
        Engine(model, max_batch_size=0)
    with pytest.raises(ConfigError, match=r"max_length 129.*128"):
        Engine(model, max_length=129)
    with pytest.raises(ConfigError, match="2 prompts but 1 sampling"):
        Engine(model).generate([[5], [6]], [GREEDY])


def test_no_prompts_no_answers(model: Transformer) -> None:
    assert Engine(model).generate([]) == []


def test_a_policy_in_training_mode_decides_without_dropout_and_can_be_trained_afterwards() -> None:
    model = tiny(dropout=0.5).train()
    engine = Engine(model, max_length=64)
    prompt = prompts_of(1)[0]
    first = engine.generate([prompt], GREEDY)[0]
    assert model.training
    assert all(module.training for module in model.modules())
    assert engine.generate([prompt], GREEDY)[0].ids == first.ids
    loss = model(torch.tensor([prompt + first.ids])).logits.logsumexp(-1).mean()
    loss.backward()  # nothing the engine left behind belongs to inference mode
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    assert engine.generate([prompt], GREEDY)[0].ids == by_hand(model, prompt, 12)


def test_a_fault_in_the_model_leaves_no_request_behind(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=2, max_length=64)
    calls = 0

    def fail(module: object, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(prompts_of(4), GREEDY)
    handle.remove()
    assert engine.num_running == engine.num_waiting == 0
    assert engine.generate([[5, 6]], GREEDY)[0].ids == by_hand(model, [5, 6], 12)


def test_bfloat16_products_with_float32_weights(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=4, max_length=64, dtype=torch.bfloat16)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=True)
    prompts = prompts_of(5)
    for prompt, c in zip(prompts, engine.generate(prompts, params), strict=True):
        assert isinstance(c, Completion)
        table = log_softmax(model, prompt + c.ids, 1.0)
        expected = [table[len(prompt) + t - 1, token].item() for t, token in enumerate(c.ids)]
        assert c.log_probs == pytest.approx(expected, abs=0.35)


def test_unseeded_sampling_repeats_under_the_global_seed_and_differs_without(model: Transformer) -> None:
    engine = Engine(model, max_batch_size=4, max_length=64)
    params = SamplingParams(max_tokens=10)

    def run() -> list[list[int]]:
        return [c.ids for c in engine.generate([[5, 6]] * 3, params)]

    torch.manual_seed(11)
    first = run()
    second = run()
    torch.manual_seed(11)
    assert run() == first
    assert second != first
    assert first[0] != first[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_schedule_of_requests_gives_each_its_own_answer(model: Transformer, seed: int) -> None:
    random = Random(seed)
    prompts = prompts_of(6, seed=seed, longest=20)  # few, so that groups form
    alone = Engine(model, max_batch_size=1, max_length=48)
    engine = Engine(model, max_batch_size=random.choice([3, 8, 17]), max_length=48)
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    while len(wanted) < 45 or engine.num_running or engine.num_waiting:
        for _ in range(random.choice([0, 0, 1, 2, 9]) if len(wanted) < 45 else 0):
            params = SamplingParams(
                temperature=random.choice([0, 0.9]),
                top_p=random.choice([1, 0.8]),
                repetition_penalty=random.choice([1, 1.3]),
                seed=random.randrange(1000),
                stop_ids=tuple(random.sample(range(3, 97), random.choice([0, 8]))),
                max_tokens=random.randint(1, 40),
            )
            prompt = random.choice(prompts)
            request_id = engine.submit(prompt, params)
            wanted[request_id] = alone.generate([prompt], params)[0].ids
        if wanted and random.random() < 0.1:
            request_id = random.choice(list(wanted))
            if engine.cancel(request_id):
                cancelled.add(request_id)
        for event in engine.step():
            assert (event.finish_reason == "cancelled") == (event.token_id < 0)
            if event.token_id >= 0:
                found.setdefault(event.request_id, []).append(event.token_id)
    assert cancelled
    for request_id, ids in wanted.items():
        if request_id in cancelled:
            assert found.get(request_id, []) == ids[: len(found.get(request_id, []))]
        else:
            assert found[request_id] == ids
