"""Predictions as the table that VLMEvalKit's multiple-choice evaluation reads.

It wants ``<model>_<dataset>.xlsx`` (or ``.tsv`` with ``PRED_FORMAT=tsv``) with the ``index`` of its own
table, the options as columns A, B, ..., and ``prediction``. Its matcher strips no tags and takes the
article "A" for an answer, so ``prediction`` is the bare letter that our strict extraction read, or "Z",
its own word for none.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmedx_fast.atomic import write_bytes

FORMATS = (".tsv", ".xlsx")
UNPARSED = "Z"
_OPTIONAL = ("category", "l2-category", "split")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # neither a sheet nor a TSV can hold them
# What pandas reads as missing: an option "None" would be lost, and with it the answer "E".
_READ_AS_MISSING = frozenset(
    """#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan
    |null""".replace("\n    ", "").split("|")
)
_SHEET_LIMIT = 32_767  # characters in a cell


class Export(NamedTuple):
    """The table, and what had to be said of it: rows without options, texts ending in a new stop."""

    columns: list[str]
    rows: list[list[str | int]]
    left_out: int
    stopped: int


def vlmevalkit_table(rows: Iterable[Mapping[str, Any]]) -> Export:
    """The columns index, question, A.., answer, prediction, and category, l2-category and split
    where a row's ``meta`` (or the row) has them; category is the specialty without one.

    ``index`` is the meta's, else the id without its data set. Rows without options cannot be
    matched by letter and are counted in ``left_out``; a text that pandas reads as missing ("None")
    gets a stop ("None.") and is counted in ``stopped``. ValueError if an index comes twice, if a
    gold letter is missing, or if nothing is left.
    """
    kept, left_out = [], 0
    for row in rows:
        if row.get("options"):
            kept.append(row)
        else:
            left_out += 1
    if not kept:
        raise ValueError(
            f"none of the {left_out} predictions has options; VLMEvalKit's multiple-choice table "
            "needs them"
        )
    letters = sorted({letter for row in kept for letter in row["options"]})
    extra = [name for name in _OPTIONAL if any(_extra(row, name) for row in kept)]
    columns = ["index", "question", *letters, "answer", "prediction", *extra]
    table: list[list[str | int]] = []
    stopped, seen = 0, set()
    for row, index in zip(kept, _indices(kept), strict=True):
        if index in seen:
            raise ValueError(
                f"index {index!r} (question {row['id']!r}) comes twice; export one set, asked once "
                "per question"
            )
        seen.add(index)
        texts = [row["question"], *(row["options"].get(letter, "") for letter in letters)]
        stopped += sum(text in _READ_AS_MISSING for text in texts)
        named = [_extra(row, name) for name in extra]
        answer, predicted = _gold(row), row.get("predicted") or UNPARSED
        table.append([index, *map(_cell, texts), answer, predicted, *map(_cell, named)])
    return Export(columns, table, left_out, stopped)


def _gold(row: Mapping[str, Any]) -> str:
    if row.get("answer_label") in row["options"]:
        return str(row["answer_label"])
    raise ValueError(
        f"question {row['id']!r} has answer_label {row.get('answer_label')!r}, which is none of its "
        f"options {', '.join(row['options'])}"
    )


def _indices(rows: Sequence[Mapping[str, Any]]) -> list[str | int]:
    """Integers where all are, since VLMEvalKit compares them with its own table's."""
    raw = []
    for row in rows:
        index = (row.get("meta") or {}).get("index")
        raw.append(str(row["id"]).rpartition(":")[2] if index is None else str(index))
    return [int(x) for x in raw] if all(x.isascii() and x.isdigit() for x in raw) else list(raw)


def _extra(row: Mapping[str, Any], name: str) -> str:
    value = (row.get("meta") or {}).get(name)
    if value is None:
        value = row.get(name)
    if value is None and name == "category":
        value = row.get("specialty")
    return "" if value is None else str(value)


def _cell(text: str) -> str:
    clean = _CONTROL.sub(" ", text).replace("\r\n", "\n").replace("\r", "\n")
    return f"{clean}." if clean in _READ_AS_MISSING else clean


def write_table(table: Export, path: Path) -> None:
    """Write as ``.tsv`` or ``.xlsx`` by the suffix; the latter needs openpyxl (ValueError without)."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use {' or '.join(FORMATS)}")
    write_bytes(path, _tsv(table) if path.suffix == ".tsv" else _xlsx(table, path))


def has_openpyxl() -> bool:
    import importlib.util

    return importlib.util.find_spec("openpyxl") is not None


def _tsv(table: Export) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue().encode()


def _xlsx(table: Export, path: Path) -> bytes:
    if not has_openpyxl():
        raise ValueError(f"{path}: .xlsx needs openpyxl; pip install openpyxl, or write a .tsv")
    import openpyxl
    from openpyxl.cell import WriteOnlyCell

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(table.columns)
    for row in table.rows:
        cells = []
        for value in row:
            if isinstance(value, str) and len(value) > _SHEET_LIMIT:
                raise ValueError(
                    f"{path}: index {row[0]!r} has a text of {len(value)} characters, a sheet's cell "
                    f"holds {_SHEET_LIMIT}; write a .tsv"
                )
            cell = WriteOnlyCell(sheet, value=value if value != "" else None)
            if isinstance(value, str) and value:
                cell.data_type = "s"  # "=A1" is a text, not a formula
            cells.append(cell)
        sheet.append(cells)
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()
