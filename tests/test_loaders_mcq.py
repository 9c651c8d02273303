"""PMC-VQA, OmniMedVQA and VLMEvalKit's TSVs in their published shapes, each with its traps."""

import base64
import csv
import dataclasses
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmedx_fast.data import omnimedvqa, pmc_vqa, vlmeval_tsv
from mmedx_fast.data.images import load_image, read_encoded
from mmedx_fast.data.loaders import (
    LOADERS,
    LoadResult,
    RejectedFile,
    detect_format,
    iter_records,
    load_records,
)
from mmedx_fast.data.records import Record
from mmedx_fast.data.rows import RowContext
from mmedx_fast.data.specialties import assign_specialty
from tests._fuzz import context_for, fuzz_parser


def png(value: int = 0, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("L", (size, size), value).save(out, "PNG")
    return out.getvalue()


def shade(record: Record, index: int = 0) -> int:
    """The grey of an image: which of the fixture's images it is."""
    return load_image(record.images[index]).getpixel((0, 0))[0]  # type: ignore[index]


def write_table(file: Path, rows: Iterable[Iterable[Any]], delimiter: str = ",") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file


def reasons(result: LoadResult) -> dict[int, str]:
    return {row.row: row.reason for row in result.rejected}


# ---- PMC-VQA

V1 = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D"] + [
    "Answer_label"
]
V2 = ["index", "Figure_path", "Caption", "Question", *V1[3:7], "Answer", "split"]


def v1(**changes: str) -> list[str]:
    row = dict(zip(V1, ["f.jpg", " Which plane is shown? ", "Axial"], strict=False)) | {
        "Choice A": " A:Axial ",
        "Choice B": ' B: "Coronal"',
        "Choice C": " C:\xa0Sagittal\u200a",
        "Choice D": "D:Oblique, or N/A",
        "Answer_label": "A",
    }
    assert row.keys() >= changes.keys()
    return list((row | changes).values())


def v2(number: int = 0, **changes: str) -> list[str]:
    row = {
        "index": str(number),
        "Figure_path": "f.jpg",
        "Caption": 'A "cut".\nTwo lines.',
        "Question": "Which?",
    }
    row |= {
        f"Choice {k}": f" {k}:{v} "
        for k, v in zip("ABCD", ["Axial", "Coronal", "Third", "Last"], strict=True)
    }
    row |= {"Answer": "B", "split": "test"}
    return list((row | changes).values())


def figures(folder: Path, value: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "f.jpg").write_bytes(png(value))


@pytest.mark.parametrize("spelling", ["Answer", "Anwser"])
@pytest.mark.parametrize("name", ["train", "test_clean"])
def test_pmc_vqa_version_1(tmp_path: Path, spelling: str, name: str) -> None:
    header = [spelling if column == "Answer" else column for column in V1]
    file = write_table(tmp_path / f"{name}.csv", [header, v1()])
    figures(tmp_path / "images")
    assert detect_format(file) == detect_format(tmp_path) == "pmc_vqa"
    (record,) = load_records(tmp_path, split=name).records
    assert record.id == f"pmc_vqa:{name}:2" and record.split == name
    assert record.question == "Which plane is shown?"
    assert record.options == {"A": "Axial", "B": "Coronal", "C": "Sagittal", "D": "Oblique, or N/A"}
    assert (record.answer_label, record.answer, record.answer_type) == ("A", "Axial", "mcq")
    assert record.meta == {"version": "1", "file": name}


@pytest.mark.parametrize("header", [True, False, "unnamed"])
def test_pmc_vqa_version_2(tmp_path: Path, header: bool | str) -> None:
    first = [["", *V2[1:]]] if header == "unnamed" else [V2] if header else []
    file = write_table(tmp_path / "test_2.csv", [*first, v2(7), v2(8, Answer="D")])
    figures(tmp_path / "figures")
    assert detect_format(file) == "pmc_vqa"
    result = load_records(tmp_path, split="test")
    assert [r.answer for r in result.records] == ["Coronal", "Last"] and not result.rejected
    record = result.records[0]
    assert (record.answer_label, record.options) == (
        "B",
        {"A": "Axial", "B": "Coronal", "C": "Third", "D": "Last"},
    )
    caption = 'A "cut".\nTwo lines.'
    assert record.meta == {
        "index": "7", "Caption": caption, "split": "test", "version": "2", "file": "test_2",
    }  # fmt: skip


