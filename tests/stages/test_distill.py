"""`minimind distill`: what a teacher changes, exactly and measurably; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.tiny_stage import DENSE, MOE, Files, after_update, curve, exit_code, send, train, write_rows

from minimind import checkpoint
from minimind.config import parse
from minimind.data.config import DataConfig
from minimind.data.dataset import train_and_validation
from minimind.data.loader import Loader
from minimind.data.packing import pack
from minimind.errors import ConfigError
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.stages import answers, distill
from minimind.stages.answer_file import AnswerFile
from minimind.stages.lessons import distance
from minimind.stages.teacher import Teacher, load_teacher
from minimind.tokenizer.chat import render
from minimind.training.loop import FitResult
from minimind.training.metrics import read_metrics

Refused = Callable[..., str]
USAGE, DATA, CHECKPOINT, INTERRUPTED = 2, 3, 4, 130
WIDE = (*DENSE, "--model.hidden-size", "64", "--model.intermediate-size", "224", "--model.num-attention-heads", "4")
CPU = torch.device("cpu")


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [row("Who are you?", "A small model."), row("2 + 3 = ?", "5"), row("你好", "你好。"), row("Boo.", "Who?")]
BY_HEART = (
    *("--steps", "150", "--save-every", "0", "--optim.lr", "1e-2"),
    *("--batch-tokens", "512", "--data.row-length", "128"),
)
METHODS = {
    "white-box": (),
    "on-policy": ("--answers.prompts", "4", "--answers.max-tokens", "12", "--answers.rows", "4"),
}


@pytest.fixture(scope="session")
def teachers(shared_files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a wide pretrained teacher, a mixture of experts, and a model that has learned `ROWS` by heart."""
    files = Files(**{**vars(shared_files), "folder": tmp_path_factory.mktemp("teachers")})
    train(files.argv("pretrain", "wide", "--steps", "80", "--save-every", "0", shape=WIDE))
    train(files.argv("pretrain", "moe", "--save-every", "0", shape=MOE))
    data = write_rows(files.folder / "four.jsonl", ROWS)
    train(files.argv("sft", "knows", *BY_HEART, data=data))
    return {name: files.folder / name for name in ("wide", "moe", "knows")}


@pytest.fixture
def run_argv(files: Files, teachers: dict[str, Path]) -> Callable[..., list[str]]:
    """Return a function that gives the words after `minimind` of a short run of this stage; later words win."""

    def argv(
        out: str,
        *more: str,
        method: str = "white-box",
        teacher: Path | None = None,
        data: Path | None = None,
        shape: Sequence[str] = DENSE,
    ) -> list[str]:
        if data is None:
            asked = [{"prompt": f"{i} + {i} = ?"} for i in range(7)]
            is_asked = method == "on-policy"
            data = write_rows(files.folder / "asked.jsonl", asked) if is_asked else files.world / "sft.jsonl"
        flags = files.argv("sft", out, data=data)[1:]
        if shape:
            flags = [*flags[:4], *flags[6:], *shape]  # a new student: no --init-from
        return ["distill", "--teacher", str(teacher or teachers["wide"]), *flags, "--method", method, *more]

    return argv


def teach(argv: Sequence[str]) -> FitResult:
    """Run the stage in this process."""
    return distill.run(parse(distill.Config, argv[1:], command="distill"))


def batches(files: Files, data: Path, tokenizer: Any) -> Loader:
    kind = "pretrain" if "pretrain" in data.name else "conversation"
    config = DataConfig(files=(data,), row_length=64, validation_fraction=0, cache_dir=files.cache)
    return Loader(pack(train_and_validation(config, tokenizer, kind=kind)[0], 64), batch_rows=8, micro_rows=8, seed=0)


# --- what it changes --------------------------------------------------------------------------------------------------


