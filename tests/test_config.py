"""Dataclass <-> TOML <-> flags: the order of sources, and that every problem is named at once."""

import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config import check, from_dict, from_toml, parse, to_dict, to_toml
from minimind.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    preset: str = ""
    """Name of a shape."""
    width: int = 64
    """Width."""
    depth: int = 2
    """Depth."""

    @classmethod
    def from_preset(cls, name: str) -> "Shape":
        presets = {"small": cls(width=512, depth=8), "base": cls(width=768, depth=16)}
        if name not in presets:
            raise ConfigError(f"no preset {name!r}; there are {', '.join(presets)}")
        return presets[name]

    def problems(self) -> list[str]:
        return [f"width = {self.width}: must be even"] if self.width % 2 else []


@dataclass(frozen=True)
class Rate:
    name: Literal["adamw", "muon"] = "adamw"
    """Which."""
    lr: float = 5e-4
    """How fast."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two."""

    def problems(self) -> list[str]:
        return [f"lr = {self.lr}: must be above 0"] if self.lr <= 0 else []


@dataclass(frozen=True)
class Stage:
    """Train something."""

    init_from: Path | None = None
    """Where from."""
    files: tuple[Path, ...] = ()
    """What on."""
    limit: int | None = 7
    """At most."""
    steps: int = 3
    """How long."""
    resume: bool = True
    """Whether to go on."""
    note: str = ""
    """Anything."""
    model: Shape = field(default_factory=Shape)
    """The shape."""
    optim: Rate = field(default_factory=Rate)
    """The rate."""


@dataclass(frozen=True)
class Needs:
    out: Path
    """Required."""
    steps: int = 1
    """Optional."""


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    path = write(tmp_path, 'steps = 5\nnote = "from file"\n[optim]\nlr = 1e-3\nname = "muon"\n')
    config = parse(Stage, ["--config", str(path), "--optim.lr", "2e-3", "--init_from", "runs/a"], command="x")
    assert (config.steps, config.note, config.limit) == (5, "from file", 7)
    assert config.optim == Rate("muon", 2e-3)
    assert config.init_from == Path("runs/a")
    assert parse(Stage, ["--init-from", "runs/a"], command="x").init_from == Path("runs/a")


def test_flags_of_every_kind() -> None:
    argv = ["--files", "a", "b", "--no-resume", "--limit", "None", "--optim.betas", "0.8", "0.9", "--optim.name=muon"]
    config = parse(Stage, argv, command="x")
    assert config.files == (Path("a"), Path("b"))
    assert not config.resume
    assert config.limit is None
    assert config.optim == Rate("muon", 5e-4, (0.8, 0.9))


def test_several_files_and_equals_sign(tmp_path: Path) -> None:
    first = write(tmp_path, "steps = 5\n[optim]\nlr = 1.0\n", "a.toml")
    second = write(tmp_path, '[optim]\nname = "muon"\n', "b.toml")
    config = parse(Stage, [f"--config={first}", "--config", str(second)], command="x")
    assert (config.steps, config.optim) == (5, Rate("muon", 1.0))


def test_preset_from_file_with_single_fields_over_it(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\npreset = "base"\ndepth = 4\n')
    assert parse(Stage, ["--config", str(path)], command="x").model == Shape("base", 768, 4)
    assert from_toml(Stage, path).model == Shape("base", 768, 4)
    config = parse(Stage, ["--config", str(path), "--model.width", "32"], command="x")
    assert config.model == Shape("base", 32, 4)


@pytest.mark.parametrize("argv", [["--model.preset", "small"], ["--model.preset=small"]])
def test_preset_flag_wins_over_the_file_s(tmp_path: Path, argv: list[str]) -> None:
    path = write(tmp_path, '[model]\npreset = "base"\ndepth = 4\n')
    assert parse(Stage, ["--config", str(path), *argv], command="x").model == Shape("small", 512, 4)


def test_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.preset: no preset 'tiny'; there are small, base"):
        parse(Stage, ["--model.preset", "tiny"], command="x")
    path = write(tmp_path, '[model]\npreset = "tiny"\n')
    with pytest.raises(ConfigError, match=r"recipe\.toml: model\.preset: no preset 'tiny'"):
        from_toml(Stage, path)


def test_every_problem_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    text = 'stepss = 4\nlr = 3e-4\nsteps = "many"\nresume = 1\n[model]\nwidth = 7\n[optim]\nname = "sgd"\nbetas = [1]\n'
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        parse(Stage, ["--config", str(path), "--optim.lr", "-1"], command="x")
    lines = str(caught.value).splitlines()
    assert lines[0] == "8 problems in the configuration:"
    assert lines[1:] == [
        f"  - {path}: unknown key stepss; did you mean steps?",
        f"  - {path}: unknown key lr; did you mean optim.lr?",
        f"  - {path}: steps: expected an integer, got 'many' (string)",
        f"  - {path}: resume: expected true or false, got 1 (integer)",
        f"  - {path}: optim.name: expected one of 'adamw', 'muon', got 'sgd' (string)",
        f"  - {path}: optim.betas: expected a list of 2 values (a number, a number), got [1] (list)",
        "  - model.width = 7: must be even",
        "  - optim.lr = -1.0: must be above 0",
    ]


def test_unknown_key_without_a_near_one_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"here: unknown key optim\.zzz; the keys of \[optim\] are name, lr, betas"):
        from_dict(Stage, {"optim": {"zzz": 1}}, where="here")


