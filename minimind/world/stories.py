"""Stories with tracked state: who has it, where is she, where is it. Short, present tense, one event a sentence.

How shortcuts are kept bad. Every story is asked about one of *two* people or objects, each with probability 1/2, and
their answers differ. So any strategy that does not read the question (last receiver, last place, commonest name, ...)
is right at most half of the time. Strategies that read the question but not the order (the asked thing's first
holder, its first transfer, its holder's last place) are held at 60 % or less by the shares of the plots below.

The reasoning writes the state down event by event and looks the asked thing up in it: two habits that a small model
learns, where following a story in the head takes it many times as many examples (docs/decisions.md).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from minimind.world.draw import Draw, cumulate
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import OBJECTS, PEOPLE, PLACES, WALKERS, Language, Word, names

_TOLD: dict[str, dict[Language, tuple[str, ...]]] = {
    "at": {"en": ("{0} is at the {1}.",), "zh": ("{0}在{1}。",)},
    "go": {"en": ("{0} goes to the {1}.",), "zh": ("{0}去了{1}。",)},
    "has": {"en": ("{0} has the {1}.",), "zh": ("{0}拿着{1}。",)},
    "has both": {"en": ("{0} has the {1} and the {2}.",), "zh": ("{0}拿着{1}和{2}。",)},
    "give": {"en": ("{0} gives the {1} to {2}.",), "zh": ("{0}把{1}给了{2}。",)},
    "drop": {"en": ("{0} puts down the {1}.",), "zh": ("{0}放下了{1}。",)},
}
_WHO: dict[Language, tuple[str, ...]] = {
    "en": ("Who has the {0}?", "Who has the {0} now?"),
    "zh": ("谁拿着{0}？", "现在谁拿着{0}？"),
}
_WHERE_PERSON: dict[Language, tuple[str, ...]] = {
    "en": ("Where is {0}?", "Where is {0} now?"),
    "zh": ("{0}在哪里？", "{0}现在在哪里？"),
}
_WHERE_OBJECT: dict[Language, tuple[str, ...]] = {
    "en": ("Where is the {0}?", "Where is the {0} now?"),
    "zh": ("{0}在哪里？", "{0}现在在哪里？"),
}


_NOTES: dict[Language, str] = {"en": "Notes: {0}. Asked: {1}.", "zh": "记下：{0}。问的是{1}。"}


@dataclass(slots=True)
class Story:
    """Events in their order and the state they lead to."""

    events: list[tuple[str, tuple[Word, ...]]] = field(default_factory=list[tuple[str, tuple[Word, ...]]])
    holder: dict[Word, Word] = field(default_factory=dict[Word, Word])
    """Object -> person who has it."""
    place: dict[Word, Word] = field(default_factory=dict[Word, Word])
    """Person or object put down -> place."""

    def tell(self, event: str, *words: Word) -> None:
        """Add one event and update the state."""
        self.events.append((event, words))
        match event:
            case "at" | "go":
                self.place[words[0]] = words[1]
            case "has" | "has both":
                for thing in words[1:]:
                    self.holder[thing] = words[0]
            case "give":
                self.holder[words[1]] = words[2]
            case _:
                del self.holder[words[1]]
                self.place[words[1]] = self.place[words[0]]

    def where(self, thing: Word) -> Word:
        """Return the place of an object: where it was put down, else where its holder is."""
        return self.place[self.holder[thing]] if thing in self.holder else self.place[thing]

    def steps(self, asked: Word, language: Language) -> str:
        """Return notes: who has or is what, event by event, and at the end what they say about `asked`.

        Each note copies one sentence, and the answer is what stands beside the newest mention of the asked word.
        """
        told: list[tuple[Word, Word]] = []
        places: dict[Word, Word] = {}
        for event, words in self.events:
            match event:
                case "at" | "go":
                    places[words[0]] = words[1]
                    told.append((words[0], words[1]))
                case "has" | "has both":
                    told += [(thing, words[0]) for thing in words[1:]]
                case "give":
                    told.append((words[1], words[2]))
                case _:
                    told.append((words[1], places[words[0]]))
        holder = self.holder.get(asked)
        if holder is None:
            found = [(asked, self.place[asked])]
        else:
            found = [(asked, holder), *([(holder, self.place[holder])] if holder in self.place else [])]
        return _NOTES[language].format(_pairs(told, language), _pairs(found, language))

    def sentences(self, draw: Draw, language: Language) -> list[str]:
        """Return the sentences, one wording drawn for each."""
        return [
            draw.choice(_TOLD[event][language]).format(*(word.of(language) for word in words))
            for event, words in self.events
        ]

    def key(self, domain: str, asked: Word) -> str:
        """Return the name of the content: the same for every wording and language."""
        told = ";".join(f"{event} {' '.join(word.en for word in words)}" for event, words in self.events)
        return f"{domain}|{told}|{asked.en}"


def _pairs(pairs: Iterable[tuple[Word, Word]], language: Language) -> str:
    """Return each word beside where or with whom it is; nothing stands between them, see docs/decisions.md."""
    if language == "en":
        return ", ".join(f"{one.en} {other.en}" for one, other in pairs)
    return "，".join(f"{one.zh}{other.zh}" for one, other in pairs)


def in_order(text: str, candidates: list[str]) -> list[str]:
    """Return every mention of a candidate in the text, in the order of mention."""
    found = [(place, name) for name in candidates for place in _places(text, name)]
    return [name for _, name in sorted(found)]


def _places(text: str, name: str) -> list[int]:
    places: list[int] = []
    place = text.find(name)
    while place >= 0:
        places.append(place)
        place = text.find(name, place + 1)
    return places


def mention_shortcuts(text: str, candidates: list[str], what: str) -> dict[str, str]:
    """Return the answers of those who only look at mentions: the first, the last, the most frequent."""
    mentions = in_order(text, candidates)
    return {
        f"first {what} mentioned": mentions[0],
        f"last {what} mentioned": mentions[-1],
        f"most frequent {what}": Counter(mentions).most_common(1)[0][0],
    }


def _who_item(domain: str, story: Story, draw: Draw, language: Language, things: list[Word]) -> Item:
    asked = draw.choice(things)
    sentences = story.sentences(draw, language)
    gap = " " if language == "en" else ""
    text = gap.join(sentences)
    question = draw.choice(_WHO[language]).format(asked.of(language))
    answer = story.holder[asked].of(language)
    people = {word for _, words in story.events for word in words if word in _PEOPLE}
    gives = [words for event, words in story.events if event == "give"]
    first = next(words[0] for event, words in story.events if event.startswith("has") and asked in words)
    shortcuts = mention_shortcuts(text, [word.of(language) for word in people], "person")
    shortcuts["first holder of the object"] = first.of(language)
    if gives:
        shortcuts["last receiver"] = gives[-1][2].of(language)
        own = next((words[2] for words in gives if words[1] == asked), first)
        shortcuts["first transfer of the object"] = own.of(language)
        if len(gives) == 1:  # with one transfer that is no shortcut but the solution
            del shortcuts["first transfer of the object"]
    if not gives:
        del shortcuts["first holder of the object"]
    return Item(
        domain,
        language,
        (story.key(domain, asked),),
        f"{text}{gap}{question}",
        answer,
        f"It is {answer}." if language == "en" else f"是{answer}。",
        reasoning=story.steps(asked, language),
        grader="choice",
        grader_args={"options": names(PEOPLE, language)},
        chance=1 / len(people),
        shortcuts=shortcuts,
    )


_PEOPLE = frozenset(PEOPLE)


def who_zero(draw: Draw, language: Language, _: World) -> Item:
    """Two people have a thing each; who has this one?"""
    story = Story()
    people, things = draw.sample(PEOPLE, 2), draw.sample(OBJECTS, 2)
    for person, thing in zip(people, things, strict=True):
        story.tell("has", person, thing)
    return _who_item("who-zero", story, draw, language, things)


def who_one(draw: Draw, language: Language, _: World) -> Item:
    """One of two things changes hands once. Half of the time one person had both."""
    story = Story()
    things = draw.sample(OBJECTS, 2)
    moved = draw.choice(things)
    if draw.flip():
        giver, receiver = draw.sample(PEOPLE, 2)
        story.tell("has both", giver, *things)
    else:
        *holders, receiver = draw.sample(PEOPLE, 3)
        for person, thing in zip(holders, things, strict=True):
            story.tell("has", person, thing)
        giver = story.holder[moved]
    story.tell("give", giver, moved, receiver)
    return _who_item("who-one", story, draw, language, things)


_TWO = cumulate({"each once": 0.1, "both to one": 0.1, "on": 0.35, "on to holder": 0.3, "back": 0.15})


def who_two(draw: Draw, language: Language, _: World) -> Item:
    """Two transfers: of one thing twice (onwards or back) or of each thing once."""
    story = Story()
    plot = draw.weighted(_TWO)
    things = draw.sample(OBJECTS, 2)
    people = draw.sample(PEOPLE, 4 if plot == "on" else 3)
    for person, thing in zip(people, things, strict=False):
        story.tell("has", person, thing)
    moved = draw.choice(things)
    other = things[1 - things.index(moved)]
    giver, keeper, third = story.holder[moved], story.holder[other], people[2]
    if plot == "each once":  # x goes to the third, then y to the one who gave x
        story.tell("give", giver, moved, third)
        story.tell("give", keeper, other, giver)
    elif plot == "both to one":  # x joins y, then y goes on
        story.tell("give", giver, moved, keeper)
        story.tell("give", keeper, other, third)
    elif plot == "on to holder":  # x passes through the holder of y
        story.tell("give", giver, moved, keeper)
        story.tell("give", keeper, moved, third)
    else:
        story.tell("give", giver, moved, third)
        story.tell("give", third, moved, people[3] if plot == "on" else giver)
    return _who_item("who-two", story, draw, language, things)


def _where_item(
    domain: str, story: Story, draw: Draw, language: Language, asked: Word, answer: Word, others: dict[str, Word]
) -> Item:
    gap = " " if language == "en" else ""
    text = gap.join(story.sentences(draw, language))
    wordings = _WHERE_PERSON if asked in _PEOPLE else _WHERE_OBJECT
    question = draw.choice(wordings[language]).format(asked.of(language))
    places = {words[1] for event, words in story.events if event in ("at", "go")}
    shortcuts = mention_shortcuts(text, [place.of(language) for place in places], "place")
    shortcuts |= {name: place.of(language) for name, place in others.items()}
    name = answer.of(language)
    return Item(
        domain,
        language,
        (story.key(domain, asked),),
        f"{text}{gap}{question}",
        name,
        f"At the {name}." if language == "en" else f"在{name}。",
        reasoning=story.steps(asked, language),
        grader="choice",
        grader_args={"options": names(PLACES, language)},
        chance=1 / len(places),
        shortcuts=shortcuts,
    )


_MOVES = cumulate({0: 0.2, 1: 0.4, 2: 0.4})


def where_person(draw: Draw, language: Language, _: World) -> Item:
    """Two people, no move, one or two; the second move may lead to the place the first one left."""
    story = Story()
    num_moves = draw.weighted(_MOVES)
    people = draw.sample(WALKERS, 2)
    unseen = list(PLACES)
    for person in people:
        story.tell("at", person, unseen.pop(draw.below(len(unseen))))
    first = dict(story.place)
    left: Word | None = None
    for _move in range(num_moves):
        mover = draw.choice(people)
        goal = left if left is not None and draw.flip() else unseen.pop(draw.below(len(unseen)))
        left = story.place[mover]
        story.tell("go", mover, goal)
    asked = draw.choice(people)
    others = {"first place of the person": first[asked]}
    return _where_item("where-person", story, draw, language, asked, story.place[asked], others)


_CARRIED = cumulate({"put down": 0.8, "two carriers": 0.1, "three moves": 0.1})


def where_object(draw: Draw, language: Language, _: World) -> Item:
    """Things are carried about; in most stories one of two is put down on the way."""
    story = Story()
    plot = draw.weighted(_CARRIED)
    things = draw.sample(OBJECTS, 2)
    first_place: dict[Word, Word] = {}
    if plot == "put down":
        person = draw.choice(WALKERS)
        holders = [person, person]
        here, there = draw.sample(PLACES, 2)
        story.tell("has both", person, *things)
        story.tell("go", person, here)
        story.tell("drop", person, draw.choice(things))
        story.tell("go", person, there)
        first_place[person] = here
    else:
        holders = draw.sample(WALKERS, 2)
        for person, thing in zip(holders, things, strict=True):
            story.tell("has", person, thing)
        goals = draw.sample(PLACES, 2 if plot == "two carriers" else 3)
        walkers = draw.shuffle(holders)
        for person, goal in zip([*walkers, walkers[0]], goals, strict=False):
            story.tell("go", person, goal)
            first_place.setdefault(person, goal)
    asked = draw.choice(things)
    holder = holders[things.index(asked)]
    others = {"first place of its holder": first_place[holder], "last place of its holder": story.place[holder]}
    return _where_item("where-object", story, draw, language, asked, story.where(asked), others)


_LISTED: dict[Language, str] = {"en": "List: {0}. Look up: {1}.", "zh": "名单：{0}。查一查：{1}。"}
_FOUND: dict[Language, str] = {"en": "Found: {0}.", "zh": "查到{0}。"}


def lookup(draw: Draw, language: Language, _: World) -> Item:
    """A list of who has what, or who is where, of which three lines are read out: the habit that stories end with."""
    keys, values = draw.choice(((OBJECTS, PEOPLE), (WALKERS, PLACES)))
    listed = dict(zip(draw.sample(keys, 4), draw.sample(values, 4), strict=True))
    asked = draw.sample(tuple(listed), 3)
    comma = ", " if language == "en" else "，"
    answer, in_their_order = (
        _FOUND[language].format(_pairs([(word, listed[word]) for word in words], language))
        for words in (asked, [word for word in listed if word in asked])
    )
    content = [f"{one.en} {other.en}" for one, other in listed.items()]
    return Item(
        "lookup",
        language,
        ("|".join(["lookup", *content, *(word.en for word in asked)]),),
        _LISTED[language].format(_pairs(listed.items(), language), comma.join(word.of(language) for word in asked)),
        answer,
        answer,
        grader="exact",
        chance=1 / 24,
        shortcuts={"in the order of the list": in_their_order},
    )


_UNSEEN = "this combination of people, things, places, order and asked thing, in either language"

DOMAINS = (
    Domain(
        "lookup",
        lookup,
        "Three lines of a list of four are read out.",
        "the list together with what is asked",
        "1/6: in the order of the list; chance 1/24: any of the four values for each of the three.",
    ),
    Domain("who-zero", who_zero, "Two people have a thing each. Who has this one?", _UNSEEN, "1/2 by any habit."),
    Domain(
        "who-one",
        who_one,
        "One thing changes hands once. Who has this one?",
        _UNSEEN,
        "1/2: the last receiver, or the first holder.",
    ),
    Domain(
        "who-two",
        who_two,
        "Two transfers. Who has this thing now?",
        _UNSEEN,
        "0.6: only the object's first transfer is followed; 1/2: the last receiver; 0.475: its first holder.",
    ),
    Domain(
        "where-person",
        where_person,
        "People walk about. Where is she?",
        _UNSEEN,
        "1/2: the last place, or her first place.",
    ),
    Domain(
        "where-object",
        where_object,
        "Things are carried and put down. Where is it?",
        _UNSEEN,
        "0.6: its holder's last place (blind to putting down); 0.55: its holder's first place.",
    ),
)
