"""Stories: answers by an independent reader of the text, balance, and that no shortcut is good."""

import re
from collections import Counter, defaultdict

import pytest

from minimind.world.domains import DOMAINS, draw_item
from minimind.world.draw import Draw
from minimind.world.facts import World
from minimind.world.graders import grade
from minimind.world.item import Item
from minimind.world.lexicon import LANGUAGES, Language
from minimind.world.rows import question

WORLD = World(0)
STORIES = ("who-zero", "who-one", "who-two", "where-person", "where-object")

EVENTS: dict[str, list[tuple[str, str]]] = {
    "en": [
        (r"(\w+) is at the (\w+)\.", "at a p"),
        (r"(\w+) goes to the (\w+)\.", "at a p"),
        (r"(\w+) has the (\w+)\.", "has a x"),
        (r"(\w+) has the (\w+) and the (\w+)\.", "has a x y"),
        (r"(\w+) gives the (\w+) to (\w+)\.", "give a x b"),
        (r"(\w+) puts down the (\w+)\.", "drop a x"),
    ],
    "zh": [
        (r"(..)在(..)。", "at a p"),
        (r"(..)去了(..)。", "at a p"),
        (r"(..)拿着(..)。", "has a x"),
        (r"(..)拿着(..)和(..)。", "has a x y"),
        (r"(..)把(..)给了(..)。", "give a x b"),
        (r"(..)放下了(..)。", "drop a x"),
    ],
}
ASKS = {
    "en": [(r"Who has the (\w+)(?: now)?\?", "who"), (r"Where is (?:the )?(\w+)(?: now)?\?", "where")],
    "zh": [(r"(?:现在)?谁拿着(..)？", "who"), (r"(..)(?:现在)?在哪里？", "where")],
}


def read(text: str, language: str) -> tuple[str, list[str]]:
    """Return (answer, people who got something, in order) by reading the sentences: shares no code with the world."""
    sentences = re.findall(r"[^.?。？]+[.?。？]", text)
    holder: dict[str, str] = {}
    place: dict[str, str] = {}
    receivers: list[str] = []
    for sentence in (part.strip() for part in sentences[:-1]):
        matches = [(re.fullmatch(pattern, sentence), names) for pattern, names in EVENTS[language]]
        (found, names) = next((match, names) for match, names in matches if match)
        kind, *roles = names.split()
        words = dict(zip(roles, found.groups(), strict=True))
        if kind == "at":
            place[words["a"]] = words["p"]
        elif kind == "has":
            holder.update({words[role]: words["a"] for role in ("x", "y") if role in words})
        elif kind == "give":
            assert holder[words["x"]] == words["a"], "only who has a thing can give it"
            holder[words["x"]] = words["b"]
            receivers.append(words["b"])
        else:
            assert holder.pop(words["x"]) == words["a"]
            place[words["x"]] = place[words["a"]]
    (asked, kind) = next(
        (match.group(1), kind)
        for pattern, kind in ASKS[language]
        if (match := re.fullmatch(pattern, sentences[-1].strip()))
    )
    if kind == "who":
        return holder[asked], receivers
    return place[holder.get(asked, asked)], receivers


