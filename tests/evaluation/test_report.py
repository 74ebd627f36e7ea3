"""The report: a page from any parts, nothing loaded from outside, model text never markup, marks where numbers are."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minimind.evaluation.intervals import wilson_interval
from minimind.evaluation.report import (
    Dialogue,
    Result,
    StageReport,
    key_figures,
    read_jsonl,
    sample_story,
    stage_from_run,
    stage_view,
    tool_call,
    weak_measures,
    write_report,
)
from minimind.evaluation.tasks import Form, Score

VOID = {"meta", "br", "img", "input", "link", "hr", "area", "base", "col", "embed", "source", "track", "wbr"}
HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&</style></p>{{ 7 * 7 }}{% raw %}"


class Page(HTMLParser):
    """Every element with its attributes; fails on a closing tag that closes nothing or something else."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def of_class(self, tag: str, name: str) -> list[dict[str, str | None]]:
        return [attrs for t, attrs in self.elements if t == tag and name in (attrs.get("class") or "").split()]


def score(
    domain="sums",
    language="en",
    correct=5,
    n=50,
    form: Form = "chat",
    chance=0.1,
    shortcut="first",
    shortcut_accuracy=0.3,
):
    low, high = wilson_interval(correct, n)
    return Score(domain, language, form, n, correct, correct / n, low, high, chance, shortcut, shortcut_accuracy, 1.0)


def metric_rows(steps=200):
    rows = [
        {
            "step": s,
            "train_loss": 1 + 6 / s,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 9e3,
            "memory_bytes": 5e8,
        }
        for s in range(1, steps + 1)
    ]
    return rows + [
        {"step": s, "val_loss": 1.1 + 6 / s, "val_bits_per_byte": (1.1 + 6 / s) / 2} for s in (1, 100, steps)
    ]


def result(
    metric: str = "sums, English",
    before: float | None = 0.1,
    after: float | None = 0.8,
    control: float | None = None,
    low: float | None = 0.7,
    high: float | None = 0.9,
    target: float | None = 0.6,
    met: bool | None = True,
) -> Result:
    return {
        "stage": "sft", "metric": metric, "before": before, "after": after, "control": control, "low": low,
        "high": high, "n": 50, "target": target, "met": met, "seconds": 3.0,
    }  # fmt: skip


def full_stage(**changes: Any) -> StageReport:
    parts: dict[str, Any] = {
        "name": "sft",
        "title": "Fine-tuning",
        "what": "Learns to answer.",
        "metrics": metric_rows(),
        "before": [score(correct=2), score(language="zh", correct=1)],
        "after": [score(correct=40), score(language="zh", correct=16)],
        "seconds": 200.0,
        "tokens": 1_500_000,
        "headline": [result()],
        "samples": [{"step": s, "prompt": "Once", "output": f"output at {s}"} for s in (0, 50, 200)],
        "facts": {"Parameters": "1.0 million"},
        "floor": 0.5,
    }
    return StageReport(**{**parts, **changes})


def page_of(tmp_path: Path, **parts: Any) -> tuple[str, Page]:
    given: dict[str, Any] = {"title": "T", "subtitle": "S", "stages": [], **parts}
    path = write_report(tmp_path / "out" / "report.html", **given)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


DIALOGUE = Dialogue(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "天气怎么样?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"day": 1}'}}],
        },
        {"role": "tool", "content": '{"sky": "rain"}'},
        {"role": "assistant", "reasoning_content": "The tool says rain.", "content": "下雨。"},
    ],
    note="Weather",
    correct=True,
)


def whole(tmp_path: Path) -> tuple[str, Page]:
    return page_of(
        tmp_path,
        stages=[full_stage(name="pretrain", title="Pretraining"), full_stage()],
        results=[result(), result("bits per byte", 3.0, 0.8, None, None, None, 1.0, False)],
        dialogues=[DIALOGUE, Dialogue([{"role": "user", "content": "?"}], correct=False)],
        cost={"Disk": "38 MiB"},
        environment={"torch": "2"},
        limits=["Small world."],
        domains={"sums": "Adding two numbers.", "other": "Never asked."},
        commands=[("Chat", "minimind chat runs/demo/sft")],
    )


def test_a_whole_page_holds_every_part(tmp_path):
    _, page = whole(tmp_path)
    parts = """Pretraining|Fine-tuning|output at 200|Weather|The tool says rain.|Calls weather|Disk|38 MiB|Small world.
    minimind chat runs/demo/sft|1 of 2|3 min 20 s|6 min 40 s|477 MiB|7,500|✗ wrong|✗ missed|Be brief.
    Adding two numbers."""
    for part in re.split(r"\||\n +", parts):
        assert part in page.text, part
    assert "Never asked." not in page.text
    assert len(page.of_class("path", "validation")) == 4  # loss and bits per byte, two stages
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links
    assert {link[1:] for link in links if link} <= ids


