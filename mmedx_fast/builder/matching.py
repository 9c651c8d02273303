"""Finding a question that was seen before, in spite of other blanks, sizes, colours and encodings.

Questions of medical data sets are often templates ("What modality is shown?") asked of many images, and
images often have many questions. So neither alone makes two questions the same: by default the image must be
near-identical AND the text similar; or the text so long that two authors did not write it by chance; or
there are no images at all. Which rules hold, and every threshold, is in the config.

Texts are compared exactly, by the Jaccard similarity of their word triples; MinHash and an index of 13-word
runs only propose whom to compare. Images are compared by Hamming distance to all, which is exact too.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmedx_fast.builder.config import MatchConfig
from mmedx_fast.builder.features import (
    HASH_BYTES,
    ImageFeatures,
    TextFeatures,
    containment,
    jaccard,
)

if TYPE_CHECKING:
    import numpy as np

_WORDS = HASH_BYTES // 8
_BITS = HASH_BYTES * 8


@dataclasses.dataclass(frozen=True)
class Item:
    """A question as it is compared; ``owner`` names its data set."""

    id: str
    owner: str
    text: TextFeatures
    images: tuple[ImageFeatures, ...]


class Matcher:
    """Questions that were added, and which of them a new one equals by the config's rules."""

    def __init__(self, cfg: MatchConfig, *, every_image: bool) -> None:
        """``every_image``: all images must match one to one (two rows of the same data are then
        interchangeable); else a single shared image counts."""
        self._cfg, self._every_image = cfg, every_image
        self._items: list[Item] = []
        self._hashes = _HashIndex()
        self._runs: dict[int, list[int]] = collections.defaultdict(list)
        self._texts = _TextIndex(cfg) if {"text", "text_only"} & set(cfg.rules) else None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Item) -> None:
        number = len(self._items)
        self._items.append(item)
        for image in item.images:
            self._hashes.add(image.hash, number)
        if "long_text" in self._cfg.rules and self._long(item):
            for run in item.text.runs:
                self._runs[run].append(number)
        if self._texts is not None and self._compares_text(item):
            self._texts.add(number, item.text)

    def find(self, item: Item) -> dict[str, Any] | None:
        """Evidence of the first rule by which a question was seen before, or None: ``rule``, ``id``,
        ``set``, and the measured ``text_similarity`` and ``image_distance``."""
        for rule in self._cfg.rules:
            found = getattr(self, f"_by_{rule}")(item)
            if found is not None:
                number, measured = found
                other = self._items[number]
                return {"rule": rule, "id": other.id, "set": other.owner, **measured}
        return None

    # -- rules: (number of the other item, what was measured), or None ----------------------------

    def _by_image(self, item: Item) -> tuple[int, dict[str, float]] | None:
        near = self._near_images(item)
        if not near:
            return None
        best = min(near, key=lambda number: (near[number], number))
        return best, {"image_distance": round(near[best], 4)}

    def _by_image_and_text(self, item: Item) -> tuple[int, dict[str, float]] | None:
        near = self._near_images(item)
        similar = {n: self._similarity(item, self._items[n]) for n in near}
        best = max(similar, key=lambda n: (similar[n], -n), default=None)
        if best is None or similar[best] < self._cfg.similar_text:
            return None
        measured = {"text_similarity": similar[best], "image_distance": near[best]}
        return best, {name: round(value, 4) for name, value in measured.items()}

    def _by_long_text(self, item: Item) -> tuple[int, dict[str, float]] | None:
        if not self._long(item):
            return None
        shared = {number for run in item.text.runs for number in self._runs.get(run, ())}
        return self._best(
            {
                n: max(
                    jaccard(item.text.stem, self._items[n].text.stem),
                    containment(item.text.runs, self._items[n].text.runs),
                )
                for n in sorted(shared)
            },
            self._cfg.long_text,
        )

    def _by_text_only(self, item: Item) -> tuple[int, dict[str, float]] | None:
        return None if item.images else self._by_index(item, images=False)

    def _by_text(self, item: Item) -> tuple[int, dict[str, float]] | None:
        return self._by_index(item, images=True)

    def _by_index(self, item: Item, *, images: bool) -> tuple[int, dict[str, float]] | None:
        assert self._texts is not None
        found = self._texts.find(item.text)
        return self._best(
            {
                n: jaccard(item.text.whole, self._items[n].text.whole)
                for n in found
                if images or not self._items[n].images
            },
            self._cfg.identical_text,
        )

    # -- parts ------------------------------------------------------------------------------------

    def _best(
        self, similar: dict[int, float], enough: float
    ) -> tuple[int, dict[str, float]] | None:
        best = max(similar, key=lambda n: (similar[n], -n), default=None)
        if best is None or similar[best] < enough:
            return None
        return best, {"text_similarity": round(similar[best], 4)}

    def _similarity(self, a: Item, b: Item) -> float:
        whole = jaccard(a.text.whole, b.text.whole)
        # Other options under the same question are another row here, and the same test question there.
        return whole if self._every_image else max(whole, jaccard(a.text.stem, b.text.stem))

    def _near_images(self, item: Item) -> dict[int, float]:
        """Items with matching images -> the distance (of the worst image that had to match)."""
        bound = self._cfg.image_distance
        found = [self._hashes.within(image.hash, bound) for image in item.images]
        if not self._every_image:
            near: dict[int, float] = {}
            for numbers in found:
                for number, distance in numbers.items():
                    near[number] = min(distance, near.get(number, 1.0))
            return near
        shared = set.intersection(*(set(numbers) for numbers in found)) if found else set()
        return {
            n: max(numbers[n] for numbers in found)
            for n in shared
            if len(self._items[n].images) == len(item.images)
        }

    def _long(self, item: Item) -> bool:
        return item.text.n_words >= self._cfg.long_words

    def _compares_text(self, item: Item) -> bool:
        return "text" in self._cfg.rules or not item.images


