"""`minimind agent`: it learns which tool to call, replays bit for bit, and takes whatever a tool or a row does."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rl.fake_vllm import serving
from stages.test_exactness import torchrun
from stages.tiny_rollouts import rows_of
from stages.tiny_stage import DENSE, Files, after_update, send, train, write_rows

from minimind import checkpoint
from minimind.config import parse
from minimind.data.prompt import Prompt
from minimind.errors import ConfigError, DataError, Interrupted
from minimind.rl import connection
from minimind.rl.episodes import solve
from minimind.rl.rewards import contains_gt
from minimind.rl.scoring import Answer
from minimind.rl.tools import Toolbox
from minimind.stages import agent
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render_text
from minimind.tokenizer.train import train as train_tokenizer
from minimind.training.loop import FitResult
from minimind.training.metrics import read_metrics

OWN = """
def left() -> str:
    return "dust"

def right() -> str:
    return "gold"
"""
SCHEMAS = [{"type": "function", "function": {"name": name}} for name in ("left", "right")]
QUESTIONS = ("Dig.", "Where?", "Go on.")


SHORT = ("--observation-tokens", "20", "--max-tokens", "40")
"""Where the schemas of the file, which are longer, must fit."""


def messages(question: str, tool: str, found: str) -> list[dict[str, Any]]:
    call = {"name": tool, "arguments": {}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": found},
        {"role": "assistant", "content": found},
    ]


@pytest.fixture(scope="module")
def started(shared_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model that calls one of two tools, either as often as the other, and says what it replied."""
    files = replace(shared_files, folder=tmp_path_factory.mktemp("agent"))
    (files.folder / "own.py").write_text(OWN)
    words = [render_text(Tokenizer.load(files.tokenizer), messages("Dig.", "left", "dust"), tools=SCHEMAS)]
    files = replace(files, tokenizer=files.folder / "tokenizer")
    train_tokenizer(words * 20, 420).save(files.tokenizer)  # it knows the schemas well, so that prompts are short
    shape = (*DENSE, "--model.hidden-size", "48")
    train(files.argv("pretrain", "base", "--steps", "2", shape=shape))
    rows = [
        {"messages": messages(question, tool, found), "tools": SCHEMAS}
        for question in QUESTIONS
        for tool, found in (("left", "dust"), ("right", "gold"))
    ]
    flags = ("--init-from", str(files.folder / "base"), "--steps", "80", "--save-every", "0", "--optim.lr", "1e-2")
    size = ("--data.row-length", "128", "--batch-tokens", "768")
    train(files.argv("sft", "sft", *flags, *size, data=write_rows(files.folder / "sft.jsonl", rows)))
    return files


