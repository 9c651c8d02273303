"""Parquet and saved data sets: rows without their image bytes, images read one by one when opened."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedx_fast.data import parquet
from mmedx_fast.data.images import ImageError, image_digest, load_image, read_encoded
from mmedx_fast.data.loaders import load_records
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.parquet import read_parquet, read_saved
from mmedx_fast.data.records import ImageRef

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("L", (size, size), value).save(out, "PNG")
    return out.getvalue()


def rows_of(file: Path) -> list[dict[str, Any]]:
    read = list(read_saved(file) if file.is_dir() else read_parquet(file))
    assert [number for number, _ in read] == list(range(1, len(read) + 1))
    return [row for _, row in read if isinstance(row, dict)]


IMAGES: list[Any] = [
    {"bytes": png(0), "path": "a.png"},
    {"bytes": png(1), "path": None},
    None,
    {"bytes": None, "path": "there.png"},
    {"bytes": png(4), "path": "b.png"},
]
LISTS: list[Any] = [
    [{"bytes": png(10), "path": None}, {"bytes": png(11), "path": None}],
    [],
    None,
    [{"bytes": None, "path": "x.png"}, {"bytes": png(31), "path": None}],
    [{"bytes": png(40), "path": "y.png"}],
]


def mixed(bytes_only: bool = False) -> pa.Table:
    """Every way to store images, with and without nulls; with ``bytes_only`` no path is needed."""

    def drop(value: Any) -> Any:
        return None if bytes_only and value and value["bytes"] is None else value

    images = [drop(value) for value in IMAGES]
    lists = [None if v is None else [x for x in map(drop, v) if x] for v in LISTS]
    plain = [None if v is None else v["bytes"] for v in images]
    plains = [None if v is None else [x["bytes"] for x in v if x["bytes"]] for v in lists]
    return pa.table(
        {
            "question": [f"q{i}" for i in range(5)],
            "image": pa.array(images, STRUCT),
            "images": pa.array(lists, pa.list_(STRUCT)),
            "plain": pa.array(plain, pa.binary()),
            "plains": pa.array(plains, pa.large_list(pa.large_binary())),
            "only": pa.array(
                [v and {"bytes": v["bytes"]} for v in images], pa.struct([("bytes", pa.binary())])
            ),
            "n": pa.array([1.5, None, float("nan"), 2.0, 3.0]),
        }
    )


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("bytes_only", [False, True])
@pytest.mark.parametrize("statistics", [True, False])
def test_every_way_to_store_an_image(
    tmp_path: Path, group: int, bytes_only: bool, statistics: bool
) -> None:
    file = tmp_path / "t.parquet"
    table = mixed(bytes_only)
    pq.write_table(table, file, row_group_size=group, write_statistics=statistics)
    check_rows(file, table)


def check_rows(file: Path, table: pa.Table) -> None:
    """Rows against what pyarrow itself reads, image by image."""
    got, expected = rows_of(file), table.to_pylist()
    assert len(got) == len(expected)

    def same(value: Any, wanted: Any) -> None:
        if isinstance(wanted, list):
            assert len(value) == len(wanted)
            for one, other in zip(value, wanted, strict=True):
                same(one, other)
            return
        data = wanted["bytes"] if isinstance(wanted, dict) else wanted
        if data is not None:
            assert isinstance(value, ImageRef) and value.data is None
            assert read_encoded(value) == data
        else:
            assert value == (wanted.get("path") if isinstance(wanted, dict) else None)

    for row, wanted in zip(got, expected, strict=True):
        assert list(row) == table.column_names
        assert row["question"] == wanted["question"]
        assert row["n"] == (wanted["n"] if wanted["n"] == wanted["n"] else None)
        for name in ("image", "images", "plain", "plains", "only"):
            same(row[name], wanted[name])


def test_cells_name_their_place_and_open(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(mixed(), file, row_group_size=2)
    rows = rows_of(file)
    assert rows[4]["image"] == ImageRef(cell=(file, 4, "image", -1))
    assert rows[3]["images"] == ["x.png", ImageRef(cell=(file, 3, "images", 1))]
    assert str(rows[4]["image"]) == f"{file}!image[4]"
    assert str(rows[3]["images"][1]) == f"{file}!images[3][1]"
    assert load_image(rows[4]["image"]).getpixel((0, 0)) == (4, 4, 4)
    assert image_digest(rows[0]["images"][1]) == image_digest(ImageRef(data=png(11)))


def test_values_that_json_cannot_hold_become_text(tmp_path: Path) -> None:
    import datetime
    import decimal
    import json

    table = pa.table(
        {
            "day": [datetime.date(2024, 1, 2)],
            "price": [decimal.Decimal("1.50")],
            "nested": [{"x": [float("inf"), 1.0]}],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    (row,) = rows_of(tmp_path / "t.parquet")
    assert row == {"day": "2024-01-02", "price": "1.50", "nested": {"x": [None, 1.0]}}
    assert json.dumps(row, allow_nan=False)


def test_loading_never_holds_the_images(tmp_path: Path) -> None:
    """96 MiB of images; a process that lists all rows and opens one stays far below that."""
    file = tmp_path / "big.parquet"
    blob = [bytes([i]) * (1 << 20) for i in range(8)]
    writer: pq.ParquetWriter | None = None
    for group in range(12):
        cells = [{"bytes": data, "path": None} for data in blob]
        table = pa.table(
            {
                "image": pa.array(cells, STRUCT),
                "images": pa.array([[cell] for cell in cells], pa.list_(STRUCT)),
                "question": [f"q{group}-{i}" for i in range(8)],
            }
        )
        writer = writer or pq.ParquetWriter(file, table.schema, compression="none")
        writer.write_table(table.slice(0, 8))
    assert writer is not None
    writer.close()
    assert file.stat().st_size > 180 << 20
    code = f"""
