"""Documents of pretraining: biographies, small tales, dictionary lines, tools, and every question in its plain form.

The plain form is `prompt` + `completion` exactly as in the question rows, so that a base model can be asked what it
knows.
"""

import json
from dataclasses import dataclass

from minimind.world.domains import DOMAINS, MIXTURE, draw_item
from minimind.world.draw import Draw, Split, cumulate, split_of
from minimind.world.facts import RELATIONS, World
from minimind.world.lexicon import COLOURS, LANGUAGES, OBJECTS, PEOPLE, PLACES, TOWN, WEEKDAYS, Language, Word
from minimind.world.tools import TOOLS
from minimind.world.words import dictionary_line


@dataclass(frozen=True, slots=True)
class Document:
    """One document with what it cost to draw."""

    kind: str
    language: Language
    text: str
    bits: float
    """-log2 of the probability of all choices behind it, its kind and language included."""


def biography(draw: Draw, language: Language, world: World, person: Word | None = None) -> str:
    """Return two to four facts about a person (None: one by lot), each in one of its wordings."""
    person = person or draw.choice(PEOPLE)
    told = draw.sample(RELATIONS, draw.between(2, 4))
    return (" " if language == "en" else "").join(
        draw.choice(relation.told[language]).format(p=person.of(language), v=world.value(person, relation).of(language))
        for relation in told
    )


_OPENINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "It is {day} in {town}.",
        "On {day} the sun shines over {town}.",
        "{day} morning is quiet in {town}.",
        "It rains in {town} on {day}.",
    ),
    "zh": (
        "{day}，{town}阳光很好。",
        "{day}的早上，{town}很安静。",
        "{day}，{town}下着小雨。",
        "今天是{day}，{town}很热闹。",
    ),
}
_MEETINGS: dict[Language, tuple[str, ...]] = {
    "en": ("{a} meets {b} at the {place}.", "{a} goes to the {place} and sees {b}."),
    "zh": ("{a}在{place}遇见了{b}。", "{a}去了{place}，看见{b}。"),
}
_GIFTS: dict[Language, tuple[str, ...]] = {
    "en": ("{a} gives {b} the {colour} {thing}.", '"The {colour} {thing} is for you," says {a}.'),
    "zh": ("{a}把{colour}的{thing}给了{b}。", "{a}说：“这个{colour}的{thing}送给你。”"),
}
_THANKS: dict[Language, tuple[str, ...]] = {
    "en": ('"Thank you, {a}!" says {b}.', "{b} is happy.", "{b} laughs and thanks {a}."),
    "zh": ("{b}说：“谢谢你，{a}！”", "{b}很高兴。", "{b}笑着谢谢{a}。"),
}
_ENDINGS: dict[Language, tuple[str, ...]] = {
    "en": ("Now {b} has the {thing}.", "Now the {thing} is at the {place} with {b}."),
    "zh": ("现在{b}拿着{thing}。", "现在{thing}和{b}都在{place}。"),
}


def tale(draw: Draw, language: Language, split: Split) -> str:
    """Return a small gift story of five sentences that ends with who has the gift; its content belongs to `split`."""
    start = draw.bits
    while True:
        draw.bits = start
        giver, receiver = draw.sample(PEOPLE, 2)
        place, thing, colour, day = (draw.choice(words) for words in (PLACES, OBJECTS, COLOURS, WEEKDAYS))
        key = f"tale|{giver.en}|{receiver.en}|{place.en}|{thing.en}|{colour.en}|{day.en}"
        if split_of(key) == split:
            break
    words = {
        "a": giver.of(language),
        "b": receiver.of(language),
        "place": place.of(language),
        "thing": thing.of(language),
        "colour": colour.of(language),
        "day": day.of(language),
        "town": TOWN.of(language),
    }
    parts = (_OPENINGS, _MEETINGS, _GIFTS, _THANKS, _ENDINGS)
    return (" " if language == "en" else "").join(draw.choice(part[language]).format(**words) for part in parts)


def function_card(draw: Draw, language: Language) -> str:
    """Return the JSON schema of one tool, as the chat template will show it, so that its words are known early."""
    tool = draw.choice(tuple(TOOLS))
    return f"{_FUNCTION[language]}{json.dumps(TOOLS[tool].schema, ensure_ascii=False)}"


_FUNCTION: dict[Language, str] = {"en": "Function: ", "zh": "函数："}

_KINDS = cumulate(MIXTURE["pretrain"])


def document(draw: Draw, world: World, split: Split) -> Document:
    """Return one document: a kind by `MIXTURE`, either language, content of the split.

    Biographies and dictionary lines are the same knowledge in every split: what they tell is not what is asked.
    """
    start = draw.bits
    kind, language = draw.weighted(_KINDS), draw.choice(LANGUAGES)
    match kind:
        case "biography":
            text = biography(draw, language, world)
        case "tale":
            text = tale(draw, language, split)
        case "dictionary":
            text = dictionary_line(draw, language)
        case "function":
            text = function_card(draw, language)
        case _:
            text = draw_item(DOMAINS[kind], draw, language, world, split).plain_text()
    return Document(kind, language, text, draw.bits - start)