def test_a_small_student_comes_closer_to_its_teacher_than_alone(
    files: Files, teachers: dict[str, Path], run_argv: Callable[..., list[str]]
) -> None:
    data, held_out = files.world / "pretrain.jsonl", files.world / "pretrain-validation.jsonl"
    flags = ("--steps", "200", "--save-every", "0")
    alone = train(files.argv("pretrain", "alone", *flags, data=data))
    taught = teach(run_argv("taught", *flags, data=data))
    teacher = load_teacher(teachers["wide"], CPU)
    found: list[dict[str, float]] = []
    for result in (alone, taught):
        student, tokenizer = checkpoint.load(result.checkpoint)
        assert 4 * student.config.num_parameters()[0] < load_size(teacher)
        rows = batches(files, held_out, tokenizer).all_batches()
        found.append(distance(student, teacher, rows, autocast=nullcontext()))
    assert found[1]["val_kl"] < 0.6 * found[0]["val_kl"]
    assert found[1]["val_teacher_agreement"] > found[0]["val_teacher_agreement"]


def load_size(teacher: Teacher) -> int:
    assert teacher.model is not None
    return teacher.model.config.num_parameters()[0]


def answers_by_heart(result: FitResult) -> list[str]:
    model, tokenizer = checkpoint.load(result.checkpoint)
    prompts = [render(tokenizer, one["messages"][:1], add_generation_prompt=True).ids for one in ROWS]
    params = SamplingParams(temperature=0, max_tokens=40, stop_ids=(tokenizer.eos_id,))
    return [tokenizer.decode(found.ids[:-1]) for found in Engine(model).generate(prompts, params)]


EXPECTED = [one["messages"][1]["content"] for one in ROWS]


@pytest.mark.parametrize(("divergence", "alpha"), [("forward", 0.0), ("jensen-shannon", 0.25), ("reverse", 0.5)])
def test_four_rows_are_learned_by_heart(
    divergence: str, alpha: float, files: Files, teachers: dict[str, Path], run_argv: Callable[..., list[str]]
) -> None:
    data = write_rows(files.folder / "four.jsonl", ROWS)
    flags = (*BY_HEART, "--alpha", str(alpha), "--divergence", divergence)
    result = teach(run_argv("run", *flags, teacher=teachers["knows"], data=data))
    rows = [row for row in read_metrics(files.folder / "run" / "metrics.jsonl") if "kl" in row]
    assert rows[0]["kl"] > 0.3
    assert rows[-1]["kl"] < 0.02
    assert rows[-1]["teacher_agreement"] == rows[-1]["correct"] == 1
    want = alpha * rows[-1]["ce_loss"] + (1 - alpha) * 1.5**2 * rows[-1]["kl"]
    assert rows[-1]["train_loss"] == pytest.approx(want, rel=1e-5)
    assert answers_by_heart(result) == EXPECTED


def test_the_answers_that_a_teacher_writes_are_learned(
    files: Files, teachers: dict[str, Path], run_argv: Callable[..., list[str]]
) -> None:
    prompts = [{"prompt": one["messages"][0]["content"]} for one in ROWS]
    data = write_rows(files.folder / "prompts.jsonl", prompts)
    flags = (*BY_HEART, "--answers.temperature", "0", "--answers.max-tokens", "40")
    result = teach(run_argv("run", *flags, method="black-box", teacher=teachers["knows"], data=data))
    written = [json.loads(line) for line in (files.folder / "run" / "answers.jsonl").read_text().splitlines()]
    assert written == ROWS
    assert answers_by_heart(result) == EXPECTED
    note = json.loads((files.folder / "run" / "answers.json").read_text())
    assert (note["temperature"], note["seed"], note["samples"]) == (0.0, 0, 1)
    assert note["teacher"].startswith(str(teachers["knows"]))
    assert note["teacher_sha256"] == load_teacher(teachers["knows"], CPU).sha256
    assert 'files = ["' + str(data) in (files.folder / "run" / "config.toml").read_text()


