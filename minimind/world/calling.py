"""Questions that want a tool: calculator (two operands are copied), weather, clock.

The assistant calls, reads the result, replies. What the tools return is known to `tools` alone.
"""

from typing import Any

from minimind.world.draw import Draw, small_split_of
from minimind.world.facts import World
from minimind.world.item import Domain, Item, call_text
from minimind.world.lexicon import PLACES, WEEKDAYS, Language
from minimind.world.tools import run_tool

_COMPUTE: dict[Language, tuple[str, ...]] = {
    "en": ("Use the calculator: {0}.", "What is {0}?", "Please compute {0}."),
    "zh": ("用计算器算 {0}。", "{0} 等于多少？", "请计算 {0}。"),
}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Return a tool call."""
    return {"name": name, "arguments": arguments}


def calculator(draw: Draw, language: Language, _: World) -> Item:
    """Two numbers of three digits with a sign: too much for the head, so the tool is called with both operands."""
    a, b = draw.between(100, 999), draw.between(100, 999)
    sign = draw.choice("+-*")
    expression = f"{a} {sign} {b}"
    wanted = call("calculator", expression=expression)
    value = run_tool("calculator", wanted["arguments"])
    return Item(
        "calculator",
        language,
        (f"calculator|{min(a, b)}|{max(a, b)}",),
        draw.choice(_COMPUTE[language]).format(expression),
        call_text(wanted),
        f"It is {value}." if language == "en" else f"是 {value}。",
        tools=("calculator",),
        calls=(wanted,),
        grader="tool_call",
        grader_args={"calls": [wanted]},
        shortcuts={"first number twice": call_text(call("calculator", expression=f"{a} {sign} {a}"))},
    )


_WEATHER: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the weather at the {0} on {1}?",
        "How will the weather be at the {0} on {1}?",
        "{1}: what weather at the {0}?",
    ),
    "zh": ("{1}{0}的天气怎么样？", "{0}{1}天气如何？", "请查{1}{0}的天气。"),
}


def weather(draw: Draw, language: Language, _: World) -> Item:
    """The weather at a place on a day."""
    place, day = draw.choice(PLACES), draw.choice(WEEKDAYS)
    wanted = call("weather", place=place.of(language), day=day.of(language))
    report = run_tool("weather", wanted["arguments"])
    return Item(
        "weather",
        language,
        (f"weather|{place.en}|{day.en}",),
        draw.choice(_WEATHER[language]).format(place.of(language), day.of(language)),
        call_text(wanted),
        f"At the {place.en}: {report}." if language == "en" else f"{place.zh}：{report}。",
        tools=("weather", "clock"),
        calls=(wanted,),
        grader="tool_call",
        grader_args={"calls": [wanted]},
        chance=1 / (len(PLACES) * len(WEEKDAYS)),
    )


_CLOCK: dict[Language, tuple[str, ...]] = {
    "en": (
        "What time is it in {0} minutes?",
        "In {0} minutes, what time will it be?",
        "Tell me the time in {0} minutes.",
    ),
    "zh": ("{0} 分钟后是几点？", "再过 {0} 分钟是几点？", "请告诉我 {0} 分钟后的时间。"),
}


def clock(draw: Draw, language: Language, _: World) -> Item:
    """The time in some minutes."""
    minutes = draw.between(2, 300)
    wanted = call("clock", minutes=minutes)
    time = run_tool("clock", wanted["arguments"])
    return Item(
        "clock",
        language,
        (f"clock|{minutes}",),
        draw.choice(_CLOCK[language]).format(minutes),
        call_text(wanted),
        f"It will be {time}." if language == "en" else f"那时是 {time}。",
        tools=("weather", "clock"),
        calls=(wanted,),
        grader="tool_call",
        grader_args={"calls": [wanted]},
        chance=1 / 299,
    )


DOMAINS = (
    Domain(
        "calculator",
        calculator,
        "A calculator call with two operands of three digits.",
        "the pair of operands, in either order, with any sign",
        "0: both operands must be copied.",
    ),
    Domain(
        "weather",
        weather,
        "A weather call with place and day; the clock is offered too.",
        "the place together with the day (84 contents)",
        "chance 1/84.",
        split=small_split_of,
    ),
    Domain(
        "clock",
        clock,
        "A clock call with a number of minutes; the weather is offered too.",
        "the number of minutes",
        "chance 1/299.",
    ),
)
