"""DICOM to 8-bit RGB, following the grayscale pipeline of DICOM PS3.3 C.11: modality LUT, VOI LUT,
presentation.

- Modality: Modality LUT Sequence, else rescale slope and intercept.
- Values of interest: VOI LUT Sequence, else the window. Of several windows or LUTs the first is
  taken. LINEAR, LINEAR_EXACT and SIGMOID are known. Without a usable window, images of up to 8 bits
  keep their full range and deeper ones are stretched between their 0.5th and 99.5th percentile
  (pixel padding left out).
- MONOCHROME1 is inverted, so that dense is bright in every image the model sees.
- Palette, RGB and YBR images become RGB. Of a multi-frame image the middle frame is taken unless
  one is named.
- Per-frame values of enhanced multi-frame images (functional groups) are honoured. Overlays are not
  drawn.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmedx_fast.data.images import ImageError, check_size
from mmedx_fast.data.records import ImageRef

if TYPE_CHECKING:
    from PIL import Image
    from pydicom.dataset import Dataset

_PIXEL_ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_AUTO_PERCENTILES = (0.5, 99.5)


def decode_dicom(ref: ImageRef, encoded: bytes, *, frame: int | None = None) -> Image.Image:
    """Decode one frame of a DICOM file to an RGB Pillow image; raises ``ImageError``."""
    from PIL import Image

    dataset = _parse(ref, encoded)
    try:
        frame = _check_header(ref, dataset, frame)
        pixels = _decode_frame(ref, dataset, frame)
        kind = dataset.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            rgb = _palette(dataset, pixels)
        elif kind in _COLOR:
            rgb = _to_uint8(pixels.astype(np.float64), 0, 2.0**dataset.BitsStored - 1)
        else:
            rgb = _monochrome(dataset, pixels, frame)
    except ImageError:
        raise
    except Exception as error:  # pydicom raises most built-in types on damaged headers
        raise ImageError(
            ref,
            f"damaged DICOM ({type(error).__name__}: {error})",
            "export it again, or convert it to PNG",
        ) from error
    return Image.fromarray(rgb).convert("RGB")


def _parse(ref: ImageRef, encoded: bytes) -> Dataset:
    try:
        import pydicom
    except ImportError as error:
        raise ImageError(
            ref, "is DICOM and pydicom is not installed", "run: pip install pydicom"
        ) from error
    try:
        dataset = pydicom.dcmread(io.BytesIO(encoded), force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            # Without a file meta header the encoding that pydicom inferred is all there is.
            implicit, little = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = _native_syntax(bool(implicit), bool(little))
        return dataset
    except Exception as error:
        raise ImageError(
            ref, f"is not readable as DICOM ({error})", "copy the file again from its source"
        ) from error


def _native_syntax(implicit: bool, little: bool) -> Any:
    from pydicom import uid

    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _check_header(ref: ImageRef, dataset: Dataset, frame: int | None) -> int:
    """Refuse what cannot be shown before any pixel is decoded; return the frame to take."""
    if not any(name in dataset for name in _PIXEL_ELEMENTS):
        raise ImageError(
            ref,
            f"DICOM without pixel data (modality {dataset.get('Modality', 'unknown')})",
            "use the image object instead of the report, plan, directory or waveform",
        )
    for name in ("Rows", "Columns", "PhotometricInterpretation"):
        if dataset.get(name) is None:
            raise ImageError(ref, f"DICOM without {name}", "export the image again")
    kind = dataset.PhotometricInterpretation
    if kind not in (*_COLOR, "PALETTE COLOR", "MONOCHROME1", "MONOCHROME2"):
        raise ImageError(
            ref, f"DICOM photometric interpretation {kind!r} is not supported", "convert it to PNG"
        )
    check_size(ref, int(dataset.Columns), int(dataset.Rows))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frame is None:
        return frames // 2
    if not 0 <= frame < frames:
        raise ImageError(ref, f"frame {frame} of {frames} does not exist", f"use 0..{frames - 1}")
    return frame


def _decode_frame(ref: ImageRef, dataset: Dataset, frame: int) -> NDArray[Any]:
    """One frame as [rows, columns] or, for colour, [rows, columns, 3] (YBR already turned into
    RGB).
    """
    from pydicom.pixels import pixel_array

    try:
        return pixel_array(dataset, index=frame)
    except (NotImplementedError, RuntimeError) as error:
        raise ImageError(
            ref,
            f"{dataset.file_meta.TransferSyntaxUID.name} pixels cannot be decoded ({error})",
            "decompress the file (dcmdjpeg, gdcmconv --raw) or: pip install pylibjpeg[all]",
        ) from error
    except Exception as error:
        raise ImageError(
            ref,
            f"DICOM pixel data truncated or damaged ({error})",
            "copy the file again from its source",
        ) from error


def _palette(dataset: Dataset, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    from pydicom.pixels import apply_color_lut

    color = apply_color_lut(pixels, dataset)[..., :3]
    return _to_uint8(color.astype(np.float64), 0, float(np.iinfo(color.dtype).max))


def _monochrome(dataset: Dataset, pixels: NDArray[Any], frame: int) -> NDArray[np.uint8]:
    modality = _frame_item(dataset, frame, "PixelValueTransformationSequence")
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinite pixels")
    rescaled = True
    if dataset.get("ModalityLUTSequence"):
        values = _lookup(dataset, dataset.ModalityLUTSequence[0], values)[0]
    elif modality.get("RescaleSlope") is not None:
        values = values * float(modality.RescaleSlope) + float(
            modality.get("RescaleIntercept") or 0
        )
    else:
        rescaled = False

    voi = _frame_item(dataset, frame, "FrameVOILUTSequence")
    window = _window(voi)
    if voi.get("VOILUTSequence"):
        table, white = _lookup(dataset, voi.VOILUTSequence[0], values)
        grey = _to_uint8(table, 0, white)
    elif window is not None:
        grey = _apply_window(values, *window)
    elif not rescaled and dataset.get("BitsStored", 32) <= 8 and not dataset.PixelRepresentation:
        grey = _to_uint8(values, 0, 2.0**dataset.BitsStored - 1)
    else:
        grey = _auto_window(dataset, pixels, values)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _frame_item(dataset: Dataset, frame: int, sequence: str) -> Dataset:
    """Where a frame's values stand: its own functional group, the shared one, or the data set
    itself.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in [*per_frame[frame : frame + 1], *shared[:1]]:
        if group.get(sequence):
            return group[sequence].value[0]
    return dataset


