"""Sums of several steps, for the reason stage: chat answers them at once, the reason rows think first.

A reason row holds `<think>...</think><answer>...</answer>` in the assistant's turn, as its users know it.
"""

from typing import Any

from minimind.world.arithmetic import addition_steps, pair_key
from minimind.world.draw import Draw
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import PEOPLE, Language, Word

_THREE: dict[Language, tuple[str, ...]] = {
    "en": ("What is {0}?", "Add all: {0}."),
    "zh": ("{0} 等于多少？", "全部加起来：{0}。"),
}


def sums_three(draw: Draw, language: Language, _: World) -> Item:
    """The sum of three numbers of two digits."""
    a, b, c = (draw.between(10, 99) for _number in range(3))
    total = a + b + c
    gap = " " if language == "en" else ""
    steps = gap.join((addition_steps(a, b, language), addition_steps(a + b, c, language)))
    low, middle, high = sorted((a, b, c))
    return Item(
        "sums-three",
        language,
        (f"sums-three|{low}|{middle}|{high}", pair_key(a, b), pair_key(a + b, c)),
        draw.choice(_THREE[language]).format(f"{a} + {b} + {c}"),
        str(total),
        f"It is {total}." if language == "en" else f"是 {total}。",
        reasoning=steps,
        grader="number",
        grader_args={"given": [a, b, c]},
        chance=1 / 268,
        shortcuts={"the first two": str(a + b), "without carries": str(_without_carries(a, b, c))},
    )


def _without_carries(*given: int) -> int:
    tens = sum(number // 10 % 10 for number in given) % 10
    ones = sum(number % 10 for number in given) % 10
    return 10 * tens + ones


_COUNTED = (Word("shell", "贝壳"), Word("apple", "苹果"), Word("ball", "皮球"), Word("bell", "铃铛"))
"""Things that are counted with the measure word 个."""


def shells(draw: Draw, language: Language, _: World) -> Item:
    """A person has some things, finds more and gives some away: a sum and a difference."""
    person, friend = draw.sample(PEOPLE, 2)
    thing = draw.choice(_COUNTED)
    has, finds = draw.between(10, 60), draw.between(10, 39)
    together = has + finds
    gives = draw.between(2, 9)
    left = together - gives
    who, other, what = person.of(language), friend.of(language), thing.of(language)
    if language == "en":
        user = (
            f"{who} has {has} {what}s. {who} finds {finds} more. {who} gives {gives} to {other}. "
            f"How many {what}s does {who} have now?"
        )
        steps = f"{addition_steps(has, finds, language)} {together} - {gives} = {left}."
        reply = f"{who} has {left}."
    else:
        user = f"{who}有 {has} 个{what}，又找到 {finds} 个，给了{other} {gives} 个。{who}现在有几个{what}？"
        steps = f"{addition_steps(has, finds, language)}{together} - {gives} = {left}。"
        reply = f"{who}有 {left} 个。"
    return Item(
        "shells",
        language,
        (f"shells|{has}|{finds}|{gives}", pair_key(has, finds)),
        user,
        str(left),
        reply,
        reasoning=steps,
        grader="number",
        grader_args={"given": []},
        chance=1 / 89,
        shortcuts={
            "all added": str(together + gives),
            "nothing given": str(together),
            "nothing found": str(has - gives),
        },
    )


def reason_row(item: Item) -> dict[str, Any]:
    """Return a conversation whose reply carries its steps and its answer in the four tags."""
    content = f"<think>\n{item.reasoning}\n</think>\n<answer>\n{item.reply}\n</answer>"
    return {"conversations": [{"role": "user", "content": item.user}, {"role": "assistant", "content": content}]}


DOMAINS = (
    Domain(
        "sums-three",
        sums_three,
        "The sum of three numbers.",
        "the three numbers, in any order; sums of training that appear in the steps are training pairs of `sums`",
        "below 0.2 without carries.",
        set="reason",
    ),
    Domain(
        "shells",
        shells,
        "Found and given away: a sum, then a difference.",
        "the three numbers",
        "0 by any habit: something is always found and given.",
        set="reason",
    ),
)
