"""Rollouts over HTTP: the same ids and log-probabilities as here, whatever goes wrong on the way."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rl.fake_vllm import FakeVLLM, Fault, serving
from training.tiny_run import DENSE, tiny_tokenizer

from minimind import checkpoint
from minimind.config import check
from minimind.errors import ConfigError, OutOfResourcesError
from minimind.inference.engine import Engine
from minimind.inference.request import Completion
from minimind.inference.sampling import SamplingParams
from minimind.model.transformer import Transformer
from minimind.rl import connection
from minimind.rl.config import RolloutConfig
from minimind.rl.remote import VLLMServer, publish
from minimind.rl.rollout import rollout, seed_of

CONFIG = replace(DENSE, hidden_size=32, max_position_embeddings=128, initializer_range=0.3)
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65]]
END = 2
PARAMS = SamplingParams(temperature=0.9, max_tokens=20, stop_ids=(END,))


def policy(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG).eval()


def change(model: Transformer) -> None:
    """Stand for an optimizer step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVLLM]:
    """A server with other weights than the policy's."""
    start = publish(tmp_path / "start", policy(9), tiny_tokenizer(), 0)
    with serving(start) as server:
        yield server


def client(fake: FakeVLLM, model: Transformer, run: Path, **settings: Any) -> VLLMServer:
    config = RolloutConfig("vllm", url=fake.url, timeout=10.0, patience=5.0, connections=4)
    config = replace(config, **settings)
    check(config)

    def hand_over(step: int) -> Path:
        return publish(run, model, tiny_tokenizer(), step)

    return VLLMServer(config, publish=hand_over, run=run, vocab_size=CONFIG.vocab_size)


def sampled(backend: Any) -> list[Any]:
    seeds = [seed_of(7, place, k) for place in range(len(PROMPTS)) for k in range(3)]
    return rollout(backend, PROMPTS, samples_per_prompt=3, params=PARAMS, seeds=seeds)


