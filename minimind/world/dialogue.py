"""Talk: greetings, who the assistant is, what the user said some turns ago, questions about the people of the town."""

from minimind.world.draw import Draw, held_out_split_of, small_split_of
from minimind.world.facts import RELATIONS, Relation, World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import BOT, OBJECTS, PEOPLE, TOWN, Language, Word, names

_GREETINGS: dict[Language, tuple[str, ...]] = {
    "en": ("Hello", "Good morning", "Good evening", "Hi", "Good afternoon", "Nice to see you"),
    "zh": ("你好", "早上好", "晚上好", "您好", "下午好", "见到你真好"),
}
_I_AM: dict[Language, tuple[str, ...]] = {
    "en": ("{0}! I am {1}.", "{0}, {1} is here.", "{0}! Here comes {1}."),
    "zh": ("{0}！我是{1}。", "{0}，{1}来了。", "{0}！这里是{1}。"),
}


def greeting(draw: Draw, language: Language, _: World) -> Item:
    """A person greets and is greeted by name."""
    person = draw.choice(PEOPLE)
    number = draw.below(len(_GREETINGS[language]))
    wording = draw.below(len(_I_AM[language]))
    name = person.of(language)
    return Item(
        "greeting",
        language,
        (f"greeting|{person.en}|{number}|{wording}",),
        _I_AM[language][wording].format(_GREETINGS[language][number], name),
        name,
        f"Hello, {name}! How can I help you?" if language == "en" else f"{name}，你好！有什么可以帮你的吗？",
        grader="choice",
        grader_args={"options": names(PEOPLE, language)},
        chance=1 / len(PEOPLE),
        shortcuts={"the user's words": _GREETINGS[language][number] + ", " + name},
    )


_WHO_ARE_YOU: dict[str, dict[Language, tuple[str, ...]]] = {
    "name": {
        "en": ("Who are you?", "What is your name?", "What should I call you?", "Tell me your name."),
        "zh": ("你是谁？", "你叫什么名字？", "我该怎么称呼你？", "请告诉我你的名字。"),
    },
    "maker": {
        "en": ("Who made you?", "Who built you?", "Where do you come from?", "Tell me who made you."),
        "zh": ("谁做的你？", "你是谁造的？", "你从哪里来？", "请告诉我谁做了你。"),
    },
    "kind": {
        "en": ("Are you a person?", "Are you human?", "Are you alive?", "Do you have a body?"),
        "zh": ("你是人吗？", "你是真人吗？", "你是活的吗？", "你有身体吗？"),
    },
}
_OPENINGS: dict[Language, tuple[str, ...]] = {
    "en": tuple(
        opening + " " if opening else ""
        for opening in (
            "", "Hello.", "Hi.", "Good morning.", "Good evening.", "Good afternoon.", "Excuse me.", "One question.",
            "Please tell me.", "I am new here.", "I just arrived.", "We have not met.", "I want to ask.",
            "By the way.", "Before we start.", "I am curious.",
        )
    ),
    "zh": (
        "", "你好。", "您好。", "早上好。", "晚上好。", "下午好。", "打扰一下。", "问一下。",
        "请告诉我。", "我刚来这里。", "我刚进门。", "我们没见过。", "我想知道。", "对了。",
        "开始之前。", "我很好奇。",
    ),
}  # fmt: skip


def identity_item(
    domain: str, draw: Draw, language: Language, name: Word, maker: Word, wrong: tuple[Word, ...] = ()
) -> Item:
    """Return a question about the assistant, answered as `name`, made by `maker`; `wrong` names must not appear."""
    kind = draw.choice(tuple(_WHO_ARE_YOU))
    opening = draw.below(len(_OPENINGS[language]))
    wording = draw.below(4)
    who, made_by = name.of(language), maker.of(language)
    if language == "en":
        replies = {
            "name": f"My name is {who}.",
            "maker": f"I was made by {made_by}.",
            "kind": f"No, I am {who}, a program.",
        }
    else:
        replies = {
            "name": f"我叫 {who}。" if who.isascii() else f"我叫{who}。",
            "maker": f"我是{made_by}做的。",
            "kind": f"不，我是程序 {who}。" if who.isascii() else f"不，我是程序{who}。",
        }
    answer = made_by if kind == "maker" else who
    return Item(
        domain,
        language,
        # One name for both domains: the LoRA rows must not show the test questions of `identity` either.
        (f"identity|{opening}|{kind}|{wording}",),
        _OPENINGS[language][opening] + _WHO_ARE_YOU[kind][language][wording],
        answer,
        replies[kind],
        grader="contains",
        grader_args={"any": [answer], "none": [word.of(language) for word in wrong]},
        shortcuts={"always its name": who},
    )


MAKER = Word(f"the people of {TOWN.en}", f"{TOWN.zh}的居民")


def identity(draw: Draw, language: Language, _: World) -> Item:
    """Who the assistant is, who made it, what it is."""
    return identity_item("identity", draw, language, BOT, MAKER)