def prompt_rows() -> list[dict[str, Any]]:
    return [
        {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": ""}], "gt": ["gold"]}
        | {"tools": SCHEMAS}
        for question in QUESTIONS
    ]


def argv(started: Files, folder: Path, out: str, *more: str, data: Path | None = None) -> list[str]:
    data = data or write_rows(folder / "prompts.jsonl", prompt_rows())
    return [
        *("--init-from", str(started.folder / "sft"), "--out", str(folder / out), "--data", str(data)),
        *("--tools", str(started.folder / "own.py"), "--prompts", "4", "--samples", "4", "--max-tokens", "60"),
        *("--observation-tokens", "60", "--steps", "6", "--save-every", "0", "--sample-every", "0"),
        *("--data.validation-fraction", "0"),
        *("--device", "cpu", "--dtype", "float32", "--optim.lr", "1e-3"),
        *more,
    ]


def learn(words: list[str]) -> FitResult:
    return agent.run(parse(agent.Config, words, command="agent"))


def test_which_tool_to_call_is_learned(started: Files, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", prompt_rows())
    watch = ("--data.validation", str(held_out), "--eval-every", "100", "--sample-every", "100")
    flags = ("--steps", "20", "--prompts", "3", "--samples", "8", "--optim.lr", "1e-3", "--beta", "0", *watch)
    result = learn(argv(started, tmp_path, "run", *flags))
    rows = rows_of(tmp_path / "run")
    first, last = (sum(row["reward/contains_gt"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert first < 0.75
    assert last > first + 0.15
    assert rows[0]["calls"] > 0.5
    assert rows[0]["turns"] > 1.5
    assert {"failed_calls", "reward/valid_calls", "truncated", "answer_tokens"} <= rows[0].keys()
    assert abs(rows[0]["ratio"] - 1) < 1e-4  # what the engine said over several turns is what the trainer says
    model, tokenizer = checkpoint.load(result.checkpoint)
    box = Toolbox(started.folder / "own.py")
    found = solve(model, tokenizer, prompt_rows(), grader=contains_gt, tools=box, max_tokens=60)
    box.close()
    assert [one.is_correct for one in found] == [True] * 3
    assert {(one.num_turns, one.num_calls, one.num_failed_calls) for one in found} == {(2, 1, 0)}
    assert not any(one.is_truncated for one in found)
    assert "<tool_response>\ngold" in found[0].output
    assert found[0].answer.text == "gold"
    seen = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_reward" in row]
    assert (seen[0]["val_reward/contains_gt"], seen[-1]["val_reward/contains_gt"]) == (0, 1)  # greedily
    assert seen[-1]["val_turns"] == 2
    assert "tool_response" in (tmp_path / "run" / "samples.jsonl").read_text()


@pytest.mark.parametrize("stop", [2, 4], ids=["in the middle of a rollout", "between rollouts"])
def test_stopped_and_resumed_is_one_run(stop: int, started: Files, tmp_path: Path) -> None:
    flags = ("--rollout-epochs", "2", "--minibatches", "2", "--steps", "9", "--beta", "0.05")
    whole = learn(argv(started, tmp_path, "whole", *flags))
    assert learn(argv(started, tmp_path, "again", *flags)).state_hash == whole.state_hash
    with after_update(stop, send(signal.SIGINT)), pytest.raises(Interrupted):
        learn(argv(started, tmp_path, "cut", *flags))
    saved = checkpoint.read(tmp_path / "cut" / "latest")
    assert bool(saved.state["batches"]["trajectories"]) is (stop == 2)
    resumed = learn(argv(started, tmp_path, "cut", *flags))
    assert (resumed.steps, resumed.tokens, resumed.state_hash) == (9, whole.tokens, whole.state_hash)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert learn(argv(started, tmp_path, "other", *flags, "--seed", "1")).state_hash != whole.state_hash


@pytest.mark.slow
def test_two_processes_are_one(started: Files, tmp_path: Path) -> None:
    flags = ("--prompts", "5", "--steps", "4", "--micro-batch-tokens", "512")
    learn(argv(started, tmp_path, "one", *flags))
    assert torchrun(["agent", *argv(started, tmp_path, "two", *flags)]) == 0
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


def test_only_what_the_policy_chose_is_learned(started: Files, tmp_path: Path) -> None:
    learn(argv(started, tmp_path, "run", "--rollout-epochs", "2", "--steps", "1", "--save-every", "1"))
    saved = checkpoint.read(tmp_path / "run" / "latest").state["batches"]["trajectories"]
    samples = [one["sample"] for one in saved]
    assert len(samples) == 16
    told = [sample for sample in samples if 0 in sample["mask"]]
    assert told
    tokenizer = checkpoint.load(tmp_path / "run")[1]
    for sample in told:
        text = tokenizer.decode([i for i, chosen in zip(sample["ids"], sample["mask"], strict=True) if not chosen])
        assert "tool_response" in text
        assert sample["mask"][-1] == 1
    (row,) = rows_of(tmp_path / "run")
    assert row["step_weight"] == sum(sum(sample["mask"]) for sample in samples)


FAILING = """
import time

def left() -> str:
    raise ValueError("no way")

def right() -> str:
    time.sleep(100)
"""


def test_tools_that_fail_and_hang_do_not_end_a_run(started: Files, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FAILING)
    flags = ("--tools", str(tmp_path / "own.py"), "--tool-seconds", "0.1", "--steps", "2")
    result = learn(argv(started, tmp_path, "run", *flags))
    rows = rows_of(tmp_path / "run")
    assert result.steps == 2
    assert rows[0]["failed_calls"] > 0
    assert rows[0]["failed_calls"] == rows[0]["calls"]
    assert rows[0]["reward/contains_gt"] < 1


def test_rows_without_tools_are_offered_those_of_the_file(started: Files, tmp_path: Path) -> None:
    bare = [{"prompt": question, "gt": "gold"} for question in QUESTIONS]
    data = write_rows(tmp_path / "bare.jsonl", bare)
    learn(argv(started, tmp_path, "run", "--steps", "1", "--sample-every", "1", *SHORT, data=data))
    assert (
        '"name": "right", "parameters"'
        in json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])["prompt"]
    )


def test_bad_input_is_refused_before_anything_is_trained(started: Files, tmp_path: Path) -> None:
    def refused(error: type[Exception], *more: str, data: Path | None = None) -> str:
        with pytest.raises(error) as found:
            learn(argv(started, tmp_path, "bad", *more, data=data))
        assert not list((tmp_path / "bad").glob("checkpoints/*"))
        return str(found.value)

    bad: dict[str, Any] = {**prompt_rows()[0], "tools": [{"type": "function", "function": {"name": "lefd"}}]}
    offering = write_rows(tmp_path / "offering.jsonl", [*prompt_rows(), bad])
    assert f"{offering}:4: tools: nobody runs 'lefd'; did you mean 'left'" in refused(DataError, data=offering)
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "Dig.", "answer": "gold"}])
    assert "needs 'gt'" in refused(DataError, *SHORT, data=plain)
    words = [word for word in argv(started, tmp_path, "bad", data=plain) if word != "--tools"]
    words.remove(str(started.folder / "own.py"))
    with pytest.raises(DataError, match=r"plain\.jsonl:1: tools: is missing"):
        learn(words)
    assert "there is no file" in refused(ConfigError, "--tools", "nowhere.py")
    many = refused(ConfigError, "--max-turns", "0", "--observation-tokens", "0", "--tool-seconds", "0")
    for name in ("max_turns = 0", "observation_tokens = 0", "tool_seconds = 0.0"):
        assert name in many
    assert "room for" in refused(DataError, "--observation-tokens", "190")