def test_option_text_that_pandas_takes_for_missing_stays(tmp_path: Path) -> None:
    rows = [
        v1(**{"Choice D": text, "Answer": text.strip(), "Answer_label": "D"})
        for text in ("N/A", "nan", "None")
    ]
    figures(tmp_path / "images")
    result = load_records(write_table(tmp_path / "train.csv", [V1, *rows]), split="train")
    assert [r.answer for r in result.records] == ["N/A", "nan", "None"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Answer_label": "'"}, "answer is not among the options"),
        ({"Answer_label": '"'}, "answer is not among the options"),
        ({"Answer_label": "E"}, "answer is not among the options"),
        ({"Answer_label": "AB"}, "answer is not among the options"),
        ({"Answer_label": " "}, "Answer_label is missing or empty"),
        ({"Answer_label": "B"}, "answer is not the text of the labelled option"),
        ({"Answer": "common carotid", "Choice A": "A:A: common carotid"}, "answer is not the text"),
        ({"Choice B": " C:Coronal"}, "prefix is another letter"),
        ({"Choice B": "a: Axial"}, "prefix is another letter"),
        ({"Choice B": "B: \xa0"}, "option text is missing or empty"),
        ({"Choice B": ""}, "Choice B is missing or empty"),
        ({"Question": "\xa0\u200a"}, "Question is missing or empty"),
        ({"Figure_path": "gone.jpg"}, "image file is missing"),
    ],
)
def test_dirty_pmc_vqa_rows_are_counted(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    figures(tmp_path / "images")
    file = write_table(tmp_path / "train.csv", [V1, v1(), v1(**changes), v1()])
    result = load_records(file, split="train")
    assert [r.id for r in result.records] == ["pmc_vqa:train:2", "pmc_vqa:train:4"]
    (row,) = result.rejected
    assert row.row == 3 and reason in row.reason


def test_gold_text_may_be_spelled_a_little_differently(tmp_path: Path) -> None:
    figures(tmp_path / "images")
    rows = [
        v1(Answer="A: axial"),
        v1(Answer='"Axial\xa0"', Answer_label=" a "),
        v1(**{"Choice B": "Coronal"}),
    ]
    result = load_records(write_table(tmp_path / "train.csv", [V1, *rows]), split="train")
    assert len(result.records) == 3 and result.records[2].options == result.records[0].options


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("zipped", [False, True])
def test_each_version_has_its_own_figures(tmp_path: Path, version: int, zipped: bool) -> None:
    """Both versions have a figure of that name, and they are different pictures."""
    for place, archive, value in (("images", "images.zip", 1), ("figures", "images_2.zip", 2)):
        if zipped:
            with zipfile.ZipFile(tmp_path / archive, "w") as out:
                out.writestr(f"{place}/f.jpg", png(value))
        else:
            figures(tmp_path / place, value)
    rows = [V1, v1()] if version == 1 else [V2, v2()]
    file = write_table(tmp_path / "train.csv", rows)
    assert shade(load_records(file, split="train").records[0]) == version


def test_which_test_split_must_be_said(tmp_path: Path) -> None:
    figures(tmp_path / "images")
    for name in ("test", "test_clean"):
        write_table(tmp_path / f"{name}.csv", [V1, v1()])
    write_table(tmp_path / "test_2.csv", [V2, v2()])
    with pytest.raises(
        ValueError, match="'test' may be test, test_2, test_clean.*do not compare.*ask for"
    ):
        load_records(tmp_path, split="test")
    for name, version in (("test_2", "2"), ("test_clean", "1")):
        for path, split in ((tmp_path, name), (tmp_path / f"{name}.csv", "test")):
            (record,) = load_records(path, split=split).records
            assert record.meta["version"] == version and record.meta["file"] == name
    with pytest.raises(ValueError, match="no file for split 'train'.*test_2.csv"):
        load_records(tmp_path, split="train")


# ---- OmniMedVQA


def omni(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "Toy CT",
        "question_id": f"Toy CT_{number:04}",
        "question_type": "Modality Recognition",
        "image_path": "Images/Toy CT/a b (1) & c.png",
        "question": "Which technique is this?",
        "gt_answer": "CT",
        "option_A": "MRI",
        "option_B": "CT",
        "option_C": "PET",
        "option_D": "X-ray",
        "modality_type": "CT(Computed Tomography)",
        **changes,
    }


def omni_file(
    root: Path, rows: list[Any], name: str = "Toy CT", access: str = "Open-access"
) -> Path:
    file = root / "QA_information" / access / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
    images = root / "Images" / "Toy CT"
    images.mkdir(parents=True, exist_ok=True)
    (images / "a b (1) & c.png").write_bytes(png(3))
    return file


def test_omnimedvqa_tree_folder_and_file(tmp_path: Path) -> None:
    file = omni_file(tmp_path, [omni(0), omni(1)], "A")
    omni_file(tmp_path, [omni(2)], "B")
    tops = (tmp_path, tmp_path / "QA_information", file.parent)
    assert [len(load_records(path, split="test").records) for path in (*tops, file)] == [3, 3, 3, 2]
    assert {detect_format(path) for path in (*tops, file)} == {"omnimedvqa"}
    record = load_records(tmp_path, split="test").records[0]
    assert record.id == "omnimedvqa:Toy CT_0000" and record.dataset == "omnimedvqa"
    assert (record.answer_label, record.answer) == ("B", "CT") and shade(record) == 3
    assert record.meta == {
        "dataset": "Toy CT",
        "question_type": "Modality Recognition",
        "modality_type": "CT(Computed Tomography)",
        "access": "open",
    }
    with pytest.raises(ValueError, match="no split 'train'.*test data"):
        load_records(tmp_path, split="train")
    assert load_records(file, split="train").records[0].split == "train"


def test_omnimedvqa_options_and_odd_keys(tmp_path: Path) -> None:
    two = omni(0, option_C=None, option_D="")
    three = {k: v for k, v in omni(1).items() if k != "option_D"}
    odd = {k: v for k, v in omni(2).items() if k != "modality_type"} | {"modality": "CT(x)"}
    file = omni_file(tmp_path, [two, three, odd])
    records = load_records(file, split="test").records
    assert [list(r.options or ()) for r in records] == [["A", "B"], ["A", "B", "C"], list("ABCD")]
    assert records[2].meta["modality_type"] == "CT(x)" and "modality" not in records[2].meta


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"option_D": "CT"}, "two options have the gold text"),
        ({"gt_answer": "Ultrasound"}, "answer is not among the options"),
        ({"gt_answer": ""}, "gt_answer is missing or empty"),
        ({"gt_answer": "pet.", "option_A": "PET."}, "two options have the gold text"),
        (
            {"option_B": None, "option_C": "", "option_D": " ", "gt_answer": "MRI"},
            "fewer than two options",
        ),
        ({"image_path": "Images/Toy CT/gone.png"}, "image file is missing"),
        ({"image_path": "Images/Other/a b (1) & c.png"}, "image file is missing"),
        ({"question_id": None}, "question_id is missing or empty"),
    ],
)
def test_bad_omnimedvqa_rows_are_counted(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    result = load_records(omni_file(tmp_path, [omni(0), omni(1, **changes)]), split="test")
    (row,) = result.rejected
    assert len(result.records) == 1 and row.row == 2 and row.reason == reason
    assert row.id == changes.get("question_id", "Toy CT_0001")


def test_gold_text_but_for_case_and_full_stop(tmp_path: Path) -> None:
    rows = [
        omni(0, gt_answer="ct."),
        omni(1, gt_answer="CT", option_A="ct"),  # as written comes first
        omni(2, gt_answer="MRI", option_C="X", option_D="X"),  # another option twice is no harm
    ]
    records = load_records(omni_file(tmp_path, rows), split="test").records
    assert [(r.answer_label, r.answer) for r in records] == [("B", "CT"), ("B", "CT"), ("A", "MRI")]


def test_restricted_sources_need_their_own_images(tmp_path: Path) -> None:
    gone = omni(1, image_path="Images/Secret/1.png")
    omni_file(tmp_path, [omni(0), gone], access="Restricted-access")
    omni_file(tmp_path, [omni(2)])
    result = load_records(tmp_path, split="test")
    assert [r.meta["access"] for r in result.records] == ["open", "restricted"]
    assert result.reasons == {"image of a restricted source; get it from the source's owners": 1}


def test_a_list_that_breaks_off_is_no_test_set(tmp_path: Path) -> None:
    file = omni_file(tmp_path, [omni(0), omni(1)])
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"Toy CT\.json.*cut off.*element 2"):
        load_records(file, split="test")