def test_a_student_comes_closer_on_its_own_answers(files: Files, run_argv: Callable[..., list[str]]) -> None:
    data = write_rows(files.folder / "prompts.jsonl", [{"prompt": one["messages"][0]["content"]} for one in ROWS])
    flags = ("--answers.prompts", "4", "--answers.samples", "4", "--answers.max-tokens", "16", "--answers.rows", "16")
    flags = (*flags, "--steps", "50", "--save-every", "0", "--data.validation", str(data))
    argv = ("run", *flags, "--init-from", str(files.base))
    teach(run_argv(*argv, method="on-policy", data=data, shape=()))
    rows = read_metrics(files.folder / "run" / "metrics.jsonl")
    found = [row for row in rows if "val_kl" in row]
    assert [row["step"] for row in found] == [0, 50]
    assert found[1]["val_kl"] < 0.5 * found[0]["val_kl"]
    steps = [row for row in rows if "kl" in row]
    assert steps[-1]["kl"] < 0.5 * steps[0]["kl"]
    assert steps[0]["train_loss"] == pytest.approx(steps[0]["kl"], rel=1e-6)  # T is 1 and no label counts
    assert 'method = "on-policy"' in (files.folder / "run" / "config.toml").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_equal_to_the_student_has_nothing_to_teach(
    dtype: str, files: Files, run_argv: Callable[..., list[str]]
) -> None:
    teach(run_argv("run", "--alpha", "0", "--steps", "1", "--dtype", dtype, teacher=files.base, shape=()))
    (found,) = [row for row in read_metrics(files.folder / "run" / "metrics.jsonl") if "kl" in row]
    assert abs(found["kl"]) < 1e-7
    assert found["grad_norm"] < 1e-4  # of otherwise some 0.5; the two forwards need not round alike
    assert found["teacher_agreement"] == 1


@pytest.mark.parametrize("name", ["moe", "wide"])
def test_any_shape_of_teacher_teaches_any_shape_of_student(
    name: str, files: Files, teachers: dict[str, Path], run_argv: Callable[..., list[str]]
) -> None:
    shape = DENSE if name == "moe" else MOE
    teach(run_argv("run", "--steps", "30", "--save-every", "0", teacher=teachers[name], shape=shape))
    losses = [row[1] for row in curve(files.folder / "run")]
    assert losses[-1] < losses[0] - 0.3


# --- teachers that Transformers runs ----------------------------------------------------------------------------------


def save_transformers(kind: str, folder: Path, tokenizer: Path, **sizes: Any) -> Path:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    torch.manual_seed(0)
    common = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | sizes
    config = transformers.AutoConfig.for_model(kind, **common)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_a_transformers_teacher_of_another_architecture(files: Files, run_argv: Callable[..., list[str]]) -> None:
    theirs = save_transformers(
        "gpt2", files.folder / "gpt2", files.tokenizer, n_embd=32, n_layer=2, n_head=2, n_positions=64
    )
    for out, micro_tokens in (("whole", "256"), ("split", "64")):
        flags = ("--micro-batch-tokens", micro_tokens, "--save-every", "0")
        teach(run_argv(out, *flags, teacher=theirs))
    whole, split = (curve(files.folder / out) for out in ("whole", "split"))
    assert [row[1] for row in whole] == pytest.approx([row[1] for row in split], rel=1e-5)
    assert whole[-1][1] < whole[0][1]


