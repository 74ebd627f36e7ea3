"""Numbers and names as a reader sees them in reports. Knows no records, no HTML."""

import math
import re


def finite(value: object) -> float | None:
    """Return `value` as a float, or None when it is missing, not a number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def readable(name: str) -> str:
    """Return an identifier as words: `tool_weather` -> `Tool weather`."""
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:]


def short(value: float) -> str:
    """Return a number in at most about five characters: 0.0005 -> `5e-4`, 1532 -> `1,532`, 12400 -> `12.4k`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: `48 s`, `3 min 20 s`, `2 h 05 min`; a dash when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quantity(number: float | None) -> str:
    """Return a count: `812`, `64,200`, `1.31 million`; a dash when unknown."""
    if number is None or not math.isfinite(number):
        return "–"
    if abs(number) >= 1e9:
        return f"{number / 1e9:.3g} billion"
    return f"{number / 1e6:.3g} million" if abs(number) >= 1e6 else f"{number:,.0f}"


def memory(number_of_bytes: float | None) -> str:
    """Return bytes as MiB or GiB; a dash when unknown."""
    if not number_of_bytes or not math.isfinite(number_of_bytes):
        return "–"
    mib = number_of_bytes / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:,.0f} MiB"


def is_plain_number(metric: str) -> bool:
    """Whether a metric is a plain number, lower being better, and not a share."""
    return bool(re.search(r"bits|bpb|loss|perplexity|nats", metric.lower()))


def measure(value: object, metric: str = "") -> str:
    """Return a value of `metric` as text: a share as `96 %`, bits and losses with three digits; a dash when unknown."""
    number = finite(value)
    if number is None:
        return "–"
    if is_plain_number(metric) or abs(number) > 1:
        return f"{number:.3g}"
    return f"{100 * number:.0f} %"


def language_of(text: object) -> str:
    """Return the `lang` value of a text: zh-CN when it holds Chinese characters, else en."""
    return "zh-CN" if re.search(r"[\u3400-\u9fff]", str(text)) else "en"
