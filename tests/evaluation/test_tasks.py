from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from evaluation.scripted import ScriptedModel

from minimind.errors import DataError
from minimind.evaluation.harness import grade
from minimind.evaluation.tasks import (
    Form,
    Record,
    Score,
    ask,
    gain_interval,
    overall,
    prompts_ids,
    separated,
    stop_ids,
)
from minimind.model.transformer import Transformer
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import MIN_VOCAB_SIZE, train

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["Q: Who has it? A: Mia.\n", "问：谁有？答：米娅。\n"] * 10, MIN_VOCAB_SIZE + 20)


def question(number: int, answer: str, *, domain: str = "who", language: str = "en", **more: Any) -> dict[str, Any]:
    return {
        "id": f"{domain}-{language}-{number}",
        "domain": domain,
        "language": language,
        "messages": [{"role": "user", "content": f"{domain} {language} {number}?"}],
        "prompt": f"Q: {domain} {language} {number}?\nA:",
        "answer": answer,
        "grader": "exact",
        "chance": 0.25,
        "shortcuts": {"first": "Mia", "last": "Tom"},
        **more,
    }


def scripted(
    tokenizer: Tokenizer, questions: Sequence[dict[str, Any]], said: Sequence[str], form: Form, **options: Any
) -> Transformer:
    script = {
        tuple(ids): [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]
        for ids, text in zip(prompts_ids(tokenizer, questions, form, **options), said, strict=True)
    }
    return cast("Transformer", ScriptedModel(script, tokenizer.vocab_size, otherwise=tokenizer.eos_id))


QUESTIONS = [
    question(1, "Mia"),
    question(2, "Tom"),
    question(3, "Mia"),
    question(4, "Mia"),
    question(1, "米娅", language="zh", chance=0.5, shortcuts={}),
    question(2, "汤姆", language="zh", chance=0.5, shortcuts={}),
    question(
        1,
        "",
        domain="weather",
        grader="tool_call",
        grader_args={"calls": [{"name": "weather", "arguments": {"place": "mill"}}]},
        tools=[WEATHER],
        shortcuts={},
        prompt="",
    ),
]
SAID = [
    "Mia.",
    "<think>\nMia? No.\n</think>\n\nTom",
    "Tom",
    "mia",
    "米娅。",
    "米娅",
    '<tool_call>\n{"name": "weather", "arguments": {"place": "mill"}}\n</tool_call>',
]


def test_chat_form_counts_what_was_right_in_each_group(tokenizer: Tokenizer) -> None:
    records: list[Record] = []
    model = scripted(tokenizer, QUESTIONS, SAID, "chat")
    scores = ask(model, tokenizer, QUESTIONS, form="chat", grader=grade, batch_size=3, on_record=records.append)
    found = {(s.domain, s.language): s for s in scores}
    assert list(found) == [("who", "en"), ("who", "zh"), ("weather", "en")]
    english = found["who", "en"]
    assert (english.n, english.correct, english.accuracy, english.form) == (4, 3, 0.75, "chat")
    assert english.low < 0.75 < english.high
    assert english.chance == 0.25
    assert (english.shortcut, english.shortcut_accuracy) == ("first", 0.75)  # Mia is right three times of four
    assert (found["who", "zh"].correct, found["who", "zh"].chance, found["who", "zh"].shortcut) == (1, 0.5, "")
    assert found["weather", "en"].correct == 1
    assert all(s.seconds > 0 for s in scores)
    assert [record.correct for record in records] == [True, True, False, True, True, False, True]
    assert [record.output for record in records] == SAID
    assert records[2].answer == "Mia"
    assert "who en 3?" in records[2].prompt
    assert records[2].prompt.endswith("<|im_start|>assistant\n")


def test_completion_form_takes_one_line_and_leaves_out_what_has_no_plain_form(tokenizer: Tokenizer) -> None:
    plain = QUESTIONS[:6]
    said = [" Mia.\nQ: Tom?", " Tom", "", "\nMia", "米娅。", "米娅？\n\n"]
    records: list[Record] = []
    model = scripted(tokenizer, plain, said, "completion")
    scores = ask(model, tokenizer, QUESTIONS, form="completion", grader=grade, on_record=records.append)
    assert [(s.domain, s.language, s.n, s.correct) for s in scores] == [("who", "en", 4, 2), ("who", "zh", 2, 1)]
    assert [record.output for record in records] == [" Mia.", " Tom", "", "", "米娅。", "米娅？"]


