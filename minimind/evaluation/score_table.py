"""Scores as a table for people: 80 columns wide, ruled and coloured on a terminal, plain in a pipe.

It knows scores, not where they come from; `report` draws them.
"""

from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimind.evaluation.tasks import Score, overall

WIDTH = 80


def print_scores(scores: Sequence[Score], stream: TextIO) -> None:
    """Write one table for each form in `scores`: a line per domain, two columns per language, the whole at the end.

    Green: the interval lies above both chance and the best shortcut.
    """
    console = Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)
    for form in dict.fromkeys(score.form for score in scores):
        of_form = [score for score in scores if score.form == form]
        with console.capture() as captured:
            console.print(_table(of_form, has_rules=console.is_terminal))
        stream.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * share:.1f}"


def _table(scores: Sequence[Score], *, has_rules: bool) -> Table:
    languages = list(dict.fromkeys(score.language for score in scores))
    table = Table(
        box=box.SIMPLE_HEAD if has_rules else None,
        pad_edge=False,
        title=f"form {scores[0].form}: correct %, with 95 % intervals",
        title_justify="left",
    )
    table.add_column("domain", overflow="fold", min_width=8)
    table.add_column("n", justify="right", no_wrap=True)
    for language in languages:
        table.add_column(f"{language} %", justify="right", no_wrap=True)
        table.add_column("95 %", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    table.add_column("best shortcut", overflow="fold", min_width=8)
    for domain in dict.fromkeys(score.domain for score in scores):
        of_domain = {score.language: score for score in scores if score.domain == domain}
        table.add_row(*_cells(domain, of_domain, languages))
    if len(scores) > 1:
        table.add_section()
        of_language = {
            language: overall([score for score in scores if score.language == language]) for language in languages
        }
        table.add_row(*_cells("overall", of_language, languages), style="bold")
    return table


def _cells(domain: str, scores: dict[str, Score], languages: Sequence[str]) -> list[str | Text]:
    cells: list[str | Text] = [domain, str(sum(score.n for score in scores.values()))]
    for language in languages:
        score = scores.get(language)
        if score is None:
            cells += ["", ""]
            continue
        is_above = score.low > max(score.chance, score.shortcut_accuracy)
        cells += [
            Text(percent(score.accuracy), style="green" if is_above else ""),
            f"{100 * score.low:.0f}-{100 * score.high:.0f}",
        ]
    both = overall(list(scores.values()))
    best = max(scores.values(), key=lambda score: score.shortcut_accuracy)
    shortcut = f"{percent(both.shortcut_accuracy)} {best.shortcut}" if best.shortcut_accuracy else ""
    return [*cells, percent(both.chance), shortcut]