import resource, sys
from pathlib import Path
import pyarrow.parquet
from mmedx_fast.data.images import read_encoded
from mmedx_fast.data.loaders import load_records
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.parquet import read_parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = [row for _, row in read_parquet(Path({str(file)!r}))]
assert len(rows) == 96
listed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read_encoded(rows[95]["images"][0])[:1] == bytes([7])
opened = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(listed - before, opened - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, opened = (int(value) / 1024 for value in done.stdout.split())
    assert listed < 16, f"listing the rows took {listed} MiB"
    assert opened < 64, f"opening one image took {opened} MiB"


def test_large_row_groups_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.parquet"
    images = [{"bytes": png(i), "path": None} for i in range(100)]
    pq.write_table(pa.table({"image": pa.array(images, STRUCT)}), file)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 100)
    kept = set(parquet._groups)
    for row in (0, 15, 16, 57, 99):
        assert read_encoded(ImageRef(cell=(file, row, "image", -1))) == png(row)
    assert set(parquet._groups) == kept


def test_cache_is_bounded_and_sees_a_new_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.parquet"

    def write(shift: int) -> None:
        images = [{"bytes": png(i + shift), "path": None} for i in range(64)]
        pq.write_table(pa.table({"image": pa.array(images, STRUCT)}), file, row_group_size=4)

    write(0)
    size = 4 * (len(png(0)) + 64)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * size)
    for row in [*range(64), *range(63, 0, -7)]:
        assert read_encoded(ImageRef(cell=(file, row, "image", -1))) == png(row)
        held = [array for array in parquet._groups.values()]
        assert len(held) == 1 or sum(array.nbytes for array in held) <= 3 * size
    write(100)
    assert read_encoded(ImageRef(cell=(file, 5, "image", -1))) == png(105)


@pytest.mark.parametrize(
    "cell",
    [(9, "image", -1), (-1, "image", -1), (0, "pic", -1), (0, "image", 0), (0, "images", 2),
     (0, "images", -1), (2, "image", -1), (3, "image", -1), (0, "question", -1)],
)  # fmt: skip
@pytest.mark.parametrize("saved", [False, True])
def test_an_image_that_is_not_there_is_named(
    tmp_path: Path, cell: tuple[int, str, int], saved: bool
) -> None:
    file = save(mixed(), tmp_path / "d") if saved else tmp_path / "t.parquet"
    if not saved:
        pq.write_table(mixed(), file)
    with pytest.raises(ImageError, match=rf"{file}!{cell[1]}\[{cell[0]}\]"):
        read_encoded(ImageRef(cell=(file, *cell)))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "t.parquet"
    pq.write_table(mixed(), whole)
    ref = rows_of(whole)[0]["image"]
    data = whole.read_bytes()
    for number, damaged in enumerate([b"", b"PAR1", b"no parquet", data[: len(data) // 2]]):
        file = tmp_path / f"{number}.parquet"
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file}: is not a readable parquet file"):
            rows_of(file)
    whole.write_bytes(data[:100] + bytes(len(data) - 108) + data[-8:])
    with pytest.raises(ImageError, match=f"{whole}!image"):
        read_encoded(ref)
    whole.unlink()
    with pytest.raises(ImageError, match="no such data file"):
        read_encoded(ref)


# ---- save_to_disk


def save(table: pa.Table, folder: Path) -> Path:
    import datasets

    datasets.Dataset(table).save_to_disk(str(folder))
    return folder


def test_saved_data_sets(tmp_path: Path) -> None:
    check_rows(save(mixed(), tmp_path / "d"), mixed())


def test_saved_images_stay_undecoded(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "image": datasets.Image(),
         "images": datasets.List(datasets.Image())}
    )  # fmt: skip
    rows = {
        "question": ["a", "b", "c"],
        "image": [{"bytes": png(i), "path": None} for i in range(3)],
        "images": [[], [{"bytes": b"no image", "path": None}], []],
    }
    made = datasets.Dataset.from_dict(rows, features=features).select([2, 1])
    made.save_to_disk(str(tmp_path / "d"))
    got = rows_of(tmp_path / "d")
    assert [row["question"] for row in got] == ["c", "b"]
    assert load_image(got[0]["image"]).getpixel((0, 0)) == (2, 2, 2)
    assert read_encoded(got[1]["images"][0]) == b"no image"


def test_a_folder_saved_by_halves_is_named(tmp_path: Path) -> None:
    folder = save(mixed(), tmp_path / "d")
    next(folder.glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{folder}: is not a data set that .* save it again"):
        rows_of(folder)


def test_records_of_parquet_are_written_with_their_images(tmp_path: Path) -> None:
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    table = pa.table(
        {"image": pa.array(images, STRUCT), "question": ["a", "b", "c"], "answer": ["yes"] * 3}
    )
    (tmp_path / "vqa-rad").mkdir()
    pq.write_table(table, tmp_path / "vqa-rad" / "train.parquet")
    records = load_records(tmp_path / "vqa-rad", split="train").records
    write_mmedexpert(records, tmp_path / "out", "train")
    again = load_records(tmp_path / "out", split="train").records
    assert [(r.id, r.question, r.answer_type) for r in again] == [
        (r.id, r.question, "yesno") for r in records
    ]
    assert [read_encoded(r.images[0]) for r in again] == [png(i) for i in range(3)]
    assert {r.images[0].path.suffix for r in again if r.images[0].path} == {".png"}