@pytest.mark.parametrize(
    ("changes", "specialty"),
    [
        ({"modality_type": "Fundus Photography"}, "brain_senses"),
        ({"modality_type": "OCT (Optical Coherence Tomography"}, "brain_senses"),
        ({"dataset": "BreakHis"}, "oncology_surgery"),
        ({}, "adult_medicine"),
    ],
)
def test_omnimedvqa_meta_meets_the_specialty_rules(
    tmp_path: Path, changes: dict[str, Any], specialty: str
) -> None:
    (record,) = load_records(omni_file(tmp_path, [omni(0, **changes)]), split="test").records
    assert record.specialty == specialty


# ---- VLMEvalKit TSVs

GMAI = [
    "index",
    "image",
    "question",
    *"ABCDE",
    "answer",
    "category",
    "clinical VQA task",
    "department",
]
GMAI += ["perceptual granularity", "modality", "original task"]


def b64(value: int) -> str:
    return base64.b64encode(png(value)).decode()


def gmai(number: int, **changes: Any) -> list[Any]:
    row = dict.fromkeys(GMAI, "") | {
        "index": number, "image": b64(number), "question": 'This is a "CT" image. Which label fits?',
        "A": "Liver", "B": "Spleen", "answer": "B", "category": "Spleen",
        "clinical VQA task": "Organ Recognition - Abdomen", "department": "Ophthalmology",
        "perceptual granularity": "Mask level", "modality": "CT", "original task": "SEG_2D",
    }  # fmt: skip
    assert row.keys() >= changes.keys()
    return list((row | changes).values())


