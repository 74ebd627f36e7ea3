"""Items into rows: one generator per file, each an endless stream cut to a number of rows. It knows no folders.

All streams are named by (seed, file, split), so a file does not depend on which others are written.
"""

from collections.abc import Callable, Iterator
from typing import Any

from minimind.world.agent import agent_row
from minimind.world.domains import DOMAINS, MIXTURE, draw_item
from minimind.world.draw import Draw, Split, cumulate, fraction
from minimind.world.facts import World
from minimind.world.item import Item, Message, tool_schemas
from minimind.world.lexicon import LANGUAGES, PEOPLE, Language
from minimind.world.preference import preference_row
from minimind.world.pretraining import Document, biography, document
from minimind.world.reasoning import reason_row
from minimind.world.tools import TOOLS

Row = dict[str, Any]

JOINED_SHARE = 35
"""After an exchange another, unrelated question follows with this chance of 100, up to `LONGEST` questions in all, so
that a conversation may go on about anything."""

LONGEST = 4

CALLING = ("calculator", "weather", "clock")
CALLED_AGAIN_SHARE, LONGEST_CALLING = 80, 3
"""After a tool's answer another question for a tool follows with this chance of 100, up to so many in all: the schemas
cost as many tokens as two questions, so they serve more than one."""

RETOLD_SHARE = 10
"""Of 100 conversations so many ask to be told about a person. Without them fine-tuning would forget the biographies."""

TELL: dict[Language, tuple[str, ...]] = {
    "en": ("Tell me about {p}.", "What do you know about {p}?"),
    "zh": ("介绍一下{p}。", "你知道{p}的什么事？"),
}

NEEDLESS_SHARE = 0.02
"""Share of the questions that need no tool and are offered all of them."""


def documents(world: World, split: Split, count: int) -> Iterator[Document]:
    """Yield `count` pretraining documents."""
    draw = Draw(world.seed, "pretrain", split)
    for _ in range(count):
        yield document(draw, world, split)


def conversation(item: Item) -> list[Message]:
    """Return the whole exchange of an item; in the chat data a question of the reason set is answered at once."""
    messages = [*item.prompt_messages(), *item.answer_messages()]
    if DOMAINS[item.domain].set == "reason":
        messages[-1].pop("reasoning_content", None)
    return messages


def _with_tools(row: Row, *items: Item) -> Row:
    names = offered_tools(*items)
    return {**row, "tools": tool_schemas(names)} if names else row


def offered_tools(*items: Item) -> tuple[str, ...]:
    """Return the tools that a conversation about `items` offers: those it needs, and by lot others that it does not.

    So the model must choose, and must not call a tool because there is one. The lot is cast by the first question.
    """
    first, needed = items[0].user, {name for item in items for name in item.tools}
    if needed:
        return tuple(name for name in TOOLS if name in needed or fraction("offered", first, name) < 0.5)
    return tuple(TOOLS) if fraction("offered", first) < NEEDLESS_SHARE else ()


def _items(file: str, world: World, split: Split, draw: Draw) -> Iterator[Item]:
    kinds = cumulate(MIXTURE[file])
    while True:
        domain = DOMAINS[draw.weighted(kinds)]
        yield draw_item(domain, draw, draw.choice(LANGUAGES), world, split)


def _sft(world: World, split: Split, draw: Draw) -> Iterator[Row]:
    shares = MIXTURE["sft"]
    alone = cumulate({name: share for name, share in shares.items() if _is_single(name)})
    calling = cumulate({name: shares[name] for name in CALLING})
    for item in _items("sft", world, split, draw):
        kinds, longest, share = alone, LONGEST, JOINED_SHARE
        if item.domain in CALLING:
            kinds, longest, share = calling, LONGEST_CALLING, CALLED_AGAIN_SHARE
        items = [item]
        while len(items) < longest and draw.chance(share, 100):
            items.append(draw_item(DOMAINS[draw.weighted(kinds)], draw, item.language, world, split))
        yield _with_tools({"conversations": [message for one in items for message in conversation(one)]}, *items)
        if draw.chance(RETOLD_SHARE, 100 - RETOLD_SHARE):
            yield _biography(world, draw)


