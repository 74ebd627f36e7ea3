"""`minimind chat RUN` and `minimind.chat(path)` on a real checkpoint of a tiny model."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minimind
from minimind import checkpoint
from minimind.cli import main
from minimind.errors import CheckpointError, ConfigError
from minimind.inference.sampling import SamplingParams
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.stages.chat import ChatConfig, chat
from minimind.tokenizer.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = train(["The red ball is in the garden. 你好，世界。"] * 20, 320)
    tiny = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )
    path = tmp_path_factory.mktemp("run")
    checkpoint.save(
        path, 1, model=Transformer(tiny), model_config=tiny, tokenizer=tokenizer, optimizer_state={}, state={}
    )
    return path


def chat_in_pipe(
    run: Path, text: str, *flags: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["chat", str(run), "--max-tokens", "6", *flags]) == 0
    return capsys.readouterr().out


def test_a_pipe(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        chat_in_pipe(run, "hi\nyou\n", "--seed", seed, "--temperature", "1", capsys=capsys, monkeypatch=monkeypatch)
        for seed in ("1", "1", "2")
    ]
    assert answers[0] == answers[1] != answers[2]
    assert all(answer.count("\n") == 2 for answer in answers)


def test_one_prompt_with_tools(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(run), "--prompt", "hi", "--tools", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_from_python(run: Path) -> None:
    assert minimind.chat is chat
    session = chat(run, tools=True, system="Be kind.", sampling=SamplingParams(max_tokens=3, seed=1))
    deltas = list(session.send("hi"))
    assert deltas[-1].finish_reason in ("length", "stop")
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    assert session.row()["tools"][0]["function"]["name"] == "calculator"
    assert session.context_length == 2048


def test_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path / "none")]) == CheckpointError.exit_code
    assert main(["chat", str(run), "--prompt", "x", "--temperature", "-1"]) == ConfigError.exit_code
    assert main(["chat", str(run), "--prompt", "x", "--context", "3"]) == ConfigError.exit_code
    assert main(["chat", str(run), "--prompt", "x", "--context", "9999"]) == ConfigError.exit_code
    message = capsys.readouterr().err
    assert "temperature -1.0: use 0 (greedy)" in message
    assert "context = 3: use 0 or at least 16" in message
    assert ChatConfig(run).problems() == []


def test_a_clean_process_needs_no_transformers(run: Path) -> None:
    script = (
        "import sys; from minimind.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 90 * ('transformers' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "chat", str(run), "--max-tokens", "2"],
        input="hi\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
