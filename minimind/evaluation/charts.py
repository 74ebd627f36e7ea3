"""The numbers behind every picture: metric rows and scores -> coordinates in percent of the plot, ticks and labels.

Knows metrics.jsonl rows and `Score`; knows neither HTML nor matplotlib: `report.html.jinja` and `plots.py` draw.
Percent coordinates (x from the left, y from the top) let one drawing fill any width without scaling its text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minimind.evaluation.intervals import newcombe_interval
from minimind.evaluation.wording import finite, readable, short

if TYPE_CHECKING:
    from minimind.evaluation.tasks import Score

Points = list[tuple[float, float]]
"""(step, value), ascending in step, every value finite."""

LANGUAGES = {"en": "English", "zh": "Chinese"}
FORMS = {"chat": "asked in a chat", "completion": "completing a plain line"}


def series(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    """Return the finite values of `key` over "step"; of a step written twice (a resumed run) the last one."""
    found: dict[float, float] = {}
    for row in rows:
        step, value = finite(row.get("step")), finite(row.get(key))
        if step is not None and value is not None:
            found[step] = value
    return sorted(found.items())


def smooth(points: Points, span: int) -> Points:
    """Return the mean over `span` neighbours centred on each point (fewer at both ends, equally many on each side).

    Centred, because a trailing average lags: a falling training loss would be drawn above where it was.
    """
    half, total, sums = span // 2, 0.0, [0.0]
    for _, y in points:
        total += y
        sums.append(total)
    out = Points()
    for i, (x, _) in enumerate(points):
        side = min(half, i, len(points) - 1 - i)
        out.append((x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return out


def thin(points: Points, limit: int = 300) -> Points:
    """Return at most about `limit` points: the lowest and the highest of each bucket, so that no spike is hidden."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    kept: set[tuple[float, float]] = {points[0], points[-1]}
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept |= {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(kept)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers whose ends enclose [low, high]; two at least."""
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - abs(low) * 0.1 - 1e-6, high + abs(high) * 0.1 + 1e-6
    raw = (high - low) / max(count, 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Tick:
    """A grid line: `at` in percent of the axis, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One line of a chart. `path` is SVG path data in a 100 x 100 box; `dots` are (x, y, tooltip) in percent."""

    kind: str
    name: str
    path: str
    dots: list[tuple[float, float, str]]
    last: str
    """The last value as text, for the legend."""


@dataclass(frozen=True)
class Chart:
    """A line chart over steps, ready to be drawn."""

    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    floor: Tick | None
    floor_name: str
    label: str
    """What a reader who cannot see the picture should know."""


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[tuple[str, str, Points]],
    *,
    floor: float | None = None,
    floor_name: str = "",
    from_zero: bool = False,
) -> Chart | None:
    """Return the chart of `lines` = (kind, name, points), or None when none of them has a point.

    Kind "raw" is background (no dots, not in the legend), "validation" gets a dot at every point.
    """
    lines = [(kind, name, thin(points)) for kind, name, points in lines if points]
    if not lines:
        return None
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points] + ([floor] if floor is not None else [])
    left, right = min(xs), max(xs)
    left = 0.0 if 0 < left < 0.1 * right else left
    right = right if right > left else left + 1
    y_values = nice_ticks(min([*ys, 0.0]) if from_zero else min(ys), max(ys), 3 if from_zero else 5)
    bottom, top = y_values[0], y_values[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return round(100 * (x - left) / (right - left), 3), round(100 * (top - y) / (top - bottom), 3)

    drawn: list[Line] = []
    for kind, name, points in lines:
        spots = [place(x, y) for x, y in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in spots)
        dotted = kind == "validation" or len(points) == 1
        dots = [(px, py, f"step {x:,.0f}: {y:.4g}") for (px, py), (x, y) in zip(spots, points, strict=True) if dotted]
        drawn.append(Line(kind, name, path, dots, f"{points[-1][1]:.3g}"))
    words = "; ".join(
        f"{name} from {first[1]:.3g} at step {first[0]:,.0f} to {last[1]:.3g} at step {last[0]:,.0f}"
        for first, last, name in ((points[0], points[-1], name) for kind, name, points in lines if kind != "raw")
    )
    return Chart(
        title,
        unit,
        drawn,
        [
            Tick(place(x, bottom)[0], short(x))
            for x in nice_ticks(left, right, 3 if from_zero else 5)
            if left <= x <= right
        ],
        [Tick(place(left, y)[1], short(y)) for y in y_values],
        None if floor is None else Tick(place(left, floor)[1], f"{floor:.3g}"),
        floor_name,
        f"{title} ({unit}): {words}" + (f"; {floor_name} {floor:.3g}" if floor is not None else ""),
    )


def bytes_per_token(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the bytes a learned token stands for, from the last validation row with loss and bits per byte."""
    for row in reversed(rows):
        loss, bits = finite(row.get("val_loss")), finite(row.get("val_bits_per_byte"))
        if loss and bits:
            return loss / (bits * math.log(2))
    return None


def stage_charts(rows: Sequence[Mapping[str, Any]], floor: float | None) -> tuple[list[Chart], list[Chart]]:
    """Return (large charts: loss, bits per byte; small ones: learning rate, gradient norm, speed) of one stage.

    `floor`: the entropy of the data in bits per byte; in the loss chart it is times the measured bytes per token.
    """
    train, ratio = series(rows, "train_loss"), bytes_per_token(rows)
    even = smooth(train, max(2, len(train) // 40))
    loss_floor = None if floor is None or ratio is None else floor * ratio * math.log(2)
    lines = [
        ("raw", "each step", train),
        ("train", "training", even),
        ("validation", "validation", series(rows, "val_loss")),
    ]
    large = [
        line_chart("Loss", "nats per token", lines, floor=loss_floor, floor_name="entropy of the data"),
        line_chart(
            "Bits per byte",
            "held-out text",
            [("validation", "validation", series(rows, "val_bits_per_byte"))],
            floor=floor,
            floor_name="entropy of the data",
        ),
    ]
    small = [
        line_chart(title, unit, [("small", title.lower(), series(rows, key))], from_zero=True)
        for title, unit, key in (
            ("Learning rate", "per step", "lr"),
            ("Gradient norm", "before clipping", "grad_norm"),
            ("Speed", "tokens per second", "tokens_per_second"),
        )
    ]
    return [c for c in large if c], [c for c in small if c]


@dataclass(frozen=True)
class Cell:
    """One measure before and after a stage. Numbers are percentages; None where unknown."""

    language: str
    before: float | None
    before_interval: tuple[float, float] | None
    after: float | None
    interval: tuple[float, float] | None
    chance: float | None
    shortcut: float | None
    shortcut_name: str
    n: int
    gain: tuple[float, float, float] | None
    """(after - before, and the two ends of its 95 % interval) in points."""
    verdict: str
    """"gain" / "loss": the interval of the gain excludes zero; "same": it does not; "": one side was not measured."""
    is_above_bar: bool | None
    """True when the final interval lies wholly above both chance and the best shortcut."""
    label: str


@dataclass(frozen=True)
class DomainRow:
    """One domain: its readable name and one cell per language of the plot (None: not asked in that language)."""

    name: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class DotPlot:
    """Before and after of every domain in one form of asking."""

    form: str
    languages: list[str]
    codes: list[str]
    rows: list[DomainRow]

    @property
    def cells(self) -> list[Cell]:
        """Every measured cell."""
        return [cell for row in self.rows for cell in row.cells if cell]


def _percent(value: object) -> float | None:
    number = finite(value)
    return None if number is None else round(100 * min(max(number, 0.0), 1.0), 2)


def _interval(score: "Score | None") -> tuple[float, float] | None:
    if score is None:
        return None
    low, high = _percent(score.low), _percent(score.high)
    return None if low is None or high is None else (low, high)


def _gain(before: "Score | None", after: "Score | None") -> tuple[float, float, float] | None:
    if before is None or after is None or finite(before.accuracy) is None or finite(after.accuracy) is None:
        return None
    low, high = newcombe_interval(before.correct, before.n, after.correct, after.n)
    return round(100 * (after.accuracy - before.accuracy), 2), round(100 * low, 2), round(100 * high, 2)


def _verdict(gain: tuple[float, float, float] | None) -> str:
    if gain is None:
        return ""
    return "gain" if gain[1] > 0 else "loss" if gain[2] < 0 else "same"


def cell(name: str, language: str, before: "Score | None", after: "Score | None") -> Cell | None:
    """Return one measure as percentages with its spoken label, or None when neither side was measured."""
    shown = after or before
    if shown is None:
        return None
    old, new = _percent(before.accuracy if before else None), _percent(after.accuracy if after else None)
    new_interval, gain = _interval(after), _gain(before, after)
    chance = _percent(shown.chance)
    shortcut = _percent(shown.shortcut_accuracy) if shown.shortcut else None
    bars = [bar for bar in (chance, shortcut) if bar is not None]
    parts = [f"{name}, {language}:"]
    parts += [f"before {old:.0f} %,"] if old is not None else []
    parts += [f"after {new:.0f} %"] if new is not None else []
    parts += [f"(95 % interval {new_interval[0]:.0f} to {new_interval[1]:.0f} %)"] if new_interval else []
    parts += [f"; chance {chance:.0f} %"] if chance is not None else []
    parts += [f"; best shortcut, {readable(shown.shortcut).lower()}, {shortcut:.0f} %"] if shortcut is not None else []
    return Cell(
        language,
        old,
        _interval(before),
        new,
        new_interval,
        chance,
        shortcut,
        readable(shown.shortcut),
        shown.n,
        gain,
        _verdict(gain),
        new_interval[0] > max(bars) if new_interval and bars else None,
        " ".join(parts).replace(" ;", ";").removesuffix(","),
    )


def dot_plots(before: Sequence["Score"], after: Sequence["Score"]) -> list[DotPlot]:
    """Return one plot per form of asking; before and after are matched by (domain, language, form), order as given."""
    old = {(s.form, s.domain, s.language): s for s in before}
    new = {(s.form, s.domain, s.language): s for s in after}
    keys = list(dict.fromkeys([*new, *old]))
    plots: list[DotPlot] = []
    for form in dict.fromkeys(key[0] for key in keys):
        codes = sorted({key[2] for key in keys if key[0] == form})
        names = [LANGUAGES.get(code, code) for code in codes]
        rows = [
            DomainRow(
                readable(domain),
                [
                    cell(readable(domain), language, old.get((form, domain, code)), new.get((form, domain, code)))
                    for code, language in zip(codes, names, strict=True)
                ],
            )
            for domain in dict.fromkeys(key[1] for key in keys if key[0] == form)
        ]
        plots.append(DotPlot(FORMS.get(form, form), names, codes, rows))
    return plots


def mean_accuracy(scores: Sequence["Score"], keys: set[tuple[str, str]] | None = None) -> float | None:
    """Return the unweighted mean accuracy over measures (those whose (domain, language) is in `keys`), or None."""
    values = [finite(s.accuracy) for s in scores if keys is None or (s.domain, s.language) in keys]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
