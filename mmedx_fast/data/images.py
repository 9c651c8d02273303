"""Opening images: PNG, JPEG (and other bitmap files) and DICOM, from files, zip members, bytes,
base64 inside a file or a cell of a parquet file, all to 8-bit RGB.

Nothing else in the project opens an image. Every failure is an ``ImageError`` that names the image
and the remedy.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmedx_fast.data.records import ImageRef

if TYPE_CHECKING:
    from PIL import Image

MAX_DECODED_PIXELS = 89_000_000
"""Larger images are refused before their pixels are decoded (a decompression bomb, or a whole-slide
scan).
"""

MAX_ENCODED_BYTES = 1 << 30
"""Larger files and zip members are refused before they are read."""

MAX_ASPECT_RATIO = 200
"""The Qwen-VL image processors refuse anything more elongated."""

# EPS, PDF and friends are left out: Pillow hands them to external programs.
_BITMAP_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says what to do."""

    def __init__(self, ref: ImageRef | str, problem: str, remedy: str) -> None:
        # Decoders put several lines, one per plugin, into their messages.
        super().__init__(f"{ref}: {' '.join(problem.split())[:300]}; {remedy}")


def load_image(
    ref: ImageRef, *, max_pixels: int | None = None, frame: int | None = None
) -> Image.Image:
    """Open one image and return it as a fully decoded 8-bit RGB Pillow image.

    ``max_pixels``: an image with more pixels is shrunk to at most that many, aspect ratio kept.
    ``frame``: which frame of a multi-frame DICOM, from 0; ``None`` takes the middle one. Of an
    animated or multi-page bitmap file the first picture is taken.

    Greyscale above 8 bits keeps its relative brightness: full white is the largest number with as
    many bits as the image's maximum, so 12-bit data in a 16-bit PNG is not black. Signed and float
    greyscale is stretched from minimum to maximum. Transparency is laid over white. EXIF
    orientation is applied. For DICOM see ``dicom.py``.

    Raises ``ImageError`` for an image that is missing, empty, truncated, no image, over
    ``MAX_DECODED_PIXELS``, over ``MAX_ENCODED_BYTES``, more elongated than ``MAX_ASPECT_RATIO``, or
    DICOM that cannot be shown.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}; give a positive number or None")
    encoded = read_encoded(ref)
    if _is_dicom(ref, encoded):
        from mmedx_fast.data.dicom import decode_dicom

        image = decode_dicom(ref, encoded, frame=frame)
    else:
        image = _decode_bitmap(ref, encoded)
    return _shrink(image, max_pixels)


def image_digest(ref: ImageRef) -> str:
    """SHA-256 (hex) of the encoded bytes, for finding the same image in two data sets."""
    return hashlib.sha256(read_encoded(ref)).hexdigest()


def zip_members(path: Path) -> Mapping[str, zipfile.ZipInfo]:
    """Names inside a zip file, its directory read once per file version. Raises ``ImageError``."""
    return _open_zip(path).NameToInfo


def check_size(ref: ImageRef, width: int, height: int) -> None:
    """Refuse a size that must not be decoded (too many pixels) or that the model cannot take (too
    elongated).
    """
    if width < 1 or height < 1:
        raise ImageError(ref, f"has no pixels ({width}x{height})", "replace the file")
    if width * height > MAX_DECODED_PIXELS:
        raise ImageError(
            ref,
            f"{width}x{height} is more than {MAX_DECODED_PIXELS} pixels",
            "shrink it, or remove it if it is not what it should be",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            ref,
            f"aspect ratio of {width}x{height} is over {MAX_ASPECT_RATIO}, which the model refuses",
            "crop or pad it",
        )


def read_encoded(ref: ImageRef) -> bytes:
    """The encoded bytes of an image, bounded by ``MAX_ENCODED_BYTES``."""
    if ref.data is not None:
        encoded = ref.data
    elif ref.member is not None:
        encoded = _read_member(ref, *ref.member)
    elif ref.span is not None:
        encoded = _read_span(ref, *ref.span)
    elif ref.cell is not None:
        encoded = _read_cell(ref, *ref.cell)
    else:
        assert ref.path is not None
        encoded = _read_file(ref, ref.path, 0, None)
    if not encoded:
        raise ImageError(ref, "is empty (0 bytes)", "copy the file again from its source")
    return encoded


def _read_file(ref: ImageRef, path: Path, offset: int, length: int | None) -> bytes:
    """A file's bytes, or ``length`` of them from ``offset``."""
    try:
        with path.open("rb") as file:
            _check_encoded_size(ref, os.fstat(file.fileno()).st_size if length is None else length)
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except FileNotFoundError:
        raise ImageError(
            ref, "no such image file", "restore it or remove its row from the data"
        ) from None
    except OSError as error:
        raise ImageError(
            ref, f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error


def _read_span(ref: ImageRef, path: Path, offset: int, length: int) -> bytes:
    """The image whose base64 text lies at a place in a file; blanks and line ends in it are passed
    over, padding may be missing.
    """
    text = _read_file(ref, path, offset, length)
    if len(text) < length:
        raise ImageError(
            ref,
            f"the file ends before byte {offset + length}",
            "load the data again, the file was changed or cut off",
        )
    text = text.translate(None, b" \t\r\n")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise ImageError(
            ref,
            f"is not base64 ({error})",
            "load the data again if the file was changed, else copy it again from its source",
        ) from error


def _read_member(ref: ImageRef, archive: Path, name: str) -> bytes:
    opened = _open_zip(archive)
    try:
        _check_encoded_size(ref, opened.getinfo(name).file_size)
        return opened.read(name)
    except KeyError:
        raise ImageError(
            ref, "no such member in the zip file", "check the name in the data row"
        ) from None
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        # RuntimeError: encrypted member; NotImplementedError: unknown compression.
        raise ImageError(
            ref, f"zip member cannot be read ({error})", "copy or build the zip file again"
        ) from error


def _read_cell(ref: ImageRef, file: Path, row: int, column: str, position: int) -> bytes:
    from mmedx_fast.data.parquet import read_cell

    try:
        encoded = read_cell(file, row, column, position)
    except FileNotFoundError:
        raise ImageError(ref, "no such data file", "check the path") from None
    except (LookupError, ValueError, OSError) as error:
        raise ImageError(
            ref, f"cannot be read ({error})", "copy the data file again and load it anew"
        ) from error
    _check_encoded_size(ref, len(encoded))
    return encoded


def _check_encoded_size(ref: ImageRef, size: int) -> None:
    if size > MAX_ENCODED_BYTES:
        raise ImageError(
            ref, f"{size} bytes is more than {MAX_ENCODED_BYTES}", "shrink or split the image"
        )


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        stat = path.stat()
        # The process id keeps forked data-loader workers off their parent's file position.
        return _cached_zip(str(path), stat.st_mtime_ns, stat.st_size, os.getpid())
    except FileNotFoundError:
        raise ImageError(str(path), "no such zip file", "check the path") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageError(
            str(path), f"is not a readable zip file ({error})", "copy it again from its source"
        ) from error


@functools.lru_cache(maxsize=8)
def _cached_zip(path: str, mtime_ns: int, size: int, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _is_dicom(ref: ImageRef, encoded: bytes) -> bool:
    if encoded[128:132] == b"DICM":
        return True
    name = str(ref.path or (ref.member or ("", ""))[1]).lower()
    return name.endswith(_DICOM_SUFFIXES)


def _decode_bitmap(ref: ImageRef, encoded: bytes) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=_BITMAP_FORMATS) as image:
            check_size(ref, *image.size)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(ref, image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            ref,
            "is not an image (no PNG, JPEG, DICOM or other bitmap header)",
            "replace the file or remove its row from the data",
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(ref, f"decompression bomb ({error})", "remove or shrink it") from error
    except Exception as error:  # Pillow's decoders raise most built-in types on damaged data
        raise ImageError(
            ref, f"is truncated or damaged ({error})", "copy the file again from its source"
        ) from error


def _to_rgb(ref: ImageRef, image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _grey_to_rgb(ref, image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    # A copy even when the mode is RGB already: the caller's image outlives the file object.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _grey_to_rgb(ref: ImageRef, image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits (modes I, I;16*, F) to RGB, scaled as ``load_image`` says."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(ref, "holds NaN or infinite pixels", "export it again as 8 or 16 bit")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0:
        low, high = 0.0, float((1 << max(int(high).bit_length(), 8)) - 1)
    span = high - low if high > low else 1.0
    grey = np.floor((values - low) / span * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    from PIL import Image

    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = (max_pixels / (width * height)) ** 0.5
    # Rounding down keeps the product at or under max_pixels unless a side is clamped to one pixel.
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    size = (min(size[0], max_pixels // size[1] or 1), min(size[1], max_pixels // size[0] or 1))
    return image.resize(size, Image.Resampling.LANCZOS)
