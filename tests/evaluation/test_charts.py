"""Coordinates, smoothing, ticks, verdicts and wording behind the pictures, and the pictures made by matplotlib."""

import math

import pytest

from minimind.evaluation import charts, plots
from minimind.evaluation.intervals import wilson_interval
from minimind.evaluation.report import StageReport
from minimind.evaluation.tasks import Score
from minimind.evaluation.wording import duration, measure, memory, quantity, short

NAN = math.nan


def score(correct: int = 5, n: int = 50, language: str = "en") -> Score:
    low, high = wilson_interval(correct, n)
    return Score("sums", language, "chat", n, correct, correct / n, low, high, 0.1, "first", 0.3, 1.0)


def stage(**parts) -> StageReport:
    return StageReport("sft", "Fine-tuning", "Learns to answer.", **parts)


@pytest.mark.parametrize(
    ("was", "now", "verdict"), [(2, 40, "gain"), (40, 2, "loss"), (20, 24, "same"), (18, 30, "gain")]
)
def test_a_verdict_is_the_interval_of_the_difference(was, now, verdict):
    cell = charts.cell("Sums", "English", score(was), score(now))
    assert cell is not None
    assert cell.verdict == verdict


def test_chart_coordinates():
    chart = charts.line_chart("Loss", "nats", [("train", "training", [(0, 4.0), (50, 1.0), (100, 0.0)])], floor=0.5)
    assert chart is not None
    assert (chart.y_ticks[0].at, chart.y_ticks[-1].at) == (100, 0)
    assert chart.lines[0].path == "M0 0L50 75L100 100"
    assert chart.floor is not None
    assert chart.floor.at == 87.5
    assert chart.x_ticks[0].label == "0"
    assert "from 4 at step 0 to 0 at step 100" in chart.label


def test_the_floor_of_the_loss_is_bits_per_byte_times_bytes_per_token():
    rows = [{"step": 1, "val_loss": 2.0, "val_bits_per_byte": 1.0}]
    large, _ = charts.stage_charts(rows, 0.8)
    assert [chart.title for chart in large] == ["Loss", "Bits per byte"]
    assert [chart.floor.label for chart in large if chart.floor] == ["1.6", "0.8"]


def test_a_step_written_twice_counts_once():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 1, "a": 5.0}, {"step": 3, "a": True}]
    assert charts.series(rows, "a") == [(1, 5.0), (2, 2.0)]


def test_smoothing_keeps_a_straight_line_and_does_not_lag():
    line = [(float(i), 10.0 - i) for i in range(10)]
    assert [y for _, y in charts.smooth(line, 5)] == pytest.approx([y for _, y in line])
    assert [y for _, y in charts.smooth([(0, 0.0), (1, 3.0), (2, 0.0)], 3)] == [0, 1, 0]


def test_thinning_keeps_ends_and_spikes():
    points = [(float(i), 1.0) for i in range(5000)]
    points[777] = (777.0, 99.0)
    kept = charts.thin(points)
    assert len(kept) <= 302
    assert {(777.0, 99.0), points[0], points[-1]} <= set(kept)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.2, 7.1), (0, 0), (5, 5), (-3, 3), (1e-9, 2e-9), (0, 1e7)])
def test_ticks_enclose_the_values(low, high):
    ticks = charts.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.006, "0.006"), (5e-4, "5e-4"), (1532, "1,532"), (12400, "12.4k"), (3e6, "3M"), (-2.5, "-2.5")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_figures_as_people_say_them():
    assert [duration(s) for s in (None, NAN, 3.21, 48, 59.7, 200, 7500)] == [
        "–", "–", "3.2 s", "48 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"
    ]  # fmt: skip
    assert [quantity(n) for n in (None, 812, 64200, 1_310_000, 2.5e9)] == [
        "–", "812", "64,200", "1.31 million", "2.5 billion"
    ]  # fmt: skip
    assert [memory(n) for n in (None, 0, 2**20, 1.5 * 2**30)] == ["–", "–", "1 MiB", "1.50 GiB"]
    pairs = ((0.8, "sums"), (0.8, "val_bits_per_byte"), (None, ""), (NAN, ""), (3.0, "x"))
    assert [measure(value, metric) for value, metric in pairs] == ["80 %", "0.8", "–", "–", "3"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_the_same_file_each_time(tmp_path, suffix):
    for name in ("a", "b"):
        rows = [{"step": s, "train_loss": 5 / s} for s in range(1, 50)] + [{"step": 9, "val_loss": 1.0}]
        plots.save_loss(tmp_path / name / f"loss.{suffix}", [stage(metrics=rows), stage()])
        both = stage(before=[score(2), score(3, language="zh")], after=[score(40), score(41, language="zh")])
        plots.save_scores(tmp_path / name / f"scores.{suffix}", both)
    for picture in ("loss", "scores"):
        data = (tmp_path / "a" / f"{picture}.{suffix}").read_bytes()
        assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
        assert data == (tmp_path / "b" / f"{picture}.{suffix}").read_bytes()


def test_a_picture_without_scores_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stage sft: no scores to draw"):
        plots.save_scores(tmp_path / "x.png", stage())
