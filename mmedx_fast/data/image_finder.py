"""From the image names of rows to ``ImageRef``."""

from __future__ import annotations

import os
from pathlib import Path

from mmedx_fast.data.images import zip_members
from mmedx_fast.data.records import ImageRef, image_in
from mmedx_fast.data.rows import RowError

_OTHER_ARCHIVES = {"figures": ("images_2.zip",)}
_MEMBER_FOLDERS = ("figures/", "imgs/", "images/")
_USUAL = ("images",)


class ImageFinder:
    """Turns the image names of rows into ``ImageRef``; looks at directories, never into images.

    A name is looked for beside the data file, in ``images/`` there, the same ``levels`` folders up,
    and in an ``images.zip`` beside each; first as written, then by its last component alone. With
    ``check=False`` a name that is not found is taken to lie in ``images/`` (or beside the file)
    instead of being refused. Each folder is listed once, when the first image is looked for in it.
    """

    def __init__(self, file: Path, *, check: bool = True, levels: int = 1) -> None:
        self._homes = [str(home) for home in (file.parent, *file.parent.parents)[: 1 + levels]]
        self._check = check
        self._names: dict[str, frozenset[str]] = {}
        self._members: dict[Path, dict[str, str]] = {}
        self._places: dict[tuple[str, ...], tuple[list[str], list[Path]]] = {}
        self._heads: dict[tuple[tuple[str, ...], str], list[tuple[str, Path]]] = {}
        self._listed: dict[str, list[tuple[frozenset[str], Path]]] = {}

    def usual(self, names: list[str]) -> tuple[ImageRef, ...]:
        """``find`` of each name, quicker from the second image of a folder on."""
        if len(names) != 1:
            return tuple([self._usual(name) for name in names])
        return (self._usual(names[0]),)

    def _usual(self, name: str) -> ImageRef:
        head, _, tail = name.rpartition("/")
        if head in self._listed:
            for names, folder in self._listed[head]:
                if tail in names:
                    return image_in(folder, tail)
        return self.find(name)

    def find(
        self,
        name: str,
        field: str = "images",
        *,
        places: tuple[str, ...] = _USUAL,
        exact: bool = False,
    ) -> ImageRef:
        """The image of that name; raises ``RowError`` when it is not there.

        ``places``: folders to look into beside the data file and the folder itself, and (with
        ``.zip``) archives; ``exact``: do not fall back on the name's last component.
        """
        head, _, tail = name.rpartition("/")
        if not tail.strip():
            raise RowError(field, name, "image name is empty")
        if places not in self._places:
            self._places[places] = self._look_at(places)
        folders, archives = self._places[places]
        for part, spelling in ((head, name), ("", tail)):
            inside = self._heads.get((places, part)) or self._inside(places, part)
            for listed, folder in inside:
                if tail in self._listing(listed):
                    if places is _USUAL and part == head:
                        self._remember(head, inside, listed)
                    return image_in(folder, tail)
            for archive in archives:
                member = self._index(archive).get(spelling)
                if member is not None:
                    return ImageRef(member=(archive, member))
            if exact or not head:
                break
        if self._check:
            raise RowError(field, name, "image file is missing")
        return ImageRef(path=Path(folders[1] if self._listing(folders[1]) else folders[0], name))

    def _remember(self, head: str, inside: list[tuple[str, Path]], last: str) -> None:
        """Spare later names that begin with ``head`` the way here: the folders listed up to ``last``."""
        count = [listed for listed, _ in inside].index(last) + 1
        self._listed[head] = [(self._listing(at), folder) for at, folder in inside[:count]]

    def _inside(self, places: tuple[str, ...], part: str) -> list[tuple[str, Path]]:
        """The folders to look into for names that begin with the folders ``part``, as text too."""
        folders = [""] if part.startswith("/") else self._places[places][0]
        inside = [f"{folder}{part}/" if part else folder for folder in folders]
        self._heads[places, part] = [(folder, Path(folder)) for folder in inside]
        return self._heads[places, part]

    def _look_at(self, places: tuple[str, ...]) -> tuple[list[str], list[Path]]:
        """Folders (with a slash at the end) and archives to look into, in order."""
        folders = [f"{home}/{p}".rstrip("/") + "/" for home in self._homes for p in ("", *places)]
        names = [n for p in places for n in (f"{p}.zip", *_OTHER_ARCHIVES.get(p, ()))]
        archives = [Path(home, name) for home in self._homes for name in names]
        return folders, [archive for archive in archives if archive.is_file()]

    def _listing(self, folder: str) -> frozenset[str]:
        """Names (but blanks) of the files in a folder, none when there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    names = frozenset(
                        entry.name for entry in entries if entry.name.strip() and entry.is_file()
                    )
            except (OSError, ValueError):  # ValueError: a NUL in the name
                names = frozenset()
            self._names[folder] = names
        return self._names[folder]

    def _index(self, archive: Path) -> dict[str, str]:
        """Full names, names under the usual folders and, where unambiguous, last components."""
        if archive not in self._members:
            names = [n for n in zip_members(archive) if not n.endswith("/")]
            index: dict[str, str] = {}
            ambiguous: set[str] = set()
            for name in names:
                base = name.rpartition("/")[2]
                if index.setdefault(base, name) != name:
                    ambiguous.add(base)
            for base in ambiguous:
                del index[base]
            for place in _MEMBER_FOLDERS:
                index.update({n.removeprefix(place): n for n in names if n.startswith(place)})
            index.update({n: n for n in names})
            self._members[archive] = index
        return self._members[archive]
