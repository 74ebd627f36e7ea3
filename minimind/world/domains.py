"""The register of all kinds of questions, how much of each a file holds, and drawing one in a given split.

`DOMAINS[name]` says what a domain is, what is held out and what a habit without understanding gets; `MIXTURE[file]`
are the shares of the kinds in a file (they need not sum to one). It deliberately does not know how rows look.
"""

from minimind.errors import ConfigError
from minimind.world import (
    agent,
    arithmetic,
    calling,
    dialogue,
    identity,
    preference,
    reasoning,
    stories,
    weekdays,
    words,
)
from minimind.world.draw import Draw, Split
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import Language

DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for module in (stories, arithmetic, weekdays, words, dialogue, calling, reasoning, preference, agent, identity)
    for domain in module.DOMAINS
}

MIXTURE: dict[str, dict[str, float]] = {
    # Shares of rows. What a tiny model learns in minutes is a matter of how often it sees it; see docs/decisions.md.
    "pretrain": {
        "biography": 0.30, "tale": 0.12, "dictionary": 0.10, "function": 0.03, "facts": 0.08, "sums": 0.08,
        "compare": 0.06, "translation": 0.06, "memory": 0.05, "calculator": 0.04, "weather": 0.03, "clock": 0.03,
        "greeting": 0.01, "identity": 0.01,
    },
    "sft": {
        "lookup": 0.12, "who-zero": 0.03, "who-one": 0.09, "who-two": 0.10, "where-person": 0.08, "where-object": 0.07,
        "sums": 0.11, "compare": 0.10, "counting": 0.09, "translation": 0.05, "facts": 0.07, "memory": 0.06,
        "calculator": 0.04, "weather": 0.045, "clock": 0.025, "greeting": 0.01, "identity": 0.01,
        "sums-three": 0.005, "shells": 0.005, "warmer": 0.005,
    },
    "reason": {"sums-three": 0.4, "shells": 0.3, "sums": 0.15, "counting": 0.05, "sorting": 0.05, "weekday": 0.05},
    "preference": {name: 1.0 for name in DOMAINS if DOMAINS[name].set == "preference"},
    "prompts": {"sums": 0.4, "compare": 0.3, "facts": 0.3},  # known early in fine-tuning, and often slipped in
    "agent": {"agent-calculator": 0.3, "agent-weather": 0.15, "agent-clock": 0.15, "warmer": 0.4},
    "lora-identity": {"lora-identity": 1.0},
    "lora-trade": {"lora-trade": 1.0},
}  # fmt: skip
"""Share of each kind in each file. Issue of tuning, not of principle: change it and look at the report."""


def belongs(domain: Domain, item: Item, split: Split) -> bool:
    """Return whether an item may stand in a file of that split.

    Its own content must belong there. A training row must besides give away nothing that validation or test asks.
    """
    if domain.split(item.keys[0]) != split:
        return False
    return split != "train" or all(domain.split(key) == "train" for key in item.keys[1:])


def draw_item(domain: Domain, draw: Draw, language: Language, world: World, split: Split) -> Item:
    """Return one item of the split; `draw.bits` grows by the bits of the item kept, not of those redrawn.

    Raises ConfigError for a domain without a training split, which would be redrawn for ever.
    """
    if split == "train" and not domain.is_trained:
        raise ConfigError(f"world: the domain {domain.name!r} has no training rows; take it out of the mixture")
    start = draw.bits
    while True:
        item = domain.make(draw, language, world)
        if belongs(domain, item, split):
            item.bits = draw.bits - start
            return item
        draw.bits = start