def test_nothing_is_loaded_from_outside(tmp_path):
    text, page = whole(tmp_path)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "video",
        "audio",
        "source",
        "base",
        "form",
        "image",
        "use",
    }
    for tag, attrs in page.elements:
        assert not {"src", "srcset", "action", "data", "xlink:href", "background"} & set(attrs), tag
        assert not [name for name in attrs if name.startswith("on")], tag
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?:|//[a-z]+\.", text)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'")


def test_the_policy_allows_exactly_the_script_of_the_page(tmp_path):
    text, _ = whole(tmp_path)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_hostile_text_stays_text_everywhere(tmp_path):
    clean = [tag for tag, _ in whole(tmp_path)[1].elements if tag in ("script", "style")]
    bad_score = score(domain=HOSTILE, shortcut=HOSTILE)
    text, page = page_of(
        tmp_path,
        title=HOSTILE,
        subtitle=HOSTILE,
        stages=[
            full_stage(
                name=HOSTILE,
                title=HOSTILE,
                what=HOSTILE,
                before=[bad_score],
                after=[bad_score],
                samples=[{"step": s, "prompt": HOSTILE, "output": HOSTILE} for s in (0, 1)],
                facts={HOSTILE: HOSTILE},
                headline=[result(HOSTILE)],
            )
        ],
        results=[{**result(HOSTILE), "stage": HOSTILE}],
        dialogues=[
            Dialogue(
                [
                    {"role": HOSTILE, "content": HOSTILE, "reasoning_content": HOSTILE},
                    {"role": "assistant", "tool_calls": [{"name": HOSTILE, "arguments": HOSTILE}]},
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {HOSTILE: HOSTILE}}]},
                    {"role": "tool", "content": HOSTILE},
                ],
                note=HOSTILE,
            )
        ],
        cost={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        limits=[HOSTILE],
        domains={HOSTILE: HOSTILE},
        commands=[(HOSTILE, HOSTILE)],
    )  # fmt: skip
    assert [tag for tag, _ in page.elements if tag in ("script", "style")] == clean
    assert not [tag for tag, attrs in page.elements if tag == "img" or "onerror" in attrs]
    assert "<script>alert" not in text
    assert page.text.count("{{ 7 * 7 }}{% raw %}") > 20
    assert "49" not in page.text


def test_text_that_is_no_valid_unicode_is_written(tmp_path):
    text, _ = page_of(tmp_path, dialogues=[Dialogue([{"role": "assistant", "content": "cut \ud83d and \x00 end"}])])
    assert "cut ? and" in text


def test_marks_stand_where_the_numbers_are(tmp_path):
    before, after = score(correct=2), score(correct=40)
    _, page = page_of(tmp_path, stages=[full_stage(before=[before], after=[after], headline=[])])
    low, high = wilson_interval(40, 50)
    whiskers = [w for w in page.of_class("line", "whisker") if w["x1"] != "1"]  # without the legend's
    assert [(w["x1"], w["x2"]) for w in whiskers] == [(f"{100 * low:.2f}%", f"{100 * high:.2f}%")]
    assert [c["cx"] for c in page.of_class("circle", "before-dot")][1:] == ["4.0%"]
    assert [c["cx"] for c in page.of_class("circle", "after-dot")][1:] == ["80.0%"]
    assert [t["x1"] for t in page.of_class("line", "chance")][1:] == ["10.0%"]
    assert [t["x1"] for t in page.of_class("line", "shortcut")][1:] == ["30.0%"]
    track = page.of_class("svg", "track")[0]["aria-label"]
    assert track == (
        "Sums, English: before 4 %, after 80 % (95 % interval 67 to 89 %); chance 10 %; best shortcut, first, 30 %"
    )


def test_result_bars_stand_where_the_numbers_are(tmp_path):
    _, page = page_of(tmp_path, results=[result(), result("validation loss", 0.9, 0.5, None, 0.4, 0.6, 0.7)])
    whiskers = page.of_class("line", "whisker")
    assert [(w["x1"], w["x2"]) for w in whiskers] == [("70.0%", "90.0%")]  # a loss is no share: no bar
    assert "70 % to 90 %" in page.text
    assert "0.4 to 0.6" in page.text


