import json
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ConfigError, DataError
from minimind.evaluation.questions import ChoiceQuestion, read_questions, short_answer

WORLD_ROW = {
    "id": "a",
    "domain": "sums",
    "language": "en",
    "messages": [{"role": "user", "content": "1 + 1?"}],
    "answer": "2",
    "grader": "number",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_world_rows_come_back_as_they_are(tmp_path: Path) -> None:
    assert read_questions(write(tmp_path / "q.jsonl", WORLD_ROW)) == [WORLD_ROW]


@pytest.mark.parametrize(
    ("row", "index"),
    [
        ({"question": "q", "choices": ["a", "b", "c"], "answer": 2}, 2),
        ({"query": "q", "choices": ["x", "y"], "gold": 1}, 1),
        ({"question": "q", "options": ["(A)x", "(B)y", "(C)z"], "label": "C", "answer": None}, 2),
        ({"question": "q", "choices": ["yes", "no"], "answer": "no"}, 1),
    ],
)
def test_multiple_choice_in_the_forms_that_exist(tmp_path: Path, row: dict[str, Any], index: int) -> None:
    (question,) = read_questions(write(tmp_path / "arc.jsonl", row))
    assert isinstance(question, ChoiceQuestion)
    assert (question.answer, question.domain, question.language, question.id) == (index, "arc", "en", "arc.jsonl:1")
    assert question.question == "q"


def test_passage_stands_before_the_question(tmp_path: Path) -> None:
    row = {"passage": "一段话。", "question": "哪个？", "options": ["甲", "乙"], "label": "B"}
    (question,) = read_questions(write(tmp_path / "zh.jsonl", row))
    assert isinstance(question, ChoiceQuestion)
    assert (question.question, question.language) == ("一段话。\n哪个？", "zh")


def test_short_answers_get_a_chat_and_a_plain_form(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "3 + 4 = 7\n#### 7"},
        {"context": "12+30=", "continuation": "42"},
    ]
    first, second = read_questions(write(tmp_path / "short.jsonl", *rows))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["answer"] == "7"
    assert first["prompt"] == "Question: How many?\nAnswer:"
    assert first["messages"] == [{"role": "user", "content": "How many?"}]
    assert (second["prompt"], second["answer"], second["id"]) == ("12+30=", "42", "short.jsonl:2")


@pytest.mark.parametrize(
    ("answer", "text", "is_right"),
    [
        ("42", " 42", True),
        ("42", "It is 12 + 30 = 42.", True),
        ("42", "42 or 43", False),
        ("42", "420", False),
        ("42", "142", False),
        ("-7", "-7", True),
        ("-7", "7", False),
        ("1,000", "1000", True),
        ("0.5", "0.50", True),
        ("42", "", False),
        ("Paris", " paris. ", True),
        ("Paris", "It is Paris", False),
        ("New York", "new  york", True),
        ("巴黎", "巴黎。", True),
        ("ＡＢ", "ab", True),
    ],
)
def test_short_answers_are_judged_by_value(answer: str, text: str, is_right: bool) -> None:
    assert short_answer({"answer": answer}, text) == is_right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**WORLD_ROW, "id": ""}, '"id": expected a text'),
        ({**WORLD_ROW, "messages": []}, '"messages": expected a list'),
        ({**WORLD_ROW, "messages": [{"role": "assistant", "content": "2"}]}, "found role 'assistant'"),
        ({**WORLD_ROW, "answer": None}, '"answer"'),
        ({**WORLD_ROW, "grader": "oracle"}, "'oracle' is not one of exact, number"),
        ({**WORLD_ROW, "chance": 3}, '"chance": expected a number from 0 to 1, found 3'),
        ({**WORLD_ROW, "shortcuts": ["a"]}, '"shortcuts"'),
        ({**WORLD_ROW, "prompt": 3}, '"prompt"'),
    ],
)
def test_malformed_world_rows_are_named_with_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "q.jsonl", WORLD_ROW, row)
    with pytest.raises(DataError) as error:
        read_questions(path, graders=("number", "exact"))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "index from 0 to 1, a letter, or the text"),
        ({"question": "q", "choices": ["a", "b"]}, '"answer"'),
        ({"question": "", "choices": ["a", "b"], "answer": 0}, '"question"'),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "True"),
    ],
)
def test_malformed_choices_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=":1: ") as error:
        read_questions(write(tmp_path / "q.jsonl", row))
    assert message in str(error.value)


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {**WORLD_ROW, "id": 1}, "{not json", WORLD_ROW, {**WORLD_ROW, "language": None})
    with pytest.raises(DataError) as error:
        read_questions(path)
    *lines, advice = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (1, 2, 4)]
    assert "--on-error skip" in advice
    assert read_questions(path, on_error="skip") == [WORLD_ROW]


def test_many_bad_rows_are_not_all_told(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *[{**WORLD_ROW, "id": 1}] * 100)
    with pytest.raises(DataError) as error:
        read_questions(path)
    lines = str(error.value).splitlines()
    assert lines[20] == "and 80 more"
    assert len(lines) == 22


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no question"):
        read_questions(write(tmp_path / "empty.jsonl"))


def test_rows_without_any_question_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='"question", "context" or "query"'):
        read_questions(write(tmp_path / "q.jsonl", {"text": "only text"}))


def test_real_question_files_are_read(public_data: Path) -> None:
    sizes: dict[str, int] = {}
    for path in sorted((public_data / "mcq_en").glob("*.jsonl")) + sorted(
        (public_data / "mcq_zh_agieval").glob("*.jsonl")
    ):
        # some rows of this one have two right answers
        questions = read_questions(path, on_error="skip" if path.stem == "gaokao-mathqa" else "raise")
        sizes[path.stem] = len(questions)
        is_choice = isinstance(questions[0], ChoiceQuestion)
        assert is_choice == (
            path.stem not in {"svamp"} and not path.stem.startswith(("simple", "bigbench_op", "bigbench_re"))
        )
    assert sizes["arc_easy"] == 1188
    assert sizes["svamp"] == 150
    assert sizes["gaokao-history"] > 200
    assert sizes["gaokao-mathqa"] == 344
