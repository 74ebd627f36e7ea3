"""The tools of Willowby: calculator, clock, weather.

JSON schemas for the model, pure functions for whoever runs a call. The weather is a table, the clock stands at ten
past nine: the same call gives the same result for ever. Model text is never evaluated: the calculator has a parser of
its own. It deliberately does not know conversations.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from minimind.world.draw import fraction
from minimind.world.lexicon import PLACES, SKIES, WEEKDAYS, Language, Word

NOW_MINUTES = 9 * 60 + 10
"""The time on the town's clock, in minutes after midnight."""

MAX_DIGITS = 15
MAX_EXPRESSION = 200


class ToolCallError(ValueError):
    """A call that cannot be run; the message says what was wrong and what is expected."""


_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|([-+*/()×÷]))")


def _tokens(expression: str) -> list[str]:
    tokens: list[str] = []
    place, end = 0, len(expression.rstrip())
    while place < end:
        found = _TOKEN.match(expression, place)
        if found is None:
            raise ToolCallError(f"cannot read {expression[place:].strip()[:20]!r}; use numbers, + - * / and brackets")
        tokens.append(found.group(1) or found.group(2))
        place = found.end()
    return tokens


class _Parser:
    """Recursive descent: a sum of products of factors; a factor is a number, minus a factor, or a sum in brackets."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while self.peek() in ("*", "/", "×", "÷"):
            is_times = self.take() in ("*", "×")
            other = self.factor()
            if not is_times and other == 0:
                raise ToolCallError("division by zero")
            value = value * other if is_times else value / other
        return value

    def factor(self) -> Fraction:
        found = self.take()
        if found == "-":
            return -self.factor()
        if found == "(":
            value = self.sum()
            if self.take() != ")":
                raise ToolCallError("a bracket is not closed")
            return value
        if not found or not found[0].isdigit():
            raise ToolCallError(f"a number is missing before {found!r}" if found else "a number is missing at the end")
        if len(found) > MAX_DIGITS:
            raise ToolCallError(f"a number has more than {MAX_DIGITS} digits")
        return Fraction(found)


def calculator(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / and brackets; at most six decimals."""
    if len(expression) > MAX_EXPRESSION:
        raise ToolCallError(f"the expression has {len(expression)} characters, at most {MAX_EXPRESSION} are read")
    parser = _Parser(_tokens(expression))
    if not parser.tokens:
        raise ToolCallError("the expression is empty; write for example 12 + 30")
    value = parser.sum()
    if parser.peek():
        raise ToolCallError(f"{parser.peek()!r} is one too many")
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def clock(minutes: int = 0) -> str:
    """Return the town's time in so many minutes (negative: ago) as HH:MM."""
    hours, rest = divmod((NOW_MINUTES + minutes) % (24 * 60), 60)
    return f"{hours:02d}:{rest:02d}"


def _find(words: tuple[Word, ...], name: str, what: str) -> tuple[Word, Language]:
    for word in words:
        if name.lower() == word.en.lower():
            return word, "en"
        if name == word.zh:
            return word, "zh"
    known = ", ".join(word.en for word in words)
    raise ToolCallError(f"unknown {what} {name!r}; known: {known}")


@lru_cache(maxsize=len(PLACES) * len(WEEKDAYS))
def forecast(place: Word, day: Word) -> tuple[Word, int]:
    """Return the sky and the degrees of a place on a day, from the town's weather table."""
    sky = SKIES[int(fraction("sky", place.en, day.en) * len(SKIES))]
    # Distinct degrees for the places of one day, so that "where is it warmer?" always has an answer.
    rank = sorted(PLACES, key=lambda other: fraction("warmth", other.en, day.en)).index(place)
    return sky, 3 + 2 * rank


def weather(place: str, day: str) -> str:
    """Return the weather at a place on a weekday, in the language of the place's name."""
    where, language = _find(PLACES, place, "place")
    when, _ = _find(WEEKDAYS, day, "day")
    sky, degrees = forecast(where, when)
    return f"{sky.en}, {degrees} degrees" if language == "en" else f"{sky.zh}，{degrees} 度"


@dataclass(frozen=True, slots=True)
class Tool:
    """A pure function with the JSON schema a model sees (OpenAI's function form)."""

    function: Callable[..., str]
    schema: dict[str, Any]

    @property
    def properties(self) -> dict[str, dict[str, Any]]:
        """The arguments: name -> JSON schema."""
        return self.schema["function"]["parameters"]["properties"]

    @property
    def required(self) -> list[str]:
        """Names of the arguments that must be given."""
        return self.schema["function"]["parameters"]["required"]


def _tool(function: Callable[..., str], description: str, arguments: dict[str, str]) -> Tool:
    schema = {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {name: {"type": kind} for name, kind in arguments.items()},
                "required": list(arguments),
            },
        },
    }
    return Tool(function, schema)


TOOLS: dict[str, Tool] = {
    "calculator": _tool(calculator, "compute", {"expression": "string"}),
    "clock": _tool(clock, "time in so many minutes", {"minutes": "integer"}),
    "weather": _tool(weather, "weather", {"place": "string", "day": "string"}),
}


def run_tool(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the result of a call as text; whatever is wrong with it comes back as `error: ...`, nothing is raised."""
    tool = TOOLS.get(name)
    if tool is None:
        return f"error: unknown tool {name!r}; known: {', '.join(TOOLS)}"
    if not isinstance(arguments, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - a model wrote it
        return f"error: {name}: arguments must be an object, not {type(arguments).__name__}"
    for argument in tool.required:
        if argument not in arguments:
            return f"error: {name}: the argument {argument!r} is missing"
    for argument, value in arguments.items():
        if argument not in tool.properties:
            return f"error: {name}: unknown argument {argument!r}; expected {', '.join(tool.properties)}"
        kind = tool.properties[argument]["type"]
        is_right = (
            isinstance(value, str) if kind == "string" else isinstance(value, int) and not isinstance(value, bool)
        )
        if not is_right:
            return f"error: {name}: {argument!r} must be of type {kind}, not {type(value).__name__}"
    try:
        return tool.function(**arguments)
    except ToolCallError as error:
        return f"error: {name}: {error}"
