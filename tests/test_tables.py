"""CSV and TSV: the same fields as Python's csv module, the place of every lazy field, and what is damaged."""

import csv
import io
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedx_fast.data import tables
from mmedx_fast.data.rows import RowError
from mmedx_fast.data.tables import Cell, read_table
from tests._fuzz import MemoryFile


def save(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def table(file: Path, delimiter: bytes = b",", **options: Any) -> list[tuple[int, Any]]:
    return list(read_table(file, delimiter=delimiter, **options))


def reasons(found: list[tuple[int, Any]]) -> dict[int, str]:
    return {number: row.reason for number, row in found if isinstance(row, RowError)}


def test_rows_by_column_with_the_line_where_they_begin(tmp_path: Path) -> None:
    text = '\ufeff a ,b\r\n1,"x, ""y""\nz"\r\n\r\n,\xa0é\n"",""'
    assert table(save(tmp_path / "t.csv", text)) == [
        (2, {"a": "1", "b": 'x, "y"\nz'}),
        (5, {"a": "", "b": "\xa0é"}),
        (6, {"a": "", "b": ""}),
    ]
    assert table(save(tmp_path / "t.csv", "")) == table(save(tmp_path / "t.csv", "a,b\n")) == []


def test_fields_over_128_kib(tmp_path: Path) -> None:
    long = "x" * (csv.field_size_limit() + 1)
    assert len(long) > 128 << 10
    assert table(save(tmp_path / "t.csv", f'a,b\n{long},"{long}"\n')) == [
        (2, {"a": long, "b": long})
    ]


def test_a_file_without_header(tmp_path: Path) -> None:
    file = save(tmp_path / "t.csv", "1,x\n2,y\n")

    def headless(first: list[str]) -> list[str] | None:
        return ["n", "t"] if first[0].isdigit() else None

    assert table(file, headless=headless) == [(1, {"n": "1", "t": "x"}), (2, {"n": "2", "t": "y"})]
    save(file, "a,b\n2,y\n")
    assert table(file, headless=headless) == [(2, {"a": "2", "b": "y"})]


def test_damaged_rows_are_numbered_and_the_next_are_read(tmp_path: Path) -> None:
    content = (
        b"a,b\n1,2\n1\n1,2,3\n\xff,2\n"  # lines 1 to 5
        b'1,"never closed\n3,4\n5,6\n'  # 6 to 8
    )
    found = table(save(tmp_path / "t.csv", content))
    assert reasons(found) == {
        3: "number of fields is not the header's",
        4: "number of fields is not the header's",
        5: "not valid UTF-8",
        6: "quote is never closed",
    }
    assert [row for _, row in found if isinstance(row, dict)] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
        {"a": "5", "b": "6"},
    ]


def test_an_unclosed_quote_takes_no_more_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stray quotes all over a large file: every line is read again, but not the file for each."""
    monkeypatch.setattr(tables, "MAX_ROW_LINES", 10)
    lines = ["a,b", *(f'"{i},x' if i % 3 == 0 else f"{i},x" for i in range(3000))]
    found = table(save(tmp_path / "t.csv", "\n".join(lines) + "\n"))
    # Two stray quotes close each other; csv reads it so too. No line is lost: all are in one row or another.
    assert sum(isinstance(row, dict) for _, row in found) >= 1000
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 100)
    file = save(tmp_path / "t.csv", "a,b\n" + "y" * 1000 + ',1\n"' + "z" * 50 + "\n" + "u,v\n" * 50)
    found = table(file)
    assert reasons(found) == {2: "row over 100 bytes", 3: "quote is never closed"}
    assert [number for number, row in found if isinstance(row, dict)] == list(range(4, 54))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,a\n1,2,3\n", "column 'a' twice"),
        (b"a,\xff\n1,2\n", "header is not valid UTF-8"),
        (b'a,"b\n1,2\n', "header cannot be read.*never closed"),
    ],
)
def test_unusable_headers(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"t\.csv.*{message}"):
        table(save(tmp_path / "t.csv", content))


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("value", ["abcd", "['ab', 'cd']", 'quo"te', '["a", "b"]', "tab\tin", ""])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_cell_is_where_it_says(tmp_path: Path, start: str, value: str, ending: str) -> None:
    out = io.StringIO()
    out.write(start)
    writer = csv.writer(out, delimiter="\t", lineterminator=ending)
    writer.writerows([["i", "image", "q"], *([i, value * i, 'a "b"\nc'] for i in range(1, 4))])
    file = save(tmp_path / "t.tsv", out.getvalue())
    content = file.read_bytes()
    found = table(file, b"\t", lazy=("image",))
    assert len(found) == 3
    for i, (_, row) in enumerate(found, 1):
        cell = row["image"]
        assert isinstance(cell, Cell) and cell.file == file
        assert content[cell.offset : cell.offset + len(cell.raw)] == cell.raw
        assert cell.raw.decode().replace('""', '"') == value * i and row["q"] == 'a "b"\nc'


def test_a_cell_with_text_after_its_quote_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "t.csv", 'i,image\n1,"abc"d\n2,x\n')
    assert reasons(table(file, lazy=("image",))) == {2: "text after the closing quote"}
    assert table(file)[0] == (2, {"i": "1", "image": "abcd"})


def test_memory_is_that_of_a_row(tmp_path: Path) -> None:
    row = "1\t" + "x" * 1_000_000 + "\tq\n"
    file = save(tmp_path / "t.tsv", "i\timage\tq\n" + row * 40)
    tracemalloc.start()
    count = sum(isinstance(r, dict) for _, r in read_table(file, delimiter=b"\t", lazy=("image",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40 and peak < 5_000_000


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**63))
def test_fuzzed_tables(seed: int) -> None:
    """10,000 tables against the csv module: fields with any mixture of quotes, delimiters and line ends."""
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choices('ab,"\n\té', k=rng.randint(0, 40)))
        delimiter = rng.choice(",\t")
        # An unclosed quote takes the rest of the file for csv, and here costs one line: compare up to there.
        expected = list(csv.reader(io.StringIO("h\n" + text, newline=""), delimiter=delimiter))
        found: list[Any] = []
        source = io.BytesIO(f"h\n{text}".encode())
        for _, _, row in tables._split_rows(source, delimiter.encode()):
            if isinstance(row, RowError):
                assert row.reason == "quote is never closed"
                break
            found.append([field.value.decode() for field in row])
        else:
            assert found == [row for row in expected if row], text
            continue
        assert found == [row for row in expected if row][: len(found)], text


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**63))
def test_fuzzed_bytes(seed: int) -> None:
    """Any bytes at all: rows, ``RowError``s, or a ``ValueError`` that names the file."""
    rng = random.Random(seed)
    for _ in range(100):
        body = bytes(rng.choices(b'\x00\xff"\t\n\rab,\xc3\xa9', k=rng.randint(0, 60)))
        start = rng.choice((b"a\timage\tc\n", b"", b"\xef\xbb\xbfa\n"))
        file: Any = MemoryFile(start + body, "bytes.tsv")
        try:
            for number, row in read_table(file, delimiter=b"\t", lazy=("image",)):
                assert number >= 1 and isinstance(row, dict | RowError)
        except ValueError as error:
            assert "bytes.tsv" in str(error)
