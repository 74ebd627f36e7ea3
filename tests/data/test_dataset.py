"""The token cache: what goes in comes out, degenerate rows are counted, the fingerprint follows the content."""

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind.batch import Example
from minimind.data import build, prompt, text
from minimind.data.config import DataConfig
from minimind.data.dataset import TokenDataset, content_digest, prepare, train_and_validation
from minimind.data.jsonl import read_rows
from minimind.errors import ConfigError, DataError, OutOfResourcesError
from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.chat import render, render_batch
from minimind.tokenizer.train import train

from .conftest import TEXTS, turns

WriteRows = Callable[..., Path]


def ids_of(dataset: TokenDataset) -> list[list[int]]:
    return [example.ids for example in dataset]


def test_texts_come_back(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([{"text": content} for content in TEXTS])
    dataset = prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "cache")
    expected = [[1, *tokenizer.encode(content), 2] for content in TEXTS]
    assert ids_of(dataset) == expected
    assert dataset.document(0) == Example(expected[0], [1.0] * len(expected[0]))
    assert dataset.num_tokens == sum(map(len, expected))
    assert dataset.num_learned_tokens == dataset.num_tokens - len(TEXTS)
    assert dataset.ids.dtype == np.uint16
    assert text.prompt_ids(tokenizer, "Once") == [1, *tokenizer.encode("Once")]
    with pytest.raises(IndexError, match="document 4 of 4"):
        dataset.document(4)


