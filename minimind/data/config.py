"""What a stage needs to know about its data: files, length of a row, what to do with bad rows. No torch, no reading."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    files: Annotated[tuple[Path, ...], tyro.conf.arg(name="data", prefix_name=False, metavar="FILE ...")] = ()
    """Training files: .jsonl or .json (each also .gz or .zst), .parquet; for pretraining also .txt."""
    validation: tuple[Path, ...] = ()
    """Validation files; without them `validation-fraction` of the training documents is held out."""
    validation_fraction: float = 0.01
    """Share of the documents held out, chosen by the hash of their content; 0 holds out none."""
    on_error: Literal["raise", "skip"] = "raise"
    """A malformed row stops the run (raise), or is counted and left out (skip)."""
    row_length: int = 0
    """Tokens of a row of a batch: the context that is trained. 0: that of the model started from, 512 for a new one."""
    packing: Literal["packed", "padded"] = "packed"
    """Fill rows with several documents (packed, faster), or one document a row (padded)."""
    pack_window: int = 131_072
    """Documents among which packing looks for the best fit; bounds its memory."""
    cache_dir: Path = Path("runs/.cache")
    """Folder of the tokenised data; safe to delete."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values."""
        found: list[str] = []
        if not 0 <= self.validation_fraction < 1:
            found.append(f"data.validation_fraction is {self.validation_fraction}, expected 0 <= fraction < 1")
        if self.row_length < 0 or self.row_length == 1:
            found.append(f"data.row_length is {self.row_length}, expected at least 2 tokens, or 0 for the model's own")
        if self.pack_window < 1:
            found.append(f"data.pack_window is {self.pack_window}, expected at least 1 document")
        return found
