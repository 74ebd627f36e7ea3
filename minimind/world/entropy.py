"""How many bits a text of the world holds: the floor under every model's bits per byte.

Derivation. A text is made by independent choices c1, c2, ...; each adds -log2 p(ci) to `Draw.bits`. If different
choices give different texts, p(text) is the product of the p(ci), so the sum is exactly -log2 p(text), and its mean
over texts is the entropy of the generator. If two ways lead to one text, p(text) is larger and the sum is an upper
bound of the true cost. A redrawn item counts only the choices of the one kept: nobody can learn the hash behind the
splits, so the best reader spends p(content), not p(content | split), on unseen content. Facts, weather and words are
constants of the world: they cost nothing to who has learned them, and the floor is that reader's.

Exact (`Domain.is_exact`, tests/world/test_entropy.py): all kinds. The closed forms below are checked against the
draws.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from minimind.world.domains import MIXTURE
from minimind.world.facts import RELATIONS
from minimind.world.lexicon import ANIMALS, COLOURS, OBJECTS, PEOPLE, PLACES, WALKERS, WEEKDAYS
from minimind.world.pretraining import Document
from minimind.world.tools import TOOLS
from minimind.world.words import DICTIONARY


@dataclass(frozen=True, slots=True)
class Floor:
    """Sums over documents: how many, their UTF-8 bytes (without an end token), their bits."""

    rows: int
    bytes: int
    bits: float

    @property
    def bits_per_byte(self) -> float:
        """The smallest mean bits per byte any model can reach on average."""
        return self.bits / self.bytes if self.bytes else 0.0


def floor(documents: Iterable[Document]) -> Floor:
    """Return the summed floor of documents."""
    rows = size = 0
    bits = 0.0
    for document in documents:
        rows += 1
        size += len(document.text.encode())
        bits += document.bits
    return Floor(rows, size, bits)


def _log(*counts: float) -> float:
    return sum(math.log2(count) for count in counts)


def _entropy(weights: Iterable[float]) -> float:
    return -sum(weight * math.log2(weight) for weight in weights if weight)


def kind_bits() -> float:
    """Return the bits of choosing a document's kind and language."""
    total = sum(MIXTURE["pretrain"].values())
    return _entropy(weight / total for weight in MIXTURE["pretrain"].values()) + 1


P, L, O, W = len(PEOPLE), len(PLACES), len(OBJECTS), len(WALKERS)  # noqa: E741 - sizes of the lexicon in the formulas below

EXPECTED_BITS: dict[str, float] = {
    # people, things; wording of the question; asked thing
    "who-zero": _log(P, P - 1, O, O - 1) + _log(2, 2),
    # which keys; the list; what is asked in which order
    "lookup": 1 + 0.5 * (_log(*range(O - 3, O + 1)) + _log(*range(P - 3, P + 1)))
    + 0.5 * (_log(*range(W - 3, W + 1)) + _log(*range(L - 3, L + 1)))
    + _log(4, 3, 2),
    # half: two people, else three; moved thing; wordings of the question; asked thing
    "who-one": _log(O, O - 1, P, P - 1) + 0.5 * _log(P - 2) + _log(2, 2, 2, 2),
    # plot; people (four in 35 %); moved thing; the question in two wordings; asked thing
    "who-two": _entropy((0.1, 0.1, 0.35, 0.3, 0.15))
    + _log(O, O - 1, P, P - 1, P - 2) + 0.35 * _log(P - 3) + _log(2, 2, 2),
    # moves 0, 1, 2 (20, 40, 40 %): each a mover and a goal; the second goal is the left place or (half) a fresh one
    "where-person": _entropy((0.2, 0.4, 0.4)) + _log(W, W - 1, L, L - 1)
    + 0.8 * _log(2, L - 2) + 0.4 * (_log(2, 2) + 0.5 * _log(L - 3)) + _log(2, 2),
    # 80 % put down: one person, two places; 10 % two carriers in either order; 10 % three moves
    "where-object": _entropy((0.8, 0.1, 0.1)) + _log(O, O - 1, W, L, L - 1) + 0.8 * _log(2)
    + 0.2 * _log(W - 1, 2) + 0.1 * _log(L - 2) + _log(2, 2),
    # carries in 7 of 10; tens 9 x 9; ones as drawn; three wordings
    "sums": _entropy((0.7, 0.3)) + _log(9, 9, 3)
    + 0.7 * (_log(9) + sum(math.log2(first) for first in range(1, 10)) / 9)
    + 0.3 * (_log(10) + sum(math.log2(10 - first) for first in range(10)) / 10),
    # equal tens in 1 of 5: ten and two ones; else two tens and the ones' relation; larger or smaller; two wordings
    "compare": _entropy((0.2, 0.8)) + 0.2 * _log(9, 10, 9)
    + 0.8 * (_log(9, 8) + _entropy((0.325, 0.575, 0.1)) + 0.1 * _log(10) + 0.9 * _log(45)) + _log(2, 2),
    # words, counts, the order (count + rest choose count), two wordings
    "counting": _log(6, 5, 5, 4, 2)
    + sum(math.log2(math.comb(count + rest, rest)) for count in range(1, 6) for rest in range(1, 5)) / 20,
    "sorting": _log(90, 89, 88, 2),
    "weekday": _log(7, 8, 2, 2),
    "date": _log(12, 9, 2) + sum(math.log2(28 - days) for days in range(1, 10)) / 9,
    "translation": _log(len(COLOURS), len(OBJECTS) + len(ANIMALS), 3),
    "facts": _log(P, len(RELATIONS), 3),
    # two told: order of two, names, asked; three told: which, order of six, its value, asked (1/3, 1/3, 1/3)
    "memory": 1 + _log(P, P - 1) + 0.5 * (_log(2) + _log(2))
    + 0.5 * (_log(2, 6) + 0.5 * _log(O - 1) + 0.5 * _log(90) + _log(3)),
    "greeting": _log(P, 6, 3),
    "identity": _log(3, 16, 4),
    "calculator": _log(900, 900, 3, 3),
    "weather": _log(L, len(WEEKDAYS), 3),
    "clock": _log(299, 3),
    "biography": _log(P) + _log(3)
    + sum(_log(*range(len(RELATIONS), len(RELATIONS) - told, -1)) + told * _log(3) for told in (2, 3, 4)) / 3,
    "tale": _log(P, P - 1, L, O, len(COLOURS), len(WEEKDAYS)) + _log(4, 2, 2, 3, 2),
    "dictionary": _log(len(DICTIONARY), 2),
    "function": _log(len(TOOLS)),
}  # fmt: skip
"""Entropy in bits of one item or document of a kind, given kind and language, before any split: the closed forms."""


def expected_bits() -> float:
    """Return the entropy in bits of one pretraining document, kind and language included."""
    total = sum(MIXTURE["pretrain"].values())
    return kind_bits() + sum(weight / total * EXPECTED_BITS[kind] for kind, weight in MIXTURE["pretrain"].items())
