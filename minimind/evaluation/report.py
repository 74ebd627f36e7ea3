"""report.html: what a run or a whole demo did, as one self-contained page.

Gathers plain records (metric rows, scores, samples, dialogues) into views and renders `report.html.jinja`. The page
loads nothing from outside (its Content-Security-Policy forbids it); text of models is escaped by Jinja, never trusted.
Deliberately knows nothing of models, training or how anything was measured; coordinates of charts are `charts.py`'s.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined

from minimind.evaluation.charts import Chart, DotPlot, dot_plots, mean_accuracy, series, stage_charts
from minimind.evaluation.wording import (
    duration,
    finite,
    is_plain_number,
    language_of,
    measure,
    memory,
    quantity,
    readable,
)

if TYPE_CHECKING:
    from minimind.evaluation.tasks import Score

SAMPLE_STEPS = 5
"""At most this many moments of training are shown per prompt."""

COPY_SCRIPT = """
document.querySelectorAll('button[data-copy]').forEach(function (button) {
  button.hidden = false;
  button.addEventListener('click', function () {
    var code = button.parentNode.querySelector('code');
    var done = function () {
      button.textContent = 'Copied';
      setTimeout(function () { button.textContent = 'Copy'; }, 1500);
    };
    var select = function () {
      var range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      if (document.execCommand('copy')) done();
    };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
    else select();
  });
});
"""


class Result(TypedDict):
    """One row of the demo's results.json. Shares are 0..1; metrics naming bits, loss or perplexity are numbers."""

    stage: str
    metric: str
    before: float | None
    after: float | None
    control: float | None
    """What a model reached that spent the same otherwise."""
    low: float | None
    high: float | None
    n: int | None
    target: float | None
    met: bool | None
    seconds: float | None


@dataclass(frozen=True)
class StageReport:
    """What one stage did. Only `name`, `title` and `what` are needed; every other part may be empty."""

    name: str
    title: str
    what: str
    """One sentence: what this stage does."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of metrics.jsonl."""
    before: Sequence["Score"] = ()
    after: Sequence["Score"] = ()
    seconds: float = 0.0
    tokens: int = 0
    headline: Sequence[Result] = ()
    """The stage's own measures, shown large."""
    samples: Sequence[Mapping[str, Any]] = ()
    """{"step", "prompt", "output"} over training."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Parameters, steps, batch, learning rate ... as shown."""
    floor: float | None = None
    """Entropy of this stage's data in bits per byte, where it is known."""


@dataclass(frozen=True)
class Dialogue:
    """One conversation with the model: messages with role, content, reasoning_content?, tool_calls?."""

    messages: Sequence[Mapping[str, Any]]
    note: str = ""
    correct: bool | None = None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file this package wrote, [] when absent; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def stage_from_run(run: Path, *, name: str, title: str, what: str, **parts: Any) -> StageReport:
    """Return the StageReport of a run directory: its metrics.jsonl and samples.jsonl, `parts` being any other field."""
    metrics = read_jsonl(run / "metrics.jsonl")
    last: dict[str, Any] = {key: value for row in metrics for key, value in row.items() if value is not None}
    parts.setdefault("seconds", finite(last.get("seconds")) or 0.0)
    parts.setdefault("tokens", int(finite(last.get("tokens")) or 0))
    parts.setdefault("samples", read_jsonl(run / "samples.jsonl"))
    return StageReport(name=name, title=title, what=what, metrics=metrics, **parts)


@dataclass(frozen=True)
class Tile:
    """A key figure: its name, the figure, what it was before ("" if nothing) and a note."""

    name: str
    value: str
    before: str = ""
    note: str = ""