def _lookup(dataset: Dataset, item: Dataset, values: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Apply one LUT item (PS3.3 C.11.1.1, C.11.2.1.1); returns the table's values and its full
    white.
    """
    entries, first, bits = (int(part) for part in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        little = dataset.original_encoding[1] is not False
        data = np.frombuffer(data, "<u2" if little else ">u2")
    table = np.asarray(data, np.float64)[: entries or 1 << 16]
    index = np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.int64)
    return table[index], 2.0**bits - 1


def _window(item: Dataset) -> tuple[float, float, str] | None:
    """The first window (centre, width, function), or None if there is none to apply."""
    center, width = (_first(item.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = str(item.get("VOILUTFunction") or "LINEAR").upper()
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    return center, width, function


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return float(value[0]) if len(value) else None
    return float(value)


def _apply_window(
    values: NDArray[Any], center: float, width: float, function: str
) -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 with an output range of 0..255."""
    if function == "SIGMOID":
        unit = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        unit = (values - center) / width + 0.5
    elif function == "LINEAR":
        # A width of 1 is a threshold: the standard's formula would divide by zero.
        unit = (
            (values - (center - 0.5)) / (width - 1) + 0.5
            if width > 1
            else (values > center - 0.5).astype(np.float64)
        )
    else:
        raise ValueError(f"VOI LUT function {function!r} is not in the standard")
    return _to_uint8(unit, 0, 1)


def _auto_window(dataset: Dataset, pixels: NDArray[Any], values: NDArray[Any]) -> NDArray[np.uint8]:
    shown = values
    padding = dataset.get("PixelPaddingValue")
    if padding is not None and (pixels != padding).any():
        shown = values[pixels != padding]
    low, high = (float(bound) for bound in np.percentile(shown, _AUTO_PERCENTILES))
    if high <= low:
        low, high = float(shown.min()), float(shown.max())
    return _to_uint8(values, low, high)


def _to_uint8(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map low..high to 0..255, clipped, rounded half up; a constant image (high <= low) becomes
    black.
    """
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.floor(np.clip((values - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)
