"""Numbers: sums with carrying, comparing, counting, sorting.

Digits are written with spaces around the signs in both languages. Steps in `reasoning` can be checked one by one. It
deliberately does not know tools: the calculator is asked in `calling`.
"""

from minimind.world.draw import Draw, cumulate
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import OBJECTS, Language

LOW, HIGH = 10, 99


def pair_key(a: int, b: int) -> str:
    """Return the name of the sum of two numbers; a + b and b + a are the same content."""
    return f"sum|{min(a, b)}|{max(a, b)}"


def addition_steps(a: int, b: int, language: Language) -> str:
    """Return the written addition of two numbers of at most three digits, from the ones upwards, with carries."""
    steps: list[str] = []
    carry = 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        ones, others = a // 10**place % 10, b // 10**place % 10
        total = ones + others + carry
        left = f"{ones} + {others}" + (" + 1" if carry else "")
        carry = total // 10
        if language == "en":
            steps.append(f"{left} = {total}" + (", carry 1." if carry else "."))
        else:
            steps.append(f"{left} = {total}" + ("，进 1。" if carry else "。"))
    return (" " if language == "en" else "").join(steps)


_SUM: dict[Language, tuple[str, ...]] = {
    "en": ("What is {0} + {1}?", "Add {0} + {1}.", "How much is {0} + {1}?"),
    "zh": ("{0} + {1} 等于多少？", "请算 {0} + {1}。", "{0} + {1} 是多少？"),
}


def sums(draw: Draw, language: Language, _: World) -> Item:
    """The sum of two numbers of two digits; 7 in 10 carry from the ones."""
    has_carry = draw.chance(7, 10)
    tens = draw.between(1, 9), draw.between(1, 9)
    if has_carry:  # 45 of 100 pairs of ones carry; drawn by the first, then the second
        first = draw.between(1, 9)
        ones = first, draw.between(10 - first, 9)
    else:
        first = draw.below(10)
        ones = first, draw.between(0, 9 - first)
    a, b = 10 * tens[0] + ones[0], 10 * tens[1] + ones[1]
    return Item(
        "sums",
        language,
        (pair_key(a, b),),
        draw.choice(_SUM[language]).format(a, b),
        str(a + b),
        f"It is {a + b}." if language == "en" else f"是 {a + b}。",
        reasoning=addition_steps(a, b, language),
        grader="number",
        grader_args={"given": [a, b]},
        chance=1 / (2 * HIGH - 2 * LOW + 1),
        shortcuts={"without the carry": str(a + b - 10 * has_carry), "the larger number": str(max(a, b))},
    )


_COMPARE: dict[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("Which is larger, {0} or {1}?", "Which is smaller, {0} or {1}?"),
        ("Which number is larger: {0} or {1}?", "Which number is smaller: {0} or {1}?"),
    ),
    "zh": (
        ("{0} 和 {1} 哪个大？", "{0} 和 {1} 哪个小？"),
        ("哪个数更大：{0} 还是 {1}？", "哪个数更小：{0} 还是 {1}？"),
    ),
}


_UNEQUAL = tuple((low, high) for high in range(10) for low in range(high))
# Over all pairs the last digits are right half of the time: 1/5 (equal tens) + 4/5 (0.325 + 0.1 / 2) = 1/2.
_ONES = cumulate({"with": 0.325, "against": 0.575, "equal": 0.1})


def compare(draw: Draw, language: Language, _: World) -> Item:
    """The larger or smaller of two numbers of two digits; in one of five pairs the tens are equal."""
    if draw.chance(1, 5):
        ten = draw.between(1, 9)
        pair = [10 * ten + one for one in draw.sample(range(10), 2)]
    else:
        tens = draw.sample(range(1, 10), 2)
        relation = draw.weighted(_ONES)
        if relation == "equal":
            low_one = high_one = draw.below(10)
        else:
            low_one, high_one = draw.choice(_UNEQUAL)
            if relation == "against":
                low_one, high_one = high_one, low_one
        pair = [10 * ten + (high_one if ten == max(tens) else low_one) for ten in tens]
    is_smaller = draw.flip()
    a, b = pair
    larger, smaller = max(a, b), min(a, b)
    answer = smaller if is_smaller else larger
    ones_say = a if (a % 10 > b % 10) != is_smaller else b
    word = ("smaller" if is_smaller else "larger") if language == "en" else ("更小" if is_smaller else "更大")
    return Item(
        "compare",
        language,
        (f"compare|{smaller}|{larger}",),
        draw.choice(_COMPARE[language])[is_smaller].format(a, b),
        str(answer),
        f"{answer} is {word}." if language == "en" else f"{answer} {word}。",
        grader="choice",
        grader_args={"options": [str(a), str(b)]},
        chance=0.5,
        shortcuts={
            "first number": str(a),
            "last number": str(b),
            "always the larger": str(larger),
            "by the last digit": str(ones_say),
        },
    )


