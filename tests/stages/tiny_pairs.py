"""Pairs small enough for tests: a friendly answer is better than a rude one."""

from typing import Any


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row of preference data."""
    asked = {"role": "user", "content": question}
    sides = {"chosen": chosen, "rejected": rejected}
    return {side: [asked, {"role": "assistant", "content": text}] for side, text in sides.items()}


PAIRS = [
    pair(f"{a} and {b}?", f"Gladly: {a + b}.", f"{a + b}, {'stupid' * (1 + a % 2)}.")
    for a in range(6)
    for b in range(4)
]
HELD_OUT = [pair(f"{a} and 5?", f"Gladly: {a + 5}.", f"{a + 5}, stupid.") for a in range(6)]