def test_conversations_come_back_with_their_weights(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [turns("the dog", "the cat"), turns("the ball", "the river", "the mat", "the boy", system="a girl")]
    dataset = prepare([write_rows(rows)], tokenizer, kind="conversation", cache_dir=tmp_path / "c", max_length=100)
    expected = [render(tokenizer, row["conversations"]) for row in rows]
    assert list(dataset) == expected
    assert dataset.num_learned_tokens == sum(weight > 0 for e in expected for weight in e.loss_weights[1:])


def test_batches_of_rows_keep_the_order(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [{"text": f"the dog {i}"} for i in range(50)]
    talks = [turns(f"the dog {i}", f"the cat {i}") for i in range(50)]
    pairs = [{"prompt": f"the dog {i}", "chosen": f"the cat {i}", "rejected": "the mat"} for i in range(50)]

    def all_kinds(name: str) -> list[list[list[int]]]:
        cache = tmp_path / name
        return [
            ids_of(prepare([write_rows(texts)], tokenizer, kind="pretrain", cache_dir=cache)),
            ids_of(prepare([write_rows(talks)], tokenizer, kind="conversation", cache_dir=cache, max_length=99)),
            ids_of(prepare([write_rows(pairs)], tokenizer, kind="preference", cache_dir=cache, max_length=99)),
        ]

    whole = all_kinds("a")
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 30)
    monkeypatch.setattr(build, "BATCH_CONVERSATIONS", 7)
    monkeypatch.setattr(build, "KNOWN_CHARACTERS", 50)
    assert all_kinds("b") == whole


def test_what_was_encoded_is_forgotten_before_it_is_much(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    characters: list[int] = []

    def watched(*args: Any, known: dict[str, list[int]]) -> list[Example]:
        examples = render_batch(*args, known=known)
        characters.append(sum(map(len, known)))
        return examples

    monkeypatch.setattr(build, "render_batch", watched)
    monkeypatch.setattr(build, "BATCH_CONVERSATIONS", 4)
    monkeypatch.setattr(build, "KNOWN_CHARACTERS", 200)
    talks = [turns(f"the dog {i}", f"the cat {i}") for i in range(200)]
    pairs = [{"prompt": f"the dog {i}", "chosen": f"the cat {i}", "rejected": "the mat"} for i in range(200)]
    prepare([write_rows(talks)], tokenizer, kind="conversation", cache_dir=tmp_path / "c", max_length=99)
    assert len(characters) >= 50
    prepare([write_rows(pairs)], tokenizer, kind="preference", cache_dir=tmp_path / "c", max_length=99)
    assert 200 < max(characters) < 500


def test_degenerate_rows_are_counted_and_left_out(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    texts = write_rows([{"text": ""}, {"text": " \n"}, {"text": "the dog"}], "texts.jsonl")
    dataset = prepare([texts], tokenizer, kind="pretrain", cache_dir=tmp_path)
    assert (dataset.report["rows"], dataset.report["empty"], dataset.report["documents"]) == (3, 2, 1)
    rows: list[dict[str, Any]] = [
        turns("the dog", ""),  # nothing to learn
        turns("the dog " * 100, "the cat"),  # the question alone is too long
        turns("the dog", "the cat " * 100),  # the answer is cut
        turns("the dog " * 20, "the cat", "the ball", "the river"),  # the first turns are left out
        {**turns("the dog", "the cat"), "label": False},  # not to be imitated
        turns("the dog", "the cat"),
    ]
    dataset = prepare([write_rows(rows)], tokenizer, kind="conversation", cache_dir=tmp_path, max_length=40)
    counts = {key: count for key, count in dataset.report.items() if count}
    assert counts == {"rows": 6, "empty": 1, "too_long": 1, "cut": 1, "truncated": 1, "disliked": 1, "documents": 3}
    assert max(map(len, ids_of(dataset))) <= 40
    assert all(any(example.loss_weights[1:]) for example in dataset)


def test_a_mask_without_anything_to_learn_is_counted(write_rows: WriteRows, tmp_path: Path) -> None:
    silent = Tokenizer(
        train(TEXTS, 300)._json,  # pyright: ignore[reportPrivateUsage] - a tokenizer with another template
        chat_template="{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
    )
    dataset = prepare([write_rows([turns("a", "b")])], silent, kind="conversation", cache_dir=tmp_path, max_length=40)
    assert (dataset.report["nothing_to_learn"], dataset.num_documents) == (1, 0)


def test_a_bad_row_stops_or_is_skipped(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([turns("the dog", "the cat"), "nonsense", {"messages": [{"role": "x"}]}, turns("a", "b")])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON.*(?s:.)*data check.*--data\.on-error skip"):
        prepare([path], tokenizer, kind="conversation", cache_dir=tmp_path / "c", max_length=64)
    assert [file.name for file in (tmp_path / "c").iterdir() if not file.name.endswith(".lock")] == []
    dataset = prepare([path], tokenizer, kind="conversation", cache_dir=tmp_path / "c", max_length=64, on_error="skip")
    assert (dataset.report["skipped"], dataset.num_documents) == (2, 2)


def test_a_damaged_file_stops_even_when_rows_may_be_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: the compressed data is damaged.*cannot be read"):
        prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "c", on_error="skip")


def test_unpaired_preferences_are_bad_rows_of_pairs(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"prompt": "the dog", "chosen": "the cat", "rejected": "the mat"}, {**turns("a", "b"), "label": True}]
    options: dict[str, Any] = {"kind": "preference", "cache_dir": tmp_path, "max_length": 64}
    with pytest.raises(DataError, match=r":2: label: one answer with a label"):
        prepare([write_rows(rows)], tokenizer, **options)
    dataset = prepare([write_rows(rows)], tokenizer, **options, on_error="skip")
    assert (dataset.num_documents, dataset.documents_per_row) == (2, 2)


def test_the_cache_is_used_while_nothing_changes(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([{"text": "the dog"}, {"text": "the cat"}])
    options: dict[str, Any] = {"kind": "pretrain", "cache_dir": tmp_path / "c"}
    first = prepare([path], tokenizer, **options)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    moved = path.rename(tmp_path / "moved.jsonl")
    os.utime(moved)
    again = prepare([moved], tokenizer, **options)
    assert again.fingerprint == first.fingerprint
    assert (again.folder / "meta.json").stat().st_mtime_ns == stamp


def test_the_fingerprint_follows_content_tokenizer_and_options(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows([turns("the dog", "the cat"), turns("a", "b")])

    def fingerprint(**changes: Any) -> str:
        options: dict[str, Any] = {"kind": "conversation", "cache_dir": tmp_path / "c", "max_length": 64} | changes
        return prepare(options.pop("files", [path]), options.pop("tokenizer", tokenizer), **options).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    other_template = Tokenizer(
        tokenizer._json,  # pyright: ignore[reportPrivateUsage] - the same vocabulary with another template
        chat_template=tokenizer.chat_template.replace("# Tools", "# My tools"),
    )
    variants = [
        {"max_length": 65},
        {"validation_fraction": 0.5},
        {"validation_fraction": 0.5, "part": "validation"},
        {"on_error": "skip"},
        {"files": [path, path]},
        {"tokenizer": train(TEXTS, 350)},
        {"tokenizer": other_template},
        {"files": [write_rows([turns("the dog", "the cat"), turns("a", "c")], "other.jsonl")]},
    ]
    found = [fingerprint(**variant) for variant in variants]
    assert len({base, *found}) == len(variants) + 1


def test_a_damaged_cache_is_refused(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([{"text": "the dog"}])
    folder = prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "c").folder
    (folder / "ids.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"ids\.bin: 0 bytes, expected \d+ bytes; delete the folder"):
        prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "c")
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match="not a token cache"):
        TokenDataset(folder)


def test_a_killed_build_leaves_nothing_that_counts(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([{"text": "the dog"}])
    reference = prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "a")
    leftover = tmp_path / "b" / f"{reference.folder.name}.tmp-1"
    leftover.mkdir(parents=True)  # as kill -9 leaves it
    (leftover / "ids.bin").write_bytes(b"half")
    assert ids_of(prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "b")) == ids_of(reference)
    assert not leftover.exists()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.Writer, "add", full)
    with pytest.raises(OutOfResourcesError, match=r"No space left on device after .* bytes .*--data\.cache-dir"):
        prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "c")
    assert not [file for file in (tmp_path / "c").iterdir() if file.is_dir()]