def test_rollouts_on_a_server_are_those_here(started: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    flags = ("--rollout-epochs", "2", "--minibatches", "2", "--steps", "6")
    learn(argv(started, tmp_path, "here", *flags))
    with serving(checkpoint.resolve(started.folder / "sft")) as fake:
        there = ("--rollout.backend", "vllm", "--rollout.url", fake.url, "--rollout.connections", "4")
        fake.faults.extend(["500", "drop"])
        learn(argv(started, tmp_path, "there", *flags, *there))
        assert fake.calls.count("/collective_rpc") == 2  # one for each rollout
        with after_update(3, send(signal.SIGINT)), pytest.raises(Interrupted):
            learn(argv(started, tmp_path, "cut", *flags, *there))
        fake.restart()
        learn(argv(started, tmp_path, "cut", *flags, *there))
    here, rows = rows_of(tmp_path / "here"), rows_of(tmp_path / "there")
    for one, other in zip(here, rows, strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=2e-4), name
    assert {row["rollout_staleness"] for row in rows} == {0}
    assert all(row["rollout_gap"] < 1e-4 for row in rows)
    assert all(abs(row["importance"] - 1) < 1e-3 for row in rows)
    assert rows_of(tmp_path / "cut") == rows
    with after_update(3, send(signal.SIGINT)), pytest.raises(Interrupted):
        learn(argv(started, tmp_path, "moved", *flags))
    with serving(checkpoint.resolve(started.folder / "sft")) as fake:  # sampled here, learned further with a server
        learn(argv(started, tmp_path, "moved", *flags, "--rollout.backend", "vllm", "--rollout.url", fake.url))
    assert rows_of(tmp_path / "moved")[3]["importance"] == pytest.approx(1, abs=1e-6)


def test_rollouts_of_older_weights_are_told_and_corrected(
    started: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(checkpoint.resolve(started.folder / "sft")) as fake:
        there = ("--rollout.backend", "vllm", "--rollout.url", fake.url, "--rollout.max-staleness", "2")
        learn(argv(started, tmp_path, "old", *there, "--steps", "4", "--optim.lr", "1e-2"))
        rows = rows_of(tmp_path / "old")
        assert [row["rollout_staleness"] for row in rows] == [0, 1, 2, 0]
        assert rows[0]["rollout_gap"] < 1e-4 < rows[1]["rollout_gap"]
        assert abs(rows[1]["ratio"] - 1) < 1e-4  # to the policy of now, not to the older one
        assert rows[2]["importance"] != pytest.approx(1, abs=1e-6)
        assert fake.calls.count("/collective_rpc") == 2
        assert "processed_logprobs" not in capsys.readouterr().err
        fake.shift = 1.0  # a server that tells something else
        learn(argv(started, tmp_path, "odd", *there, "--steps", "1"))
        assert "--logprobs-mode processed_logprobs" in capsys.readouterr().err
        (row,) = rows_of(tmp_path / "odd")
        assert row["importance"] == pytest.approx(0.3679, abs=1e-3)  # exp(-1)


def test_a_grader_decides_what_is_solved(started: Files) -> None:
    model, tokenizer = checkpoint.load(started.folder / "sft")

    def never(prompt: Prompt, answer: Answer) -> float:
        return 0.0

    assert solve(model, tokenizer, [], grader=never) == []
    box = Toolbox(started.folder / "own.py")
    found = solve(model, tokenizer, prompt_rows()[:2], grader=never, tools=box, max_tokens=60)
    box.close()
    assert [one.is_correct for one in found] == [False, False]
    (alone,) = solve(model, tokenizer, prompt_rows()[:1], grader=never, max_tokens=60)
    assert alone.num_failed_calls == alone.num_calls > 0
    assert "nobody runs it here" in alone.output
    with pytest.raises(DataError, match="agent row 1: gt: is missing"):
        solve(model, tokenizer, [{"prompt": "?", "tools": SCHEMAS}], grader=never)
    with pytest.raises(DataError, match="agent row 1: the prompt has"):
        solve(model, tokenizer, [{"prompt": "? " * 600, "tools": SCHEMAS, "gt": "x"}], grader=never)
