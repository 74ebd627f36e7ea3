"""Pictures of a run for a README or a paper, as PNG or SVG (the suffix decides), drawn by matplotlib.

The report needs none of this: its charts are inline SVG. Matplotlib is imported only when a picture is made, and its
global state (pyplot) is never touched.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.evaluation.charts import Points, dot_plots, series, smooth
from minimind.evaluation.report import StageReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION, BEFORE, SHORTCUT, INK, SOFT = "#0b6e69", "#c2410c", "#8a8f96", "#a16207", "#1d2024", "#5c6269"


def _figure(width: float, height: float, columns: int) -> tuple["Figure", "list[Axes]"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes: list[Axes] = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#c9c4ba")
        axis.tick_params(colors=SOFT, labelsize=9, length=0)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: "Figure", path: Path) -> Path:
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    # A fixed salt and no date: the same numbers give the same file, so a picture in git changes only when they do.
    with mpl.rc_context({"svg.hashsalt": "minimind"}):
        figure.savefig(path, dpi=160, metadata=metadata)
    return path


def save_loss(path: Path, stages: Sequence[StageReport]) -> Path:
    """Write the loss curves (nats per token over steps) of `stages`, side by side, and return `path`."""
    figure, axes = _figure(4.6 * max(1, len(stages)), 3.2, max(1, len(stages)))
    for axis, stage in zip(axes, stages, strict=False):
        train, validation = series(stage.metrics, "train_loss"), series(stage.metrics, "val_loss")
        axis.set_title(stage.title, loc="left", fontsize=11, color=INK, fontweight="bold")
        axis.set_xlabel("step", color=SOFT, fontsize=9)
        axis.grid(axis="y", color="#ece8e0")
        if train:
            axis.plot(*zip(*train, strict=True), color=TRAIN, alpha=0.22, linewidth=0.8)
            even = smooth(train, max(2, len(train) // 40))
            axis.plot(*zip(*even, strict=True), color=TRAIN, linewidth=1.8, label="training")
        if validation:
            axis.plot(*zip(*validation, strict=True), color=VALIDATION, marker="o", markersize=3.5, label="validation")
        if train or validation:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes[0].set_ylabel("loss, nats per token", color=SOFT, fontsize=9)
    return _save(figure, path)


CURVES = ("#0b6e69", "#c2410c", "#4338ca", "#a16207", "#be185d", "#15803d", "#5c6269")


def save_rewards(path: Path, curves: Mapping[str, Points]) -> Path:
    """Write the held-out reward of several algorithms over the tokens that each has sampled; return `path`."""
    figure, axes = _figure(6.4, 3.6, 1)
    axis = axes[0]
    for (name, points), color in zip(curves.items(), CURVES, strict=False):
        axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, linewidth=1.8, label=name)
    axis.set_title("Greedy answers right, held-out prompts", loc="left", fontsize=11, color=INK, fontweight="bold")
    axis.set_xlabel("tokens sampled", color=SOFT, fontsize=9)
    axis.grid(axis="y", color="#ece8e0")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    return _save(figure, path)


def rewards_over_tokens(rows: Iterable[Mapping[str, Any]]) -> Points:
    """Return (tokens sampled so far, held-out reward) of a run of reinforcement learning that logs every step."""
    sampled: dict[int, float] = {}
    points: Points = []
    for row in rows:
        if "generated_tokens" in row:
            sampled[row["rollout"]] = row["generated_tokens"]
        elif "val_reward" in row:
            points.append((sum(sampled.values()), row["val_reward"]))
    return points


def save_scores(path: Path, stage: StageReport) -> Path:
    """Write the before/after dot plot of a stage (its first form of asking), a panel per language; return `path`."""
    plots = dot_plots(stage.before, stage.after)
    if not plots:
        raise ValueError(f"stage {stage.name}: no scores to draw; pass the Scores of before and after")
    plot = plots[0]
    figure, axes = _figure(2.4 + 3.6 * len(plot.languages), 1.2 + 0.34 * len(plot.rows), len(plot.languages))
    for column, (axis, language) in enumerate(zip(axes, plot.languages, strict=True)):
        axis.set_title(language, loc="left", fontsize=11, color=INK, fontweight="bold")
        axis.set_xlim(-3, 103)
        axis.set_ylim(len(plot.rows) - 0.4, -0.6)
        axis.set_yticks(
            range(len(plot.rows)), [row.name for row in plot.rows] if column == 0 else [""] * len(plot.rows)
        )
        axis.grid(axis="y", color="#ece8e0")
        axis.spines["left"].set_visible(False)
        for y, row in enumerate(plot.rows):
            cell = row.cells[column]
            if cell is None:
                continue
            if cell.interval:
                axis.plot(cell.interval, (y, y), color=TRAIN, linewidth=6, alpha=0.28, solid_capstyle="butt")
            if cell.before is not None and cell.after is not None:
                axis.plot((cell.before, cell.after), (y, y), color=TRAIN, linewidth=1.2, alpha=0.4)
            marks: list[tuple[float | None, str, dict[str, Any]]] = [
                (cell.chance, "chance", {"s": 60, "marker": "|", "color": BEFORE}),
                (cell.shortcut, "best shortcut", {"s": 110, "marker": "|", "color": SHORTCUT}),
                (cell.before, "before", {"s": 28, "marker": "o", "color": "white", "edgecolors": BEFORE}),
                (cell.after, "after, 95 % interval", {"s": 40, "marker": "o", "color": TRAIN}),
            ]
            for value, name, style in marks:
                if value is not None:
                    axis.scatter(value, y, label=name, linewidths=1.8, zorder=3, **style)
    axes[0].set_xlabel("% right on held-out questions", color=SOFT, fontsize=9)
    known: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        known |= dict(zip(names, handles, strict=True))
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK
    )
    return _save(figure, path)
