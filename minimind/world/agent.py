"""Tasks for the tool agent: the questions of `calling`, graded by the final reply, and one that needs two calls.

A row is {"conversations", "tools", "gt"}: the environment runs the calls with `tools.run_tool` and looks for `gt` in
the end.
"""

from dataclasses import replace
from typing import Any

from minimind.world import calling
from minimind.world.draw import Draw
from minimind.world.facts import World
from minimind.world.item import Domain, Item, tool_schemas
from minimind.world.lexicon import PLACES, SKIES, WEEKDAYS, Language, Word, names
from minimind.world.tools import forecast, run_tool

_WARMER: dict[Language, tuple[str, ...]] = {
    "en": ("Where is it warmer on {2}, at the {0} or at the {1}?", "{2}: is it warmer at the {0} or at the {1}?"),
    "zh": ("{2}{0}和{1}哪里更暖和？", "{2}哪里更暖和，{0}还是{1}？"),
}


def warmer(draw: Draw, language: Language, _: World) -> Item:
    """Which of two places is warmer on a day: two calls, then a comparison."""
    first, second = draw.sample(PLACES, 2)
    day = draw.choice(WEEKDAYS)
    calls = tuple(calling.call("weather", place=place.of(language), day=day.of(language)) for place in (first, second))

    def degrees(place: Word) -> int:
        return forecast(place, day)[1]

    answer = max((first, second), key=degrees).of(language)
    low, high = sorted((first.en, second.en))
    return Item(
        "warmer",
        language,
        (f"warmer|{low}|{high}|{day.en}",),
        draw.choice(_WARMER[language]).format(first.of(language), second.of(language), day.of(language)),
        answer,
        f"It is warmer at the {answer}." if language == "en" else f"{answer}更暖和。",
        tools=("weather",),
        calls=calls,
        grader="choice",
        grader_args={"options": [first.of(language), second.of(language)]},
        chance=0.5,
        shortcuts={"first place mentioned": first.of(language), "last place mentioned": second.of(language)},
    )


def _with_result(asked: Domain, grader: str, about: str) -> Domain:
    """Return the domain with the same questions and splits, answered by the result of the call, not by the call."""
    name = f"agent-{asked.name}"

    def make_agent_item(draw: Draw, language: Language, world: World) -> Item:
        item = asked.make(draw, language, world)
        result = run_tool(item.calls[0]["name"], item.calls[0]["arguments"])
        args: dict[str, Any] = {}
        if grader == "number":
            args = {"given": [int(part) for part in item.calls[0]["arguments"]["expression"].split() if part.isdigit()]}
        elif grader == "contains":
            args = {"any": [result], "none": [sky for sky in names(SKIES, language) if sky not in result]}
        return replace(item, domain=name, answer=result, grader=grader, grader_args=args, chance=0.0, shortcuts={})

    return replace(asked, name=name, make=make_agent_item, about=about, weak="0: the tool must be asked.", set="agent")


def agent_row(item: Item) -> dict[str, Any]:
    """Return the row of tool RL: the messages up to an empty assistant turn, the tools, what the end must hold."""
    return {
        "conversations": [*item.prompt_messages(), {"role": "assistant", "content": ""}],
        "tools": tool_schemas(item.tools),
        "gt": [item.answer],
        "domain": item.domain,
        "language": item.language,
        "answer": item.answer,
        "grader": item.grader,
        "grader_args": item.grader_args,
    }


_CALCULATOR, _WEATHER_CALL, _CLOCK_CALL = calling.DOMAINS

DOMAINS = (
    _with_result(_CALCULATOR, "number", "The calculator's result in the final reply."),
    _with_result(_WEATHER_CALL, "contains", "The weather in the final reply."),
    _with_result(_CLOCK_CALL, "sequence", "The clock's time in the final reply."),
    Domain(
        "warmer",
        warmer,
        "Where it is warmer: two calls and a comparison.",
        "the pair of places together with the day",
        "1/2: always the first place; a place that is often warm is right a little more often.",
        set="agent",
    ),
)
