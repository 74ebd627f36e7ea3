import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind import checkpoint, cli
from minimind.evaluation.harness import first_of_each, grade, measure
from minimind.evaluation.intervals import wilson_interval
from minimind.evaluation.score_table import print_scores
from minimind.evaluation.tasks import Score
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.tokenizer.train import MIN_VOCAB_SIZE, train

QUESTION = {
    "id": "q1",
    "domain": "sums",
    "language": "en",
    "messages": [{"role": "user", "content": "1 + 1?"}],
    "answer": "2",
    "grader": "number",
    "prompt": "Q: 1 + 1?\nA:",
    "shortcuts": {"one": "1"},
    "chance": 0.1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train(["Q: who? A: Mia. 1 + 1 = 2\n"] * 5, MIN_VOCAB_SIZE + 5)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=4096,
        original_max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = Transformer(config)
    state: dict[str, Any] = {}
    checkpoint.save(
        path,
        1,
        model=model,
        model_config=config,
        tokenizer=tokenizer,
        optimizer_state={"x": torch.zeros(1)},
        state=state,
    )
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_files_the_worlds_test_questions_are_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "scores.json"
    assert cli.main(["eval", str(run), "--limit", "1", "--max-tokens", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[1].split() == ["domain", "n", "en", "%", "95", "%", "zh", "%", "95", "%", "chance", "best", "shortcut"]
    assert lines[-1].startswith("overall")
    assert {"sums", "facts", "calculator"} <= {line.split()[0] for line in lines}
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in printed.out
    assert "--form completion" in printed.err
    result = json.loads(out.read_text())
    assert len(result["records"]) == sum(score["n"] for score in result["scores"]) > 20
    assert {score["form"] for score in result["scores"]} == {"chat"}
    assert set(result["scores"][0]) == set(Score.__dataclass_fields__)
    assert cli.main(["eval", str(run), "--limit", "1", "--max-tokens", "2", "--sets", "agent"]) == 0
    assert "sums" not in capsys.readouterr().out


def test_the_same_evaluation_twice_gives_the_same_answers(run: Path, tmp_path: Path) -> None:
    results: list[Any] = []
    for name in ("a.json", "b.json"):
        path = tmp_path / name
        arguments = ["--limit", "1", "--max-tokens", "3", "--temperature", "0.8", "--seed", "3", "--form", "completion"]
        assert cli.main(["eval", str(run), *arguments, "--out", str(path)]) == 0
        results.append(json.loads(path.read_text())["records"])
    assert results[0] == results[1]
    assert len({record["output"] for record in results[0]}) > 5


def test_question_files_of_several_kinds_and_data_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = jsonl(tmp_path / "world.jsonl", QUESTION)
    choices = jsonl(tmp_path / "pairs.jsonl", {"question": "Mia or", "choices": ["Tom", "who"], "answer": 1})
    short = jsonl(tmp_path / "short.jsonl", {"context": "1 + 1 =", "continuation": "2"})
    text = jsonl(tmp_path / "text.jsonl", {"text": "who? Mia."}, {"text": "1 + 1 = 2"})
    talk = jsonl(
        tmp_path / "talk.jsonl",
        {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Mia."}]},
    )
    files = ["--questions", str(world), str(choices), str(short), "--data", str(text), str(talk)]
    assert cli.main(["eval", str(run), *files, "--form", "completion", "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    domains = [line.split("  ")[0] for line in out.splitlines()]
    assert {"sums", "pairs (sum)", "pairs (per byte)", "short"} <= set(domains)
    assert f"{text}: val_loss " in out
    assert f"{talk}: val_loss " in out


def test_only_data_files_ask_no_questions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = jsonl(tmp_path / "text.jsonl", {"text": "who? Mia."})
    out = tmp_path / "loss.json"
    assert cli.main(["eval", str(run), "--data", str(text), "--out", str(out)]) == 0
    assert "domain" not in capsys.readouterr().out
    losses = json.loads(out.read_text())["losses"][str(text)]
    assert set(losses) == {"val_loss", "val_bits_per_byte", "val_accuracy"}


def test_measure_is_the_mean_over_all_tokens_however_long_the_document(run: Path, tmp_path: Path) -> None:
    model, tokenizer = checkpoint.load(run)
    long = "who? Mia. 1 + 1 = 2. " * 20
    path = jsonl(tmp_path / "text.jsonl", {"text": long})
    ids = [tokenizer.bos_id, *tokenizer.encode(long), tokenizer.eos_id]
    total = 0.0
    for start in range(0, len(ids) - 1, 64):  # rows of 64, as the model was trained; pieces overlap by one token
        piece = torch.tensor([ids[start : start + 65]])
        with torch.no_grad():
            table = model(piece[:, :-1]).logits[0].double().log_softmax(-1)
        total -= float(table.gather(1, piece[0, 1:, None]).sum())
    assert measure(model, tokenizer, path)["val_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN/none"], 4, "does not exist"),
        (["RUN", "--questions", "none.jsonl"], 2, "no such file"),
        (["RUN", "--questions", "bad.jsonl"], 3, "bad.jsonl:2: "),
        (["RUN", "--questions", "oracle.jsonl"], 3, "'oracle' is not one of"),
        (["RUN", "--limit", "-1", "--batch-size", "0"], 2, "batch_size is 0"),
        (["RUN", "--sets", "mian"], 2, "'mian' does not exist"),
        (["RUN", "--data", "none.jsonl"], 2, "no such file"),
        (["RUN", "--out", "."], 2, "is a folder"),
        (["RUN", "--questions", "chat.jsonl", "--form", "completion"], 2, "--form chat"),
    ],
)
def test_mistakes_are_told_with_their_exit_code(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(QUESTION) + "\n{oops\n")
    jsonl(tmp_path / "oracle.jsonl", {**QUESTION, "grader": "oracle"})
    jsonl(tmp_path / "chat.jsonl", {**QUESTION, "prompt": ""})
    assert cli.main(["eval", *(a.replace("RUN", str(run)) for a in arguments)]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_bad_questions_may_be_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n{oops\n")
    arguments = ["eval", str(run), "--questions", str(path), "--on-error", "skip", "--max-tokens", "2"]
    assert cli.main(arguments) == 0
    assert "bad.jsonl:2" in capsys.readouterr().err


def test_a_flag_that_does_not_exist_exits_with_2(run: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", str(run), "--limt", "3"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval"])
    assert stop.value.code == 2


def test_the_worlds_graders_and_short_answers_share_one_door() -> None:
    assert grade(QUESTION, "It is 2")
    assert not grade(QUESTION, "3")
    assert grade({**QUESTION, "grader": "short_answer"}, "2")
    with pytest.raises(KeyError):
        grade({**QUESTION, "grader": "oracle"}, "2")


def test_first_of_each_keeps_the_first() -> None:
    rows = [{**QUESTION, "id": str(i), "language": "en" if i % 2 else "zh"} for i in range(10)]
    kept = first_of_each(rows, 2)
    assert [row["id"] for row in kept if isinstance(row, dict)] == ["0", "1", "2", "3"]
    assert len(first_of_each(rows, 0)) == 10


def made(domain: str, language: str, correct: int, n: int, chance: float = 0.25, shortcut: float = 0.5) -> Score:
    low, high = wilson_interval(correct, n)
    return Score(domain, language, "chat", n, correct, correct / n, low, high, chance, "last place", shortcut, 1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_in_a_pipe_is_plain_and_in_a_terminal_ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    scores = [
        made("sums", "en", 48, 50),
        made("sums", "zh", 20, 50),
        made("a domain with a very long name indeed", "en", 50, 50),
    ]
    pipe, terminal = io.StringIO(), Terminal()
    print_scores(scores, pipe)
    print_scores(scores, terminal)
    lines = pipe.getvalue().splitlines()
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    assert "\x1b" not in pipe.getvalue()
    sums = next(line.split() for line in lines if line.startswith("sums"))
    assert sums == ["sums", "100", "96.0", "87-99", "40.0", "28-54", "25.0", "50.0", "last", "place"]
    assert "98.0  93-99" in lines[-1]  # 98 of 100 in English
    green = set(re.findall(r"\x1b\[32m *([\d.]+)", terminal.getvalue()))
    assert green == {"96.0", "100.0"}  # the overall row is bold: 1;32
    assert re.search(r"\x1b\[1;32m *98.0", terminal.getvalue())
    assert "─" in terminal.getvalue()


def test_forms_have_a_table_each() -> None:
    stream = io.StringIO()
    print_scores([made("sums", "en", 1, 2), replace(made("sums", "en", 2, 2), form="completion")], stream)
    assert stream.getvalue().count("domain") == 2