_COUNT: dict[Language, tuple[str, ...]] = {
    "en": ("Count {0}: {1}.", "How often do you read {0} here: {1}?"),
    "zh": ("数一数{0}：{1}。", "{0}出现了几次：{1}？"),
}
_COUNTED = OBJECTS[:6]
_NUMERALS: dict[Language, tuple[str, ...]] = {
    "en": ("one", "two", "three", "four", "five"),
    "zh": ("一", "二", "三", "四", "五"),
}


def counting(draw: Draw, language: Language, _: World) -> Item:
    """How often one of two words stands in a numbered list of at most nine lines.

    The steps walk the list: each copies the line of a number, and the asked word gets the count so far beside it.
    """
    asked, other = draw.sample(_COUNTED, 2)
    count, rest = draw.between(1, 5), draw.between(1, 4)
    # Any order of the list is equally likely: choose the places of the asked word among those left.
    order: list[bool] = []
    ones, zeros = count, rest
    while ones + zeros:
        is_asked = draw.chance(ones, ones + zeros)
        order.append(is_asked)
        ones, zeros = ones - is_asked, zeros - (not is_asked)
    name, numerals = asked.of(language), iter(_NUMERALS[language])
    gap, comma, stop = (" ", ", ", ".") if language == "en" else ("", "，", "。")
    lines = [f"{line}{gap}{name if order[line - 1] else other.of(language)}" for line in range(1, len(order) + 1)]
    walk = [f"{line}{gap}{next(numerals)}" if order[place] else line for place, line in enumerate(lines)]
    pattern = "".join("1" if is_asked else "0" for is_asked in order)
    return Item(
        "counting",
        language,
        (f"counting|{asked.en}|{other.en}|{pattern}",),
        draw.choice(_COUNT[language]).format(name, comma.join(lines)),
        str(count),
        f"{count} times." if language == "en" else f"{count} 次。",
        reasoning=comma.join(walk) + stop,
        grader="number",
        chance=0.2,
        shortcuts={
            "length of the list": str(count + rest),
            "count of the other word": str(rest),
            "half of the list": str((count + rest + 1) // 2),
            "always 3": "3",
        },
    )


_SORT: dict[Language, tuple[str, ...]] = {
    "en": ("Sort from small to large: {0}.", "Put in order, smallest first: {0}."),
    "zh": ("从小到大排列：{0}。", "把这些数从小到大排好：{0}。"),
}


def sorting(draw: Draw, language: Language, _: World) -> Item:
    """Three different numbers of two digits, smallest first."""
    numbers = draw.sample(range(LOW, HIGH + 1), 3)
    low, middle, high = sorted(numbers)
    left = " ".join(str(number) for number in numbers if number != low)
    answer = f"{low} {middle} {high}"
    if language == "en":
        steps = f"Smallest {low}, left {left}. Smallest {middle}, left {high}."
    else:
        steps = f"最小 {low}，剩下 {left}。最小 {middle}，剩下 {high}。"
    by_ones = " ".join(map(str, sorted(numbers, key=lambda number: (number % 10, number))))
    return Item(
        "sorting",
        language,
        (
            f"sorting|{low}|{middle}|{high}",
            f"compare|{low}|{middle}",
            f"compare|{low}|{high}",
            f"compare|{middle}|{high}",
        ),
        draw.choice(_SORT[language]).format(" ".join(map(str, numbers))),
        answer,
        f"{answer}." if language == "en" else f"{answer}。",
        reasoning=steps,
        grader="sequence",
        chance=1 / 6,
        shortcuts={
            "as given": " ".join(map(str, numbers)),
            "backwards": " ".join(map(str, reversed(numbers))),
            "by the last digit": by_ones,
        },
    )


DOMAINS = (
    Domain(
        "sums",
        sums,
        "The sum of two numbers of two digits, with the steps of written addition.",
        "the pair of numbers, in either order",
        "0.3 without the carry.",
    ),
    Domain(
        "compare",
        compare,
        "The larger or smaller of two numbers of two digits.",
        "the pair of numbers, in either order; no sorted list of training shows it either",
        "1/2 by any habit; 'by the last digit' is about 1/2 too.",
    ),
    Domain(
        "counting",
        counting,
        "How often a word stands in a numbered list.",
        "the list (words and order)",
        "0.42: half of the list; 1/5: always the same number.",
    ),
    Domain(
        "sorting",
        sorting,
        "Three numbers in order.",
        "the three numbers, in any order",
        "0.29: by the last digit; 1/6: as given, or backwards.",
    ),
)