def key_figures(stages: Sequence[StageReport], results: Sequence[Result], main: str = "") -> list[Tile]:
    """Return the tiles at the top; a figure that nobody measured gets no tile. `main` as in `write_report`."""
    tiles: list[Tile] = []
    seconds, tokens = sum(s.seconds for s in stages), sum(s.tokens for s in stages)
    parameters = [v for s in stages for k, v in s.facts.items() if k.lower().startswith("parameter")]
    scored = [s for s in stages if s.after]
    if scored:
        final = next((s.after for s in scored if s.name == main), scored[-1].after)
        first = next((s.before for s in scored if s.before), ())
        shared = {(s.domain, s.language) for s in final} & {(s.domain, s.language) for s in first}
        old, new = mean_accuracy(first, shared), mean_accuracy(final, shared or None)
        number = len(shared or final)
        note = f"mean of {number} held-out measures" if number > 1 else "one held-out measure"
        tiles.append(Tile("Held-out answers right", measure(new), measure(old) if old is not None else "", note))
    for stage in stages:
        bits = series(stage.metrics, "val_bits_per_byte")
        if bits:
            floor = f", floor {stage.floor:.3g}" if stage.floor is not None else ""
            old_bits = f"{bits[0][1]:.3g}" if len(bits) > 1 else ""
            tiles.append(Tile("Bits per byte", f"{bits[-1][1]:.3g}", old_bits, f"held-out text, {stage.title}{floor}"))
            break
    if seconds:
        tiles.append(Tile("Training time", duration(seconds), note=f"{len(stages)} stages" if len(stages) > 1 else ""))
    if parameters:
        tiles.append(Tile("Parameters", parameters[0]))
    if tokens:
        tiles.append(
            Tile("Tokens seen", quantity(tokens), note=f"{quantity(tokens / seconds)} a second" if seconds else "")
        )
    judged = [r for r in results if r.get("met") is not None]
    if judged:
        met = sum(bool(r.get("met")) for r in judged)
        tiles.append(Tile("Targets met", f"{met} of {len(judged)}", note="all under Results"))
    return tiles


@dataclass(frozen=True)
class ResultBar:
    """A result row as text, and its interval in percent of the bar where the metric is a share."""

    row: Result
    name: str
    stage: str
    before: str
    after: str
    control: str
    interval: str
    target: str
    spots: dict[str, float]


def result_bars(results: Sequence[Result], titles: Mapping[str, str]) -> list[ResultBar]:
    """Return the rows of the results table; `titles` names the stages."""
    bars: list[ResultBar] = []
    for row in results:
        metric = str(row.get("metric", ""))
        values = {key: finite(row.get(key)) for key in ("before", "after", "control", "low", "high", "target")}
        known = {key: value for key, value in values.items() if value is not None}
        is_share = not is_plain_number(metric) and all(0 <= value <= 1 for value in known.values())
        interval = f"{measure(values['low'], metric)} to {measure(values['high'], metric)}"
        bars.append(
            ResultBar(
                row,
                readable(metric),
                titles.get(str(row.get("stage")), readable(str(row.get("stage", "")))),
                measure(values["before"], metric),
                measure(values["after"], metric),
                measure(values["control"], metric),
                interval if "low" in known and "high" in known else "–",
                measure(values["target"], metric),
                {key: round(100 * value, 2) for key, value in known.items()} if is_share else {},
            )
        )
    return bars


@dataclass(frozen=True)
class StageView:
    """A stage with everything the template draws."""

    stage: StageReport
    charts: list[Chart]
    small_charts: list[Chart]
    plots: list[DotPlot]
    samples: list[tuple[str, list[tuple[int, str]]]]
    summary: str
    tokens_per_second: float | None
    peak_memory: float | None