def tsv(file: Path, rows: Iterable[Iterable[Any]]) -> Path:
    return write_table(file, rows, "\t")


def test_gmai_row(tmp_path: Path) -> None:
    file = tsv(tmp_path / "GMAI_mm_bench_VAL.tsv", [GMAI, gmai(4)])
    assert detect_format(file) == detect_format(tmp_path) == "vlmeval_tsv"
    (record,) = load_records(tmp_path, split="validation").records
    assert record.id == "gmai:GMAI_mm_bench_VAL:4" and record.dataset == "gmai"
    assert record.options == {"A": "Liver", "B": "Spleen"}
    assert (record.answer_label, record.answer) == ("B", "Spleen")
    assert record.images[0].span is not None and read_encoded(record.images[0]) == png(4)
    assert record.meta == {
        "gold_category": "Spleen",
        "clinical vqa task": "Organ Recognition - Abdomen",
        "department": "Ophthalmology",
        "perceptual granularity": "Mask level",
        "modality": "CT",
        "original task": "SEG_2D",
        "source_file": "GMAI_mm_bench_VAL",
    }
    assert assign_specialty(record)[0] == record.specialty == "brain_senses"


def test_no_prompt_reads_meta() -> None:
    """``category`` is the gold answer in words; it lies in meta, which the prompt's maker must not touch."""
    source = (Path(vlmeval_tsv.__file__).parents[1] / "prompts.py").read_text()
    assert ".question" in source and "meta" not in source and "category" not in source


def test_absent_options(tmp_path: Path) -> None:
    rows = [
        gmai(0),
        gmai(1, C="None", D="nan", E="NaN"),
        gmai(2, C="c", D="d", E="e", answer="E"),
        gmai(3, C="None", answer="C"),
        gmai(4, B="None", answer="A"),
        gmai(5, C="c", answer="c"),
    ]
    result = load_records(tsv(tmp_path / "x.tsv", [GMAI, *rows]), split="test")
    assert ["".join(r.options or ()) for r in result.records] == ["AB", "AB", "ABCDE", "ABC"]
    assert [r.answer_label for r in result.records] == ["B", "B", "E", "C"]
    assert reasons(result) == {5: "answer is not among the options", 6: "fewer than two options"}


def test_images_by_reference_before_after_and_in_other_parts(tmp_path: Path) -> None:
    one = [gmai(0, image="2"), gmai(1), gmai(2), gmai(3, image="1.0"), gmai(4, image="11")]
    two = [gmai(10, image="1"), gmai(11), gmai(12, image="10"), gmai(13, image="99")]
    tsv(tmp_path / "set_part_1.tsv", [GMAI, *one])
    tsv(tmp_path / "set_part_2.tsv", [GMAI, *two])
    result = load_records(tmp_path, split="test")
    assert {r.id.split(":")[2]: shade(r) for r in result.records} == {
        "0": 2, "1": 1, "2": 2, "3": 1, "4": 11, "10": 1, "11": 11,
    }  # fmt: skip
    assert {row.id for row in result.rejected} == {"12", "13"}
    assert set(result.reasons) == {"image is the index of no row that holds an image"}