def test_in_half_precision_both_kinds_of_teacher_say_nearly_the_same(
    files: Files, teachers: dict[str, Path], run_argv: Callable[..., list[str]]
) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    theirs = save_transformers("gpt2", files.folder / "gpt2", files.tokenizer, **sizes)
    for name, teacher in (("ours", teachers["wide"]), ("theirs", theirs)):
        losses = [
            teach(run_argv(f"{name}-{dtype}", "--steps", "3", "--dtype", dtype, teacher=teacher)).metrics["train_loss"]
            for dtype in ("float32", "bfloat16")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert losses[0] != losses[1]


def test_a_directory_read_both_ways_says_the_same(
    files: Files, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    from minimind.stages import teacher as module

    native = load_teacher(teachers["wide"], CPU)
    monkeypatch.setattr(module, "is_ours", lambda _: False)
    monkeypatch.setattr(module, "_is_known", lambda _: False)
    foreign = load_teacher(teachers["wide"], CPU)
    assert (native.model is None, foreign.model is None) == (False, True)
    assert (native.vocab_size, native.max_length) == (foreign.vocab_size, foreign.max_length)
    tokenizer = checkpoint.load(teachers["wide"])[1]
    batch = batches(files, files.world / "sft.jsonl", tokenizer).micro_batches(0)[0]
    with torch.inference_mode():
        (ours, our_logits), (theirs, their_logits) = native.ask(batch), foreign.ask(batch)
        is_real = batch.documents >= 0
        torch.testing.assert_close(our_logits(ours[is_real]), their_logits(theirs[is_real]), rtol=1e-4, atol=1e-4)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_are_five_and_resume_five(method: str, files: Files, run_argv: Callable[..., list[str]]) -> None:
    # White-box: a new student with dropout, two micro-batches a step. On-policy: one that can answer.
    new = method == "white-box"
    flags = ("--model.dropout", "0.1", "--micro-batch-tokens", "128") if new else METHODS[method]

    def argv(out: str, *more: str) -> list[str]:
        start = () if new else ("--init-from", str(files.base))
        return run_argv(out, *flags, "--save-every", "0", *start, *more, method=method, shape=DENSE if new else ())

    whole = teach(argv("whole"))
    assert teach(argv("again")).state_hash == whole.state_hash
    with after_update(5, send(signal.SIGINT)):
        assert exit_code(argv("cut")) == INTERRUPTED
    assert checkpoint.read(files.folder / "cut" / "latest").step == 5
    resumed = teach(argv("cut"))
    assert (resumed.steps, resumed.tokens, resumed.state_hash) == (10, whole.tokens, whole.state_hash)
    assert curve(files.folder / "cut") == curve(files.folder / "whole")
    assert teach(argv("other", "--seed", "1")).state_hash != whole.state_hash


@pytest.mark.parametrize("method", METHODS)
def test_the_split_into_micro_batches_changes_nothing(
    method: str, files: Files, run_argv: Callable[..., list[str]]
) -> None:
    losses: list[list[float]] = []
    for micro_tokens in ("64", "256"):
        start = ("--init-from", str(files.base)) if method == "on-policy" else ()
        flags = (*METHODS[method], "--micro-batch-tokens", micro_tokens, "--save-every", "0", *start)
        teach(run_argv(micro_tokens, *flags, method=method, shape=() if start else DENSE))
        losses.append([row[1] for row in curve(files.folder / micro_tokens)])
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(method: str, files: Files, run_argv: Callable[..., list[str]]) -> None:
    def argv(out: str) -> list[str]:
        start = ("--init-from", str(files.base)) if method == "on-policy" else ()
        return run_argv(out, *METHODS[method], "--save-every", "0", *start, method=method, shape=() if start else DENSE)

    teach(argv("one"))
    assert torchrun(argv("two")) == 0
    one, two = (curve(files.folder / out) for out in ("one", "two"))
    assert [row[1] for row in one] == pytest.approx([row[1] for row in two], rel=1e-5)
    assert len(two) == 10


@pytest.mark.slow
def test_two_processes_write_the_same_answers(
    files: Files, teachers: dict[str, Path], run_argv: Callable[..., list[str]]
) -> None:
    data = write_rows(files.folder / "prompts.jsonl", [{"prompt": one["messages"][0]["content"]} for one in ROWS])
    flags = ("--answers.max-tokens", "14", "--answers.samples", "70", "--steps", "2")  # more than one block

    def argv(out: str) -> list[str]:
        return run_argv(out, *flags, method="black-box", teacher=teachers["knows"], data=data)

    teach(argv("one"))
    assert torchrun(argv("two")) == 0
    for name in ("answers.jsonl", "answers.json"):
        assert (files.folder / "one" / name).read_bytes() == (files.folder / "two" / name).read_bytes()
    assert json.loads((files.folder / "two" / "answers.json").read_text())["counts"]["done"] == 280 > answers.BLOCK


def torchrun(argv: Sequence[str]) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*command, "-m", "minimind", *argv]
    return subprocess.run(words, capture_output=True, env=environment, cwd=Path(__file__).parents[2]).returncode


# --- the teacher's answers --------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for the death of the process."""


@pytest.fixture
def questions(files: Files) -> Path:
    """Return a file of prompts, some of which the teacher can answer within few tokens."""
    asked = [one["messages"][0]["content"] for one in ROWS]
    prompts = [{"prompt": text} for text in (*asked, "Tell me a long story.", *asked, "What is this?", *asked)]
    return write_rows(files.folder / "prompts.jsonl", prompts)


def test_a_writer_killed_at_any_moment_goes_on_with_the_same_rows(
    files: Files,
    teachers: dict[str, Path],
    questions: Path,
    run_argv: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "BLOCK", 3)

    def argv(out: str) -> list[str]:
        flags = ("--answers.max-tokens", "14", "--answers.samples", "2", "--answers.rows", "2", "--steps", "2")
        return run_argv(out, *flags, method="black-box", teacher=teachers["knows"], data=questions)

    whole = teach(argv("whole"))
    add, calls = AnswerFile.add, 0

    def crashing(book: AnswerFile, rows: list[dict[str, Any] | str]) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # rows of the block are on disk, the note is not
            with book.path.open("a") as file:
                file.write('{"messages": [{"role": "user", "con')
            raise Crash
        add(book, rows)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "add", crashing)
        with pytest.raises(Crash):
            teach(argv("cut"))
    resumed = teach(argv("cut"))
    texts = [(files.folder / out / "answers.jsonl").read_text() for out in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert resumed.state_hash == whole.state_hash
    notes = [json.loads((files.folder / out / "answers.json").read_text()) for out in ("whole", "cut")]
    assert notes[0] == notes[1]
    counts = notes[0]["counts"]
    assert counts["done"] == 28
    assert counts["cut"] > 0
    assert counts["written"] == len(texts[0].splitlines()) == 28 - counts["cut"] - counts["empty"]


def test_answers_of_another_manner_are_refused_and_kept(
    files: Files, teachers: dict[str, Path], questions: Path, run_argv: Callable[..., list[str]]
) -> None:
    def argv(*more: str, teacher: str = "knows") -> list[str]:
        flags = ("--answers.max-tokens", "14", "--steps", "1", *more)
        return run_argv("run", *flags, method="black-box", teacher=teachers[teacher], data=questions)

    teach(argv())
    before = (files.folder / "run" / "answers.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"temperature was 1\.0 and is 0\.5; use the old values"):
        teach(argv("--answers.temperature", "0.5"))
    with pytest.raises(ConfigError, match="seed was 0 and is 3"):
        teach(argv("--seed", "3"))
    with pytest.raises(ConfigError, match="teacher_sha256 was"):
        teach(argv(teacher="wide"))
    assert (files.folder / "run" / "answers.jsonl").read_bytes() == before
    teach(argv("--answers.temperature", "0", "--fresh"))
    assert (files.folder / "run" / "previous-1" / "answers.jsonl").read_bytes() == before
    assert json.loads((files.folder / "run" / "answers.json").read_text())["temperature"] == 0


# --- what a user can get wrong ----------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "no teacher": (("--teacher", "None"), "teacher: nobody to learn from; give --teacher RUN"),
    "temperature": (("--temperature", "0"), "temperature = 0.0: must be above 0"),
    "alpha": (("--alpha", "1.5"), "alpha = 1.5: must lie between 0 and 1"),
    "words": (("--method", "black-box", "--alpha", "0.2"), "alpha: of no use with --method black-box"),
    "labels": (("--method", "on-policy", "--alpha", "0.5"), "alpha = 0.5: 0 with --method on-policy"),
    "greedy": (("--method", "on-policy", "--answers.temperature", "0"), "answers.temperature = 0: above 0"),
    "nobody answers": (("--method", "on-policy"), "init_from: --method on-policy takes a student that answers"),
    "tokens": (("--answers.max-tokens", "0"), "answers.max_tokens = 0: at least 1"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_configuration(
    case: str, files: Files, run_argv: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = IMPOSSIBLE[case]
    assert exit_code(run_argv("run", *flags)) == USAGE
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (files.folder / "run").exists()


def refused(code: int, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert exit_code(argv) == code
    return " ".join(capsys.readouterr().err.split())


def test_a_teacher_of_another_vocabulary_is_refused(
    files: Files, run_argv: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(files.world / "pretrain.jsonl")
    train_tokenizer = ["train-tokenizer", "--data", text, "--out", str(files.folder / "tokens"), "--vocab-size", "290"]
    assert exit_code(train_tokenizer) == 0
    other = files.folder / "other"
    train(files.argv("pretrain", "other", "--tokenizer", str(files.folder / "tokens"), "--steps", "1"))
    said = refused(CHECKPOINT, run_argv("run", teacher=other, shape=()), capsys)
    assert "another vocabulary than the student" in said
    assert str(files.base) in said
    assert "id 2" in said  # the first that differs
    assert "--method black-box" in said
    assert not (files.folder / "run").exists()
    flags = ("--steps", "1", "--answers.max-tokens", "150", "--answers.rows", "4")  # words cross vocabularies
    data = write_rows(files.folder / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(4)])
    code = exit_code(run_argv("words", *flags, method="black-box", teacher=other, data=data, shape=()))
    assert code in (0, DATA)  # an untrained teacher may not come to an end


def test_a_transformers_teacher_with_other_tokens_or_fewer_logits_is_refused(
    files: Files, run_argv: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    fewer = save_transformers("gpt2", files.folder / "fewer", files.tokenizer, **sizes | {"vocab_size": 280})
    assert "it has 280 logits, the student 300" in refused(CHECKPOINT, run_argv("run", teacher=fewer), capsys)
    other = save_transformers("gpt2", files.folder / "other", files.tokenizer, **sizes)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = (next(token for token, index in vocabulary.items() if index == wanted) for wanted in (250, 251))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(content))
    said = refused(CHECKPOINT, run_argv("run", "--init-from", str(files.base), teacher=other, shape=()), capsys)
    assert f"id 250 is {b!r} for it and {a!r} here" in said
    short = save_transformers("gpt2", files.folder / "short", files.tokenizer, **sizes | {"n_positions": 32})
    assert "reads 32 tokens at once and rows have 64" in refused(USAGE, run_argv("run", teacher=short), capsys)
    writer = refused(USAGE, run_argv("run", method="black-box", teacher=short), capsys)
    assert "only a model that `minimind chat` runs can write answers" in writer
    assert not (files.folder / "run").exists()


def test_a_teacher_that_is_not_there(
    files: Files, run_argv: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(CHECKPOINT, run_argv("run", teacher=files.folder / "nobody"), capsys)
    assert "nobody: does not exist" in said


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_its_own_teacher_only(
    method: str, files: Files, run_argv: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--init-from", str(files.base), "--steps", "2", *METHODS[method])
    teach(run_argv("run", *flags, method=method, shape=()))
    longer = run_argv("run", *flags, "--steps", "3", method=method, teacher=files.base, shape=())
    assert "not the teacher that this run was started with" in refused(CHECKPOINT, longer, capsys)


def test_the_historical_recipe_is_the_historical_loss(repository: Path) -> None:
    config = parse(
        distill.Config, ["--config", str(repository / "recipes" / "distill-minimind2-small.toml")], command="distill"
    )
    assert (config.temperature, config.alpha, config.divergence, config.method) == (1.5, 0.5, "forward", "white-box")
    assert config.teacher == Path("runs/minimind2/sft")