def items(name: str, language: Language, count: int) -> list[Item]:
    draw = Draw("stories", name, language)
    return [draw_item(DOMAINS[name], draw, language, WORLD, "train") for _ in range(count)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", STORIES)
def test_answers_agree_with_an_independent_reader(name: str, language: Language) -> None:
    transfers: Counter[int] = Counter()
    for item in items(name, language, 300):
        answer, receivers = read(item.user, language)
        assert answer == item.answer, item.user
        transfers[len(receivers)] += 1
        assert item.shortcuts.get("last receiver", receivers[-1] if receivers else "") == (receivers or [""])[-1]
    assert set(transfers) == {{"who-one": 1, "who-two": 2}.get(name, 0)}


@pytest.mark.parametrize("name", STORIES)
def test_no_shortcut_is_good(name: str) -> None:
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    total = 1500
    for item in items(name, "en", total):
        row = question(item, "x")
        assert grade(row, item.reply)
        for shortcut, answer in item.shortcuts.items():
            seen[shortcut] += 1
            right[shortcut] += grade(row, answer)
    assert right
    for shortcut, count in right.items():
        # 0.6 by design; 0.04 is three standard errors
        assert count / total < 0.64, (name, shortcut, count / total)
        if "holder" not in shortcut and "transfer" not in shortcut and "of the person" not in shortcut:
            assert count / total < 0.54, (name, shortcut, count / total)  # does not read the question: at most 1/2


@pytest.mark.parametrize("name", STORIES)
def test_the_question_decides(name: str) -> None:
    """The same story is asked about two things with different answers, equally often: reading is needed."""
    by_story: dict[str, set[str]] = defaultdict(set)
    answers: Counter[str] = Counter()
    domain = DOMAINS[name]
    draw = Draw("pairs", name)
    asked_late = 0
    for _ in range(1500):
        item = domain.make(draw, "en", WORLD)
        story = item.keys[0].rsplit("|", 1)[0]
        by_story[story].add(item.answer)
        answers[item.answer] += 1
        names = re.findall(r"\w+", item.user.rsplit(".", 1)[0])
        asked_late += names.index(item.answer) > len(names) / 2
    # the answer's first mention is not always early nor always late, and no person or place is favoured
    assert 150 < asked_late < 1350 or name == "who-zero"
    assert max(answers.values()) < 2.2 * 1500 / len(answers)


def test_the_two_questions_of_a_story_differ() -> None:
    for name in STORIES:
        domain = DOMAINS[name]
        draw = Draw("differ", name)
        for _ in range(300):
            item = domain.make(draw, "en", WORLD)
            body, ask = item.user.rsplit(". ", 1)
            things = set(re.findall(r"the (\w+)", body)) - set(re.findall(r"(?:at|to) the (\w+)", body))
            candidates = things if name != "where-person" else set(re.findall(r"([A-Z]\w+) (?:is|goes)", body))
            asked = re.findall(r"(\w+)(?: now)?\?", ask)[0]
            assert asked in candidates
            assert len(candidates) == 2
            answers = {read(f"{body}. {ask.replace(asked, other)}", "en")[0] for other in candidates}
            assert len(answers) == 2, item.user


def test_mixed_lengths_do_not_give_the_answer_away() -> None:
    """Of two-transfer stories every holder in turn is the answer: first holder, first receiver, last receiver."""
    counts: Counter[str] = Counter()
    for item in items("who-two", "en", 2000):
        for shortcut in ("last receiver", "first holder of the object", "first transfer of the object"):
            counts[shortcut] += item.shortcuts[shortcut] == item.answer
    assert 0.44 < counts["last receiver"] / 2000 < 0.56
    assert 0.41 < counts["first holder of the object"] / 2000 < 0.54
    assert 0.54 < counts["first transfer of the object"] / 2000 < 0.66


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", STORIES)
def test_the_notes_follow_the_story_and_say_the_answer(name: str, language: Language) -> None:
    draw = Draw("notes", name)
    for _ in range(200):
        item = DOMAINS[name].make(draw, language, WORLD)
        lines = re.fullmatch(
            r"Notes: (.*)\. Asked: (.*)\." if language == "en" else r"记下：(.*)。问的是(.*)。", item.reasoning
        )
        assert lines
        told, found = (
            [re.fullmatch(r"(\w+) (\w+)|(..)(..)", pair) for pair in re.split(", |，", part)] for part in lines.groups()
        )
        newest: dict[str, str] = {}
        for pair in told:
            assert pair
            one, other = (word for word in pair.groups() if word)
            assert one in item.user
            assert other in item.user
            newest[one] = other
        other = ""
        for pair in found:  # whoever has it first, then where she is
            assert pair
            one, other = (word for word in pair.groups() if word)
            assert newest[one] == other
        assert other == item.answer


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_looked_up_line_is_in_the_list(language: Language) -> None:
    draw = Draw("lookup", language)
    for _ in range(200):
        item = DOMAINS["lookup"].make(draw, language, WORLD)
        listed, asked = re.fullmatch(
            r"List: (.*)\. Look up: (.*)\." if language == "en" else r"名单：(.*)。查一查：(.*)。", item.user
        ).groups()  # type: ignore[union-attr]
        lines, found = (re.split(", |，", part) for part in (listed, re.sub("Found: |查到|[.。]", "", item.answer)))
        assert len(set(lines)) == 4
        assert len(set(found)) == 3
        assert set(found) < set(lines)
        assert all(line.startswith(word) for line, word in zip(found, re.split(", |，", asked), strict=True))