def _biography(world: World, draw: Draw) -> Row:
    """Return a conversation whose answer is a biography, as pretraining tells it: the same in every split."""
    language, person = draw.choice(LANGUAGES), draw.choice(PEOPLE)
    asked = draw.choice(TELL[language]).format(p=person.of(language))
    told = biography(draw, language, world, person)
    return {"conversations": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]}


def _is_single(name: str) -> bool:
    """Return whether a domain's conversations are one question and one answer without tools."""
    return name not in ("memory", "warmer", *CALLING)


def _reason(world: World, split: Split, draw: Draw) -> Iterator[Row]:
    for item in _items("reason", world, split, draw):
        yield reason_row(item)


def _preference(world: World, split: Split, draw: Draw) -> Iterator[Row]:
    for item in _items("preference", world, split, draw):
        yield preference_row(draw, item)


def _prompts(world: World, split: Split, draw: Draw) -> Iterator[Row]:
    """Three of four rows hold a conversation that ends with an empty turn, the others `prompt` and `answer`."""
    for number, item in enumerate(_items("prompts", world, split, draw)):
        head: Row = {"id": f"{split}-{number:06d}"}
        if number % 4 == 3:
            head["prompt"] = item.user
        else:
            head["conversations"] = [*item.prompt_messages(), {"role": "assistant", "content": ""}]
        yield head | grading(item)


def _agent(world: World, split: Split, draw: Draw) -> Iterator[Row]:
    for item in _items("agent", world, split, draw):
        yield agent_row(item)


def _lora(file: str) -> Callable[[World, Split, Draw], Iterator[Row]]:
    def stream(world: World, split: Split, draw: Draw) -> Iterator[Row]:
        for item in _items(file, world, split, draw):
            yield {"conversations": conversation(item)}

    return stream


STREAMS: dict[str, Callable[[World, Split, Draw], Iterator[Row]]] = {
    "sft": _sft,
    "reason": _reason,
    "preference": _preference,
    "prompts": _prompts,
    "agent": _agent,
    "lora-identity": _lora("lora-identity"),
    "lora-trade": _lora("lora-trade"),
}
"""Every file besides pretrain: an endless stream of its rows."""


def rows(file: str, world: World, split: Split, count: int) -> Iterator[Row]:
    """Yield `count` rows of a file."""
    if file == "pretrain":
        for found in documents(world, split, count):
            yield {"text": found.text}
        return
    stream = STREAMS[file](world, split, Draw(world.seed, file, split))
    for _ in range(count):
        yield next(stream)


def grading(item: Item) -> Row:
    """Return what is needed to grade an answer: for question rows and for rewards."""
    return {
        "domain": item.domain,
        "language": item.language,
        "answer": item.answer,
        "grader": item.grader,
        "grader_args": item.grader_args,
    }


def question(item: Item, name: str) -> Row:
    """Return the question row of an item; only the main set has a plain form, since pretraining shows no other."""
    is_main = DOMAINS[item.domain].set == "main"
    row: Row = {"id": name, "set": DOMAINS[item.domain].set, **grading(item)}
    row["messages"] = item.prompt_messages()
    row["chance"] = round(item.chance, 6)
    row["shortcuts"] = item.shortcuts
    row["prompt"] = item.plain_prompt() if is_main else ""
    row["completion"] = item.plain_completion() if is_main else ""
    return _with_tools(row, item)


def questions(world: World, split: Split, count: int) -> Iterator[Row]:
    """Yield question rows, no two alike: at most `count` for each domain and language, all domains in turn.

    Taking turns makes every beginning of the file a fair sample. Small domains have fewer contents and end earlier.
    """
    streams = [_distinct(name, language, world, split, count) for name in DOMAINS for language in LANGUAGES]
    while streams:
        alive: list[Iterator[Row]] = []
        for stream in streams:
            row = next(stream, None)
            if row is not None:
                alive.append(stream)
                yield row
        streams = alive


def _distinct(name: str, language: Language, world: World, split: Split, count: int) -> Iterator[Row]:
    draw = Draw(world.seed, "questions", split, name, language)
    seen: set[str] = set()
    tries = 0
    while len(seen) < count and tries < 20 * count:
        tries += 1
        item = draw_item(DOMAINS[name], draw, language, world, split)
        text = item.plain_prompt()
        if text not in seen:
            seen.add(text)
            yield question(item, f"{split}-{name}-{language}-{len(seen):04d}")