@pytest.mark.parametrize("quote", ["'", '"'])
def test_lists_of_images(tmp_path: Path, quote: str) -> None:
    listed = "[" + ", ".join(f"{quote}{b64(v)}{quote}" for v in (5, 6, 7)) + "]"
    uri = f"data:image/png;base64,{b64(8)}"
    rows = [gmai(0, image=listed), gmai(1, image=uri), gmai(2, image=f"[{quote}{uri}{quote}]")]
    result = load_records(tsv(tmp_path / "x.tsv", [GMAI, *rows]), split="test")
    assert [[shade(r, i) for i in range(len(r.images))] for r in result.records] == [
        [5, 6, 7],
        [8],
        [8],
    ]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("", "image is missing or empty"),
        ("nan", "image is missing or empty"),
        ("[]", "image is the index of no row that holds an image"),
        ("?" * 100, "image is not base64"),
        ("['" + "A" * 100 + "', 'short']", "image is not base64"),
        ("['" + "A" * 100 + "', 'A", "list of images is cut off"),
    ],
)
def test_bad_images(tmp_path: Path, image: str, reason: str) -> None:
    file = tsv(tmp_path / "x.tsv", [GMAI, gmai(0), gmai(1, image=image)])
    assert reasons(load_records(file, split="test")) == {3: reason}


def test_test_parts_without_answers(tmp_path: Path) -> None:
    column = GMAI.index("answer")

    def without(row: list[Any]) -> list[Any]:
        return row[:column] + row[column + 1 :]

    for part in range(1, 12):
        rows = [without(GMAI), without(gmai(part * 10)), without(gmai(part * 10 + 1))]
        tsv(tmp_path / f"GMAI_mm_bench_TEST_part_{part}.tsv", rows)
    tsv(tmp_path / "GMAI_mm_bench_VAL.tsv", [GMAI, gmai(1), gmai(2, answer="nan")])
    with pytest.raises(ValueError, match="all 22 rows were rejected.*22 x no answer column"):
        load_records(tmp_path, split="test")
    stream = iter_records(tmp_path, split="test", allow_unanswered=True)
    records = list(stream)
    assert [int(r.id.split(":")[2]) for r in records] == [
        10 * p + i for p in range(1, 12) for i in (0, 1)
    ]
    assert {(r.answer_label, r.answer, r.id.split(":")[1]) for r in records} == {
        (None, "", "GMAI_mm_bench_TEST")
    }
    assert stream.count == 22 and not stream.reasons
    result = load_records(tmp_path, split="validation")
    assert len(result.records) == 1 and reasons(result) == {3: "answer is missing or empty"}
    assert len(load_records(tmp_path, split="validation", allow_unanswered=True).records) == 2
    (tmp_path / "GMAI_mm_bench_TEST_part_3.tsv").unlink()
    with pytest.raises(ValueError, match="part 3 is missing"):
        load_records(tmp_path, split="test", allow_unanswered=True)


def test_fields_over_128_kib_and_column_case(tmp_path: Path) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    image = base64.b64encode(out.getvalue()).decode()
    assert len(image) > 128 << 10
    header = [name.upper() if len(name) > 1 else name for name in GMAI]
    file = tsv(tmp_path / "x.tsv", [header, gmai(0, image=image)])
    (record,) = load_records(file, split="test").records
    assert read_encoded(record.images[0]) == out.getvalue() and record.dataset == "gmai"


def test_other_sets_in_this_scheme(tmp_path: Path) -> None:
    medxpert = tsv(
        tmp_path / "MedXpertQA_MM_test.tsv",
        [
            ["index", "image", "question", "A", "B", "answer", "body_system"],
            [
                "MM-1",
                f"['{b64(1)}', '{b64(2)}']",
                "What now?\nAnswer Choices: (A) x (B) y",
                "x",
                "y",
                "A",
                "Nervous",
            ],
        ],
    )
    (record,) = load_records(medxpert, split="test").records
    assert record.question == "What now?" and len(record.images) == 2
    assert record.id == "vlmeval:MedXpertQA_MM_test:MM-1" and record.specialty == "brain_senses"
    path_vqa = tsv(
        tmp_path / "PathVQA_TEST.tsv",
        [
            ["index", "image", "question", "hint", "answer", "category"],
            [0, b64(1), "Is it red?", "", "yes", "x"],
            [1, b64(1), "Where?", "Liver cut.", "in the canals", "x"],
        ],
    )
    first, second = load_records(path_vqa, split="test").records
    assert (first.answer_type, first.answer, first.options) == ("yesno", "yes", None)
    assert (second.answer_type, second.question) == ("open", "Liver cut.\nWhere?")
    with pytest.raises(ValueError, match="several data sets for split 'test'"):
        load_records(tmp_path, split="test")


