"""Small translation: a coloured thing or animal from English into Chinese or back, and its dictionary lines."""

from minimind.world.draw import Draw, small_split_of
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import (
    ANIMALS,
    COLOURS,
    FOODS,
    OBJECTS,
    PEOPLE,
    PLACES,
    TRADES,
    WEEKDAYS,
    Language,
    Word,
)

THINGS = OBJECTS + ANIMALS
DICTIONARY = PLACES + OBJECTS + ANIMALS + COLOURS + TRADES + FOODS + WEEKDAYS + PEOPLE

_ASK: dict[Language, tuple[str, ...]] = {
    "en": ("Say in Chinese: {0}.", "What is {0} in Chinese?", "Translate into Chinese: {0}."),
    "zh": ("用英语说：{0}。", "{0}用英语怎么说？", "翻译成英语：{0}。"),
}
_MEANS: dict[Language, tuple[str, ...]] = {
    "en": ("The word {0} is {1} in Chinese.", "In Chinese {0} is {1}."),
    "zh": ("{1}用英语说是 {0}。", "{1}的英语是 {0}。"),
}


def phrase(colour: Word, thing: Word) -> Word:
    """Return the coloured thing in both languages."""
    return Word(f"{colour.en} {thing.en}", f"{colour.zh}的{thing.zh}")


def translation(draw: Draw, language: Language, _: World) -> Item:
    """A colour and a thing in the other language; the words are in the dictionary, the pair may be new."""
    colour, thing = draw.choice(COLOURS), draw.choice(THINGS)
    both = phrase(colour, thing)
    answer = both.of("zh" if language == "en" else "en")
    other: Language = "zh" if language == "en" else "en"
    return Item(
        "translation",
        language,
        (f"translation|{both.en}",),
        draw.choice(_ASK[language]).format(both.of(language)),
        answer,
        f"{answer}." if language == "en" else f"英语是 {answer}。",
        grader="exact",
        grader_args={"accept": [f"英语是 {answer}"] if language == "zh" else []},
        chance=1 / (len(COLOURS) * len(THINGS)),
        shortcuts={"the words unchanged": both.of(language), "the thing alone": thing.of(other)},
    )


def dictionary_line(draw: Draw, language: Language) -> str:
    """Return one sentence that tells a word in the other language."""
    word = draw.choice(DICTIONARY)
    return draw.choice(_MEANS[language]).format(word.en, word.zh)


DOMAINS = (
    Domain(
        "translation",
        translation,
        "A coloured thing or animal in the other language.",
        "the pair of colour and thing (both words are in the dictionary and in other pairs), in both directions",
        "0 by any habit; chance 1/160.",
        split=small_split_of,
    ),
)
