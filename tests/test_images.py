"""Bitmaps and DICOM, against independent numpy computations and pydicom's own windowing."""

import base64
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedx_fast.data import images
from mmedx_fast.data.images import ImageError, image_digest, load_image
from mmedx_fast.data.records import ImageRef

pydicom = pytest.importorskip("pydicom")
# The files inside the package, found without pydicom's downloader.
DICOM = Path(pydicom.__file__).parent / "data" / "test_files"


def ref(source: Path | bytes) -> ImageRef:
    return ImageRef(data=source) if isinstance(source, bytes) else ImageRef(path=source)


def grey(source: Path | bytes, **options: Any) -> np.ndarray:
    """The picture as [rows, columns], after checking that it is grey RGB."""
    image = load_image(ref(source), **options)
    assert image.mode == "RGB"
    array = np.asarray(image)
    assert (array == array[..., :1]).all()
    return array[..., 0].astype(np.float64)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def dicom_bytes(dataset: Any) -> bytes:
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def ramp(**attributes: Any) -> Any:
    """A 16-bit signed MR slice, changed as told."""
    dataset = pydicom.dcmread(DICOM / "MR_small.dcm")
    for name, value in attributes.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    return dataset


# ---- bitmaps


def test_png_round_trip_is_exact() -> None:
    array = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    loaded = load_image(ref(encode(Image.fromarray(array))))
    assert loaded.mode == "RGB" and (np.asarray(loaded) == array).all()


@pytest.mark.parametrize("top", [200, 1000, 4095, 65535])
def test_deep_grey_png_keeps_relative_brightness(top: int) -> None:
    values = np.linspace(0, top, 64 * 64).astype(np.uint16).reshape(64, 64)
    white = next(2**bits - 1 for bits in range(8, 17) if 2**bits > top)
    expected = values.astype(np.float64) * 255 / white
    assert np.abs(grey(encode(Image.fromarray(values))) - expected).max() <= 0.5


def test_signed_and_float_tiff_are_stretched() -> None:
    values = np.linspace(-1000, 3000, 256).reshape(16, 16)
    expected = (values + 1000) / 4000 * 255
    for dtype in (np.int32, np.float32):
        data = encode(Image.fromarray(values.astype(dtype)), "TIFF")
        assert np.abs(grey(data) - expected).max() <= 0.6
    bad = values.astype(np.float32)
    bad[0, 0] = np.nan
    with pytest.raises(ImageError, match="NaN"):
        load_image(ref(encode(Image.fromarray(bad), "TIFF")))