def test_image_paths(tmp_path: Path) -> None:
    figures(tmp_path / "images")
    rows = [[0, "f.jpg", "q?", "a", "b", "A"], [1, "['f.jpg', 'f.jpg']", "q?", "a", "b", "B"]]
    rows += [[2, "[f.jpg", "q?", "a", "b", "B"], [3, "gone.jpg", "q?", "a", "b", "B"]]
    header = ["index", "image_path", "question", "A", "B", "answer"]
    result = load_records(tsv(tmp_path / "x.tsv", [header, *rows]), split="test")
    assert [len(r.images) for r in result.records] == [1, 2]
    assert reasons(result) == {
        4: "image_path is not a list of file names",
        5: "image file is missing",
    }


_STREAM = """
import sys
import PIL.Image, yaml
from mmedx_fast.data.loaders import iter_records
from mmedx_fast.data.images import load_image

def peak():  # MiB; getrusage would give that of the parent before its exec, if larger
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10

before = peak()
stream = iter_records(sys.argv[1], split="test")
records = list(stream)
assert len(records) == 150 and stream.count == 150
assert load_image(records[-1].images[0]).size == (8, 8)
print(peak() - before)
"""


def test_a_large_tsv_costs_the_memory_of_its_text(tmp_path: Path) -> None:
    """150 MB of pictures, every record kept: the process grows by a tenth of it."""
    filler = "A" * 999_000
    file = tmp_path / "big.tsv"
    with file.open("w") as out:
        out.write("\t".join(GMAI) + "\n")
        for number in range(150):
            row = gmai(number, image=b64(1) if number == 149 else filler)
            out.write("\t".join(map(str, row)).replace('"CT"', "CT") + "\n")
    assert file.stat().st_size > 140_000_000
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(file)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20


# ---- the stream


def write_gmai(folder: Path, count: int) -> Path:
    rows = [gmai(i, answer="Z") if i % 5 == 4 else gmai(i) for i in range(count)]
    return tsv(folder / "x.tsv", [GMAI, *rows])


def test_stream_counts_and_hands_out_rejected_rows(tmp_path: Path) -> None:
    file = write_gmai(tmp_path, 10)
    seen: list[Any] = []
    stream = iter_records(file, split="test", on_rejected=seen.append)
    assert next(stream).id.endswith(":0") and stream.count == 1 and not stream.reasons
    rest = list(stream)
    assert len(rest) == 7 and stream.count == 8 and [row.id for row in seen] == ["4", "9"]
    assert stream.first_rejected is seen[0] and stream.reasons == {seen[0].reason: 2}
    assert stream.summary() == load_records(file, split="test").summary()
    assert stream.specialty_rules == {"department": 8}


def test_include_and_limit(tmp_path: Path) -> None:
    file = write_gmai(tmp_path, 10)
    odd = lambda record: int(record.id.split(":")[2]) % 2 == 1  # noqa: E731
    stream = iter_records(file, split="test", include=odd, limit=2)
    assert [r.id.split(":")[2] for r in stream] == ["1", "3"] and stream.excluded == 2
    assert len(load_records(file, split="test", include=odd).records) == 4
    assert list(iter_records(file, split="test", include=lambda record: False)) == []


def test_rejected_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = write_gmai(tmp_path, 10)
    target = tmp_path / "run" / "rejected.jsonl"
    with pytest.raises(KeyboardInterrupt), RejectedFile(target) as rejected:
        list(iter_records(file, split="test", on_rejected=rejected))
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with RejectedFile(target) as rejected:
        list(iter_records(file, split="test", on_rejected=rejected))
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == ["4", "9"]
    whole = load_records(file, split="test").write_rejected(tmp_path / "whole.jsonl")
    assert whole.read_text() == target.read_text()


def test_duplicates_are_found_across_files_and_by_more_than_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tsv(tmp_path / "set_part_1.tsv", [GMAI, gmai(0), gmai(1)])
    tsv(tmp_path / "set_part_2.tsv", [GMAI, gmai(2), gmai(1)])
    with pytest.raises(
        ValueError,
        match=r"part_2\.tsv:3: id 'vlmeval?.*|part_2.tsv:3: id 'gmai:set:1'.*part_1\.tsv:3",
    ):
        load_records(tmp_path, split="test")
    tsv(tmp_path / "set_part_2.tsv", [GMAI, gmai(2), gmai(3)])
    monkeypatch.setattr("mmedx_fast.data.loaders.id_hash", lambda name: 0)
    assert len(load_records(tmp_path, split="test").records) == 4


