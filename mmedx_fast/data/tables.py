"""CSV and TSV files row by row, with the place in the file of fields too large to keep.

The rules are those of Python's ``csv`` (and pandas): a field that begins with ``"`` goes to the next
single ``"`` and may hold delimiters and line ends, ``""`` in it is one quote, and what follows the
closing quote up to the delimiter belongs to it. There is no limit of 128 KiB for a field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mmedx_fast.data.rows import Row, RowError

MAX_ROW_BYTES = 128 << 20
"""A longer row is refused: it must fit in memory, and an unclosed quote must not swallow the file."""

MAX_ROW_LINES = 1000
"""A quoted field that goes on for more lines is taken for an unclosed quote."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A field as it lies in the file: its bytes, without outer quotes, and where they begin."""

    file: Path
    offset: int
    raw: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    value: bytes
    start: int
    """Of the bytes between the quotes, in the row; -1 where text follows the closing quote."""

    length: int


def read_table(
    file: Path,
    *,
    delimiter: bytes,
    lazy: Container[str] = (),
    rename: Callable[[str], str] = str.strip,
    headless: Callable[[list[str]], Sequence[str] | None] = lambda first: None,
) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (number of the line where the row begins, from 1; {column: text} or ``RowError``).

    ``lazy``: columns given as ``Cell`` instead of text. ``rename``: applied to every column name.
    ``headless``: given the first row, names the columns if that row is data and no header.

    One row is in memory at a time. Blank lines are passed over. A row with a quote that is never
    closed, with another number of fields than the header, or that is not UTF-8 is a ``RowError``,
    and reading goes on with the line after its first. Raises ``ValueError`` for a header with a
    column twice.
    """
    columns: Sequence[str] | None = None
    with file.open("rb") as source:
        for number, offset, row in _split_rows(source, delimiter):
            if isinstance(row, RowError):
                if columns is None:
                    raise ValueError(f"{file}: the header cannot be read: {row}")
                yield number, row
                continue
            if columns is None:
                try:
                    first = [field.value.decode("utf-8") for field in row]
                except UnicodeError:
                    raise ValueError(f"{file}: the header is not valid UTF-8") from None
                columns = headless(first)
                if columns is None:
                    columns = _header(file, [rename(name) for name in first])
                    continue
            yield number, _named(file, offset, row, columns, lazy)


def _header(file: Path, columns: list[str]) -> list[str]:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"{file}: header names column {twice[0]!r} twice; rename one of the two")
    return columns


def _named(
    file: Path, offset: int, row: list[_Field], columns: Sequence[str], lazy: Container[str]
) -> Row | RowError:
    if len(row) != len(columns):
        return RowError(
            "line", f"{len(row)} of {len(columns)}", "number of fields is not the header's"
        )
    named: Row = {}
    for column, field in zip(columns, row, strict=True):
        if column in lazy:
            if field.start < 0:
                return RowError(column, field.value[:80], "text after the closing quote")
            raw = field.value  # as it lies there unless quotes in it were doubled
            if len(raw) != field.length:
                raw = raw.replace(b'"', b'""')
            named[column] = Cell(file, offset + field.start, raw)
            continue
        try:
            named[column] = field.value.decode("utf-8")
        except UnicodeError:
            return RowError(column, field.value[:80], "not valid UTF-8")
    return named


def _split_rows(
    source: BinaryIO, delimiter: bytes
) -> Iterator[tuple[int, int, list[_Field] | RowError]]:
    """Every row with its line number and its offset in the file."""
    number, offset = 1, 0
    bom = b"\xef\xbb\xbf"
    while line := source.readline(MAX_ROW_BYTES):
        start, first = offset, number
        number, offset = number + 1, offset + len(line)
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            offset += _skip_line(source)
            yield first, start, RowError("line", line[:80], f"row over {MAX_ROW_BYTES} bytes")
            continue
        if start == 0 and line.startswith(bom):
            line, start = line[len(bom) :], len(bom)
        if not line.strip(b"\r\n"):
            continue
        fields, resume = _split(line, delimiter, [], 0)
        if resume >= 0:
            row, lines = _read_on(source, line, delimiter, fields, resume)
            if row is None:
                source.seek(offset)
                yield first, start, RowError("line", line[:80], "quote is never closed")
                continue
            fields, number, offset = row, number + lines, source.tell()
        yield first, start, fields


def _read_on(
    source: BinaryIO, line: bytes, delimiter: bytes, fields: list[_Field], resume: int
) -> tuple[list[_Field] | None, int]:
    """The fields of a row of several lines, and how many more lines it took."""
    for lines in range(1, MAX_ROW_LINES):
        more = source.readline(max(1, MAX_ROW_BYTES - len(line)))
        if not more or len(line) + len(more) >= MAX_ROW_BYTES:
            break
        line += more
        if b'"' in more:
            fields, resume = _split(line, delimiter, fields, resume)
            if resume < 0:
                return fields, lines
    return None, 0


def _split(
    line: bytes, delimiter: bytes, fields: list[_Field], at: int
) -> tuple[list[_Field], int]:
    """The fields from ``at`` on, added to ``fields``; then -1, or where a field begins that is not
    closed.
    """
    end = len(line) - (2 if line.endswith(b"\r\n") else 1 if line.endswith((b"\n", b"\r")) else 0)
    while True:
        if line[at : at + 1] == b'"' and at < end:
            close = _closing_quote(line, at + 1)
            if close < 0:
                return fields, at
            stop = line.find(delimiter, close + 1, end)
            stop = end if stop < 0 else stop
            value = line[at + 1 : close].replace(b'""', b'"')
            if stop > close + 1:
                fields.append(_Field(value + line[close + 1 : stop], -1, 0))
            else:
                fields.append(_Field(value, at + 1, close - at - 1))
        else:
            stop = line.find(delimiter, at, end)
            stop = end if stop < 0 else stop
            fields.append(_Field(line[at:stop], at, stop - at))
        if stop >= end:
            return fields, -1
        at = stop + 1


def _closing_quote(line: bytes, at: int) -> int:
    while (close := line.find(b'"', at)) >= 0 and line[close + 1 : close + 2] == b'"':
        at = close + 2
    return close


def _skip_line(source: BinaryIO) -> int:
    skipped = 0
    while rest := source.readline(1 << 20):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped
