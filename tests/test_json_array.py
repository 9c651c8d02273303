"""JSON arrays read element by element: the same rows as json.loads, in bounded memory, and a name for every damage."""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedx_fast.data import json_array
from mmedx_fast.data.json_array import read_json, read_json_array
from mmedx_fast.data.rows import RowError, read_jsonl
from tests._fuzz import MemoryFile

ROWS = [
    {"id": 1, "question": "a, [b] {c} \"d\" \\ é 是 \U0001f600", "nested": {"x": [1, {"y": None}]}},
    {"id": 2, "n": -1.5e-3, "big": 10**30, "t": True},
    {},
    {"id": 3, "long": "x" * 300},
]  # fmt: skip


def rows_of(file: Path) -> list[Any]:
    return list(read_json_array(file))


def save(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_same_rows_as_json_whatever_the_chunk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    indent: int | None,
    ascii_only: bool,
) -> None:
    monkeypatch.setattr(json_array, "CHUNK_BYTES", chunk)
    text = "\ufeff \n" + json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only) + "\r\n\n"
    assert rows_of(save(tmp_path / "a.json", text)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_empty_array(tmp_path: Path, text: str) -> None:
    assert rows_of(save(tmp_path / "a.json", text)) == []


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_elements_that_are_no_rows_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_array, "CHUNK_BYTES", chunk)
    text = b'[{"a": 1}, 12, "x", null, [1], {"b": "\xff"}, {"c": "\\ud800"}, {"d": "\xc3\xa9\\ud83d\\ude00"}]'
    found = {number: row for number, row in rows_of(save(tmp_path / "a.json", text))}
    assert {n: r.reason for n, r in found.items() if isinstance(r, RowError)} == {
        **{n: "not a JSON object" for n in (2, 3, 4, 5)},
        **{n: "not valid UTF-8" for n in (6, 7)},
    }
    assert found[1] == {"a": 1} and found[8] == {"d": "é\U0001f600"}


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ('{"a": 1}', 0, "no JSON array"),
        ("hello", 0, "no JSON array"),
        ("[", 0, "cut off in or before element 1, at byte 1"),
        ('[{"a": 1}', 1, "cut off in or before element 2, at byte 9"),
        ('[{"a": 1},', 1, "cut off in or before element 2, at byte 10"),
        ('[{"a": 1}, {"b": "xyz', 1, "cut off in or before element 2, at byte 11"),
        ('[{"a": 1}, {"b": tru', 1, "cut off|malformed"),
        ('[{"a": 1} {"b": 1}]', 1, "neither ',' nor ']'.*at byte 10"),
        ('[{"a": 1},]', 1, "malformed in element 2"),
        ('[{"a": 1}, {"b": oh no this is not JSON}, {}]', 1, "malformed in element 2"),
        ('[{"a": 1}, {b: 1}' + ' , {"c": 1}' * 99 + "]", 1, "malformed in element 2"),
        ('[{"a": 1}] {"b": 1}', 1, "goes on after the array's end"),
        ('[{"é": 1}, x]', 1, "malformed in element 2.*at byte 12"),
        ('[{"a": ' + "[" * 100_000, 0, "nested too deeply in element 1"),
        ('[{"a": ' + "9" * 5000 + "}]", 0, "malformed in element 1"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_damage_is_named_after_the_rows_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rows: int, message: str, chunk: int
) -> None:
    monkeypatch.setattr(json_array, "CHUNK_BYTES", chunk)
    reader = read_json_array(save(tmp_path / "a.json", text))
    for number in range(1, rows + 1):
        assert next(reader)[0] == number
    with pytest.raises(ValueError, match=rf"a\.json.*({message}).*copy it again"):
        list(reader)


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    whole = json.dumps(ROWS, ensure_ascii=False).encode()
    for length in range(1, len(whole)):
        with pytest.raises(ValueError, match="cut off|malformed"):
            rows_of(save(tmp_path / "a.json", whole[:length]))


def test_an_element_without_end_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(json_array, "MAX_ELEMENT_CHARS", 5000)
    file = save(tmp_path / "a.json", '[{"a": 1}, {"b": "' + "x" * 4_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="over 5000 characters in element 2"):
        rows_of(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_memory_is_that_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHUNK_BYTES", 1 << 16)
    row = json.dumps({"question": "word " * 200})
    file = save(tmp_path / "a.json", "[" + ",\n".join([row] * 10_000) + "]")
    assert file.stat().st_size > 10_000_000
    tracemalloc.start()
    assert sum(isinstance(row, dict) for _, row in read_json_array(file)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_json_files_hold_an_array_or_lines(tmp_path: Path) -> None:
    lines = save(tmp_path / "lines.json", '{"a": 1}\n{"a": 2}\n')
    array = save(tmp_path / "array.json", '\ufeff\n [{"a": 1}, {"a": 2}]')
    assert list(read_json(lines)) == list(read_json(array)) == [(1, {"a": 1}), (2, {"a": 2})]
    assert list(read_json(save(tmp_path / "empty.json", ""))) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63))
def test_fuzzed_files(seed: int) -> None:
    """10,000 damaged files: what json.loads takes is read the same, all else raises ``ValueError``."""
    rng = random.Random(seed)
    for _ in range(50):
        text = bytearray(json.dumps(ROWS[:3], ensure_ascii=False).encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(3)] = rng.choice(
                (
                    b"",
                    b",",
                    b"[",
                    b"]",
                    b"{",
                    b"}",
                    b'"',
                    b"\\",
                    b"\xff",
                    b"1",
                    b" ",
                    b"\\ud800",
                    b"NaN",
                )
            )
        file: Any = MemoryFile(bytes(text))
        try:
            expected = json.loads(text.decode())
        except ValueError:
            expected = None
        try:
            found = rows_of(file)
        except ValueError as error:
            assert expected is None or not isinstance(expected, list), (error, text)
            continue
        if expected is None:  # the only damage survived: bytes that are not UTF-8 inside an element
            assert any(isinstance(row, RowError) for _, row in found)
            continue
        for (_, row), value in zip(found, expected, strict=True):
            assert repr(row) == repr(value) or isinstance(row, RowError)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**63))
def test_fuzzed_lines_are_read_as_json_reads_them(seed: int) -> None:
    """10,000 lines: the quick parser may refuse a line, never read it differently."""
    rng = random.Random(seed)
    pieces = [
        b'"',
        b"\\",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"1e-999",
        b"-0",
        b"0.1",
        b"9" * 30,
        b"\\ud800",
        b"\\ud83d\\ude00",
    ]
    pieces += [
        b"\\u0000",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc3\xa9",
        b"\x00",
        b"\t",
        b" ",
        b"[",
        b"]",
        b"{",
        b"}",
        b":",
        b",",
        b"true",
    ]
    for _ in range(50):
        line = bytearray(b'{"a": 1, "b": "x y", "c": [1.5, null], "a": {"d": "e"}}')
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(line))
            line[at : at + rng.randrange(4)] = rng.choice(pieces)
        file: Any = MemoryFile(bytes(line).replace(b"\n", b"") + b"\n")
        ((_, found),) = read_jsonl(file)
        try:
            expected = json.loads(line.decode())
            json.dumps(expected, ensure_ascii=False).encode()
        except (ValueError, UnicodeError):
            assert isinstance(found, RowError), line
            continue
        if isinstance(expected, dict):
            assert repr(found) == repr(expected), line
        else:
            assert isinstance(found, RowError) and found.reason == "not a JSON object"
