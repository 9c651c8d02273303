"""Where the files that ship with the package are."""

from __future__ import annotations

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
CONFIG_DIR = PACKAGE_DIR / "configs"


def shipped_configs() -> list[str]:
    """Names of the YAML recipes inside the installed package, such as `demo.yaml`, sorted."""
    return sorted(path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Find a YAML or JSON file by its path, or by its name among the shipped recipes.

    `name` is looked for as given (from the working directory, or absolute), then inside the
    package, with or without a leading `configs/`: `mmedx run configs/demo.yaml` works in a checkout
    and, after `pip install`, anywhere.

    Raises:
        FileNotFoundError: neither place has the file; the message names both and the recipes.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given.resolve()
    if not given.is_absolute():
        parts = given.parts[1:] if given.parts[:1] == ("configs",) else given.parts
        shipped = CONFIG_DIR.joinpath(*parts)
        # resolve(): `..` must not lead out of the package.
        if parts and shipped.is_file() and shipped.resolve().is_relative_to(CONFIG_DIR.resolve()):
            return shipped.resolve()
    known = ", ".join(shipped_configs()) or "none"
    raise FileNotFoundError(
        f"config {str(name)!r}: not found as {given.absolute()} nor in the package's configs/ "
        f"(it has: {known}). Give the path of a YAML file or one of these names."
    )
