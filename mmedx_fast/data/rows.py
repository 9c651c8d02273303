"""What all loaders share: a loader's shape, reading JSONL line by line, checks of common fields."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mmedx_fast.data.records import SPECIALTIES, Record

if TYPE_CHECKING:
    from mmedx_fast.data.image_finder import ImageFinder

Row = dict[str, Any]
PlainLine = Callable[[bytes], "Record | None"]

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
"""The names under which a split's file is found; a split not listed goes by its own name."""

MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 17
_LINES = 32
"""Records made at a time: a generator's turn for each costs as much as decoding it, and from about a
hundred on the garbage collector starts for every block."""
_LETTERS = dict.fromkeys(string.ascii_uppercase)
_PLAIN_ENDS = frozenset(string.ascii_letters + string.digits + string.punctuation) - {'"', "'"}
_FIRST_LETTERS = frozenset(tuple(string.ascii_uppercase[:n]) for n in range(2, 27))


class RowError(ValueError):
    """One row that cannot be used. ``reason`` is a fixed phrase (rows are counted by it), ``value``
    what stood there.
    """

    def __init__(self, field: str, value: Any, reason: str) -> None:
        super().__init__(f"{field}={value!r}: {reason}")
        self.field = field
        self.value = value
        self.reason = reason


RawRow = Record | Row | RowError | None
"""What a line holds: a record, a row to make one of, a row that is none, or nothing."""


