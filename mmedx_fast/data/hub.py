"""Where the rows of a split lie in a folder as the Hugging Face hub lays it out, and reading them.

Known are shards (``data/train-00000-of-00002-<hash>.parquet``), single files (``train.jsonl``),
folders named after the split (``train/0000.parquet``) and what ``datasets.save_to_disk`` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from mmedx_fast.data.json_array import read_json
from mmedx_fast.data.parquet import read_parquet, read_saved
from mmedx_fast.data.rows import SPLIT_NAMES, Row, RowError, SeveralFiles, no_split_file, read_jsonl

SUFFIXES = (".parquet", ".jsonl", ".json")
_SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
_FOLDER_SHARD = re.compile(r"(?:.*[-_])?\d+")
_DEPTH = ("", "*/", "*/*/")
"""A split's files lie in the folder itself or up to two folders down (``data/``, a configuration)."""


class WrongShards(SeveralFiles):
    """The files of a split that cannot be all of it, or not once."""


def hub_files(
    path: Path,
    split: str,
    *,
    suffixes: tuple[str, ...] = SUFFIXES,
    also: tuple[str, ...] = (),
    released: tuple[str, ...] = (),
) -> list[Path]:
    """The files (or the saved folder) of a split, shards in their order.

    ``also``: further names a format uses for this split; ``released``: full names of files that are
    this split without saying so. Raises ``ValueError`` when there is none, ``SeveralFiles`` when
    there is more than one to choose from, ``WrongShards`` when one is missing or there twice.
    """
    if path.is_file():
        return [path]
    names = (*SPLIT_NAMES.get(split, (split,)), *also)
    if (path / "state.json").is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        return [_saved_split(path, split, names)]
    if own := [path / name for name in released if (path / name).is_file()]:
        return own
    for depth in _DEPTH:
        groups = _groups(path, depth, names, suffixes)
        if len(groups) > 1:
            found = [file for files in groups.values() for file in files]
            listed = ", ".join(str(files[0].relative_to(path)) for files in groups.values())
            raise SeveralFiles(
                f"{path}: several files for split {split!r} ({listed}); give the one meant", found
            )
        for files in groups.values():
            _check_shards(files)
            return files
    raise no_split_file(path, split, names, suffixes)


def read_any(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (number from 1, row) of a parquet, JSON or JSONL file or a saved folder."""
    if file.is_dir():
        return read_saved(file)
    if file.suffix.lower() == ".parquet":
        return read_parquet(file)
    return read_json(file) if file.suffix.lower() == ".json" else read_jsonl(file)


def _saved_split(path: Path, split: str, names: tuple[str, ...]) -> Path:
    file = path / "dataset_dict.json"
    try:
        present = [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["splits"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: is damaged ({error}); save the data set again") from error
    found = [name for name in names if name in present]
    if not found:
        raise ValueError(
            f"{path}: no split {split!r} in the saved data set (it has {', '.join(present)}); "
            "give the folder of the split meant"
        )
    return path / found[0]


def _groups(
    path: Path, depth: str, names: tuple[str, ...], suffixes: tuple[str, ...]
) -> dict[tuple[str, ...], list[Path]]:
    """Files of one depth by what they are shards of."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for file in sorted(path.glob(f"{depth}*")):
        if file.suffix.lower() not in suffixes or not file.is_file():
            continue
        shard = _SHARD.search(file.stem)
        name = file.stem[: shard.start()] if shard else file.stem
        if name in names:
            group = (str(file.parent), name, file.suffix, shard["count"] if shard else "")
        elif file.parent != path and file.parent.name in names and _FOLDER_SHARD.fullmatch(name):
            group = (str(file.parent), "", file.suffix, shard["count"] if shard else "")
        else:
            continue
        groups.setdefault(group, []).append(file)
    return groups


def _check_shards(files: list[Path]) -> None:
    """Every shard must be there once: a data set must not shrink in silence."""
    shards = [match for file in files if (match := _SHARD.search(file.stem))]
    if not shards:
        return
    count = int(shards[0]["count"])
    numbers = [int(match["number"]) for match in shards]
    missing = sorted(set(range(count)) - set(numbers))
    if missing:
        raise WrongShards(
            f"{files[0].parent}: shard {missing[0]} of {count} is missing beside {files[0].name} "
            f"({len(missing)} missing); download it, or give the files one by one",
            files,
        )
    if len(numbers) != len(set(numbers)):
        raise WrongShards(
            f"{files[0].parent}: two versions of the same shard ({files[0].name}, ...); "
            "keep one version",
            files,
        )
