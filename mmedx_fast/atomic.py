"""Writes that happen or do not: a temporary name in the same directory, fsync, rename.

What a killed process leaves half-written has a name that :func:`clean` knows. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMP = ".mmedx-tmp."
_OLD = ".mmedx-old."
_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


class DiskFullError(OSError):
    """A write did not fit; nothing half-written is left and the last good state is intact."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinities become null (JSON has neither).

    Paths become strings, numpy scalars and 0-d tensors numbers. Raises TypeError for anything else,
    naming the file, before the file is touched.
    """
    try:
        text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise TypeError(f"{path}: cannot be written as JSON: {error}") from None
    write_text(path, text + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically. Raises :class:`DiskFullError`, or OSError as it
    comes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _sibling(path, TEMP)
    try:
        with disk_guard(path, len(data)):
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            _sync_dir(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise


@contextlib.contextmanager
def write_stream(path: Path) -> Iterator[IO[bytes]]:
    """A file to write piece by piece; on a clean exit it replaces ``path``, on any other nothing is
    left of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _sibling(path, TEMP)
    try:
        with disk_guard(path):
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            _sync_dir(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise


@contextlib.contextmanager
def write_folder(path: Path, nbytes: int | None = None, *, durable: bool = True) -> Iterator[Path]:
    """Fill the folder that is yielded; on a clean exit it becomes ``path``, replacing an older one.

    ``nbytes``, when known, goes into the message of a full disk. On any exception the new folder is
    removed and the older one stays. Without ``durable`` nothing is fsynced: whole or absent after a kill,
    but not after a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _sibling(path, TEMP)
    try:
        with disk_guard(path, nbytes):
            temp.mkdir()
            yield temp
            if durable:
                _sync_tree(temp)
            _swap_in(temp, path, durable)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


@contextlib.contextmanager
def disk_guard(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn a full disk or quota, also as reported by safetensors, into :class:`DiskFullError`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = _FULL.get(number or 0) or next(
            (m for m in _FULL.values() if m in str(error)), None
        )
        if reason is None:
            raise
        wanted = f" ({nbytes:,} bytes)" if nbytes is not None else ""
        raise DiskFullError(
            number or errno.ENOSPC,
            f"cannot write {path}{wanted}: {reason.lower()}, {_free(Path(path)):,} bytes free. The "
            f"last good state is intact: free some space and start the same command again",
        ) from error


def plain(value: Any) -> Any:
    """``value`` in JSON's types: paths as strings, numpy and torch scalars as numbers, non-finite
    as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _sibling(path: Path, prefix: str) -> Path:
    return path.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.{path.name}"


def _swap_in(temp: Path, path: Path, durable: bool) -> None:
    """Rename ``temp`` to ``path``; in the instant between two renames the older one has a name that
    :func:`clean` recognises and puts back."""
    old = None
    if path.exists():
        old = _sibling(path, _OLD)
        os.rename(path, old)
    try:
        os.rename(temp, path)
    except BaseException:
        if old is not None:
            os.rename(old, path)
        raise
    if durable:
        _sync_dir(path.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        _sync_dir(Path(root))


def _sync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems refuse fsync on a directory; the rename itself is still atomic.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def clean(folder: Path) -> list[Path]:
    """Remove what a killed run left half-written; put back a folder that was about to be
    replaced."""
    removed = []
    for root, dirs, files in os.walk(folder):
        for name in [*dirs, *files]:
            if not name.startswith((TEMP, _OLD)):
                continue
            leftover = Path(root, name)
            target = leftover.with_name(name.split(".", 3)[3])
            # A folder in a folder that was being filled goes with it.
            if name.startswith(_OLD) and not target.exists() and not target.name.startswith(TEMP):
                os.rename(leftover, target)
                continue
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
            removed.append(leftover)
        dirs[:] = [name for name in dirs if not name.startswith((TEMP, _OLD))]
    return removed
