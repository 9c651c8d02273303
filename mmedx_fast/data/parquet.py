"""Parquet and saved Arrow data, row by row; image bytes stay in the file until an image is opened.

Image columns are struct<bytes, path> (the ``Image`` feature of Hugging Face ``datasets``), plain
binary, or lists of either. A row holds an ``ImageRef`` in place of the bytes; where only a path is
stored it holds that path as text, and None where there is neither. All other columns are plain
Python values; dates, times and decimals become text.
"""

from __future__ import annotations

import bisect
import collections
import datetime
import decimal
import functools
import itertools
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedx_fast.data.records import ImageRef
from mmedx_fast.data.rows import Row, RowError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 1024
_BYTES_BATCH_ROWS = 16
"""Rows held at once where the bytes themselves must be looked at to know which are there."""

CACHE_BYTES = 256 << 20
"""Image columns of row groups that stay in memory; larger ones are streamed through."""


def read_parquet(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (row number from 1, row) with the memory of one batch of the text columns.

    Raises ``ValueError`` for a file that is damaged or no parquet file.
    """
    try:
        opened = _open(file)
        number = itertools.count(1)
        for group in range(opened.num_row_groups):
            for row in _group_rows(file, opened, group):
                yield next(number), row
    except _arrow_errors() as error:
        raise ValueError(
            f"{file}: is not a readable parquet file ({_short(error)}); copy it again from its source"
        ) from error


def read_saved(folder: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (row number from 1, row) of a split that ``datasets.save_to_disk`` wrote to ``folder``.

    Raises ``ValueError`` for a folder that ``datasets`` cannot read.
    """
    table = _saved_table(folder)
    start = 0
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        kinds = {field.name: _image_kind(field.type) for field in batch.schema}
        columns = {
            name: _cells(folder, name, column, start, present=False)
            if kinds[name]
            else map(_plain, column.to_pylist())
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        for offset, values in enumerate(zip(*columns.values(), strict=True)):
            yield start + offset + 1, dict(zip(columns, values, strict=True))
        start += batch.num_rows


def read_cell(file: Path, row: int, column: str, position: int) -> bytes:
    """Encoded bytes of one image: ``row`` from 0, ``position`` in its list, -1 where it is none.

    Of a parquet file only the row group and the column that hold it are read, and kept (up to
    ``CACHE_BYTES``) for the rows that follow. ``file`` may be a saved folder, see ``read_saved``.
    Raises ``LookupError`` when there is no such image, ``ValueError`` or ``OSError`` for a file
    that cannot be read.
    """
    if file.is_dir():
        table = _saved_table(file)
        if not 0 <= row < table.num_rows:
            raise LookupError(f"no row {row}")
        value = table.column(column)[row].as_py()
    else:
        value = _parquet_value(file, row, column)
    if position >= 0:
        if not isinstance(value, list) or position >= len(value):
            raise LookupError(f"no image {position} in row {row}")
        value = value[position]
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise LookupError(f"no image bytes in row {row}")
    return encoded


# ---- rows


def _open(file: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file)


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _image_kind(kind: pa.DataType) -> str:
    """``struct`` or ``binary`` for a column of images or of lists of them, else an empty text."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        if "bytes" in names and _image_kind(kind.field("bytes").type) == "binary":
            return "struct"
    return ""


def _group_rows(file: Path, opened: pq.ParquetFile, group: int) -> Iterator[Row]:
    schema = opened.schema_arrow
    images = {field.name for field in schema if _image_kind(field.type)}
    present = {name: _bytes_present(opened, group, name) for name in images}
    # A leaf besides the bytes (the path) tells which rows hold an image without reading any.
    light = {name: _leaves(opened, name, but="bytes") for name in images if present[name]}
    wanted = [
        leaf
        for field in schema
        for leaf in (light.get(field.name) or _leaves(opened, field.name, but=None))
    ]
    size = _BATCH_ROWS if len(light) == len(images) and all(light.values()) else _BYTES_BATCH_ROWS
    first = _group_starts(opened)[group]
    for batch in opened.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
        read = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns = [
            _cells(file, name, read[name], first, present=present[name])
            if name in images
            else map(_plain, read[name].to_pylist())
            for name in schema.names
        ]
        for values in zip(*columns, strict=True):
            yield dict(zip(schema.names, values, strict=True))
        first += batch.num_rows


def _group_starts(opened: pq.ParquetFile) -> list[int]:
    sizes = (opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def _leaves(opened: pq.ParquetFile, name: str, *, but: str | None) -> list[str]:
    """The stored columns of a top-level column, without those that end in ``but``."""
    paths = (opened.schema.column(i).path for i in range(len(opened.schema)))
    own = [path for path in paths if path == name or path.startswith(f"{name}.")]
    return [path for path in own if but is None or path.rpartition(".")[2] != but]


def _bytes_present(opened: pq.ParquetFile, group: int, name: str) -> bool:
    """Whether every image of a row group is stored as bytes, as far as the statistics tell.

    It takes a leaf besides the bytes, from which the images can be counted.
    """
    others = _leaves(opened, name, but="bytes")
    chunks = opened.metadata.row_group(group)
    columns = [chunks.column(i) for i in range(chunks.num_columns)]
    own = set(_leaves(opened, name, but=None)) - set(others)
    statistics = next((c.statistics for c in columns if c.path_in_schema in own), None)
    if not others or statistics is None or not statistics.has_null_count:
        return False
    column = opened.read_row_group(group, columns=others, use_threads=False).column(name)
    return bool(statistics.null_count == sum(map(_empty_slots, column.chunks)))


def _empty_slots(array: pa.Array) -> int:
    """How many null images, null lists and empty lists: what counts as null in the bytes' leaf."""
    if not _is_list(array):
        return int(array.null_count)
    lengths = array.value_lengths().fill_null(0).to_pylist()
    return lengths.count(0) + array.flatten().null_count


def _cells(file: Path, name: str, array: pa.Array, first: int, *, present: bool) -> list[Any]:
    """The image column of a batch as ``ImageRef``, path text or None, or lists of these."""
    if not _is_list(array):
        own = enumerate(_slots(array, present), start=first)
        return [_slot(file, row, name, -1, slot) for row, slot in own]
    slots = iter(_slots(array.flatten(), present))
    return [
        None
        if length is None
        else [_slot(file, first + i, name, j, next(slots)) for j in range(length)]
        for i, length in enumerate(array.value_lengths().to_pylist())
    ]


def _is_list(array: pa.Array) -> bool:
    return hasattr(array, "value_lengths")


def _slots(array: pa.Array, present: bool) -> list[bool | str | None]:
    """Per image: True where bytes are stored, else its path, else None."""
    valid = array.is_valid().to_pylist()
    if not hasattr(array, "field"):
        return [True if there else None for there in valid]
    names = [array.type.field(i).name for i in range(array.type.num_fields)]
    stored = valid if present else array.field("bytes").is_valid().to_pylist()
    paths = array.field("path").to_pylist() if "path" in names else [None] * len(array)
    return [
        None if not there else True if has else path
        for there, has, path in zip(valid, stored, paths, strict=True)
    ]


def _slot(
    file: Path, row: int, name: str, position: int, slot: bool | str | None
) -> ImageRef | str | None:
    return ImageRef(cell=(file, row, name, position)) if slot is True else slot or None


def _plain(value: Any) -> Any:
    """What JSON can hold: not-a-number becomes None, dates and decimals text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value


# ---- cells

_lock = threading.Lock()
_groups: collections.OrderedDict[tuple[Any, ...], pa.ChunkedArray] = collections.OrderedDict()


@functools.lru_cache(maxsize=16)
def _cached_open(path: str, mtime_ns: int, size: int, pid: int) -> tuple[pq.ParquetFile, list[int]]:
    opened = _open(Path(path))
    return opened, _group_starts(opened)


def _parquet_value(file: Path, row: int, column: str) -> Any:
    stat = file.stat()
    # The process id keeps forked data-loader workers off their parent's file position.
    version = (str(file), stat.st_mtime_ns, stat.st_size, os.getpid())
    try:
        with _lock:
            opened, starts = _cached_open(*version)
            group = bisect.bisect_right(starts, row) - 1
            if not 0 <= group < opened.num_row_groups:
                raise LookupError(f"no row {row}")
            if column not in opened.schema_arrow.names:
                raise LookupError(f"no column {column!r}")
            return _group_value(version, opened, group, column, row - starts[group])
    except _arrow_errors() as error:
        raise ValueError(f"not readable as parquet: {_short(error)}") from error


def _group_value(
    version: tuple[Any, ...], opened: pq.ParquetFile, group: int, column: str, offset: int
) -> Any:
    key = (*version, group, column)
    if key in _groups:
        _groups.move_to_end(key)
        return _groups[key][offset].as_py()
    leaves = _leaves(opened, column, but="path")
    chunks = opened.metadata.row_group(group)
    size = sum(
        chunks.column(i).total_uncompressed_size
        for i in range(chunks.num_columns)
        if chunks.column(i).path_in_schema in leaves
    )
    if size > CACHE_BYTES:
        return _streamed_value(opened, group, leaves, offset)
    _groups[key] = opened.read_row_group(group, columns=leaves, use_threads=False).column(0)
    while len(_groups) > 1 and sum(array.nbytes for array in _groups.values()) > CACHE_BYTES:
        _groups.popitem(last=False)
    return _groups[key][offset].as_py()


def _streamed_value(opened: pq.ParquetFile, group: int, leaves: list[str], offset: int) -> Any:
    for batch in opened.iter_batches(
        _BYTES_BATCH_ROWS, row_groups=[group], columns=leaves, use_threads=False
    ):
        if offset < batch.num_rows:
            return batch.column(0)[offset].as_py()
        offset -= batch.num_rows
    raise LookupError(f"the row group ends {offset + 1} rows early")


@functools.lru_cache(maxsize=8)
def _loaded(folder: str, mtime_ns: int, pid: int) -> Any:
    import datasets

    return datasets.load_from_disk(folder)


def _saved_table(folder: Path) -> pa.Table:
    """The memory-mapped table of a saved split: bytes are read only where they are touched."""
    state = folder / "state.json"
    try:
        loaded = _loaded(str(folder), state.stat().st_mtime_ns, os.getpid())
    except Exception as error:  # datasets passes on whatever pyarrow, json and its own code raise
        raise ValueError(
            f"{folder}: is not a data set that datasets.save_to_disk wrote whole "
            f"({type(error).__name__}: {_short(error)}); save it again"
        ) from error
    return loaded.data.table