def test_transparency_lies_over_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = (10, 20, 30, 255)
    shown = np.asarray(load_image(ref(encode(Image.fromarray(rgba, "RGBA")))))
    assert (shown[0] == (10, 20, 30)).all() and (shown[1] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    shown = np.asarray(load_image(ref(encode(palette, transparency=0))))
    assert shown.tolist() == [[[255, 255, 255], [200, 0, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    format = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    loaded = load_image(ref(encode(source, format)))
    assert loaded.mode == "RGB" and loaded.size == (5, 4)
    assert np.asarray(loaded).min() >= 254


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert load_image(ref(encode(image, "JPEG", exif=exif))).size == (20, 40)


@pytest.mark.parametrize("size", [(1000, 10), (333, 517), (20, 4000), (64, 64)])
@pytest.mark.parametrize("max_pixels", [1, 50, 4096])
def test_max_pixels_is_kept(size: tuple[int, int], max_pixels: int) -> None:
    width, height = load_image(ref(encode(Image.new("L", size))), max_pixels=max_pixels).size
    assert 1 <= width * height <= max_pixels
    if max_pixels == 4096:
        assert abs(np.log(width / height) - np.log(size[0] / size[1])) < 0.3


# ---- what is refused


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


NOISE = encode(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (NOISE[: len(NOISE) // 2], "truncated"),
        (NOISE[:20], "truncated|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (png_header(20_000, 20_000), "pixels"),
        (png_header(9_400, 9_500), "pixels"),
        (png_header(201, 1), "aspect ratio"),
        (encode(Image.new("L", (3, 601))), "aspect ratio"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "scan-7.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as error:
        load_image(ref(path))
    assert "scan-7.png" in str(error.value) and ";" in str(error.value)


def test_aspect_ratio_of_200_is_still_taken() -> None:
    assert load_image(ref(encode(Image.new("L", (200, 1))))).size == (200, 1)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such image file"):
        load_image(ref(tmp_path / "gone.png"))
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(ref(tmp_path))


def test_every_truncation_of_every_format_is_an_image_error_or_an_image() -> None:
    sources = [encode(Image.open(io.BytesIO(NOISE)), f) for f in ("PNG", "JPEG", "GIF", "TIFF")]
    sources.append((DICOM / "MR_small.dcm").read_bytes())
    refused = 0
    for source in sources:
        for cut in np.linspace(0, len(source) - 1, 25).astype(int):
            try:
                assert load_image(ref(source[:cut])).mode == "RGB"
            except ImageError:
                refused += 1
    assert refused > 100


def test_size_limit_of_encoded_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(NOISE)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("a.png", NOISE)
    monkeypatch.setattr(images, "MAX_ENCODED_BYTES", 100)
    for source in (
        ImageRef(path=tmp_path / "a.png"),
        ImageRef(member=(tmp_path / "a.zip", "a.png")),
    ):
        with pytest.raises(ImageError, match="more than 100"):
            load_image(source)


# ---- zip members and bytes


def test_zip_member_equals_file(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("images/a b (1).png", NOISE)
    member = ImageRef(member=(archive, "images/a b (1).png"))
    assert (np.asarray(load_image(member))[..., 0] == grey(NOISE)).all()
    assert image_digest(member) == image_digest(ref(NOISE))
    with pytest.raises(ImageError, match="no such member"):
        load_image(ImageRef(member=(archive, "gone.png")))
    with pytest.raises(ImageError, match="no such zip"):
        load_image(ImageRef(member=(tmp_path / "gone.zip", "a.png")))


def test_damaged_zip(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("a.png", NOISE)
    raw = bytearray(archive.read_bytes())
    raw[60] ^= 0xFF  # inside the member's data: the checksum no longer holds
    archive.write_bytes(raw)
    with pytest.raises(ImageError, match="zip"):
        load_image(ImageRef(member=(archive, "a.png")))
    archive.write_bytes(raw[:100])
    with pytest.raises(ImageError, match="not a readable zip"):
        load_image(ImageRef(member=(archive, "a.png")))


def test_zip_is_read_again_after_it_changed(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    for size in (3, 9):
        with zipfile.ZipFile(archive, "w") as out:
            out.writestr("a.png", encode(Image.new("L", (size, size))))
        assert load_image(ImageRef(member=(archive, "a.png"))).size == (size, size)


# ---- base64 inside a file


def test_span_equals_file(tmp_path: Path) -> None:
    text = base64.b64encode(NOISE)
    assert text.endswith(b"=")
    folded = b"\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for spelling in (text, folded, text.rstrip(b"=")):
        file = tmp_path / "rows.tsv"
        file.write_bytes(b"7\t" + spelling + b"\tWhat is shown?\n" + spelling)
        for offset in (2, 2 + len(spelling) + len(b"\tWhat is shown?\n")):
            span = ImageRef(span=(file, offset, len(spelling)))
            assert images.read_encoded(span) == NOISE
            assert (np.asarray(load_image(span))[..., 0] == grey(NOISE)).all()
            assert image_digest(span) == image_digest(ref(NOISE))
            assert str(span) == f"{file}@{offset}+{len(spelling)}"


def test_damaged_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.tsv"
    file.write_bytes(base64.b64encode(NOISE) + b"\tquestion?!")
    size = file.stat().st_size
    for span, message in (
        ((file, 0, size + 1), "the file ends before byte"),
        ((file, 0, size), "is not base64"),
        ((file, 1, 5), "is not base64"),
        ((file, 4, 0), "is empty"),
        ((file, 4, 400), "is not an image"),
        ((tmp_path / "gone.tsv", 0, 4), "no such image file"),
        ((tmp_path, 0, 4), "cannot be read"),
    ):
        with pytest.raises(ImageError, match=rf"{span[0].name}@{span[1]}\+{span[2]}.*{message}"):
            load_image(ImageRef(span=span))
    monkeypatch.setattr(images, "MAX_ENCODED_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100"):
        load_image(ImageRef(span=(file, 0, 101)))


@pytest.mark.parametrize("sources", [{}, {"path": Path("a"), "span": (Path("a"), 0, 1)}])
def test_an_image_lies_in_one_place(sources: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of path, data, member, span and cell"):
        ImageRef(**sources)


# ---- DICOM


def linear_window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, case by case as the standard writes it, for an output of 0..255."""
    inside = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    return np.where(values <= low, 0, np.where(values > high, 255, inside))


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_padded.dcm",
    ],
)
def test_mr_window_in_every_encoding(name: str) -> None:
    plain = pydicom.dcmread(DICOM / "MR_small.dcm").pixel_array.astype(np.float64)
    assert np.abs(grey(DICOM / name) - linear_window(plain, 600, 1600)).max() <= 0.5


def test_ct_rescale_and_window() -> None:
    dataset = pydicom.dcmread(DICOM / "dicomdirtests" / "98892001" / "CT5N" / "2062")
    assert (dataset.RescaleIntercept, dataset.WindowCenter, dataset.WindowWidth) == (-1024, 40, 400)
    expected = linear_window(dataset.pixel_array.astype(np.float64) - 1024, 40, 400)
    assert 0 < expected.mean() < 255
    shown = grey(DICOM / "dicomdirtests" / "98892001" / "CT5N" / "2062")
    assert np.abs(shown - expected).max() <= 0.5


def test_first_of_several_windows() -> None:
    dataset = pydicom.dcmread(DICOM / "examples_overlay.dcm")
    assert list(dataset.WindowCenter) == [450, 200] and list(dataset.WindowWidth) == [790, 443]
    expected = linear_window(dataset.pixel_array.astype(np.float64), 450, 790)
    assert np.abs(grey(DICOM / "examples_overlay.dcm") - expected).max() <= 0.5


def test_monochrome1_is_inverted() -> None:
    path = DICOM / "dicomdirtests" / "77654033" / "CR1" / "6154"
    dataset = pydicom.dcmread(path)
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    expected = 255 - linear_window(values, float(dataset.WindowCenter), float(dataset.WindowWidth))
    shown = grey(path)
    assert np.abs(shown - expected).max() <= 0.5
    # The larger the stored value, the darker: dense tissue stays bright.
    assert np.corrcoef(values.ravel(), shown.ravel())[0, 1] < -0.99


def test_without_window_the_percentiles_are_stretched() -> None:
    dataset = pydicom.dcmread(DICOM / "CT_small.dcm")
    assert "WindowCenter" not in dataset
    values = dataset.pixel_array.astype(np.float64) - 1024
    low, high = np.quantile(
        values[values != float(dataset.PixelPaddingValue) - 1024], [0.005, 0.995]
    )
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    assert np.abs(grey(DICOM / "CT_small.dcm") - expected).max() <= 0.5


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(600.0, 1600.0), (1000.0, 37.5), (300.0, 1.5)])
def test_window_functions_agree_with_pydicom(function: str, center: float, width: float) -> None:
    from pydicom.pixels import apply_windowing

    dataset = ramp(WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    shown = apply_windowing(dataset.pixel_array, dataset)  # in the signed 16-bit range
    expected = (shown + 2.0**15) / (2.0**16 - 1) * 255
    assert np.abs(grey(dicom_bytes(dataset)) - expected).max() <= 0.51


def test_window_of_width_one_is_a_threshold() -> None:
    dataset = ramp(WindowCenter=600, WindowWidth=1)
    expected = np.where(dataset.pixel_array >= 600, 255, 0)
    assert (grey(dicom_bytes(dataset)) == expected).all()


def test_voi_lut_sequence_comes_before_the_window() -> None:
    item = pydicom.Dataset()
    item.LUTDescriptor = [1000, 100, 12]
    table = (4095 - np.arange(1000) * 4).astype(int)
    item.LUTData = table.astype("<u2").tobytes()
    dataset = ramp(PixelRepresentation=0, VOILUTSequence=pydicom.Sequence([item]))
    expected = table[np.clip(dataset.pixel_array.astype(int) - 100, 0, 999)] / 4095 * 255
    assert np.abs(grey(dicom_bytes(dataset)) - expected).max() <= 0.5


def test_lut_of_a_big_endian_file() -> None:
    item = pydicom.Dataset()
    item.LUTDescriptor = [1000, 100, 12]
    table = np.arange(1000) * 4
    item.LUTData = table.astype(">u2").tobytes()
    dataset = pydicom.dcmread(DICOM / "MR_small_bigendian.dcm")
    dataset.VOILUTSequence = pydicom.Sequence([item])
    expected = table[np.clip(dataset.pixel_array.astype(int) - 100, 0, 999)] / 4095 * 255
    assert np.abs(grey(dicom_bytes(dataset)) - expected).max() <= 0.5


def test_modality_lut_sequence() -> None:
    item = pydicom.Dataset()
    item.LUTDescriptor = [2000, 0, 16]
    item.add_new("LUTData", "US", (np.arange(2000) * 2 + 5).tolist())
    dataset = ramp(
        PixelRepresentation=0,
        ModalityLUTSequence=pydicom.Sequence([item]),
        WindowCenter=1200,
        WindowWidth=3000,
    )
    values = np.clip(dataset.pixel_array.astype(int), 0, 1999) * 2 + 5
    expected = linear_window(values.astype(np.float64), 1200, 3000)
    assert np.abs(grey(dicom_bytes(dataset)) - expected).max() <= 0.5


def test_rescale_and_window_of_the_frame_itself() -> None:
    """Enhanced multi-frame: values of the frame's own functional group, or the shared."""

    def group(**sequences: dict[str, Any]) -> Any:
        outer = pydicom.Dataset()
        for name, values in sequences.items():
            inner = pydicom.Dataset()
            for key, value in values.items():
                setattr(inner, key, value)
            setattr(outer, name, pydicom.Sequence([inner]))
        return outer

    dataset = ramp(WindowCenter=None, WindowWidth=None, NumberOfFrames=2)
    frame = pydicom.dcmread(DICOM / "MR_small.dcm").pixel_array.astype(np.float64)
    raw = pydicom.dcmread(DICOM / "MR_small.dcm").PixelData
    dataset.PixelData = raw + raw
    scale = {"RescaleSlope": 2, "RescaleIntercept": -100, "RescaleType": "US"}
    dataset.SharedFunctionalGroupsSequence = pydicom.Sequence(
        [group(PixelValueTransformationSequence=scale)]
    )
    windows = [{"WindowCenter": c, "WindowWidth": 1000} for c in (500, 1500)]
    dataset.PerFrameFunctionalGroupsSequence = pydicom.Sequence(
        [group(FrameVOILUTSequence=window) for window in windows]
    )
    for index, center in enumerate((500, 1500)):
        expected = linear_window(frame * 2 - 100, center, 1000)
        shown = grey(dicom_bytes(dataset), frame=index)
        assert np.abs(shown - expected).max() <= 0.5


def test_multi_frame_takes_the_middle_frame() -> None:
    dataset = pydicom.dcmread(DICOM / "rtdose.dcm")
    frames = dataset.pixel_array
    assert len(frames) == 15
    shown = [grey(DICOM / "rtdose.dcm", frame=i) for i in range(15)]
    assert (grey(DICOM / "rtdose.dcm") == shown[7]).all()
    values = frames[7].astype(np.float64)
    low, high = np.quantile(values, [0.005, 0.995])
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    assert np.abs(shown[7] - expected).max() <= 0.5
    with pytest.raises(ImageError, match="frame 15 of 15"):
        load_image(ref(DICOM / "rtdose.dcm"), frame=15)


def test_ultrasound_rgb_palette_and_ybr() -> None:
    rgb = pydicom.dcmread(DICOM / "examples_rgb_color.dcm")
    shown = np.asarray(load_image(ref(DICOM / "examples_rgb_color.dcm")))
    assert (shown == rgb.pixel_array).all()

    palette = pydicom.dcmread(DICOM / "examples_palette.dcm")
    tables = [
        np.frombuffer(getattr(palette, f"{c}PaletteColorLookupTableData"), "<u2") / 65535 * 255
        for c in ("Red", "Green", "Blue")
    ]
    expected = np.stack([table[palette.pixel_array] for table in tables], -1)
    shown = np.asarray(load_image(ref(DICOM / "examples_palette.dcm"))).astype(float)
    assert np.abs(shown - expected).max() <= 0.5

    ybr = pydicom.dcmread(DICOM / "SC_ybr_full_422_uncompressed.dcm")
    y, cb, cr = np.moveaxis(pydicom.pixels.pixel_array(ybr, raw=True).astype(float), -1, 0)
    expected = np.stack(
        [
            y + 1.402 * (cr - 128),
            y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
            y + 1.772 * (cb - 128),
        ],
        -1,
    )
    shown = np.asarray(load_image(ref(DICOM / "SC_ybr_full_422_uncompressed.dcm"))).astype(float)
    assert np.abs(shown - np.clip(expected, 0, 255)).max() <= 1.01


@pytest.mark.parametrize("name", ["SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"])
def test_deep_colour(name: str) -> None:
    dataset = pydicom.dcmread(DICOM / name)
    expected = dataset.pixel_array / (2.0**dataset.BitsStored - 1) * 255
    shown = np.asarray(load_image(ref(DICOM / name))).astype(float)
    assert np.abs(shown - expected).max() <= 0.5


def test_eight_bit_and_one_bit_without_window_keep_their_range() -> None:
    dataset = pydicom.dcmread(DICOM / "image_dfl.dcm")
    assert (grey(DICOM / "image_dfl.dcm") == dataset.pixel_array).all()
    mask = pydicom.dcmread(DICOM / "liver_1frame.dcm").pixel_array
    assert (grey(DICOM / "liver_1frame.dcm") == mask * 255).all()


def test_file_without_meta_header(tmp_path: Path) -> None:
    raw = (DICOM / "MR_small_implicit.dcm").read_bytes()
    length = pydicom.dcmread(DICOM / "MR_small_implicit.dcm").file_meta
    bare = raw[132 + 12 + length.FileMetaInformationGroupLength :]
    path = tmp_path / "bare.dcm"
    path.write_bytes(bare)
    assert (grey(path) == grey(DICOM / "MR_small.dcm")).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reportsi.dcm", "without pixel data.*SR"),
        ("dicomdirtests/DICOMDIR", "without pixel data"),
        ("MR_truncated.dcm", "truncated or damaged"),
        ("JPEGLSNearLossless_08.dcm", "cannot be decoded.*pylibjpeg"),
        ("badVR.dcm", "damaged DICOM"),
    ],
)
def test_dicom_that_cannot_be_shown(name: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        load_image(ref(DICOM / name))
    assert Path(name).name in str(error.value) and "\n" not in str(error.value)


def test_dicom_headers_that_lie() -> None:
    with pytest.raises(ImageError, match="pixels"):
        load_image(ref(dicom_bytes(ramp(Rows=60_000, Columns=60_000))))
    with pytest.raises(ImageError, match="aspect ratio"):
        load_image(ref(dicom_bytes(ramp(Rows=4096, Columns=1))))
    with pytest.raises(ImageError, match="'HSV' is not supported"):
        load_image(ref(dicom_bytes(ramp(PhotometricInterpretation="HSV"))))
    with pytest.raises(ImageError, match="without Rows"):
        load_image(ref(dicom_bytes(ramp(Rows=None))))


def test_every_shipped_file_gives_an_image_or_an_image_error() -> None:
    shown = 0
    for path in sorted(p for p in DICOM.rglob("*") if p.is_file()):
        try:
            shown += load_image(ref(path)).mode == "RGB"
        except ImageError as error:
            assert path.name in str(error)
    assert shown >= 60
