"""A run is a folder: one owner at a time, writes that happen or do not, stages that know their end.

A killed run leaves either the old state or the new one of everything it wrote (:mod:`.atomic`).
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import yaml

from mmedx_fast.atomic import (
    DiskFullError,
    clean,
    disk_guard,
    plain,
    write_bytes,
    write_folder,
    write_json,
    write_text,
)
from mmedx_fast.config import Config

__all__ = [
    "DiskFullError",
    "RunBusyError",
    "RunFolder",
    "RunFolderError",
    "Stage",
    "disk_guard",
    "plain",
    "write_bytes",
    "write_folder",
    "write_json",
    "write_text",
]

_LOG = logging.getLogger(__name__)


class RunFolderError(RuntimeError):
    """A run folder that cannot be used; the message names it and says what to do."""


class RunBusyError(RunFolderError):
    """Another process is at work in the folder."""


class RunFolder:
    """A run's folder, locked for this process when opened exclusively. Use as a context manager."""

    def __init__(
        self, cfg: Config, path: Path, lock: int | None, changed: dict[str, tuple[Any, Any]]
    ):
        self.cfg = cfg
        self.path = path
        self.exclusive = lock is not None
        self.changed = changed
        """Settings that differ from those the folder was last opened with: key -> (before, now)."""
        self._lock = lock
        if lock is not None:
            # A forked child would keep the lock alive after its parent was killed.
            ref = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget_lock(ref))

    @classmethod
    def open(cls, cfg: Config, *, exclusive: bool = True) -> RunFolder:
        """Make ``cfg.folder``, lock it, clean up after a killed run and write the resolved
        ``config.yaml``.

        With ``exclusive=False`` (readers, ranks above 0) nothing is made, locked, cleaned or written. An
        earlier config that differs is kept as ``config.old-N.yaml``; whether finished stages still
        hold is for their fingerprints to say. Raises :class:`RunBusyError` when another process has
        the folder, and :class:`RunFolderError` when it cannot be made or read.
        """
        path = cfg.folder
        try:
            if exclusive:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"cannot make the run folder {path}: {error.strerror}; "
                f"choose another with run_dir=<folder>"
            ) from None
        lock = _take_lock(path) if exclusive else None
        try:
            changed = _changed_settings(path / "config.yaml", cfg)
            if exclusive:
                for leftover in clean(path):
                    _LOG.info("removed %s, half-written by a run that was killed", leftover)
                _write_config(path, cfg, changed)
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
        return cls(cfg, path, lock, changed)

    def stage(self, name: str, fingerprint: str) -> Stage:
        """The stage's folder, ready for work under ``fingerprint`` (what its result depends on).

        What was made under another fingerprint moves to ``<name>.old-N``, with a warning. ``name``
        may hold slashes (``dsa/pediatrics``). A reader (``exclusive=False``) moves and makes
        nothing.
        """
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"stage name {name!r} must be a relative path inside the run folder")
        stage = Stage(name=name, dir=self.path / name, fingerprint=fingerprint)
        if self.exclusive:
            self._prepare(stage)
        return stage

    def peek(self, name: str) -> dict[str, Any] | None:
        """The result of a finished stage whatever its fingerprint, or None; touches nothing."""
        found = _read_json(self.path / name / "done.json")
        return found.get("result") if found else None

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            fcntl.flock(
                self._lock, fcntl.LOCK_UN
            )  # at once, whoever else holds a copy of the descriptor
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, stage: Stage) -> None:
        if stage.dir.exists():
            reason = _why_not_usable(stage)
            if reason is not None:
                old = _free_name(stage.dir, f"{stage.dir.name}.old-{{}}")
                settings = ", ".join(
                    f"{k}: {a!r} -> {b!r}" for k, (a, b) in list(self.changed.items())[:5]
                )
                os.rename(stage.dir, old)
                warnings.warn(
                    f"stage {stage.name!r} of {self.path}: {reason}"
                    f"{f' ({settings})' if settings else ''}; it is done again, and what was there "
                    f"is kept in {old}",
                    stacklevel=3,
                )
        stage.dir.mkdir(parents=True, exist_ok=True)
        if not (stage.dir / "stage.json").exists():
            write_json(
                stage.dir / "stage.json", {"name": stage.name, "fingerprint": stage.fingerprint}
            )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage's folder. ``dir`` is free to write in; ``finish`` makes it count as done."""

    name: str
    dir: Path
    fingerprint: str

    def done(self) -> bool:
        """Whether the stage finished under this fingerprint."""
        found = _read_json(self.dir / "done.json")
        return (
            found is not None and found.get("fingerprint") == self.fingerprint and "result" in found
        )

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``done.json``: the last thing a stage does."""
        done = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "finished": _now(),
            "result": result,
        }
        write_json(self.dir / "done.json", done)

    def result(self) -> dict[str, Any]:
        """What ``finish`` was given. Raises :class:`RunFolderError` when the stage is not done."""
        done = _read_json(self.dir / "done.json")
        if done is None or done.get("fingerprint") != self.fingerprint or "result" not in done:
            raise RunFolderError(
                f"stage {self.name!r} in {self.dir} is not finished (no done.json of these "
                f"settings); run it first"
            )
        result: dict[str, Any] = done["result"]
        return result


def _why_not_usable(stage: Stage) -> str | None:
    """Why the content of ``stage.dir`` cannot be carried on under the stage's fingerprint, or
    None."""
    mark = stage.dir / "stage.json"
    if mark.exists():
        found = _read_json(mark)
        if found is None:
            return f"{mark} is damaged, so it is unknown what the folder was made with"
        if found.get("fingerprint") != stage.fingerprint:
            return "the settings or inputs it depends on have changed"
        return None
    # Folders of sub-stages (dsa/pediatrics inside dsa) are no trace of an unknown run.
    others = [p for p in stage.dir.iterdir() if not any(p.rglob("stage.json"))]
    return f"it holds files of unknown origin ({others[0].name})" if others else None


def _free_name(path: Path, pattern: str) -> Path:
    number = 1
    while (candidate := path.with_name(pattern.format(number))).exists():
        number += 1
    return candidate


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({error}); it is taken as absent", stacklevel=3)
        return None
    return value if isinstance(value, dict) else None


def _take_lock(folder: Path) -> int:
    path = folder / ".lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunFolderError(f"cannot write in the run folder {folder}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
        os.close(fd)
        raise RunBusyError(
            f"{folder} is in use by {holder or 'another process'}: wait for it to end or stop it, "
            f"or give this run a folder of its own (name=<other> or run_dir=<folder>)"
        ) from None
    except OSError as error:
        os.close(fd)
        raise RunFolderError(
            f"cannot lock {path}: {error.strerror}; put the run on a file system that has locks"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)
    return fd


def _forget_lock(ref: weakref.ref[RunFolder]) -> None:
    run = ref()
    if run is not None and run._lock is not None:
        os.close(run._lock)  # without unlocking: the lock is still the parent's
        run._lock, run.exclusive = None, False


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _changed_settings(path: Path, cfg: Config) -> dict[str, tuple[Any, Any]]:
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError) as error:
        warnings.warn(
            f"{path} cannot be read ({error}); it is kept aside and written anew", stacklevel=3
        )
        return {"config.yaml": ("unreadable", "written anew")}
    old, new = _flat(before), _flat(cfg.model_dump(mode="json"))
    return {
        k: (old.get(k), new.get(k))
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return out


def _write_config(folder: Path, cfg: Config, changed: dict[str, tuple[Any, Any]]) -> None:
    path = folder / "config.yaml"
    if path.exists():
        if not changed:
            return
        write_bytes(_free_name(path, "config.old-{}.yaml"), path.read_bytes())
    write_text(path, cfg.to_yaml())
