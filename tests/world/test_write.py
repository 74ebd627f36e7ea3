"""Files: every name of the contract, sound rows, the same bytes in every process, nothing half written."""

import json
import os
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ConfigError
from minimind.world import write as writing
from minimind.world.domains import DOMAINS, MIXTURE
from minimind.world.graders import GRADERS
from minimind.world.rows import NEEDLESS_SHARE
from minimind.world.tools import run_tool
from minimind.world.write import SIZES, Sizes, main, write

SMALL = Sizes("", 300, 200, 40, 40, 40, 40, 40, 40, held_out=25, questions=3)
NAMES = ("pretrain", "sft", "reason", "preference", "prompts", "agent", "lora-identity", "lora-trade")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write(out, seed=3, sizes=SMALL)
    return out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def hashes(out: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def test_all_files_and_row_counts(folder: Path) -> None:
    expected = {f"{name}{ending}.jsonl" for name in NAMES for ending in ("", "-validation", "-test")}
    expected |= {"questions-validation.jsonl", "questions-test.jsonl", "world.json"}
    assert {path.name for path in folder.iterdir()} == expected
    about = json.loads((folder / "world.json").read_text())
    assert about["seed"] == 3
    assert about["mixture"] == MIXTURE
    for name, count in about["rows"].items():
        assert len(rows_of(folder / name)) == count
    assert about["rows"]["pretrain.jsonl"] == 300
    assert about["rows"]["sft-test.jsonl"] == 25
    assert set(about["domains"]) == set(DOMAINS)
    assert all(entry["held_out"] and entry["about"] for entry in about["domains"].values())
    texts = [row["text"] for row in rows_of(folder / "pretrain-test.jsonl")]
    whole = about["floor"]["pretrain-test.jsonl"]
    assert whole["bytes"] == sum(len(text.encode()) for text in texts)
    assert whole["bits_per_byte"] == pytest.approx(whole["bits"] / whole["bytes"], abs=1e-5)
    assert sum(kind["rows"] for kind in whole["kinds"].values()) == 25


def check_messages(messages: list[dict[str, Any]]) -> None:
    before = "user"
    for place, message in enumerate(messages):
        assert message["role"] in ("user", "assistant", "tool")
        assert isinstance(message["content"], str)
        if message["role"] == "tool":
            call = messages[place - 1]["tool_calls"][0]
            assert message["content"] == run_tool(call["name"], call["arguments"])
            assert not message["content"].startswith("error")
        if place:
            assert (before == "assistant") != (message["role"] == "assistant")
        else:
            assert message["role"] == "user"
        before = message["role"]


@pytest.mark.parametrize("ending", ["", "-validation", "-test"])
def test_rows_are_sound(folder: Path, ending: str) -> None:
    for row in rows_of(folder / f"pretrain{ending}.jsonl"):
        assert set(row) == {"text"}
        assert 0 < len(row["text"]) < 420
    for name in ("sft", "lora-identity", "lora-trade", "reason"):
        for row in rows_of(folder / f"{name}{ending}.jsonl"):
            check_messages(row["conversations"])
            assert row["conversations"][-1]["role"] == "assistant"
            assert row["conversations"][-1]["content"]
            called = {call["name"] for message in row["conversations"] for call in message.get("tool_calls", ())}
            assert called <= {tool["function"]["name"] for tool in row.get("tools", ())}
    for row in rows_of(folder / f"reason{ending}.jsonl"):
        content = row["conversations"][-1]["content"]
        assert [content.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")] == [1, 1, 1, 1]
    for row in rows_of(folder / f"preference{ending}.jsonl"):
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["chosen"][-1]["content"] != row["rejected"][-1]["content"]
    shapes: set[str] = set()
    for row in rows_of(folder / f"prompts{ending}.jsonl"):
        shapes.add("prompt" if "prompt" in row else "conversations")
        if "prompt" in row:
            assert isinstance(row["prompt"], str)
        else:
            assert row["conversations"][-1] == {"role": "assistant", "content": ""}
        assert row["answer"]
        assert row["grader"] in GRADERS
    assert shapes == {"prompt", "conversations"}
    for row in rows_of(folder / f"agent{ending}.jsonl"):
        assert row["conversations"][-1] == {"role": "assistant", "content": ""}
        assert row["tools"][0]["function"]["name"]
        assert row["gt"] == [row["answer"]]


def test_tools_must_be_chosen(folder: Path) -> None:
    """Calls choose among tools that differ from row to row, and some questions with tools need none."""
    needed: Counter[int] = Counter()
    needless = plain = 0
    for row in rows_of(folder / "sft.jsonl"):
        is_called = any("tool_calls" in message for message in row["conversations"])
        if is_called:
            needed[len(row["tools"])] += 1
        needless += "tools" in row and not is_called
        plain += not is_called
    assert set(needed) == {1, 2, 3}
    assert needless / plain == pytest.approx(NEEDLESS_SHARE, abs=0.03)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_question_rows(folder: Path, split: str) -> None:
    rows = rows_of(folder / f"questions-{split}.jsonl")
    keys = {"id", "set", "domain", "language", "messages", "answer", "grader", "grader_args", "chance", "shortcuts"}
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) - {"tools"} == keys | {"prompt", "completion"}
        assert row["messages"][-1]["role"] == "user"
        assert row["grader"] in {*GRADERS, "tool_call"}
        assert all(isinstance(answer, str) for answer in row["shortcuts"].values())
        assert bool(row["prompt"]) == (row["set"] == "main") == bool(row["completion"])
    groups = [(row["domain"], row["language"]) for row in rows]
    assert set(groups) == {(name, language) for name in DOMAINS for language in ("en", "zh")}
    assert len(set(groups[: 2 * len(DOMAINS)])) == 2 * len(DOMAINS)  # every beginning of the file is a fair sample
    assert {row["set"] for row in rows} == {"main", "reason", "preference", "agent", "lora-identity", "lora-trade"}


def test_the_plain_form_of_pretraining_is_the_form_of_the_questions(folder: Path) -> None:
    starts = {row["prompt"][:2] for row in rows_of(folder / "questions-test.jsonl") if row["prompt"]}
    texts = [row["text"] for row in rows_of(folder / "pretrain.jsonl")]
    for start, reply in (("Q:", "\nA: "), ("问：", "\n答：")):
        assert start in starts
        assert sum(text.startswith(start) and reply in text for text in texts) > 30


def test_the_same_bytes_in_another_process_and_other_bytes_for_another_seed(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from minimind.world.write import *\n"
        "write(Path(sys.argv[1]), seed=3, sizes=Sizes('', 300, 200, 40, 40, 40, 40, 40, 40, held_out=25, questions=3))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env=environment)
    assert hashes(tmp_path / "a") == hashes(folder)
    write(tmp_path / "b", seed=4, sizes=SMALL)
    first, second = hashes(folder), hashes(tmp_path / "b")
    assert all(first[name] != second[name] for name in first)


def test_a_failure_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, seed=1, sizes=SMALL)
    before = hashes(tmp_path)

    def broken(*_: Any) -> Any:
        yield {"text": "one"}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "rows", broken)
    with pytest.raises(Exception, match="disk is full"):
        write(tmp_path, seed=1, sizes=SMALL)
    assert hashes(tmp_path) == before


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "quick", SMALL)
    assert main(["--out", str(tmp_path / "w"), "--seed", "3", "--scale", "quick"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"300\t{tmp_path / 'w' / 'pretrain.jsonl'}" in printed
    assert len(printed) == 26
    with pytest.raises(ConfigError, match="scale must be one of quick, demo, full"):
        main(["--out", str(tmp_path), "--scale", "huge"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the world here"):
        write(tmp_path / "file", sizes=SMALL)


def test_sizes() -> None:
    assert Sizes.from_preset("demo").pretrain >= 40_000
    with pytest.raises(ConfigError, match="unknown size 'small'; choose one of quick, demo, full"):
        Sizes.from_preset("small")
    assert Sizes(pretrain=0).problems() == ["pretrain must be at least 1, got 0"]
