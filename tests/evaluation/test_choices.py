import math
from pathlib import Path

import pytest
import torch

from minimind.evaluation.choices import log_likelihoods, pair_ids, score_choices
from minimind.evaluation.harness import evaluate, first_of_each
from minimind.evaluation.questions import ChoiceQuestion, read_questions
from minimind.evaluation.tasks import Record
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import MIN_VOCAB_SIZE, train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the cat sat on the mat. 猫坐在垫子上。"] * 10, MIN_VOCAB_SIZE + 15)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
            initializer_range=0.2,
        )
    ).eval()


def by_hand(model: Transformer, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        table = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(float(table[len(context) + i - 1, token]) for i, token in enumerate(continuation))


def test_log_likelihoods_equal_one_forward_each_in_any_batch(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (
            torch.randint(3, 90, (c,), generator=generator).tolist(),
            torch.randint(3, 90, (n,), generator=generator).tolist(),
        )
        for c, n in [(1, 1), (20, 3), (5, 30), (7, 1), (1, 12), (13, 2)]
    ]
    expected = [by_hand(model, *pair) for pair in pairs]
    for batch_tokens in (1, 40, 10_000):
        assert log_likelihoods(model, pairs, batch_tokens=batch_tokens) == pytest.approx(expected, rel=1e-5)


def test_a_context_too_long_loses_its_beginning(model: Transformer) -> None:
    context, continuation = list(range(3, 83)), [5, 6, 7]
    # 48 positions predict the last 48 of 49 ids
    kept = (context + continuation)[-49:]
    with torch.no_grad():
        table = model(torch.tensor([kept[:-1]])).logits[0].double().log_softmax(-1)
    expected = sum(float(table[45 + i, token]) for i, token in enumerate(continuation))
    assert log_likelihoods(model, [(context, continuation)]) == pytest.approx([expected], rel=1e-5)


def test_the_choice_and_its_space_are_tokenised_apart(tokenizer: Tokenizer) -> None:
    context, choice = pair_ids(tokenizer, "the cat", "sat", "completion")
    assert context == [tokenizer.bos_id, *tokenizer.encode("the cat")]
    assert tokenizer.decode(choice) == " sat"
    for question in ("Answer: ", "Answer:"):
        context, choice = pair_ids(tokenizer, question, "A", "completion")
        assert (tokenizer.decode(context[1:]), tokenizer.decode(choice)) == ("Answer:", " A")
    assert tokenizer.decode(pair_ids(tokenizer, "猫坐在", "垫子", "completion")[1]) == "垫子"
    assert tokenizer.decode(pair_ids(tokenizer, "a line\n", "next", "completion")[1]) == "next"
    context, choice = pair_ids(tokenizer, "the cat", "sat", "chat")
    assert tokenizer.decode(context).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(choice) == "sat"


def test_scores_follow_the_two_readings_and_name_the_best_rule(model: Transformer, tokenizer: Tokenizer) -> None:
    texts = [f"the cat {word} on" for word in ("sat", "the", "mat", "cat")]
    questions: list[ChoiceQuestion] = []
    for number, text in enumerate(texts):
        choices = ("a", "the mat on the cat", "mat on")
        sums = [by_hand(model, *pair_ids(tokenizer, text, choice, "completion")) for choice in choices]
        assert sums.index(max(sums)) == 0  # the short one has it easier
        rates = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        right = rates.index(max(rates))
        assert right != 0
        questions.append(ChoiceQuestion(str(number), "cats", "en", text, choices, right))
    records: list[Record] = []
    by_sum, by_byte = score_choices(model, tokenizer, questions, on_record=records.append)
    assert (by_sum.domain, by_sum.correct, by_sum.n) == ("cats (sum)", 0, 4)
    assert (by_byte.domain, by_byte.correct, by_byte.n) == ("cats (per byte)", 4, 4)
    assert by_sum.chance == pytest.approx(1 / 3)
    assert by_byte.shortcut in {"the longest", "always B", "always C"}
    assert by_byte.shortcut_accuracy >= 0.5
    assert len(records) == 8
    assert [record.correct for record in records] == [False, True] * 4


def test_chance_is_the_mean_over_questions_of_unequal_size(model: Transformer, tokenizer: Tokenizer) -> None:
    questions = [
        ChoiceQuestion("0", "d", "en", "the", ("cat", "mat"), 0),
        ChoiceQuestion("1", "d", "en", "the", ("cat", "mat", "sat", "on"), 0),
    ]
    assert score_choices(model, tokenizer, questions)[0].chance == pytest.approx(0.375)


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_real_multiple_choice_runs_through(
    public_data: Path, model: Transformer, tokenizer: Tokenizer, form: str
) -> None:
    questions = read_questions(public_data / "mcq_en" / "copa.jsonl")
    questions = first_of_each(questions, 10)
    scores = evaluate(model, tokenizer, questions, form)  # pyright: ignore[reportArgumentType] - one of the two
    assert [(score.domain, score.n) for score in scores] == [("copa (sum)", 10), ("copa (per byte)", 10)]
    assert all(score.chance == 0.5 and math.isfinite(score.accuracy) for score in scores)