def test_the_stop_tokens_of_a_completion_are_all_that_hold_a_line_end(tokenizer: Tokenizer) -> None:
    ends = set(stop_ids(tokenizer, "completion"))
    assert {tokenizer.eos_id, tokenizer.pad_id} == set(stop_ids(tokenizer, "chat"))
    for i in range(tokenizer.vocab_size):
        assert (i in ends) == ("\n" in tokenizer.decode([i]) or i in (tokenizer.eos_id, tokenizer.pad_id))


def test_an_opened_thought_is_read_as_one(tokenizer: Tokenizer) -> None:
    questions = QUESTIONS[:1]
    model = scripted(tokenizer, questions, ["Tom?\n</think>\n\nMia"], "chat", enable_thinking=True)
    scores = ask(model, tokenizer, questions, form="chat", grader=grade, enable_thinking=True)
    assert scores[0].correct == 1


def test_an_answer_that_never_ends_is_cut_and_judged(tokenizer: Tokenizer) -> None:
    questions = QUESTIONS[:1]
    model = scripted(tokenizer, questions, ["<think>\n" + "Mia " * 50], "chat")
    records: list[Record] = []
    scores = ask(model, tokenizer, questions, form="chat", grader=grade, max_tokens=20, on_record=records.append)
    assert scores[0].correct == 0
    assert len(tokenizer.encode(records[0].output, allow_special=True)) == 20


def test_the_same_questions_in_any_batch_give_the_same_answers(tokenizer: Tokenizer) -> None:
    outputs: list[list[str]] = []
    for batch_size in (1, 2, 7, 64):
        records: list[Record] = []
        model = scripted(tokenizer, QUESTIONS, SAID, "chat")
        ask(model, tokenizer, QUESTIONS, form="chat", grader=grade, batch_size=batch_size, on_record=records.append)
        outputs.append([record.output for record in records])
    assert outputs == [SAID] * 4


def test_a_prompt_too_long_is_named(tokenizer: Tokenizer) -> None:
    questions = [QUESTIONS[0], question(9, "x", messages=[{"role": "user", "content": "long " * 300}])]
    model = scripted(tokenizer, QUESTIONS[:1], ["Mia"], "chat")
    with pytest.raises(DataError, match=r"question who-en-9: the prompt has \d+ tokens and the model 512 positions"):
        ask(model, tokenizer, questions, form="chat", grader=grade)


def test_messages_that_cannot_be_rendered_are_named(tokenizer: Tokenizer) -> None:
    bad = question(5, "x", messages=[{"role": "wizard", "content": "?"}])
    model = scripted(tokenizer, QUESTIONS[:1], ["Mia"], "chat")
    with pytest.raises(DataError, match=r"question who-en-5: .*wizard"):
        ask(model, tokenizer, [bad], form="chat", grader=grade)


def test_no_questions_no_scores(tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer, QUESTIONS[:1], ["Mia"], "chat")
    assert ask(model, tokenizer, [], form="chat", grader=grade) == []
    assert ask(model, tokenizer, QUESTIONS[6:], form="completion", grader=grade) == []


def score(correct: int, n: int, **more: Any) -> Score:
    from minimind.evaluation.tasks import Tally

    made = Tally(n=n, correct=correct, chance=0.5 * n, shortcuts={"a": n // 2, "b": n // 4}).score(
        "d", "en", "chat", 2.0
    )
    return replace(made, **more)


def test_before_and_after_are_separated_when_their_intervals_do_not_overlap() -> None:
    # of 50: 25 right is 36.6 to 63.4 %, 34 is 54.2 to 79.2 %, 41 is 69.2 to 90.2 %
    assert not separated(score(25, 50), score(34, 50))
    assert separated(score(25, 50), score(41, 50))
    assert separated(score(41, 50), score(25, 50))  # a loss is one too
    assert not separated(score(0, 0 + 1), score(1, 1))


def test_gain_interval_goes_from_before_to_after() -> None:
    low, high = gain_interval(score(48, 80), score(56, 70))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=6e-5)
    assert gain_interval(score(56, 70), score(48, 80)) == pytest.approx((-high, -low))


def test_overall_counts_every_question_once() -> None:
    one, two = score(10, 10), score(0, 30, chance=0.1, shortcut="", shortcut_accuracy=0.0)
    whole = overall([one, two])
    assert (whole.n, whole.correct, whole.accuracy, whole.seconds) == (40, 10, 0.25, 4.0)
    assert whole.chance == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert whole.shortcut_accuracy == pytest.approx(10 * 0.5 / 40)
    assert whole.low < 0.25 < whole.high