def test_options_of_a_loader_are_checked(tmp_path: Path) -> None:
    file = write_gmai(tmp_path, 3)
    with pytest.raises(ValueError, match="vlmeval_tsv has no option 'language'; its options: none"):
        iter_records(file, split="test", options={"language": "en"})


def test_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    rows = [omni(i) for i in range(200)]
    file = omni_file(tmp_path, rows)
    calls: list[Any] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return function(*args, **kwargs)

        return call

    for name in ("scandir", "stat"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    assert len(load_records(file, split="test", format="omnimedvqa").records) == 200
    assert len(calls) < 30


# ---- telling formats apart


def test_every_format_is_known_by_its_columns(tmp_path: Path) -> None:
    files = {
        "pmc_vqa": write_table(tmp_path / "a" / "train.csv", [V1, v1()]),
        "omnimedvqa": omni_file(tmp_path / "b", [omni(0)]),
        "vlmeval_tsv": tsv(tmp_path / "c" / "x.tsv", [GMAI, gmai(0)]),
    }
    assert {name: detect_format(file) for name, file in files.items()} == {n: n for n in files}
    # A file of another name is known just as well.
    renamed = files["pmc_vqa"].rename(tmp_path / "a" / "rows.txt")
    assert detect_format(renamed) == "pmc_vqa"
    assert files.keys() <= LOADERS.keys()


def test_a_folder_of_several_formats_names_them(tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", [V1, v1()])
    tsv(tmp_path / "x.tsv", [GMAI, gmai(0)])
    with pytest.raises(
        ValueError,
        match=r"any of pmc_vqa \(.*train\.csv\), vlmeval_tsv \(.*x\.tsv\); give it by name",
    ):
        detect_format(tmp_path)
    figures(tmp_path / "images")
    assert load_records(tmp_path, split="train", format="pmc_vqa").records


def test_unknown_files_list_what_was_found(tmp_path: Path) -> None:
    file = write_table(tmp_path / "x.csv", [["a", "b"], [1, 2]])
    with pytest.raises(ValueError, match=r"columns found: a, b\).*pmc_vqa: Figure_path"):
        detect_format(file)
    broken = tmp_path / "x.json"
    broken.write_text("[oops")
    with pytest.raises(ValueError, match="format not recognised.*malformed"):
        detect_format(broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data file of a known format"):
        detect_format(tmp_path / "empty")


# ---- any row at all


def gold_pmc(row: dict[str, Any], record: Record) -> None:
    assert record.options is not None and record.answer_label is not None
    given = row["Answer_label"] if "Answer_label" in row else row["Answer"]
    assert given.strip(" \t\r\n\xa0\u200a\"'").upper() == record.answer_label
    raw = row[f"Choice {record.answer_label}"].replace("\xa0", " ").replace("\u200a", " ")
    assert raw.split(":", 1)[-1].strip(" \t\r\n\"'") == record.answer or record.answer in raw
    if "Answer_label" in row:
        gold = row["Answer"].replace("\xa0", " ").replace("\u200a", " ").strip(" \t\r\n\"'")
        spelled = (gold, gold.removeprefix(f"{record.answer_label}:").strip(" \t\r\n\"'"))
        assert record.answer.casefold().split() in [text.casefold().split() for text in spelled]


@pytest.mark.parametrize(("header", "row"), [(V1, v1()), (V2, v2())])
def test_fuzzed_pmc_vqa_rows(tmp_path: Path, header: list[str], row: list[str]) -> None:
    valid = dict(zip(header, row, strict=True))
    fuzz_parser(
        pmc_vqa.LOADER, [valid], context_for(tmp_path / "train.csv", pmc_vqa.LOADER), gold_pmc
    )


def test_fuzzed_omnimedvqa_rows(tmp_path: Path) -> None:
    def gold(row: dict[str, Any], record: Record) -> None:
        loosely = [
            " ".join(t.casefold().split()).rstrip(". ") for t in (row["gt_answer"], record.answer)
        ]
        assert loosely[0] == loosely[1]
        assert row[f"option_{record.answer_label}"].strip() == record.answer

    context = context_for(tmp_path / "x.json", omnimedvqa.LOADER)
    fuzz_parser(omnimedvqa.LOADER, [omni(0), omni(1, option_C=None, option_D="")], context, gold)


def vlmeval_rows(folder: Path) -> tuple[list[Mapping[str, Any]], RowContext]:
    rows = [gmai(0), gmai(1, image="0"), gmai(2, C="Liver cyst", D="None", answer="C")]
    file = tsv(folder / "x.tsv", [GMAI, *rows])
    parsed: list[Mapping[str, Any]] = [
        row for _, row in vlmeval_tsv.rows(file) if isinstance(row, dict)
    ]
    assert len(parsed) == 3
    return parsed, context_for(file, vlmeval_tsv.LOADER)


def test_fuzzed_vlmeval_rows(tmp_path: Path) -> None:
    def gold(row: dict[str, Any], record: Record) -> None:
        answer = row["answer"].strip()
        if record.options is None:
            assert record.answer == answer
        else:
            assert (
                answer.upper() == record.answer_label
                or answer.casefold() == record.answer.casefold()
            )
            assert record.answer in row[str(record.answer_label)]

    rows, context = vlmeval_rows(tmp_path)
    fuzz_parser(vlmeval_tsv.LOADER, rows, context, gold)


def test_a_file_that_several_loaders_know_names_them(tmp_path: Path) -> None:
    from mmedx_fast.data.detection import detect

    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"other": 1}, omni(0), omni(1, extra=1)]))
    first = omnimedvqa.LOADER
    twin = dataclasses.replace(first, name="twin")
    with pytest.raises(
        ValueError, match=r"any of omnimedvqa \(.*x\.json\), twin \(.*give it by name"
    ):
        detect(file, {"omnimedvqa": first, "twin": twin})
    # A row that only one of them knows decides.
    strict = dataclasses.replace(twin, detect=lambda row: "extra" in row or first.detect(row))
    rare = dataclasses.replace(first, detect=lambda row: first.detect(row) and "extra" not in row)
    assert detect(file, {"omnimedvqa": rare, "twin": strict}) == "twin"


