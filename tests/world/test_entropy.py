"""The floor: bits of a draw are -log2 p of its text. Three checks that share no code with each other.

1. Injective: on a shrunken lexicon, where the same text comes up often, equal texts always come from equal choices.
2. Closed form: the mean bits of many draws equal the formula of `EXPECTED_BITS` within five standard errors.
3. Frequencies: on small domains the entropy of the counted texts equals the formula.
"""

import math
from collections import Counter
from typing import Any

import pytest

from minimind.world import arithmetic, calling, dialogue, pretraining, stories, weekdays, words
from minimind.world.domains import DOMAINS, MIXTURE
from minimind.world.draw import Draw, cumulate
from minimind.world.entropy import EXPECTED_BITS, expected_bits, floor, kind_bits
from minimind.world.facts import World
from minimind.world.lexicon import LANGUAGES, Language
from minimind.world.rows import documents

WORLD = World(0)
KINDS = list(EXPECTED_BITS)


class PathDraw(Draw):
    """A Draw that remembers every choice."""

    def __init__(self, *labels: object) -> None:
        super().__init__(*labels)
        self.path: list[Any] = []

    def below(self, n: int) -> int:
        self.path.append(super().below(n))
        return self.path[-1]

    def chance(self, part: int, whole: int) -> bool:
        self.path.append(super().chance(part, whole))
        return self.path[-1]

    def weighted(self, cumulative: Any) -> Any:
        self.path.append(super().weighted(cumulative))
        return self.path[-1]


def text_of(kind: str, draw: Draw, language: Language) -> str:
    """Draw one unsplit document of a kind."""
    if kind == "biography":
        return pretraining.biography(draw, language, WORLD)
    if kind == "tale":
        return pretraining.tale(draw, language, "train")
    if kind == "dictionary":
        return words.dictionary_line(draw, language)
    if kind == "function":
        return pretraining.function_card(draw, language)
    return DOMAINS[kind].make(draw, language, WORLD).plain_text()


@pytest.fixture
def tiny_lexicon(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Few people, places and things, so that texts repeat."""
    for module in (stories, dialogue, pretraining, arithmetic, calling, words):
        for name, size in (
            ("PEOPLE", 4),
            ("WALKERS", 4),
            ("PLACES", 5),
            ("OBJECTS", 2),
            ("COLOURS", 2),
            ("WEEKDAYS", 2),
        ):
            if hasattr(module, name) and not (kind == "lookup" and name == "OBJECTS"):  # its lists have four lines
                monkeypatch.setattr(module, name, getattr(module, name)[:size])
    monkeypatch.setattr(pretraining, "split_of", lambda _key: "train")


@pytest.mark.usefixtures("tiny_lexicon")
@pytest.mark.parametrize("kind", KINDS)
def test_equal_texts_come_from_equal_choices(kind: str) -> None:
    for language in LANGUAGES:
        draw = PathDraw("path", kind, language)
        path_of: dict[str, tuple[Any, ...]] = {}
        num_repeats = 0
        for _ in range(900):
            draw.path.clear()
            text = text_of(kind, draw, language)
            num_repeats += text in path_of
            assert path_of.setdefault(text, tuple(draw.path)) == tuple(draw.path), text
        # numbers of three digits and long stories repeat too rarely to tell; they are read back in the other tests
        if kind not in (
            "calculator",
            "sorting",
            "where-person",
            "who-two",
            "tale",
            "compare",
            "sums",
            "biography",
            "lookup",
        ):
            assert num_repeats > 20, kind


@pytest.mark.parametrize("kind", KINDS)
def test_mean_bits_equal_the_closed_form(kind: str) -> None:
    draw = Draw("mean", kind)
    bits: list[float] = []
    count = 1200
    for number in range(count):
        start = draw.bits
        before = draw.bits
        text_of(kind, draw, LANGUAGES[number % 2])
        bits.append(draw.bits - start)
        draw.bits = before
    mean = sum(bits) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in bits) / count / count)
    assert abs(mean - EXPECTED_BITS[kind]) < 5 * error + 1e-9, (mean, EXPECTED_BITS[kind])


@pytest.mark.parametrize(
    ("make", "kind", "count"),
    [
        (weekdays.weekday, "weekday", 30_000),
        (words.translation, "translation", 40_000),
        (dialogue.identity, "identity", 20_000),
    ],
)
def test_counted_texts_have_the_entropy_of_the_formula(make: Any, kind: str, count: int) -> None:
    draw = Draw("counted", kind)
    seen = Counter(make(draw, "zh", WORLD).user for _ in range(count))
    plug_in = -sum(n / count * math.log2(n / count) for n in seen.values())
    bias = (len(seen) - 1) / (2 * count * math.log(2))  # Miller and Madow 1955
    assert plug_in + bias == pytest.approx(EXPECTED_BITS[kind], abs=0.01)


def test_bits_of_unequal_choices() -> None:
    draw = Draw("unequal")
    shares = cumulate({"a": 3.0, "b": 1.0, "never": 0.0})
    counts: Counter[str] = Counter()
    for _ in range(4000):
        start = draw.bits
        found = draw.weighted(shares)
        counts[found] += 1
        assert draw.bits - start == pytest.approx({"a": math.log2(4 / 3), "b": 2.0}[found])
    assert set(counts) == {"a", "b"}
    assert abs(counts["a"] / 4000 - 0.75) < 0.03
    start = draw.bits
    assert draw.bits + math.log2(7) == pytest.approx((draw.below(7), draw.bits)[1])
    hits = 0
    for _ in range(4000):
        start = draw.bits
        hit = draw.chance(1, 5)
        hits += hit
        assert draw.bits - start == pytest.approx(math.log2(5) if hit else math.log2(5 / 4))
    assert abs(hits / 4000 - 0.2) < 0.03
    start = draw.bits
    assert sorted(draw.shuffle("abcd")) == list("abcd")
    assert draw.bits - start == pytest.approx(math.log2(24))


def test_the_floor_of_a_file_is_near_its_expectation_in_every_split() -> None:
    assert kind_bits() > 1
    for split in ("train", "validation"):
        found = list(documents(WORLD, split, 2500))
        whole = floor(found)
        assert whole.rows == 2500
        assert whole.bytes == sum(len(one.text.encode()) for one in found)
        assert whole.bits / whole.rows == pytest.approx(expected_bits(), rel=0.02)
        assert whole.bits_per_byte == pytest.approx(whole.bits / whole.bytes)
        assert 0.1 < whole.bits_per_byte < 0.4
    assert floor([]).bits_per_byte == 0.0


def test_every_kind_of_the_mixture_has_a_formula() -> None:
    assert set(EXPECTED_BITS) >= set(MIXTURE["pretrain"])
    assert all(DOMAINS[kind].is_exact for kind in KINDS if kind in DOMAINS)