@pytest.mark.parametrize("kind", ["a file", "below a file", "full", "not writable"])
def test_a_cache_folder_that_cannot_be(
    kind: str, tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([{"text": "the dog"}])
    cache = tmp_path / "cache"
    error: type[Exception] = ConfigError
    message = r"data\.cache_dir = .*/cache.*: cannot be written \(.+\); give another --data\.cache-dir$"
    if kind in ("a file", "below a file"):
        cache.write_text("mine")
        cache = cache / "below" if kind == "below a file" else cache
    else:
        number = errno.ENOSPC if kind == "full" else errno.EACCES

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "mkdir", fail)  # permissions do not bind the root user
        if kind == "full":
            error, message = OutOfResourcesError, r"/cache: No space left on device .*--data\.cache-dir"
    with pytest.raises(error, match=message):
        prepare([path], tokenizer, kind="pretrain", cache_dir=cache)
    monkeypatch.setattr("minimind.data.dataset.REMEMBERED_BYTES", 1)
    os.utime(path, (0, 0))
    with pytest.raises(error, match=message):  # its digest could not be remembered either
        prepare([path], tokenizer, kind="pretrain", cache_dir=cache)


def test_a_cache_folder_that_takes_no_new_folder(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    mkdir = Path.mkdir

    def fail(self: Path, *args: Any, **options: Any) -> None:
        if ".tmp-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ConfigError, match=r"/c: cannot be written \(Permission denied\)"):
        prepare([write_rows([{"text": "a"}])], tokenizer, kind="pretrain", cache_dir=tmp_path / "c")


def test_a_file_that_changes_while_it_is_read(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([{"text": "the dog"}])
    add = build.Writer.add

    def meddle(self: build.Writer, documents: Any, weights: Any = None) -> None:
        path.write_text(json.dumps({"text": "the cat sat"}) + "\n")
        add(self, documents, weights)

    monkeypatch.setattr(build.Writer, "add", meddle)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while being read"):
        prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "c")
    assert not [file for file in (tmp_path / "c").iterdir() if file.is_dir()]


def test_two_builders_at_once_make_one_cache(
    tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([{"text": f"the dog {i}"} for i in range(2000)])
    built: list[Path] = []
    write_folder = build.write_folder

    def counted(target: Path, fill: Callable[[Path], None]) -> None:
        built.append(target)
        write_folder(target, fill)

    monkeypatch.setattr("minimind.data.dataset.write_folder", counted)

    def run(_: int) -> list[list[int]]:
        return ids_of(prepare([path], tokenizer, kind="pretrain", cache_dir=tmp_path / "c"))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert results == [results[0]] * 4
    assert len(built) == 1


def test_the_split_is_by_content(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"text": f"the dog {i % 200} ran"} for i in range(400)]  # every text twice
    config = DataConfig(files=(write_rows(rows),), validation_fraction=0.2, cache_dir=tmp_path / "c", row_length=64)
    training, validation = train_and_validation(config, tokenizer, kind="pretrain")
    assert validation is not None
    seen, held_out = (count_documents(ids_of(part)) for part in (training, validation))
    assert not seen.keys() & held_out.keys()
    assert {*seen.values(), *held_out.values()} == {2}
    assert len(seen) + len(held_out) == 200
    assert 20 <= len(held_out) <= 60
    # other rows in another order and file: no document changes sides
    more = write_rows([*reversed(rows[:200]), *({"text": f"the cat {i}"} for i in range(100))], "more.jsonl")
    later = DataConfig(files=(more,), validation_fraction=0.2, cache_dir=tmp_path / "c", row_length=64)
    after, after_held_out = (
        count_documents(ids_of(part)) for part in train_and_validation(later, tokenizer, kind="pretrain") if part
    )
    assert seen.keys() <= after.keys()
    assert held_out.keys() <= after_held_out.keys()


def count_documents(documents: list[list[int]]) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for document in documents:
        counts[tuple(document)] = counts.get(tuple(document), 0) + 1
    return counts


def test_validation_files_and_no_validation(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    path, other = write_rows([{"text": "the dog"}]), write_rows([{"text": "the cat"}], "other.jsonl")
    config = DataConfig(files=(path,), validation=(other,), cache_dir=tmp_path / "c")
    training, validation = train_and_validation(config, tokenizer, kind="pretrain")
    assert (training.num_documents, validation and validation.num_documents) == (1, 1)
    none = DataConfig(files=(path,), validation_fraction=0.0, cache_dir=tmp_path / "c")
    assert train_and_validation(none, tokenizer, kind="pretrain")[1] is None
    few = DataConfig(files=(path,), validation_fraction=0.0001, cache_dir=tmp_path / "c")
    assert train_and_validation(few, tokenizer, kind="pretrain")[1] is None
    empty = DataConfig(files=(write_rows([{"text": ""}], "empty.jsonl"),), cache_dir=tmp_path / "c")
    with pytest.raises(DataError, match=r"empty\.jsonl: nothing to train on \(rows 1, empty 1\)"):
        train_and_validation(empty, tokenizer, kind="pretrain")


def test_the_budget_of_a_row(tokenizer: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows([turns("the dog", "the cat " * 50)])
    config = DataConfig(files=(path,), row_length=32, validation_fraction=0, cache_dir=tmp_path / "c")
    dataset = train_and_validation(config, tokenizer, kind="conversation")[0]
    assert dataset.longest == 33  # 32 labels
    pairs = write_rows([{"prompt": "the dog", "chosen": "the cat " * 50, "rejected": "the mat " * 50}], "pairs.jsonl")
    config = DataConfig(files=(pairs,), row_length=64, validation_fraction=0, cache_dir=tmp_path / "c")
    assert train_and_validation(config, tokenizer, kind="preference")[0].longest == 33


def test_missing_files_and_arguments(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.jsonl: no such file"):
        prepare([tmp_path / "gone.jsonl"], tokenizer, kind="pretrain", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="no data files"):
        prepare([], tokenizer, kind="pretrain", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="max_length is None"):
        prepare([tmp_path / "gone.jsonl"], tokenizer, kind="conversation", cache_dir=tmp_path)


def test_digests_of_large_files_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.data.dataset.REMEMBERED_BYTES", 4)
    path = tmp_path / "a.txt"
    path.write_text("some text")
    os.utime(path, (1_000_000, 1_000_000))
    first = content_digest(path, tmp_path / "c")
    notes = list((tmp_path / "c" / "digests").iterdir())
    assert [note.read_text() for note in notes] == [first]
    path.write_text("same size")
    assert content_digest(path, tmp_path / "c") != first  # just changed: read, and not remembered
    assert len(list((tmp_path / "c" / "digests").iterdir())) == 1


def test_prompts_load(write_rows: WriteRows) -> None:
    path = write_rows([{"prompt": "1 + 2?", "answer": "3"}, {"prompt": 5}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: prompt: is the number 5"):
        prompt.load([path])
    prompts, report = prompt.load([path], on_error="skip")
    assert [found.answer for found in prompts] == ["3"]
    assert report == {"rows": 2, "prompts": 1, "skipped": 1}
    with pytest.raises(DataError, match="no prompt in 1 rows"):
        prompt.load([write_rows([{"prompt": 5}], "bad.jsonl")], on_error="skip")


def test_the_command_line_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import dataclass, field

    from minimind.config import parse

    @dataclass(frozen=True)
    class Config:
        """A stage."""

        data: DataConfig = field(default_factory=DataConfig)
        """Data."""

    words = ["--data", "a.jsonl", "b.jsonl", "--data.on-error", "skip", "--data.row-length", "64"]
    parsed = parse(Config, words, command="sft").data
    assert (parsed.files, parsed.on_error, parsed.row_length) == ((Path("a.jsonl"), Path("b.jsonl")), "skip", 64)
    bad = ["--data.row-length", "1", "--data.validation-fraction", "1.5", "--data.pack-window", "0"]
    with pytest.raises(ConfigError) as caught:
        parse(Config, bad, command="sft")
    assert all(name in str(caught.value) for name in ("row_length", "validation_fraction", "pack_window"))


def test_every_text_is_read_from_every_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": content}) + "\n" for content in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS), encoding="utf-8")
    caches = [
        prepare([tmp_path / name], tokenizer, kind="pretrain", cache_dir=tmp_path) for name in ("a.jsonl", "a.txt")
    ]
    assert ids_of(caches[0]) == ids_of(caches[1])
    assert len(list(read_rows(tmp_path / "a.txt"))) == len(TEXTS)