def test_names_with_folders_links_and_roots(tmp_path: Path) -> None:
    from mmedx_fast.data.image_finder import ImageFinder
    from mmedx_fast.data.rows import RowError

    deep = tmp_path / "data" / "images" / "a" / "b"
    figures(deep)
    (tmp_path / "data" / "link.jpg").symlink_to(deep / "f.jpg")
    (tmp_path / "data" / "dangling.jpg").symlink_to(deep / "gone.jpg")
    (tmp_path / "data" / "folder.jpg").mkdir()
    finder = ImageFinder(tmp_path / "data" / "x.jsonl")
    for name in ("a/b/f.jpg", "images/a/b/f.jpg", "images/a/../a/b/f.jpg", str(deep / "f.jpg")):
        assert finder.find(name).path.resolve() == deep / "f.jpg"  # type: ignore[union-attr]
    assert finder.find("link.jpg").path == tmp_path / "data" / "link.jpg"
    assert finder.find("elsewhere/link.jpg").path == tmp_path / "data" / "link.jpg"
    for name in ("f.jpg", "dangling.jpg", "folder.jpg", "a/f.jpg", "a\x00b/f.jpg", "x" * 5000):
        with pytest.raises(RowError, match="image file is missing"):
            finder.find(name)
    with pytest.raises(RowError, match="image file is missing"):
        finder.find("elsewhere/link.jpg", exact=True)


def test_a_stream_keeps_no_rows(tmp_path: Path) -> None:
    omni_file(tmp_path, [])
    file = tmp_path / "QA_information" / "Open-access" / "big.json"
    file.write_text(json.dumps([omni(i, question="word " * 400) for i in range(5000)]))
    assert file.stat().st_size > 10_000_000
    stream = iter_records(file, split="test", format="omnimedvqa")
    next(stream)
    tracemalloc.start()
    assert sum(1 for _ in stream) == 4999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # two chunks of a JSON array and 60 bytes an id


def test_a_table_among_thousands_of_pictures_is_found(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for number in range(1200):
        (tmp_path / f"{number}.png").touch()
    tsv(tmp_path / "x_VAL.tsv", [GMAI, gmai(0)])
    tsv(tmp_path / "inner" / "y_test.tsv", [GMAI, gmai(1)])
    for split, index in (("validation", "0"), ("test", "1")):
        (record,) = load_records(tmp_path, split=split).records
        assert record.id.endswith(f":{index}")
