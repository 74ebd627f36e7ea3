"""Whether an answer is right, by program. Every grader is pure and refuses answers that list the candidates.

`grade(question, text, reasoning, tool_calls)` looks at the final answer only: what stands after `</think>`, inside
`<answer>...</answer>`, or after "Answer:" / "答案：" of the plain form, whichever is there. It deliberately does not
know how the text was generated.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

Arguments = Mapping[str, Any]

_MARKS = re.compile(r"<answer>|Answer:|Answer：|答案:|答案：")
_NUMBER = re.compile(r"(?<![0-9A-Za-z.])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?![0-9A-Za-z])")


def final_answer(text: str) -> str:
    """Return the part of the text that answers: thinking and everything before the last answer mark is dropped."""
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif "<think>" in text:
        return ""  # still thinking: there is no answer
    marks = list(_MARKS.finditer(text))
    if marks:
        text = text[marks[-1].end() :]
    return text.split("</answer>", 1)[0].strip()


def normalise(text: str) -> str:
    """Return the text with compatibility forms, case, punctuation at the ends and runs of white space evened out."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\s+", " ", text).strip()
    return text.strip(" .,;:!?。、，；：！？\"'“”‘’")


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str] | None:
    name = normalise(name)
    if not name:
        return None
    before = r"(?<![0-9a-z])" if re.match(r"[0-9a-z]", name) else ""
    after = r"(?![0-9a-z])" if re.search(r"[0-9a-z]$", name) else ""
    if name[0].isdigit():  # 3.12 and -12 do not mention 12
        before = r"(?<![0-9a-z.-])"
    if name[-1].isdigit():
        after = r"(?![0-9a-z]|\.[0-9])"
    return re.compile(before + re.escape(name) + after)


def mentions(text: str, name: str) -> bool:
    """Return whether `name` stands in the text: as whole words if written in letters or digits, else anywhere."""
    pattern = _pattern(name)
    return pattern is not None and pattern.search(normalise(text)) is not None


def numbers(text: str) -> list[float]:
    """Return the whole numbers and decimals of the text, in order; the 12 inside 112 is none of them."""
    text = unicodedata.normalize("NFKC", text)
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def exact(answer: str, arguments: Arguments, text: str) -> bool:
    """The final answer is the expected text or one of `accept`, but for case, outer punctuation and white space."""
    accepted = [answer, *arguments.get("accept", ())]
    said = normalise(text)
    return bool(said) and any(said == normalise(good) for good in accepted)


def number(answer: str, arguments: Arguments, text: str) -> bool:
    """The last number is the answer; besides it only numbers `given` in the question stand in the final answer."""
    said = numbers(text)
    allowed = {float(given) for given in arguments.get("given", ())} | {float(answer)}
    return bool(said) and said[-1] == float(answer) and allowed.issuperset(said)


def choice(answer: str, arguments: Arguments, text: str) -> bool:
    """Exactly one of `options` is mentioned, and it is the answer."""
    text = normalise(text)
    said = {option for option in arguments["options"] if (found := _pattern(option)) and found.search(text)}
    return said == {answer}


def contains(answer: str, arguments: Arguments, text: str) -> bool:
    """One of `any` (default: the answer) is mentioned and none of `none`."""
    wanted, unwanted = arguments.get("any") or [answer], arguments.get("none", ())
    return any(mentions(text, good) for good in wanted) and not any(mentions(text, bad) for bad in unwanted)


def sequence(answer: str, _: Arguments, text: str) -> bool:
    """The numbers of the final answer are exactly those of the answer, in its order."""
    return numbers(text) == numbers(answer)


def polite(answer: str, arguments: Arguments, text: str) -> bool:
    """Right by the inner grader, with one of the phrases in `polite` and none of those in `rude`."""
    inner = GRADERS[arguments["grader"]]
    said = normalise(text)
    if not any(normalise(phrase) in said for phrase in arguments["polite"]):
        return False
    if any(normalise(phrase) in said for phrase in arguments["rude"]):
        return False
    for phrase in arguments["polite"]:  # what is left must be the answer
        text = re.sub(re.escape(phrase), " ", text, flags=re.IGNORECASE)
    return inner(answer, arguments.get("grader_args", {}), text)


GRADERS: dict[str, Callable[[str, Arguments, str], bool]] = {
    "exact": exact,
    "number": number,
    "choice": choice,
    "contains": contains,
    "sequence": sequence,
    "polite": polite,
}
"""Graders of text: (answer, grader_args, final answer) -> right or not. `tool_call` is apart: it looks at calls."""


def parse_calls(text: str) -> list[dict[str, Any]]:
    """Return the calls written as JSON objects, alone or in `<tool_call>` tags; [] if anything else is there."""
    rest = re.sub(r"</?tool_call>", " ", text).strip()
    calls: list[dict[str, Any]] = []
    decoder = json.JSONDecoder()
    while rest:
        try:
            found, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        if not isinstance(found, dict):
            return []
        calls.append(found)  # pyright: ignore[reportUnknownArgumentType] - JSON
        rest = rest[end:].strip()
    return calls


def _plain_call(call: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return (name, arguments) of a call in our form or OpenAI's (a `function` inside, arguments as JSON text)."""
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        return None, None
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    return inner.get("name"), arguments


def _canonical(arguments: Any) -> Any:
    """Return arguments with the white space inside strings removed: '12 + 3' and '12+3' are the same expression."""
    if isinstance(arguments, Mapping):
        return {name: _canonical(value) for name, value in arguments.items()}
    if isinstance(arguments, str):
        return "".join(arguments.split())
    # 5 and 5.0 and true are not the same argument
    return (type(arguments).__name__, arguments)


def tool_call(wanted: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the calls are exactly the wanted ones: names and arguments equal, in order, none more."""
    if len(wanted) != len(calls):
        return False
    for good, given in zip(wanted, calls, strict=True):
        good_name, good_arguments = _plain_call(good)
        name, arguments = _plain_call(given)
        if name != good_name or _canonical(arguments) != _canonical(good_arguments):
            return False
    return True


def grade(
    question: Mapping[str, Any], text: str, reasoning: str = "", tool_calls: Sequence[Mapping[str, Any]] = ()
) -> bool:
    """Return whether an answer to a question row is right. `reasoning` never counts, `text` is the visible answer.

    Raises KeyError for a grader that does not exist.
    """
    del reasoning  # steps are free; only the answer is graded
    if question["grader"] == "tool_call":
        calls = list(tool_calls) or parse_calls(final_answer(text))
        return tool_call(question["grader_args"]["calls"], calls)
    grader = GRADERS[question["grader"]]
    if tool_calls:
        return False  # a call is not an answer
    return grader(str(question["answer"]), question.get("grader_args") or {}, final_answer(text))
