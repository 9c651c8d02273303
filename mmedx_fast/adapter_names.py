"""One name for each module that several adapters change, though versions of transformers named it otherwise.

PEFT loads an adapter by whole names: of one that mixes them only a part would be loaded, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from mmedx_fast.model_files import canonical
from mmedx_fast.peft_adapters import Adapter, AdapterError, LoraLayer

if TYPE_CHECKING:
    from mmedx_fast.base_layout import BaseLayout

Rows = Mapping[str, Sequence[LoraLayer | None]]

_NEWER = re.compile(r"model\.(language_model|visual)\.")
_OLDER = re.compile(r"(model\.(layers|embed_tokens)|visual|language_model)\.")


def named_rows(
    adapters: Sequence[Adapter], rows: Rows, layout: BaseLayout | None
) -> dict[str, list[LoraLayer | None]]:
    """The rows with one name for each module: that of the base's class, else the adapters' own.

    Raises AdapterError where adapters name modules differently and no base says which name is right.
    """
    if layout is None or layout.module is None:
        _check_one_form(adapters, layout)
    named, seen = {}, dict[tuple[str, int], str]()
    for key, row in rows.items():
        first = next(layer for layer in row if layer is not None)
        name = (layout.module_name(first.name) if layout else None) or first.name
        other = seen.setdefault((name, first.index), first.name)
        if other != first.name:
            raise AdapterError(f"{other} and {first.name} are one module of the base, {name}")
        named[key] = [None if layer is None else replace(layer, name=name) for layer in row]
    return named


def _check_one_form(adapters: Sequence[Adapter], layout: BaseLayout | None) -> None:
    named = [(a, layer.name) for a in adapters for layer in a.layers.values()]
    known: dict[str, tuple[str, Adapter, str]] = {}
    for adapter, name in named:
        short = canonical(name)
        prefix = name.removesuffix(short)
        before, one, other = known.setdefault(short.split(".")[0], (prefix, adapter, name))
        if prefix != before and adapter is not one:
            _refuse(one, other, adapter, name, layout)
    newer, older = _of_form(adapters, _NEWER), _of_form(adapters, _OLDER)
    # one adapter with both is of a class of its own, in which they are no versions of each other
    alone = _without(newer, older), _without(older, newer)
    for (one, other), (adapter, name) in zip(*alone, strict=False):
        _refuse(one, other, adapter, name, layout)


def _of_form(adapters: Sequence[Adapter], form: re.Pattern[str]) -> dict[str, tuple[Adapter, str]]:
    """A name of that form of each adapter that has one."""
    return {
        adapter.name: (adapter, layer.name)
        for adapter in adapters
        for layer in adapter.layers.values()
        if form.match(layer.name)
    }


def _without(
    some: dict[str, tuple[Adapter, str]], others: dict[str, tuple[Adapter, str]]
) -> list[tuple[Adapter, str]]:
    return [found for name, found in some.items() if name not in others]


def _refuse(
    one: Adapter, name: str, other: Adapter, named: str, layout: BaseLayout | None
) -> NoReturn:
    remedy = (
        "give the base they are of (--base DIR), which says what its modules are called"
        if layout is None
        else f"transformers has no class for the base {layout.folder} that says which is right: rename "
        "the modules of one"
    )
    raise AdapterError(
        f"{one.folder} has the module {name}, {other.folder} {named}: they were saved under different versions "
        f"of transformers, and PEFT would load only a part of the two together; {remedy}"
    )