def sample_story(samples: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return, per prompt, (step, output) at up to `SAMPLE_STEPS` moments: the first, the last, and between them more of
    the early ones, where a model changes fastest."""
    prompts: dict[str, dict[int, str]] = {}
    for sample in samples:
        step = finite(sample.get("step"))
        if step is not None:
            prompts.setdefault(str(sample.get("prompt", "")), {})[int(step)] = str(sample.get("output", ""))
    story: list[tuple[str, list[tuple[int, str]]]] = []
    for prompt, outputs in prompts.items():
        steps = sorted(outputs)
        last = len(steps) - 1
        picks = {round(last * (i / (SAMPLE_STEPS - 1)) ** 2) for i in range(SAMPLE_STEPS)}
        story.append((prompt, [(steps[i], outputs[steps[i]]) for i in sorted(picks)]))
    return story


def _summary(plots: Sequence[DotPlot], stage: StageReport) -> str:
    cells = [cell for plot in plots for cell in plot.cells]
    judged = [cell.verdict for cell in cells if cell.verdict]
    if not judged:
        return ""
    count = {verdict: judged.count(verdict) for verdict in ("gain", "same", "loss")}
    means = [mean_accuracy(scores) for scores in (stage.before, stage.after)]
    return (
        f"Mean of {len(cells)} measures: {measure(means[0])} before, {measure(means[1])} after. "
        f"{count['gain']} clearly better, {count['same']} not separable, {count['loss']} clearly worse "
        "(clear: the 95 % interval of the difference excludes zero)."
    )


def stage_view(stage: StageReport) -> StageView:
    """Return the charts, plots, samples and figures of one stage."""
    charts, small = stage_charts(stage.metrics, stage.floor)
    plots = dot_plots(stage.before, stage.after)
    speed = stage.tokens / stage.seconds if stage.tokens and stage.seconds > 0 else None
    peak = max((value for _, value in series(stage.metrics, "memory_bytes")), default=None)
    story = sample_story(stage.samples)
    return StageView(stage, charts, small, plots, story, _summary(plots, stage), speed, peak)


def weak_measures(view: StageView) -> list[str]:
    """Return the measures of a stage whose final interval does not lie above chance and the best shortcut."""
    return [
        f"{row.name} ({language})"
        for plot in view.plots
        for row in plot.rows
        for language, cell in zip(plot.languages, row.cells, strict=True)
        if cell and cell.is_above_bar is False
    ]


def tool_call(call: Mapping[str, Any]) -> tuple[str, str]:
    """Return (name, arguments as indented JSON) of a tool call, OpenAI's or flat; broken JSON stays as it is."""
    inner = call.get("function")
    source: Mapping[str, Any] = inner if isinstance(inner, Mapping) else call
    arguments = source.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return str(source.get("name", "?")), str(arguments)
    return str(source.get("name", "?")), json.dumps(arguments, ensure_ascii=False, indent=1, default=str)


def write_report(
    path: Path,
    *,
    title: str,
    subtitle: str,
    stages: Sequence[StageReport],
    results: Sequence[Result] = (),
    dialogues: Sequence[Dialogue] = (),
    cost: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Sequence[str] = (),
    commands: Sequence[tuple[str, str]] = (),
    domains: Mapping[str, str] | None = None,
    main: str = "",
) -> Path:
    """Write the page to `path` (whole or not at all) and return it.

    `main` names the stage whose answers stand at the top and whose weaknesses are named (default: the last that was
    questioned). `commands` are (what it does, command line); `domains` says in a sentence what each scored domain asks.
    """
    stages = [replace(stage, seconds=finite(stage.seconds) or 0.0, floor=finite(stage.floor)) for stage in stages]
    views = [stage_view(stage) for stage in stages]
    jinja = Environment(
        loader=PackageLoader("minimind.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "duration": duration,
        "quantity": quantity,
        "memory": memory,
        "measure": measure,
        "readable": readable,
        "tool_call": tool_call,
        "lang": language_of,
    }
    jinja.filters.update(filters)
    script_hash = base64.b64encode(hashlib.sha256(COPY_SCRIPT.encode()).digest()).decode()
    scored = [view for view in views if view.stage.after]
    asked = {score.domain for stage in stages for score in (*stage.before, *stage.after)}
    page = jinja.get_template("report.html.jinja").render(
        title=title,
        subtitle=subtitle,
        views=views,
        tiles=key_figures(stages, results, main),
        results=result_bars(results, {stage.name: stage.title for stage in stages}),
        dialogues=dialogues,
        cost=cost or {},
        environment=environment or {},
        limits=limits,
        weak=weak_measures(next((view for view in scored if view.stage.name == main), scored[-1])) if scored else [],
        commands=commands,
        domains={name: text for name, text in (domains or {}).items() if name in asked},
        total_seconds=sum(stage.seconds for stage in stages),
        script=COPY_SCRIPT,
        script_hash=script_hash,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path