@dataclasses.dataclass(frozen=True)
class RowContext:
    """What a loader may know besides the row and its number: what the caller asked for, the images,
    and the file.

    ``options`` has a value for every name in the loader's ``options``. ``files`` are all files of
    the split, of which ``file`` is read now; ``memory`` is the loader's own, empty when the first
    file begins, for what one row must know of another.
    """

    split: str
    require_reasoning: bool
    images: ImageFinder
    file: Path
    files: tuple[Path, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allow_unanswered: bool = False
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Loader:
    """One data format.

    ``detect(row)`` says whether a raw row is of this format; ``files(path, split)`` lists the files
    of a split under a file or folder; ``rows(file)`` yields (row number from 1, raw row or the
    ``RowError`` that it is); ``parse(row, number, context)`` makes the record or raises
    ``RowError``. ``columns`` names the format's columns, for messages. ``options`` are the choices
    that a caller has, {name: allowed values, the default first}. ``image_levels``: how many folders
    above the data file images are looked for. ``suffixes``: of the files it may be, to spare others
    a look; empty means any. ``plain`` (of JSONL alone) is a shortcut: it gives the function that makes
    the record of a line that is plainly fine, as ``parse`` would, and ``None`` of any other line.
    """

    name: str
    columns: str
    detect: Callable[[Row], bool]
    parse: Callable[[Row, int, RowContext], Record]
    files: Callable[[Path, str], list[Path]]
    rows: Callable[[Path], Iterator[tuple[int, Row | RowError]]]
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    image_levels: int = 1
    suffixes: tuple[str, ...] = ()
    plain: Callable[[RowContext], PlainLine] | None = None

    def chosen(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Every option with its value, the default where none is given. Raises ``ValueError`` for a
        name or value that the loader does not know.
        """
        for name, value in options.items():
            if name not in self.options:
                raise ValueError(
                    f"{self.name} has no option {name!r}; "
                    f"its options: {', '.join(self.options) or 'none'}"
                )
            if value not in self.options[name]:
                allowed = ", ".join(map(repr, self.options[name]))
                raise ValueError(f"{self.name} option {name} is {value!r}; give one of {allowed}")
        return {name: options.get(name, allowed[0]) for name, allowed in self.options.items()}


class SeveralFiles(ValueError):
    """A folder with several files that may be meant; ``files`` lists them."""

    def __init__(self, message: str, files: list[Path]) -> None:
        super().__init__(message)
        self.files = files


def split_files(path: Path, split: str, suffix: str = ".jsonl") -> list[Path]:
    """The one file of a split: ``path`` itself, or ``<path>/<split><suffix>`` under any of the
    split's names, or the same one folder down. Raises ``ValueError`` when there is none or more
    than one to choose from.
    """
    if path.is_file():
        return [path]
    wanted = [name + suffix for name in SPLIT_NAMES.get(split, (split,))]
    found = [path / name for name in wanted if (path / name).is_file()]
    if not found:
        found = sorted(f for name in wanted for f in path.glob(f"*/{name}") if f.is_file())
    if len(found) > 1:
        listed = ", ".join(str(f.relative_to(path)) for f in found)
        raise SeveralFiles(
            f"{path}: several files for split {split!r} ({listed}); give the one meant", found
        )
    if not found:
        raise no_split_file(path, split, wanted, (suffix,))
    return found


def no_split_file(
    path: Path, split: str, wanted: Iterable[str], suffixes: tuple[str, ...]
) -> ValueError:
    """The error for a folder without the split's file: what was looked for and what is there."""
    if not path.is_dir():
        return ValueError(f"{path}: no such file or folder; check the data path")
    present = sorted(str(f.relative_to(path)) for f in data_files(path, suffixes))[:10]
    return ValueError(
        f"{path}: no file for split {split!r} (looked for {', '.join(wanted)}; "
        f"{' and '.join(suffixes)} files there: {', '.join(present) or 'none'}); "
        "give the file itself or rename it"
    )


def data_files(path: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of these suffixes in a folder, then in the folders in it, by name. Of an inner folder only
    1,000 entries are looked at: it may hold all the images.
    """
    inner: list[str] = []
    for folder, limit in itertools.chain([(str(path), None)], ((name, 1000) for name in inner)):
        with os.scandir(folder) as entries:
            for entry in sorted(itertools.islice(entries, limit), key=lambda entry: entry.name):
                if limit is None and entry.is_dir():
                    inner.append(entry.path)
                elif entry.name.lower().endswith(suffixes) and entry.is_file():
                    yield Path(entry.path)


def read_jsonl(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (line number from 1, object or ``RowError``), a block of lines in memory at a time; blank
    lines are passed over.
    """
    for number, lines in _line_blocks(file):
        for at, line in enumerate(lines, number):
            if isinstance(line, RowError):
                yield at, line
            elif line and not line.isspace():
                yield at, _parse_line(line)


def read_plain(file: Path, plain: PlainLine) -> Iterator[tuple[int, list[RawRow]]]:
    """``read_jsonl`` some lines at a time, (number of the first from 1, what each is), with the record
    itself in place of a row of which ``plain`` makes one and ``None`` for a blank line.
    """
    for number, lines in _line_blocks(file):
        for at in range(0, len(lines), _LINES):
            some = lines[at : at + _LINES]
            yield number + at, [plain(x) or _other(x) if isinstance(x, bytes) else x for x in some]


def _other(line: bytes) -> Row | RowError | None:
    return _parse_line(line) if line and not line.isspace() else None


def _line_blocks(file: Path) -> Iterator[tuple[int, list[bytes | RowError]]]:
    """Yield (number of the first line from 1, some whole lines). A call a line would cost more than
    splitting them.
    """
    with file.open("rb") as source:
        number = 1
        while block := source.read(_BLOCK_BYTES):
            rest = source.readline(MAX_LINE_BYTES)
            if len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                _skip_line(source)
            block += rest
            if number == 1:
                block = block.removeprefix(b"\xef\xbb\xbf")
            lines: list[bytes | RowError] = [*io.BytesIO(block)]
            if len(block) >= MAX_LINE_BYTES:
                lines = [_of_length(line) for line in lines if isinstance(line, bytes)]
            yield number, lines
            number += len(lines)


def _of_length(line: bytes) -> bytes | RowError:
    if len(line) - line.endswith(b"\n") >= MAX_LINE_BYTES:
        return RowError("line", line[:80], f"line over {MAX_LINE_BYTES} bytes")
    return line


def _skip_line(lines: Any) -> None:
    while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


_decode = msgspec.json.Decoder().decode
"""Three times as fast as ``json.loads`` and stricter: what it takes, json takes and reads the same."""


def _parse_line(line: bytes) -> Row | RowError:
    # NaN, infinite numbers and half surrogate pairs it refuses, so json has the last word.
    try:
        row = _decode(line)
        if type(row) is dict:
            return row
    except (ValueError, RecursionError, msgspec.MsgspecError):
        pass
    try:
        text = line.decode("utf-8")
        return checked_object(json.loads(text), text)
    except UnicodeError:
        return RowError("line", line[:80], "not valid UTF-8")
    except (ValueError, RecursionError):
        return RowError("line", line[:80], "malformed JSON")


def checked_object(value: Any, text: str) -> Row | RowError:
    """A parsed row and the text it came from; a ``RowError`` unless it is an object that can be
    written out again, which half of a surrogate pair never can.
    """
    if not isinstance(value, dict):
        return RowError("line", value, "not a JSON object")
    try:
        if not text.isascii():
            text.encode("utf-8")
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return RowError("line", text[:80], "not valid UTF-8")
    return value


def text_field(row: Mapping[str, Any], field: str, *, required: bool = True) -> str | None:
    """A text column, stripped; ``None`` when it is absent, null or blank and not required."""
    value = row.get(field)
    if isinstance(value, str):
        text = value.strip()
        if text:
            return text
    elif value is not None:
        raise RowError(field, value, f"{field} is not text")
    if required:
        raise RowError(field, value, f"{field} is missing or empty")
    return None


def required_text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        text = value.strip()
        if text:
            return text
    text_field(row, field)
    raise AssertionError("unreachable: text_field refuses what is no text")


def id_field(row: Mapping[str, Any], field: str = "id") -> str:
    """A row's own id as text; whole numbers are taken too."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return required_text(row, field)


def clean_options(raw: Any, field: str = "options") -> dict[str, str]:
    """Options as {upper-case letter: text} in the order given.

    The letters' own prefixes (``A:``, ``A.``, ``(A)``) go only if every option carries one, since
    an option may begin like that by itself ("A. fumigatus"); a pair of outer quotes goes too.
    """
    if not isinstance(raw, Mapping):
        raise RowError(field, raw, "options are not a mapping of letter to text")
    options: dict[str, str] = {}
    plain = True
    for letter, text in raw.items():
        key = letter if letter in _LETTERS else _option_letter(letter, field)
        if key in options:
            raise RowError(field, letter, "option letter is not one letter, or twice there")
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            text = str(text)
        if not isinstance(text, str) or not (text := text.strip()):
            raise RowError(f"{field}.{key}", raw[letter], "option text is missing or empty")
        options[key] = text
        if text[-1] in "\"'" or text[0] == "(" or text[0].upper() == key:
            plain = False
    if len(options) < 2:
        raise RowError(field, raw, "fewer than two options")
    return options if plain else _without_marks(options)


def are_plain(options: dict[str, str]) -> bool:
    """Whether ``clean_options`` would give the options back as they are; ``False`` where that takes
    longer to tell.
    """
    if tuple(options) not in _FIRST_LETTERS:
        return False
    for text in options.values():
        if not text or text[0] not in _PLAIN_ENDS or text[-1] not in _PLAIN_ENDS:
            return False
    # Prefixes go only if all options have one.
    return options["A"][0] not in "(Aa" or options["B"][0] not in "(Bb"


def _option_letter(letter: Any, field: str) -> str:
    key = str(letter).strip().upper()
    if key not in _LETTERS:
        raise RowError(field, letter, "option letter is not one letter, or twice there")
    return key


def _without_marks(options: dict[str, str]) -> dict[str, str]:
    """Options without the prefixes that all of them carry, and without outer quotes."""
    prefixes = {k: re.match(rf"\(?{k}\s*[).:]\s*(?=\S)", t, re.I) for k, t in options.items()}
    if all(prefixes.values()):
        options = {
            k: t[m.end() :]
            for (k, t), m in zip(options.items(), prefixes.values(), strict=True)
            if m
        }
    return {key: _unquote(text) for key, text in options.items()}


def _unquote(text: str) -> str:
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def label_field(row: Mapping[str, Any], field: str, options: Mapping[str, str]) -> str:
    """The gold letter, upper-case; must be one of the options."""
    label = row.get(field)
    if isinstance(label, str) and label in options:
        return label
    label = required_text(row, field).upper()
    if label not in options:
        raise RowError(field, label, "answer is not among the options")
    return label


def specialty_field(row: Mapping[str, Any]) -> str | None:
    """The explicit specialty column that any format may have; it overrides the rules."""
    specialty = row.get("specialty")
    if specialty is None or (isinstance(specialty, str) and specialty in SPECIALTIES):
        return specialty
    specialty = text_field(row, "specialty", required=False)
    if specialty is not None and specialty not in SPECIALTIES:
        raise RowError("specialty", specialty, f"specialty is not one of {', '.join(SPECIALTIES)}")
    return specialty