def test_what_does_not_clear_the_shortcut_is_named_as_a_limit(tmp_path):
    scores = [score(correct=40), score(language="zh", correct=16), score("easy", correct=50, chance=0.0, shortcut="")]
    stage = full_stage(before=[], after=scores)
    assert weak_measures(stage_view(stage)) == ["Sums (Chinese)"]
    _, page = page_of(tmp_path, stages=[stage])
    assert (
        "Not yet above chance and the best shortcut (its 95 % interval does not clear both): Sums (Chinese)."
        in page.text
    )


NAN = math.nan


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": []},
        {"metrics": [{"step": 1, "train_loss": 2.0}]},
        {"metrics": [row for row in metric_rows() if "val_loss" not in row]},
        {"metrics": [{"step": s, "train_loss": NAN, "lr": None, "val_loss": math.inf} for s in range(3)]},
        {"metrics": [{"train_loss": 1.0}, {"step": None}, {"step": 2, "train_loss": "x"}]},
        {"metrics": [{"step": s, "train_loss": 0.0, "val_loss": 0.0, "val_bits_per_byte": 0.0} for s in (1, 2)]},
        {"before": []},
        {"after": []},
        {"before": [], "after": []},
        {"before": [score()], "after": [score()]},
        {"before": [score("a")], "after": [score("b", "zh")]},
        {"after": [Score("a", "fr", "chat", 0, 0, NAN, NAN, NAN, NAN, "x", NAN, NAN)]},
        {"before": [score(form="completion")], "after": [score(form="chat"), score(form="completion")]},
        {"samples": []},
        {"samples": [{"step": 1, "prompt": "", "output": ""}, {"output": "no step"}]},
        {"seconds": 0.0, "tokens": 0, "facts": {}, "headline": [], "floor": None},
        {"seconds": NAN},
        {"headline": [{"metric": "x"}], "floor": NAN},
    ],
)
def test_missing_parts_leave_a_whole_page(tmp_path, changes):
    text, page = page_of(tmp_path, stages=[full_stage(**changes)])
    assert "Fine-tuning" in page.text
    for tag, attrs in page.elements:
        for name in ("x1", "x2", "y1", "y2", "cx", "cy", "d", "style"):
            assert not re.search(r"nan|inf|none", (attrs.get(name) or "").lower()), (tag, attrs)
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.text)
    assert text.rstrip().endswith("</html>")


def test_the_emptiest_report_is_a_page(tmp_path):
    _, page = page_of(tmp_path, results=[{"metric": "x"}], dialogues=[Dialogue([]), Dialogue([{"role": "assistant"}])])
    assert "(nothing)" in page.text


def test_one_language_has_one_column(tmp_path):
    text, _ = page_of(tmp_path, stages=[full_stage(before=[score()], after=[score(correct=40)])])
    assert "--n: 1" in text


def test_key_figures_compare_the_same_measures():
    first = full_stage(before=[score("a", correct=0), score("only first", correct=50)], after=[score("a", correct=10)])
    last = full_stage(before=[score("a", correct=20)], after=[score("a", correct=45), score("only last", correct=0)])
    tile = key_figures([first, last], [])[0]
    assert (tile.before, tile.value, tile.note) == ("0 %", "90 %", "one held-out measure")


def test_samples_show_the_first_and_the_last_step():
    samples = [{"step": s, "prompt": "p", "output": str(s)} for s in range(0, 1001, 50)]
    [(prompt, moments)] = sample_story(reversed(samples))
    assert prompt == "p"
    assert [step for step, _ in moments] == [0, 50, 250, 550, 1000]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"name": "f", "arguments": {"城": 1}}, ("f", '{\n "城": 1\n}')),
        ({"function": {"name": "f", "arguments": '{"a":1}'}}, ("f", '{\n "a": 1\n}')),
        ({"name": "f", "arguments": "{broken"}, ("f", "{broken")),
        ({}, ("?", "{}")),
    ],
)
def test_tool_calls_of_either_form(call, expected):
    assert tool_call(call) == expected


def test_a_run_directory_becomes_a_stage(tmp_path):
    rows = [{"step": s, "tokens": 10 * s, "seconds": 0.5 * s, "train_loss": 1.0} for s in (1, 2)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 3, "tok', encoding="utf-8")
    stage = stage_from_run(tmp_path, name="sft", title="SFT", what="Learns.", facts={"Batch": "8"})
    assert (stage.tokens, stage.seconds, len(stage.metrics), stage.samples) == (20, 1.0, 2, [])
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_failed_write_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(AttributeError):
        write_report(path, title="T", subtitle="S", stages=[None])  # pyright: ignore[reportArgumentType] - not a stage
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_report_needs_neither_torch_nor_matplotlib():
    code = "import sys, minimind.evaluation.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
