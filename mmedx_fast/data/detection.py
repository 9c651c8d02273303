"""Which of the formats a data file or folder is in, by the columns of its first rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mmedx_fast.data.rows import SPLIT_NAMES, Loader, Row, RowError, SeveralFiles

_SNIFFED_ROWS = 100

Reader = Callable[[Path], Iterator[tuple[int, Row | RowError]]]


def detect(path: Path, loaders: Mapping[str, Loader]) -> str:
    """Name of the loader that knows the rows of a file, or of the files of a folder.

    A row that exactly one loader of those that read it takes decides for its file. Raises
    ``ValueError`` when no loader knows a row, or more than one does, or files of a folder differ.
    """
    columns: dict[str, None] = {}
    problems: list[str] = []
    found: dict[str, Path] = {}
    pairs = _readers(path, loaders)
    for (reader, file), names in pairs.items():
        try:
            known = _sniff(reader, file, {name: loaders[name] for name in names}, columns)
        except ValueError as error:  # this reader cannot read it; perhaps another one can
            problems.append(str(error))
            continue
        for name in known:
            found.setdefault(name, file)
    if len(found) == 1:
        return next(iter(found))
    if found:
        listed = ", ".join(f"{name} ({file})" for name, file in found.items())
        raise ValueError(
            f"{path}: the format may be any of {listed}; give it by name, or give the file meant"
        )
    raise _unrecognised(path, [file for _, file in pairs], columns, problems, loaders)


def _readers(path: Path, loaders: Mapping[str, Loader]) -> dict[tuple[Reader, Path], list[str]]:
    """Which loaders would read which file, and how."""
    suffix = path.suffix.lower()
    candidates = dict(loaders)
    if path.is_file():
        fitting = {n: x for n, x in loaders.items() if suffix in x.suffixes}
        anything = {n: x for n, x in loaders.items() if not x.suffixes}
        candidates = fitting | anything if fitting else candidates
    pairs: dict[tuple[Reader, Path], list[str]] = {}
    for name, loader in candidates.items():
        for file in _any_files(loader, path):
            pairs.setdefault((loader.rows, file), []).append(name)
    return pairs


def _any_files(loader: Loader, path: Path) -> Iterable[Path]:
    """Some split's files of a folder, whichever there are."""
    if path.is_file():
        return [path]
    for split in SPLIT_NAMES:
        try:
            return loader.files(path, split)
        except SeveralFiles as error:
            return error.files
        except ValueError:
            continue
    return []


def _sniff(
    reader: Reader, file: Path, loaders: Mapping[str, Loader], columns: dict[str, None]
) -> list[str]:
    """The loaders that know the rows of a file; adds the columns of rows that none knows."""
    unsure: list[str] = []
    for _, row in itertools.islice(reader(file), _SNIFFED_ROWS):
        if isinstance(row, RowError):
            continue
        matching = [name for name, loader in loaders.items() if loader.detect(row)]
        if len(matching) == 1:
            return matching
        unsure = unsure or matching
        columns.update(dict.fromkeys(map(str, row)))
    return unsure


def _unrecognised(
    path: Path,
    files: list[Path],
    columns: Iterable[str],
    problems: list[str],
    loaders: Mapping[str, Loader],
) -> ValueError:
    if not files:
        wanted = sorted({s for loader in loaders.values() for s in loader.suffixes})
        return ValueError(
            f"{path}: no data file of a known format there (looked for {', '.join(wanted)} files "
            "named after a split); give the file itself"
        )
    names = ", ".join(map(str, dict.fromkeys(files[:4])))
    if all(file.stat().st_size == 0 for file in files):
        return ValueError(f"{names}: the file is empty; copy it again from its source")
    known = "; ".join(f"{name}: {loader.columns}" for name, loader in loaders.items())
    found = ", ".join(sorted(columns)[:40]) or "none, there are no data rows"
    problem = f"; {problems[0]}" if problems and not columns else ""
    return ValueError(
        f"{names}: format not recognised (columns found: {found}{problem}); "
        f"give the format by name or use one of these columns: {known}"
    )
