"""Pairs for preference learning: polite and correct against rude, or against polite but wrong.

Both sides share the prompt.
"""

from dataclasses import replace
from typing import Any

from minimind.world import arithmetic, dialogue, words
from minimind.world.draw import Draw
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import Language

POLITE: dict[Language, tuple[str, ...]] = {
    "en": ("Of course.", "With pleasure.", "Happy to help."),
    "zh": ("当然可以。", "很乐意。", "很高兴帮你。"),
}
RUDE: dict[Language, tuple[str, ...]] = {
    "en": ("What a silly question.", "Do not bother me.", "Are you stupid?"),
    "zh": ("真是个傻问题。", "别来烦我。", "你傻吗？"),
}

_ASKED = ("facts", "compare", "translation")
"""Kinds that are answered at once: a story needs notes, which a pair of replies does not hold."""


def _polite(asked: Domain) -> Domain:
    """Return the domain with the same contents and splits, answered politely."""

    def make_polite(draw: Draw, language: Language, world: World) -> Item:
        item = asked.make(draw, language, world)
        args = {
            "grader": item.grader,
            "grader_args": item.grader_args,
            "polite": list(POLITE[language]),
            "rude": list(RUDE[language]),
        }
        gap = " " if language == "en" else ""
        reply = draw.choice(POLITE[language]) + gap + item.reply
        shortcuts = {name: POLITE[language][0] + gap + answer for name, answer in item.shortcuts.items()}
        name = f"polite-{asked.name}"
        return replace(item, domain=name, grader="polite", grader_args=args, reply=reply, shortcuts=shortcuts)

    return replace(
        asked,
        name=f"polite-{asked.name}",
        make=make_polite,
        about=f"The questions of {asked.name}, answered politely and correctly.",
        weak=f"0 without politeness; with it as in {asked.name}.",
        set="preference",
    )


DOMAINS = tuple(
    _polite(domain) for module in (dialogue, arithmetic, words) for domain in module.DOMAINS if domain.name in _ASKED
)


def _wrong_reply(draw: Draw, item: Item) -> str:
    """Return the reply with another answer in the place of the right one."""
    if item.domain == "polite-facts":
        options = item.grader_args["grader_args"]["options"]
    else:  # what a shortcut would say: the other number, the words untranslated
        opening = POLITE[item.language][0]
        options = sorted({answer.removeprefix(opening).strip() for answer in item.shortcuts.values()})
    before, _, after = item.reply.rpartition(item.answer)
    return before + draw.choice([option for option in options if option != item.answer]) + after


def preference_row(draw: Draw, item: Item) -> dict[str, Any]:
    """Return {"chosen", "rejected"}: half of the rejected replies are rude but right, half polite but wrong."""
    prompt = item.prompt_messages()
    if draw.flip():
        gap = " " if item.language == "en" else ""
        opening = next(phrase for phrase in POLITE[item.language] if item.reply.startswith(phrase))
        rejected = draw.choice(RUDE[item.language]) + gap + item.reply[len(opening) :].lstrip()
    else:
        rejected = _wrong_reply(draw, item)
    return {
        "chosen": [*prompt, {"role": "assistant", "content": item.reply}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected}],
    }
