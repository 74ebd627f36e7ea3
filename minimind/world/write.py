"""`minimind world --out DIR`: the built-in world as JSONL in every format that training and evaluation read.

`world.json` beside them says what they hold. A file appears whole or not at all: it is written beside its name and then
renamed. Memory does not grow with the sizes.
"""

import errno
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from minimind.errors import ConfigError, OutOfResourcesError
from minimind.world.domains import DOMAINS, MIXTURE
from minimind.world.draw import SPLITS, Split
from minimind.world.entropy import Floor
from minimind.world.facts import World
from minimind.world.pretraining import Document
from minimind.world.rows import STREAMS, Row, documents, questions, rows

FILES = ("pretrain", *STREAMS)
"""Names of the files that training reads, without ending; with `-validation` and `-test` beside them."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows."""

    preset: str = ""
    """quick, demo or full; the fields below override it."""
    pretrain: int = 60_000
    """Training rows of pretrain."""
    sft: int = 64_000
    """Training rows of sft."""
    reason: int = 4_000
    """Training rows of reason."""
    preference: int = 4_000
    """Training rows of preference."""
    prompts: int = 4_000
    """Training rows of prompts."""
    agent: int = 2_000
    """Training rows of agent."""
    lora_identity: int = 600
    """Training rows of lora-identity."""
    lora_trade: int = 1_200
    """Training rows of lora-trade."""
    held_out: int = 500
    """Rows of each -validation and -test file."""
    questions: int = 60
    """Questions per domain and language in each of questions-validation and questions-test."""

    @classmethod
    def from_preset(cls, name: str) -> "Sizes":
        """Return the sizes of that name. Raises ConfigError for an unknown one."""
        if name not in SIZES:
            raise ConfigError(f"unknown size {name!r}; choose one of {', '.join(SIZES)}")
        return SIZES[name]

    def problems(self) -> list[str]:
        """Return what is wrong with the numbers."""
        numbers = {name: value for name, value in asdict(self).items() if name != "preset"}
        return [f"{name} must be at least 1, got {value}" for name, value in numbers.items() if value < 1]

    def of(self, file: str, split: Split) -> int:
        """Return the number of rows of a file of a split."""
        return int(getattr(self, file.replace("-", "_"))) if split == "train" else self.held_out


SIZES = {
    "quick": Sizes("quick", 8_000, 6_000, 800, 800, 800, 400, 300, 600, 200, 20),
    "demo": Sizes("demo"),
    "full": Sizes("full", 400_000, 500_000, 40_000, 40_000, 40_000, 20_000, 600, 1_200, 2_000, 200),
}


@dataclass(frozen=True)
class WorldConfig:
    """Write the built-in world as JSONL files."""

    out: Path
    """Folder to write into; made if missing, files of the same names are replaced."""
    seed: int = 0
    """Another seed gives other facts, other questions and other rows. What is held out does not depend on it."""
    scale: str = "demo"
    """Numbers of rows: quick, demo or full."""

    def problems(self) -> list[str]:
        """Return what is wrong with the values."""
        return [] if self.scale in SIZES else [f"scale must be one of {', '.join(SIZES)}, got {self.scale!r}"]


@dataclass
class _Tally:
    """Counts documents by kind while they pass through to the file."""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0.0]))

    def passing(self, found: Iterable[Document]) -> Iterator[Row]:
        for one in found:
            entry = self.sums[one.kind]
            entry[0] += 1
            entry[1] += len(one.text.encode())
            entry[2] += one.bits
            yield {"text": one.text}

    def report(self) -> dict[str, Any]:
        floors = {kind: Floor(int(n), int(size), bits) for kind, (n, size, bits) in sorted(self.sums.items())}
        whole = Floor(
            sum(part.rows for part in floors.values()),
            sum(part.bytes for part in floors.values()),
            sum(part.bits for part in floors.values()),
        )
        return _floor_row(whole) | {"kinds": {kind: _floor_row(part) for kind, part in floors.items()}}


def _floor_row(part: Floor) -> dict[str, Any]:
    return {
        "rows": part.rows,
        "bytes": part.bytes,
        "bits": round(part.bits, 3),
        "bits_per_byte": round(part.bits_per_byte, 5),
    }


def write(out_dir: Path, *, seed: int = 0, sizes: Sizes = SIZES["demo"]) -> dict[str, int]:
    """Write all files and return file name -> number of rows.

    `world.json` tells the seed, the mixture, what each domain holds out, and the entropy floor of each pretrain file in
    bits, bytes and bits per byte. Raises ConfigError if the folder cannot be written, OutOfResourcesError if the disk
    is full.
    """
    world = World(seed)
    counts: dict[str, int] = {}
    floors: dict[str, Any] = {}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            ending = "" if split == "train" else f"-{split}"
            for file in FILES:
                name = f"{file}{ending}.jsonl"
                count = sizes.of(file, split)
                if file == "pretrain":
                    tally = _Tally()
                    counts[name] = _write_rows(out_dir / name, tally.passing(documents(world, split, count)))
                    floors[name] = tally.report()
                else:
                    counts[name] = _write_rows(out_dir / name, rows(file, world, split, count))
            if split != "train":
                name = f"questions-{split}.jsonl"
                counts[name] = _write_rows(out_dir / name, questions(world, split, sizes.questions))
        about = {
            "seed": seed,
            "rows": counts,
            "mixture": MIXTURE,
            "floor": floors,
            "domains": {name: domain_row(name) for name in DOMAINS},
        }
        _replace(out_dir / "world.json", [orjson.dumps(about, option=orjson.OPT_INDENT_2), b"\n"])
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResourcesError(
                f"{out_dir}: the disk is full; free some space or take a smaller --scale"
            ) from error
        raise ConfigError(f"{out_dir}: cannot write the world here: {error.strerror}; choose another --out") from error
    return counts


def domain_row(name: str) -> dict[str, Any]:
    """Return what a domain is, as told in `world.json` and the report."""
    domain = DOMAINS[name]
    return {
        "set": domain.set,
        "about": domain.about,
        "held_out": domain.held_out,
        "without_understanding": domain.weak,
        "is_trained": domain.is_trained,
    }


def _write_rows(path: Path, found: Iterable[Row]) -> int:
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for row in found:
            count += 1
            yield orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)

    _replace(path, lines())
    return count


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb", buffering=2**20) as file:
            file.writelines(parts)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def main(argv: list[str]) -> int:
    """Run `minimind world`: write the files, print one line `rows<TAB>path` for each."""
    from minimind.config import parse

    config = parse(WorldConfig, argv, command="world", description=__doc__ or "")
    counts = write(config.out, seed=config.seed, sizes=SIZES[config.scale])
    for name, count in counts.items():
        sys.stdout.write(f"{count}\t{config.out / name}\n")
    return 0
