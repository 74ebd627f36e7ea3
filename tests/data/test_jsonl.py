"""Reading: every malformed line is named with file and line, every format gives the same rows, memory stays flat."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import jsonl
from minimind.data.jsonl import read_rows, scan
from minimind.data.rows import Problem, Row
from minimind.errors import ConfigError, DataError

GOOD = b'{"text": "good"}'

MALFORMED: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"text": "a', "not valid JSON"),
    "missing brace": (b'{"text": "a"', "not valid JSON: unexpected end of data"),
    "trailing comma": (b'{"text": "a",}', "trailing comma"),
    "single quotes": (b"{'text': 'a'}", "not valid JSON"),
    "no quotes": (b"{text: 1}", "not valid JSON"),
    "two objects on a line": (b'{"text": "a"} {"text": "b"}', "unexpected content after document"),
    "missing colon": (b'{"text" "a"}', "not valid JSON"),
    "plain words": (b"hello", "not valid JSON"),
    "python literal": (b'{"text": None}', "not valid JSON"),
    "NaN": (b'{"text": "a", "score": NaN}', "not valid JSON"),
    "infinity": (b'{"text": "a", "score": -Infinity}', "not valid JSON"),
    "number too large": (b'{"text": "a", "score": 1e999}', "infinity"),
    "raw line break in a string": (b'{"text": "a\tb"}', "control character"),
    "raw NUL": (b'{"text": "a\0b"}', "control character"),
    "bad escape": (b'{"text": "\\x41"}', "not valid JSON"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 14"),
    "list": (b'[{"text": "a"}]', "a list, expected an object"),
    "string": (b'"text"', "a string, expected an object"),
    "number": (b"42", "the number 42, expected an object"),
    "null": (b"null", "null, expected an object"),
    "key twice": (b'{"text": "a", "text": "b"}', 'the key "text" is given twice'),
    "inner key twice": (b'{"m": [{"role": "user", "role" : "tool"}]}', 'the key "role" is given twice'),
    "nested deeply": (b'{"text": ' + b"[" * 101 + b"]" * 101 + b"}", "nested deeper than 100"),
    "nested absurdly": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 100"),
    "too long": (b'{"text": "' + b"a" * 300_000 + b'"}', "longer than 250,000 bytes"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_line_is_named_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    line, what = MALFORMED[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD, b""]))
    found = list(scan(path, max_line_bytes=250_000))
    assert [item.line for item in found] == [1, 2, 3, 4]
    assert [isinstance(item, Problem) for item in found] == [False, False, True, False]
    message = str(found[2])
    assert message.startswith(f"{path}:3: ")
    assert what in message


def test_all_malformed_lines_of_one_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in MALFORMED.values()))
    problems = [item for item in scan(path, max_line_bytes=250_000) if isinstance(item, Problem)]
    assert [problem.line for problem in problems] == list(range(1, len(MALFORMED) + 1))
    for problem, (_, what) in zip(problems, MALFORMED.values(), strict=True):
        assert what in problem.what


def test_read_rows_stops_at_the_first_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\nnonsense\n")
    rows = read_rows(path)
    assert next(rows) == Row({"text": "good"}, str(path), 1)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON"):
        next(rows)


def test_harmless_things_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # byte order mark, Windows line ends, empty lines, spaces before colons, colons in a text, no line end at the end
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text" : "b"}\n{"text": "say \\"x\\": y", "n": {"text": 1}}'
    )
    found = list(scan(path))
    assert [(item.line, item.data["text"]) for item in found if isinstance(item, Row)] == [
        (1, "a"), (4, "b"), (5, 'say "x": y'),
    ]  # fmt: skip
    assert len(found) == 3


ROWS: list[dict[str, Any]] = [{"text": f'row {i} 中文 "quoted" \\ {"é" * i}', "n": {"a": [i]}} for i in range(40)]


def _write(path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    array = json.dumps(ROWS, indent=1, ensure_ascii=path.name.startswith("ascii")).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(array if ".json." in path.name else lines))
    elif path.suffix == ".zst":
        half = len(lines) // 2  # two frames: files are often joined
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    else:
        path.write_bytes(lines if path.suffix == ".jsonl" else array)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json", "ascii.json", "a.json.gz", "A.JSONL"]
)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _write(path) if name != "A.JSONL" else path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row.data for row in read_rows(path)] == ROWS


def test_fields_that_a_parquet_row_lacks_are_absent(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning_content": "c"},
            ]
        },
        {"messages": [{"role": "user", "content": "d"}], "label": False},
    ]
    turn = pa.struct([(name, pa.string()) for name in ("role", "content", "reasoning_content")])
    table = pa.Table.from_pylist(rows, pa.schema([("messages", pa.list_(turn)), ("label", pa.bool_())]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.data for row in read_rows(tmp_path / "a.parquet")] == rows


def test_json_array_lines_and_small_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[\n{"text": "a\\n"},\n\n{"text":\n "b"}\n,{"text": "c"}\n]\n')
    for chunk in (1, 2, 3, 7, 2**20):
        monkeypatch.setattr("minimind.data.json_array.CHUNK", chunk)
        assert [(row.line, row.data["text"]) for row in read_rows(path)] == [(3, "a\n"), (5, "b"), (7, "c")]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ('[{"text": "a"},\n{"text": "b"]', 2, "not valid JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "expected ',' or ']'"),
        ('[{"text": "a"},\n', 2, "the file ends inside the array"),
        ('[{"text": "a"}', 1, "expected ',' or ']'"),
        ('[{"text": "a"},\n\n"b"]', 3, "a string, expected an object"),
        ('[{"text": "a"},\n{"text": 1, "text": 2}]', 2, "given twice"),
        ('[{"text": "a"}]\n]', 2, "after the end of the array"),
        ('[{"text": "a"},\n{"text": "\\ud800"}]', 2, "surrogate"),
        ("[" + "[" * 200_000, 1, "nested deeper"),
        ('{"text":\n"a"}', 1, "a .json file holds an array of objects, or one object a line"),
    ],
)
def test_bad_json_arrays(content: str, line: int, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    problems = [item for item in scan(path) if isinstance(item, Problem)]
    assert len(problems) == 1
    assert problems[0].line == line
    assert what in problems[0].what


def test_json_array_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "caf\xe9"}]')
    assert "not UTF-8" in str(list(scan(path))[-1])


def test_plain_text_documents(tmp_path: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_text("one\n\nstill one\n<|endoftext|>\ntwo<|endoftext|>three\n<|endoftext|>\n\n")
    assert [(r.line, r.data["text"]) for r in read_rows(marked)] == [(1, "one\n\nstill one"), (5, "two"), (5, "three")]
    plain = tmp_path / "plain.txt"
    paragraph = "word " * 200 + "\n"
    plain.write_text(f"{paragraph}\n" * 20)
    texts = [row.data["text"] for row in read_rows(plain)]
    assert len(texts) == 4
    assert "".join(texts).replace("\n", "") == (paragraph * 20).replace("\n", "")
    lines_only = tmp_path / "lines.txt"
    lines_only.write_text(paragraph * 20)
    assert [len(row.data["text"]) > 8000 for row in read_rows(lines_only)] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 5000)[:-30], "damaged or cut off"),
        ("no.jsonl.gz", b'{"text": "a"}\n', "damaged or cut off"),
        ("bad.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "damaged or cut off"),
        ("gz.jsonl", gzip.compress(b'{"text": "a"}\n'), "does not end in .gz"),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ("no.parquet", b"PAR1 nonsense", "Parquet file cannot be read"),
    ],
)
def test_damaged_files(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    last = list(scan(path))[-1]
    assert isinstance(last, Problem)
    assert last.fatal
    assert what in last.what


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "pretrain.jsonl").touch()
    with pytest.raises(ConfigError, match=r"pretrian\.jsonl: no such file; did you mean .*/pretrain\.jsonl\?"):
        list(scan(tmp_path / "pretrian.jsonl"))
    with pytest.raises(ConfigError, match=r"pretrain: no such file; did you mean .*/pretrain\.jsonl\?"):
        list(scan(tmp_path / "pretrain"))
    with pytest.raises(ConfigError, match=rf"folder .*/nowhere/x does not exist; {tmp_path} does\): check the path"):
        list(scan(tmp_path / "nowhere" / "x" / "a.jsonl"))
    (tmp_path / "a.docx").touch()
    with pytest.raises(ConfigError, match="unknown kind of data file"):
        list(scan(tmp_path / "a.docx"))
    with pytest.raises(ConfigError, match=rf"q\.json: no such file; the folder {tmp_path} holds pretrain\.jsonl$"):
        list(scan(tmp_path / "q.json"))
    for i in range(7):
        (tmp_path / f"rows-{i}.json.gz").touch()
    with pytest.raises(ConfigError, match=r"holds pretrain\.jsonl, rows-0\.json\.gz, .*rows-4\.json\.gz and 2 more$"):
        list(scan(tmp_path / "q.json"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder; name its files$"):
        list(scan(tmp_path / "folder.jsonl"))
    with pytest.raises(ConfigError, match=r"is a folder; name its files: pretrain\.jsonl, "):
        list(scan(tmp_path))
    with pytest.raises(ConfigError, match=r"no such file; the folder .* holds no data file, check the path"):
        list(scan(tmp_path / "folder.jsonl" / "a.jsonl"))


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ConfigError, match=r'pip install "minimind\[data\]"'):
        list(scan(tmp_path / "a.parquet"))


def _peak(items: Iterator[Any]) -> tuple[int, int]:
    tracemalloc.start()
    count = sum(1 for _ in items)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, peak


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.jsonl.gz", "big.txt"])
def test_memory_is_flat(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    line = json.dumps({"text": "x" * 20_000}).encode()
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as stream:
            stream.writelines(line + b"\n" for _ in range(2500))
    elif path.suffix == ".json":
        path.write_bytes(b"[" + b",\n".join([line] * 2500) + b"]")
    else:
        path.write_bytes((line + b"\n") * 2500)
    count, peak = _peak(scan(path))
    assert count in (2500, 2501)
    assert peak < 12 * 2**20  # of 50 MB


def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(100):
            stream.write(b"0" * 2**20)  # 100 MiB in one line, 100 kB on the disk
        stream.write(b"\n" + GOOD + b"\n")
    tracemalloc.start()
    found = list(scan(path, max_line_bytes=2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [str(found[0]), found[1]] == [
        f"{path}:1: the line is longer than 1,048,576 bytes",
        Row({"text": "good"}, str(path), 2),
    ]
    assert peak < 12 * 2**20
    assert jsonl.MAX_LINE_BYTES == 64 * 2**20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), json_values, max_size=4), max_size=8
    ),
    indent=st.sampled_from([None, 1]),
)
def test_whatever_json_writes_is_read_back(
    rows: list[dict[str, Any]], indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.json").write_text(json.dumps(rows, indent=indent))
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        assert [row.data for row in read_rows(folder / name)] == rows
