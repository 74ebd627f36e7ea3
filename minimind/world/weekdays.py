"""The calendar: which weekday or date it is some days before or after.

It deliberately does not know the clock (see `tools`).
"""

from minimind.world.draw import Draw, small_split_of
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import MONTHS, WEEKDAYS, Language, names

WALKS = (1, 2, 3, 4, 5, 6, 8, 9)
"""Numbers of days of the weekday questions; not 7, which would make today the answer."""
MOST_DAYS = 9
_LATER: dict[Language, tuple[str, ...]] = {
    "en": ("Today is {0}. What day is it in {1}?", "It is {0}. Which day is it in {1}?"),
    "zh": ("今天是{0}。{1} 天后是星期几？", "今天是{0}。再过 {1} 天是星期几？"),
}
_EARLIER: dict[Language, tuple[str, ...]] = {
    "en": ("Today is {0}. What day was it {1} ago?", "It is {0}. Which day was it {1} ago?"),
    "zh": ("今天是{0}。{1} 天前是星期几？", "今天是{0}。往前 {1} 天是星期几？"),
}
_DATE: dict[Language, tuple[str, ...]] = {
    "en": ("Today is {0}. What is the date in {1}?", "It is {0}. Which date is it in {1}?"),
    "zh": ("今天是 {0}。{1} 天后是几月几日？", "今天是 {0}。再过 {1} 天是几月几日？"),
}


def _days(count: int, language: Language) -> str:
    if language == "zh":
        return str(count)
    return f"{count} day" if count == 1 else f"{count} days"


def weekday(draw: Draw, language: Language, _: World) -> Item:
    """The weekday one to nine days before or after a weekday, counted day by day."""
    start, days, is_earlier = draw.below(7), draw.choice(WALKS), draw.flip()
    sign = -1 if is_earlier else 1
    walk = [WEEKDAYS[(start + sign * number) % 7].of(language) for number in range(days + 1)]
    today, answer = walk[0], walk[-1]
    steps = (", " if language == "en" else "，").join(f"{number} {walk[number]}" for number in range(1, days + 1))
    wordings = _EARLIER if is_earlier else _LATER
    tense = "was" if is_earlier else "is"
    reply = f"It {tense} {answer}." if language == "en" else f"是{answer}。"
    return Item(
        "weekday",
        language,
        (f"weekday|{start}|{sign * days}",),
        draw.choice(wordings[language]).format(today, _days(days, language)),
        answer,
        reply,
        reasoning=steps + ("." if language == "en" else "。"),
        grader="choice",
        grader_args={"options": names(WEEKDAYS, language)},
        chance=1 / 7,
        shortcuts={
            "today": today,
            "tomorrow": WEEKDAYS[(start + 1) % 7].of(language),
            "the other direction": WEEKDAYS[(start - sign * days) % 7].of(language),
        },
    )


def _date(month: int, day: int, language: Language) -> str:
    return f"{day} {MONTHS[month]}" if language == "en" else f"{month + 1} 月 {day} 日"


def date(draw: Draw, language: Language, _: World) -> Item:
    """The date one to nine days after a date, within the month."""
    month, days = draw.below(12), draw.between(1, MOST_DAYS)
    day = draw.between(1, 28 - days)
    today, answer = _date(month, day, language), _date(month, day + days, language)
    reply = f"It is {answer}." if language == "en" else f"是 {answer}。"
    return Item(
        "date",
        language,
        (f"date|{month}|{day}|{days}",),
        draw.choice(_DATE[language]).format(today, _days(days, language)),
        answer,
        reply,
        grader="exact",
        grader_args={"accept": [answer, reply]},
        chance=1 / 27,
        shortcuts={"today": today, "tomorrow": _date(month, day + 1, language)},
    )


DOMAINS = (
    Domain(
        "weekday",
        weekday,
        "The weekday some days before or after, counted day by day.",
        "the weekday together with the number of days and the direction (112 contents in all)",
        "0.19: tomorrow; 1/7: always the same day.",
        split=small_split_of,
    ),
    Domain("date", date, "The date some days later.", "month, day and number of days together", "tomorrow 1/9."),
)
