"""What questions are compared by: word runs of their texts, perceptual hashes of their images."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmedx_fast.data.images import ImageError, load_image, read_encoded
from mmedx_fast.data.records import ImageRef, Record

if TYPE_CHECKING:
    from PIL import Image

# Chinese is written without blanks, so each character stands for a word.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_RUN = 3
_LONG_RUN = 13
HASH_BYTES = 128
_HASH_SIZE = 32
_HIGHFREQ = 2


def words(text: str) -> list[str]:
    """Words in one case and Unicode form; blanks and punctuation make no difference."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """``stem``: triples of words of the question text; ``whole``: those and the options', each option on
    its own so that their order makes no difference; ``runs``: 13-word runs of the question text."""

    n_words: int
    stem: frozenset[int]
    whole: frozenset[int]
    runs: frozenset[int]


def text_features(record: Record) -> TextFeatures:
    stem = words(record.question)
    triples = _runs(stem, _RUN)
    options = (_runs(words(text), _RUN) for text in (record.options or {}).values())
    runs = _runs(stem, _LONG_RUN) if len(stem) >= _LONG_RUN else frozenset()
    return TextFeatures(len(stem), triples, triples.union(*options), runs)


def _runs(text: Sequence[str], length: int) -> frozenset[int]:
    """64-bit hashes of all runs of ``length`` words, of the whole where it is shorter."""
    length = min(length, len(text))
    if not length:
        return frozenset()
    return frozenset(_hash64(" ".join(text[i : i + length])) for i in range(len(text) - length + 1))


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def containment(a: frozenset[int], b: frozenset[int]) -> float:
    """Share of the smaller set that is in the other."""
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def perceptual_hash(image: Image.Image) -> bytes:
    """1,024 bits of the image's cosine transform: nearly the same after re-encoding, scaling, and
    changes of colour or brightness. ``imagehash.phash`` with its usual 64 bits cannot tell two chest films
    apart; these can. A mirrored, rotated or cropped copy is another image to it."""
    import imagehash
    import numpy as np

    found = imagehash.phash(image, hash_size=_HASH_SIZE, highfreq_factor=_HIGHFREQ)
    return np.packbits(found.hash.ravel()).tobytes()


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """``digest``: SHA-256 of the encoded bytes; ``hash``: :func:`perceptual_hash`; ``pixels``: width times
    height."""

    digest: str
    hash: bytes
    pixels: int


class ImageHasher:
    """Features of images, each file's remembered in ``cache`` by its content: hashing means decoding."""

    def __init__(self, cache: Path, workers: int) -> None:
        self._cache, self._workers = cache, workers
        self._known: dict[str, tuple[bytes, int]] = {}
        self._lock = threading.Lock()
        self._read_cache()
        cache.parent.mkdir(parents=True, exist_ok=True)
        # After a kill the last line may lack its end; a line of its own keeps the next one whole.
        self._out = cache.open("a", encoding="ascii")
        if cache.stat().st_size:
            self._out.write("\n")

    def all_of(
        self, records: Iterable[Record]
    ) -> Iterator[tuple[Record, tuple[ImageFeatures, ...] | ImageError]]:
        """Records in order with the features of their images, or why one cannot be used."""
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            window: list[tuple[Record, concurrent.futures.Future[tuple[ImageFeatures, ...]]]] = []
            for record in records:
                window.append((record, pool.submit(self._of, record.images)))
                if len(window) >= 16 * self._workers:  # a bounded number of images in memory
                    yield self._outcome(*window.pop(0))
            for item in window:
                yield self._outcome(*item)
        self._out.flush()

    def close(self) -> None:
        self._out.close()

    def _outcome(
        self, record: Record, future: concurrent.futures.Future[tuple[ImageFeatures, ...]]
    ) -> tuple[Record, tuple[ImageFeatures, ...] | ImageError]:
        try:
            return record, future.result()
        except ImageError as error:
            return record, error

    def _of(self, refs: Sequence[ImageRef]) -> tuple[ImageFeatures, ...]:
        return tuple(self._one(ref) for ref in refs)

    def _one(self, ref: ImageRef) -> ImageFeatures:
        digest = hashlib.sha256(read_encoded(ref)).hexdigest()
        known = self._known.get(digest)
        if known is None:
            image = load_image(ref)
            known = (perceptual_hash(image), image.width * image.height)
            line = {"sha256": digest, "hash": known[0].hex(), "pixels": known[1]}
            with self._lock:
                self._known[digest] = known
                self._out.write(json.dumps(line) + "\n")
        return ImageFeatures(digest, *known)

    def _read_cache(self) -> None:
        if not self._cache.is_file():
            return
        with self._cache.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    found = bytes.fromhex(row["hash"]), int(row["pixels"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a kill: that image is hashed again
                if len(found[0]) == HASH_BYTES:
                    self._known[row["sha256"]] = found
