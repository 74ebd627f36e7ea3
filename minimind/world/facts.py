"""Who does what in Willowby: the table of facts, drawn from the seed, and the sentences that tell and ask it.

Facts are told only in biographies (and in questions that training may ask). It deliberately does not know splits.
"""

from dataclasses import dataclass

from minimind.world.draw import Draw
from minimind.world.lexicon import ANIMALS, COLOURS, FOODS, PEOPLE, PLACES, TRADES, Language, Word


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact about a person: its possible values and its wordings, `{p}` the person and `{v}` the value."""

    name: str
    values: tuple[Word, ...]
    told: dict[Language, tuple[str, ...]]
    """Sentences of the biographies; the first is also the reply to a question."""
    asked: dict[Language, tuple[str, ...]]
    """Questions that training uses."""
    asked_anew: dict[Language, str]
    """A question whose wording training never uses."""


RELATIONS = (
    Relation(
        "trade",
        TRADES,
        {
            "en": ("{p} is a {v}.", "{p} works as a {v}.", "The trade of {p} is {v}."),
            "zh": ("{p}是{v}。", "{p}的职业是{v}。", "{p}的工作是当{v}。"),
        },
        {
            "en": ("What is the trade of {p}?", "What work does {p} do?", "Tell me the trade of {p}."),
            "zh": ("{p}的职业是什么？", "{p}做什么工作？", "请说出{p}的职业。"),
        },
        {"en": "Which trade does {p} have?", "zh": "{p}的工作是什么？"},
    ),
    Relation(
        "home",
        PLACES,
        {
            "en": ("{p} lives at the {v}.", "The home of {p} is at the {v}.", "{p} sleeps at the {v}."),
            "zh": ("{p}住在{v}。", "{p}的家在{v}。", "{p}晚上睡在{v}。"),
        },
        {
            "en": ("Where does {p} live?", "Where is the home of {p}?", "Tell me the home of {p}."),
            "zh": ("{p}住在哪里？", "{p}的家在哪里？", "请说出{p}的家。"),
        },
        {"en": "At which place does {p} live?", "zh": "{p}住在什么地方？"},
    ),
    Relation(
        "pet",
        ANIMALS,
        {
            "en": ("{p} keeps a {v}.", "The pet of {p} is a {v}.", "{p} feeds a {v} at home."),
            "zh": ("{p}养着{v}。", "{p}的宠物是{v}。", "{p}在家里喂{v}。"),
        },
        {
            "en": ("What is the pet of {p}?", "Which animal does {p} keep?", "Tell me the pet of {p}."),
            "zh": ("{p}的宠物是什么？", "{p}养着什么动物？", "请说出{p}的宠物。"),
        },
        {"en": "What pet does {p} keep?", "zh": "{p}养着什么宠物？"},
    ),
    Relation(
        "colour",
        COLOURS,
        {
            "en": ("{p} likes {v} best.", "The favourite colour of {p} is {v}.", "{p} loves the colour {v}."),
            "zh": ("{p}最喜欢{v}。", "{p}最喜欢的颜色是{v}。", "{p}最爱的颜色是{v}。"),
        },
        {
            "en": (
                "What is the favourite colour of {p}?",
                "Which colour does {p} like best?",
                "Tell me the favourite colour of {p}.",
            ),
            "zh": ("{p}最喜欢什么颜色？", "{p}最喜欢的颜色是什么？", "请说出{p}最喜欢的颜色。"),
        },
        {"en": "Which colour does {p} love?", "zh": "{p}最爱什么颜色？"},
    ),
    Relation(
        "food",
        FOODS,
        {
            "en": ("{p} likes to eat {v}.", "The favourite food of {p} is {v}.", "{p} eats {v} every day."),
            "zh": ("{p}最喜欢吃{v}。", "{p}最喜欢的食物是{v}。", "{p}天天吃{v}。"),
        },
        {
            "en": (
                "What is the favourite food of {p}?",
                "What does {p} like to eat?",
                "Tell me the favourite food of {p}.",
            ),
            "zh": ("{p}最喜欢吃什么？", "{p}最喜欢的食物是什么？", "请说出{p}最喜欢的食物。"),
        },
        {"en": "Which food does {p} like to eat?", "zh": "{p}最喜欢吃什么食物？"},
    ),
    Relation(
        "friend",
        PEOPLE,
        {
            "en": ("The best friend of {p} is {v}.", "{p} often plays with {v}.", "{p} tells everything to {v}."),
            "zh": ("{p}最好的朋友是{v}。", "{p}常常和{v}一起玩。", "{p}有话都对{v}说。"),
        },
        {
            "en": (
                "Who is the best friend of {p}?",
                "With whom does {p} often play?",
                "Tell me the best friend of {p}.",
            ),
            "zh": ("{p}最好的朋友是谁？", "{p}常常和谁一起玩？", "请说出{p}最好的朋友。"),
        },
        {"en": "Which person is the best friend of {p}?", "zh": "谁是{p}最好的朋友？"},
    ),
)


class World:
    """One Willowby: everything that the seed decides once. `facts[person][relation name]` is the value."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.facts: dict[Word, dict[str, Word]] = {person: {} for person in PEOPLE}
        for relation in RELATIONS:
            draw = Draw("facts", seed, relation.name)
            if relation.name == "friend":
                circle = draw.shuffle(PEOPLE)  # a circle has no fixed point: nobody is their own friend
                values = {person: circle[(place + 1) % len(circle)] for place, person in enumerate(circle)}
            else:
                # Each value belongs to equally many people, so the commonest value is no good guess.
                order = draw.shuffle(relation.values * (len(PEOPLE) // len(relation.values)))
                values = dict(zip(PEOPLE, order, strict=True))
            for person, value in values.items():
                self.facts[person][relation.name] = value

    def value(self, person: Word, relation: Relation) -> Word:
        """Return the value of one fact."""
        return self.facts[person][relation.name]