class _HashIndex:
    """All hashes in one array, compared with a new one at a time: 80,000 take about a millisecond."""

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None  # [capacity, words] uint64
        self._owners: list[int] = []

    def add(self, digest: bytes, owner: int) -> None:
        import numpy as np

        count = len(self._owners)
        if self._rows is None:
            self._rows = np.zeros((64, _WORDS), np.uint64)
        elif count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[count] = np.frombuffer(digest, np.uint64)
        self._owners.append(owner)

    def within(self, digest: bytes, share: float) -> dict[int, float]:
        """Owner -> share of differing bits, of those with at most ``share``."""
        import numpy as np

        if self._rows is None:
            return {}
        rows = self._rows[: len(self._owners)]
        differing = np.bitwise_count(rows ^ np.frombuffer(digest, np.uint64)).sum(1, dtype=np.int64)
        near: dict[int, float] = {}
        for index in np.flatnonzero(differing <= share * _BITS):
            owner = self._owners[index]
            near[owner] = min(near.get(owner, 1.0), float(differing[index]) / _BITS)
        return near


class _TextIndex:
    """MinHash with banding: proposes texts whose word triples overlap by at least the threshold."""

    def __init__(self, cfg: MatchConfig) -> None:
        self._num_perm = cfg.num_perm
        # Below the threshold proper, since what it proposes is compared exactly and what it misses is lost.
        self._threshold = 0.85 * cfg.identical_text
        self._lsh: Any = None

    def add(self, number: int, text: TextFeatures) -> None:
        if not text.whole:
            return
        if self._lsh is None:  # it takes a while to choose its bands, and most data has images
            from datasketch import MinHashLSH

            self._lsh = MinHashLSH(threshold=self._threshold, num_perm=self._num_perm)
        self._lsh.insert(number, self._sketch(text))

    def find(self, text: TextFeatures) -> Sequence[int]:
        if self._lsh is None or not text.whole:
            return []
        return sorted(self._lsh.query(self._sketch(text)))

    def _sketch(self, text: TextFeatures) -> Any:
        from datasketch import MinHash

        sketch = MinHash(num_perm=self._num_perm, seed=1)
        sketch.update_batch([triple.to_bytes(8, "big") for triple in text.whole])
        return sketch