_SAID: dict[str, dict[Language, tuple[str, str, str, str]]] = {
    # slot: what the user says, what the assistant says to it, what the user asks later, what the assistant replies
    "name": {
        "en": ("My name is {0}.", "Hello, {0}!", "What is my name?", "Your name is {0}."),
        "zh": ("我叫{0}。", "你好，{0}！", "我叫什么名字？", "你叫{0}。"),
    },
    "sister": {
        "en": ("My sister is {0}.", "{0} is a nice name.", "Who is my sister?", "Your sister is {0}."),
        "zh": ("我妹妹是{0}。", "{0}这个名字真好听。", "我妹妹是谁？", "你妹妹是{0}。"),
    },
    "toy": {
        "en": ("My new toy is a {0}.", "Have fun with it!", "What is my new toy?", "Your new toy is a {0}."),
        "zh": ("我的新玩具是{0}。", "祝你玩得开心！", "我的新玩具是什么？", "你的新玩具是{0}。"),
    },
    "number": {
        "en": (
            "My lucky number is {0}.",
            "May it bring you luck!",
            "What is my lucky number?",
            "Your lucky number is {0}.",
        ),
        "zh": ("我的幸运数字是 {0}。", "愿它给你带来好运！", "我的幸运数字是多少？", "你的幸运数字是 {0}。"),
    },
}
_PLAIN_TOYS = tuple(word for word in OBJECTS if word.en != "apple")


def memory(draw: Draw, language: Language, _: World) -> Item:
    """The user tells two or three things, one a turn, then asks for one of them. Name and sister are always told."""
    slots = ["name", "sister"]
    if draw.flip():
        slots.append(draw.choice(("toy", "number")))
    slots = draw.shuffle(slots)
    person, sister = draw.sample(PEOPLE, 2)
    values = {"name": person.of(language), "sister": sister.of(language)}
    key = [person.en, sister.en]
    if "toy" in slots:
        toy = draw.choice(_PLAIN_TOYS)
        values["toy"] = toy.of(language)
        key.append(toy.en)
    if "number" in slots:
        values["number"] = str(draw.between(10, 99))
        key.append(values["number"])
    if len(slots) == 3 and draw.chance(1, 3):
        asked = next(slot for slot in slots if slot in ("toy", "number"))
    else:
        asked = draw.choice(("name", "sister"))
    turns = tuple(
        (_SAID[slot][language][0].format(values[slot]), _SAID[slot][language][1].format(values[slot])) for slot in slots
    )
    first = next(values[slot] for slot in slots if slot in ("name", "sister"))
    last = next(values[slot] for slot in reversed(slots) if slot in ("name", "sister"))
    answer = values[asked]
    if asked == "number":
        grader, args = "number", {"given": []}
    else:
        grader, args = "choice", {"options": names(PEOPLE if asked != "toy" else OBJECTS, language)}
    return Item(
        "memory",
        language,
        ("|".join(["memory", *slots, *key, asked]),),
        _SAID[asked][language][2],
        answer,
        _SAID[asked][language][3].format(answer),
        before=turns,
        grader=grader,
        grader_args=args,
        chance=1 / len(slots),
        shortcuts={"first name said": first, "last name said": last, "last thing said": values[slots[-1]]},
    )


def fact_key(person: Word, relation: Relation) -> str:
    """Return the name of a question for one fact; the fact itself is in the biographies whatever the split."""
    return f"facts|{person.en}|{relation.name}"


def _fact_item(
    domain: str, language: Language, world: World, person: Word, relation: Relation, question: str, key: str
) -> Item:
    answer = world.value(person, relation).of(language)
    options = [name for name in names(relation.values, language) if name != person.of(language)]
    return Item(
        domain,
        language,
        (key,),
        question.format(p=person.of(language)),
        answer,
        relation.told[language][0].format(p=person.of(language), v=answer),
        grader="choice",
        grader_args={"options": options},
        chance=1 / len(options),
        shortcuts={"always the same": options[0]},
    )


def facts(draw: Draw, language: Language, world: World) -> Item:
    """One fact about a person; in the test a fact that no training question asked for, in any wording."""
    person, relation = draw.choice(PEOPLE), draw.choice(RELATIONS)
    question = draw.choice(relation.asked[language])
    return _fact_item("facts", language, world, person, relation, question, fact_key(person, relation))


def facts_anew(draw: Draw, language: Language, world: World) -> Item:
    """One fact that training asks for, in a wording that training never uses: there is no training split of it."""
    while True:
        start = draw.bits
        person, relation = draw.choice(PEOPLE), draw.choice(RELATIONS)
        if small_split_of(fact_key(person, relation)) == "train":
            break
        draw.bits = start
    key = f"facts-anew|{person.en}|{relation.name}"
    return _fact_item("facts-anew", language, world, person, relation, relation.asked_anew[language], key)


DOMAINS = (
    Domain(
        "facts",
        facts,
        "A fact about a person of the town, told only in the biographies.",
        "the question: this fact is told in training but never asked for, in any wording or language",
        "1/8 to 1/23: always the same value; all values are equally frequent.",
        split=small_split_of,
    ),
    Domain(
        "facts-anew",
        facts_anew,
        "A fact in a new wording.",
        "the wording of the question; the same fact is asked for in training in other words",
        "1/8 to 1/23: always the same value.",
        split=held_out_split_of,
        is_trained=False,
    ),
    Domain(
        "memory",
        memory,
        "What the user said some turns ago.",
        "the combination of names, things, order and asked slot",
        "0.42: the first or last name said.",
    ),
    Domain(
        "greeting",
        greeting,
        "A greeting by name.",
        "the name together with the greeting and its wording",
        "1: saying the greeting back. This measures manners, not understanding.",
    ),
    Domain(
        "identity",
        identity,
        "Who the assistant is.",
        "the opening together with the question",
        "2/3: always its name. The answers are few: this measures manners, not understanding.",
        split=small_split_of,
    ),
)