def local(model: Transformer) -> list[Any]:
    return sampled(Engine(model, max_batch_size=4, max_length=64))


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs) == 9
    for one, other in zip(ours, theirs, strict=True):
        assert (one.ids, one.mask, one.finish_reason) == (other.ids, other.mask, other.finish_reason)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_rollouts_there_are_those_here(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    server = client(fake, model, tmp_path / "run")
    server.at(3)
    assert_equal(sampled(server), local(model))
    assert len({tuple(one.ids) for one in sampled(server)}) == 9
    assert (server.held_step, server.staleness) == (3, 0)
    assert fake.calls == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/update_weight_version"]
    asked = fake.asked[0]
    assert asked["logprobs"] == 0
    assert asked["stop_token_ids"] == [END]
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


def test_what_the_server_loads_is_a_checkpoint(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    client(fake, model, tmp_path / "run").at(12)
    found, _ = checkpoint.load(tmp_path / "run" / "published" / "checkpoints" / "step-000012")
    for name, weight in model.state_dict().items():
        assert found.state_dict()[name].equal(weight)


def test_weights_are_handed_over_when_they_would_be_too_old(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    server = client(fake, model, tmp_path / "run", max_staleness=2)
    held: list[tuple[int, int]] = []
    for step in range(7):
        server.at(step)
        held.append((server.held_step, server.staleness))
    assert held == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2), (6, 0)]
    server.at(5)  # another run, or one that was resumed further back: newer weights are as wrong as older ones
    assert (server.held_step, server.staleness) == (5, 0)
    change(model)
    server.at(8)
    assert_equal(sampled(server), local(model))


def test_a_label_of_someone_else_is_not_trusted(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    client(fake, policy(5), tmp_path / "other").at(4)
    server = client(fake, model, tmp_path / "run", max_staleness=100)
    server.at(4)
    assert_equal(sampled(server), local(model))


TRANSIENT: list[list[Fault]] = [
    ["500"],
    ["429"],
    ["drop"],
    ["half"],
    ["abort"],
    ["drop", "500", "half", "429", "abort"],
]


@pytest.mark.parametrize("faults", TRANSIENT, ids="+".join)
def test_faults_that_pass_change_nothing(faults: list[Fault], fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    server = client(fake, model, tmp_path / "run")
    server.at(0)
    fake.faults.extend(faults)
    assert_equal(sampled(server), local(model))
    assert not fake.faults


def test_a_slow_answer_is_asked_for_again(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    server = client(fake, model, tmp_path / "run", timeout=0.5)
    server.at(0)
    fake.faults.extend(["slow"])
    assert_equal(sampled(server), local(model))
    assert len(fake.asked) > 9 or not fake.faults


def test_a_server_that_restarts_in_a_rollout_samples_it_again(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    server = client(fake, model, tmp_path / "run")
    server.at(2)
    fake.faults.extend(["", "", "", "restart"])  # pyright: ignore[reportArgumentType] - "" is none
    assert_equal(sampled(server), local(model))
    assert fake.calls.count("/collective_rpc") == 2
    fake.restart()  # between two rollouts
    server.at(2)
    assert_equal(sampled(server), local(model))


def test_a_server_that_always_restarts_is_given_up(fake: FakeVLLM, tmp_path: Path) -> None:
    server = client(fake, policy(), tmp_path / "run")
    server.at(2)
    fake.faults.extend(["restart" for _ in range(100)])
    with pytest.raises(OutOfResourcesError, match=r"127\.0\.0\.1.* changed its weights 3 times"):
        sampled(server)


WRONG: dict[Fault, str] = {
    "other prompt": "serves another model or another tokenizer",
    "other ids": "serves another model or another tokenizer",
    "no ids": "has no 'token_ids'.*return_token_ids",
}


@pytest.mark.parametrize("fault", WRONG)
def test_another_model_is_refused_at_once(fault: Fault, fake: FakeVLLM, tmp_path: Path) -> None:
    server = client(fake, policy(), tmp_path / "run")
    server.at(0)
    fake.faults.append(fault)
    with pytest.raises(ConfigError, match=WRONG[fault]):
        sampled(server)


def test_an_answer_without_its_end_is_refused(fake: FakeVLLM, tmp_path: Path) -> None:
    server = client(fake, policy(), tmp_path / "run")
    choice = {"finish_reason": "stop", "prompt_token_ids": [1], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    params = replace(PARAMS, max_tokens=5)
    found = server._read({"choices": [{**choice, "token_ids": [7, END]}]}, [1], params)
    assert found == Completion([7, END], [-1.0, -2.0], "stop")
    for ids in ([7, 8], [END], [7, END, 9]):
        with pytest.raises(ConfigError, match="another model or another tokenizer"):
            server._read({"choices": [{**choice, "token_ids": ids}]}, [1], params)


def test_a_server_that_is_gone_is_named_with_the_next_move(fake: FakeVLLM, tmp_path: Path) -> None:
    server = client(fake, policy(), tmp_path / "run", patience=0.1)
    server.at(0)
    fake.faults.extend(["500" for _ in range(1000)])
    with pytest.raises(OutOfResourcesError, match=r"http://127\.0\.0\.1.*POST /v1/completions.*500.*the same command"):
        sampled(server)
    nobody = replace(server.config, url="http://127.0.0.1:9")
    gone = VLLMServer(nobody, publish=lambda step: tmp_path, run=tmp_path, vocab_size=10)
    with pytest.raises(OutOfResourcesError, match=r"http://127\.0\.0\.1:9 .*Start it again"):
        gone.at(0)
    assert not any(thread.name.startswith("rollout") and not thread.daemon for thread in _alive_after(2.0))


def _alive_after(seconds: float) -> list[threading.Thread]:
    """Threads that are still there when those of a rollout had time to end."""
    for thread in threading.enumerate():
        if thread.name.startswith("rollout"):
            thread.join(seconds)
    return [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]


def test_a_server_that_cannot_be_handed_weights(fake: FakeVLLM, tmp_path: Path) -> None:
    fake.cannot_load = True
    with pytest.raises(ConfigError, match=r"could not load /.*step-000001.*--rollout\.server-path"):
        client(fake, policy(), tmp_path / "run").at(1)
    assert not fake.is_paused
    fake.is_dev = False
    with pytest.raises(ConfigError, match=r"POST /pause.*VLLM_SERVER_DEV_MODE=1.*--rollout\.reload manual"):
        client(fake, policy(), tmp_path / "run").at(1)


def test_the_server_may_see_the_run_elsewhere(fake: FakeVLLM, tmp_path: Path) -> None:
    model = policy()
    (tmp_path / "there").symlink_to(tmp_path / "run")
    server = client(fake, model, tmp_path / "run", server_path=str(tmp_path / "there"))
    server.at(1)
    assert_equal(sampled(server), local(model))


def test_a_server_without_labels_is_used_with_a_warning(
    fake: FakeVLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.has_labels = False
    model = policy()
    server = client(fake, model, tmp_path / "run")
    server.at(1)
    assert_equal(sampled(server), local(model))
    assert capsys.readouterr().err.count("keeps no label") == 1


def test_by_hand_the_path_that_is_served_says_the_step(fake: FakeVLLM, tmp_path: Path) -> None:
    model, run = policy(), tmp_path / "run"
    fake.is_dev = False
    server = client(fake, model, run, reload="manual", patience=0.3)
    with pytest.raises(OutOfResourcesError, match=r"did not serve /.*step-000004 within 0\.3 s.*max-staleness"):
        server.at(4)
    fake.path = run / "published" / "checkpoints" / "step-000004"
    fake.restart()
    server.at(4)
    assert_equal(sampled(server), local(model))
    patient = client(fake, model, run, reload="manual", max_staleness=2)
    patient.at(6)
    assert (patient.held_step, patient.staleness) == (4, 2)


def test_a_name_that_is_not_served_is_refused(fake: FakeVLLM, tmp_path: Path) -> None:
    server = client(fake, policy(), tmp_path / "run", served_model="large", reload="manual")
    with pytest.raises(ConfigError, match=r"serves tiny; name one with --rollout\.served-model"):
        server.at(0)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError) as found:
        check(RolloutConfig("vllm", url="localhost:8000", timeout=0, connections=0, max_staleness=-1, patience=-1))
    for name in ("url = 'localhost:8000'", "timeout = 0", "connections = 0", "max_staleness = -1", "patience = -1"):
        assert name in str(found.value)
    with pytest.raises(ConfigError, match="without /v1"):
        check(RolloutConfig(url="http://localhost:8000/v1"))


def test_no_prompts_no_requests(fake: FakeVLLM, tmp_path: Path) -> None:
    found: list[Completion] = client(fake, policy(), tmp_path / "run").generate([], [])
    assert found == []
    assert not fake.asked