def test_suggestions_look_beside_first_then_everywhere() -> None:
    for keys, hint in (
        ({"optim": {"nme": 1}}, "optim.nme; did you mean optim.name?"),
        ({"optimizer": {}}, "optimizer; did you mean optim?"),
        ({"optim": {"step": 1}}, "optim.step; did you mean steps?"),
        ({"init-from": "a"}, "init-from; did you mean init_from?"),
        ({"widht": 1}, "widht; did you mean model.width?"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict(Stage, keys, where="here")
        assert hint in str(caught.value)


def test_a_value_where_a_table_belongs() -> None:
    with pytest.raises(ConfigError, match=r"here: optim: expected a table, got 3 \(integer\)"):
        from_dict(Stage, {"optim": 3}, where="here")


def test_integers_are_numbers_but_booleans_are_not() -> None:
    assert from_dict(Stage, {"optim": {"lr": 1}}, where="here").optim.lr == 1.0
    with pytest.raises(ConfigError, match=r"steps: expected an integer, got True \(boolean\)"):
        from_dict(Stage, {"steps": True}, where="here")
    with pytest.raises(ConfigError, match=r"steps: expected an integer, got 1\.5 \(number\)"):
        from_dict(Stage, {"steps": 1.5}, where="here")


def test_check_walks_into_nested_dataclasses() -> None:
    bad = Stage(model=Shape(width=3), optim=Rate(lr=0.0))
    with pytest.raises(ConfigError) as caught:
        check(bad)
    assert "model.width = 3" in str(caught.value)
    assert "optim.lr = 0.0" in str(caught.value)
    check(Stage())


def test_a_problem_that_names_its_full_place_keeps_it() -> None:
    @dataclass(frozen=True)
    class Inner:
        size: int = 0

        def problems(self) -> list[str]:
            return ["inner.size is 0, expected 1", "size = 0: too small", "nothing fits"]

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = field(default_factory=Inner)

    with pytest.raises(ConfigError) as caught:
        check(Outer())
    expected = ["inner.size is 0, expected 1", "inner.size = 0: too small", "inner: nothing fits"]
    assert [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]] == expected


def test_required_fields(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="here: out: missing, and it has no default"):
        from_dict(Needs, {}, where="here")
    assert parse(Needs, ["--out", "a"], command="x") == Needs(Path("a"))
    assert parse(Needs, ["--config", str(write(tmp_path, 'out = "b"\n'))], command="x") == Needs(Path("b"))
    with pytest.raises(SystemExit) as stop:
        parse(Needs, [], command="x")
    assert stop.value.code == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "steps = = 3\n")
    with pytest.raises(ConfigError, match=r"recipe\.toml: not valid TOML"):
        parse(Stage, ["--config", str(path)], command="x")
    with pytest.raises(ConfigError, match=r"recipee\.toml: no such file; did you mean .*recipe\.toml\?"):
        parse(Stage, ["--config", str(tmp_path / "recipee.toml")], command="x")
    (tmp_path / "latin.toml").write_bytes(b"note = '\xe9'\n")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        from_toml(Stage, tmp_path / "latin.toml")


def test_bad_flag_exits_2_with_a_suggestion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path, "nonsense_key = 1\n")
    with pytest.raises(SystemExit) as stop:
        parse(Stage, ["--config", str(path), "--optim.lrr", "1"], command="pretrain")
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "--optim.lrr" in shown
    assert "--optim.lr " in shown
    assert "unknown key nonsense_key" in shown  # what is wrong with the file is not kept for the next attempt


def test_help_shows_every_field_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Stage, ["--help"], command="pretrain")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("minimind pretrain", "Train something.", "--config FILE", "--init-from", "Where from.", "--optim.lr"):
        assert text in shown


def test_a_long_description_is_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Stage, ["--help"], command="x", description="word " * 40 + "\n\nAnd much more.")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("word") == 40
    assert "And much more." not in shown


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False)


@given(
    st.builds(
        Stage,
        init_from=st.none() | st.sampled_from([Path("runs/a b"), Path('quo"te')]),
        files=st.lists(st.sampled_from([Path("a"), Path("中/文.jsonl")])).map(tuple),
        limit=st.none() | st.integers(-(2**60), 2**60),
        note=names.filter(lambda text: text != "none"),
        optim=st.builds(Rate, lr=numbers.filter(lambda x: x > 0), betas=st.tuples(numbers, numbers)),
    )
)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Stage) -> None:
    path = write(tmp_path_factory.getbasetemp(), to_toml(config), "round.toml")
    assert from_toml(Stage, path) == config


def test_toml_round_trip_of_a_preset_and_of_nan(tmp_path: Path) -> None:
    config = parse(Stage, ["--model.preset", "base", "--model.depth", "3"], command="x")
    assert from_toml(Stage, write(tmp_path, to_toml(config))) == config
    read = from_toml(Stage, write(tmp_path, to_toml(replace(config, optim=Rate(lr=math.nan)))))
    assert math.isnan(read.optim.lr)


def test_to_dict_is_json_able_and_comes_back() -> None:
    config = Stage(init_from=Path("a/b"), files=(Path("c"),))
    values: dict[str, Any] = to_dict(config)
    assert values["init_from"] == "a/b"
    assert values["files"] == ["c"]
    assert values["optim"]["betas"] == [0.9, 0.95]
    assert from_dict(Stage, values, where="here") == config


def test_config_needs_no_torch() -> None:
    code = "import sys, minimind.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
