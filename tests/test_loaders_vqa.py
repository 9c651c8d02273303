"""SLAKE, VQA-RAD, PathVQA, PubMedVision and HuatuoGPT's bundle: files in their published shapes,
each with the trap that its format holds.
"""

import importlib.util
import io
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from PIL import Image

from mmedx_fast.data import huatuo, pathvqa, pubmedvision, slake, vqa_rad
from mmedx_fast.data.images import load_image, read_encoded
from mmedx_fast.data.loaders import LoadResult, detect_format, load_records
from mmedx_fast.data.records import ImageRef, Record
from mmedx_fast.data.specialties import assign_specialty


def _helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = _helper("_fuzz")
context_for, fuzz_parser = fuzz.context_for, fuzz.fuzz_parser

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), value).save(out, "PNG")
    return out.getvalue()


def write_json(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    """As the hub stores images: struct of bytes and path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    columns["image"] = pa.array([{"bytes": i, "path": None} for i in columns["image"]], STRUCT)
    pq.write_table(pa.table(columns), file)
    return file


def touch(file: Path, value: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(value))
    return file


def load(path: Path, split: str = "test", **options: Any) -> LoadResult:
    return load_records(path, split=split, **options)


def reasons(result: LoadResult) -> dict[str, int]:
    return dict(result.reasons)


# ---- SLAKE


def slake_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "img_id": 9,
        "img_name": "xmlab9/source.jpg",
        "question": "Is the liver visible?",
        "answer": "Yes",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "CT",
        "answer_type": "CLOSED",
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": number,
    }
    return {**row, **changes}


def slake_set(folder: Path, rows: list[dict[str, Any]], name: str = "test") -> Path:
    for image in {row["img_name"] for row in rows}:
        touch(folder / "imgs" / image)
    return write_json(folder / f"{name}.json", rows).parent


def test_slake_row(tmp_path: Path) -> None:
    (record,) = load(slake_set(tmp_path, [slake_row(1)])).records
    assert record == Record(
        id="slake:1",
        dataset="slake",
        split="test",
        images=(ImageRef(path=tmp_path / "imgs/xmlab9/source.jpg"),),
        question="Is the liver visible?",
        options=None,
        answer_label=None,
        answer="Yes",
        answer_type="yesno",
        specialty="adult_medicine",
        meta={
            "img_id": 9,
            "q_lang": "en",
            "location": "Abdomen",
            "modality": "CT",
            "base_type": "vqa",
            "content_type": "Organ",
            "triple": ["vhead", "_", "_"],
        },
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"answer": "Yes"}, "yesno"),
        ({"answer": "no"}, "yesno"),
        ({"answer": "Left"}, "closed"),
        ({"answer": "T2"}, "closed"),
        ({"answer": "Left", "answer_type": "closed "}, "closed"),
        ({"answer": "Liver", "answer_type": "OPEN"}, "open"),
        ({"answer": "是", "q_lang": "zh"}, "closed"),
        ({"answer": "没有", "q_lang": "zh"}, "closed"),
    ],
)
def test_slake_closed_is_not_only_yes_or_no(
    tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    folder = slake_set(tmp_path, [slake_row(1, **changes)])
    (record,) = load(folder, options={"language": "both"}).records
    assert (record.answer_type, record.answer) == (kind, changes["answer"])


def test_slake_languages(tmp_path: Path) -> None:
    zh = slake_row(2, question="图中有肝脏吗？", answer="有", q_lang="zh")
    folder = slake_set(tmp_path, [slake_row(1), zh, slake_row(3)])
    for language, ids in (("en", ["1", "3"]), ("zh", ["2"]), ("both", ["1", "2", "3"])):
        result = load(folder, options={"language": language})
        assert [r.id for r in result.records] == [f"slake:{i}" for i in ids]
        assert len(result.rejected) == 3 - len(ids)
        assert all("language" in reason for reason in reasons(result))
    assert [r.id for r in load(folder).records] == ["slake:1", "slake:3"]
    with pytest.raises(ValueError, match="'de'.*'en', 'zh', 'both'"):
        load(folder, options={"language": "de"})
    with pytest.raises(ValueError, match="no option 'lang'"):
        load(folder, options={"lang": "en"})


@pytest.mark.parametrize("name", ["validate", "validation"])
def test_slake_validation_under_both_names(tmp_path: Path, name: str) -> None:
    folder = slake_set(tmp_path, [slake_row(1)], name)
    assert detect_format(folder / f"{name}.json") == "slake"
    (record,) = load(folder, "validation", format="slake").records
    assert record.split == "validation"


def test_slake_images_share_one_name(tmp_path: Path) -> None:
    """A source.jpg that lies about must not stand for every image."""
    folder = write_json(tmp_path / "test.json", [slake_row(1)]).parent
    touch(tmp_path / "source.jpg")
    touch(tmp_path / "images" / "source.jpg")
    with pytest.raises(ValueError, match="1 x image file is missing"):
        load(folder)
    touch(tmp_path / "imgs/xmlab9/source.jpg", 7)
    (record,) = load(folder).records
    assert read_encoded(record.images[0]) == png(7)


def test_slake_specialty_by_location(tmp_path: Path) -> None:
    places = ["Brain", "Brain_Tissue", "Brain_Face", "Lung", "Neck"]
    rows = [slake_row(i, location=place) for i, place in enumerate(places)]
    rows.append(slake_row(9, location="Brain", specialty="pediatrics"))
    result = load(slake_set(tmp_path, rows))
    assert [r.specialty for r in result.records] == (
        ["brain_senses"] * 3 + ["adult_medicine"] * 2 + ["pediatrics"]
    )
    assert result.specialty_rules == {"location": 3, "default": 2, "column": 1}


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"answer_type": "MAYBE"}, "answer_type", "neither OPEN nor CLOSED"),
        ({"answer_type": None}, "answer_type", "answer_type is missing"),
        ({"answer": ""}, "answer", "answer is missing"),
        ({"answer": True}, "answer", "answer is not text"),
        ({"qid": None}, "qid", "qid is missing"),
        ({"question": " "}, "question", "question is missing"),
        ({"q_lang": None}, "q_lang", "q_lang is missing"),
    ],
)
def test_bad_slake_rows(tmp_path: Path, changes: dict[str, Any], field: str, reason: str) -> None:
    result = load(slake_set(tmp_path, [slake_row(1), slake_row(2, **changes)]))
    (row,) = result.rejected
    assert (row.row, row.field) == (2, field) and reason in row.reason


# ---- VQA-RAD


def bare_rows(*answers: Any) -> list[dict[str, Any]]:
    return [
        {"image": png(i), "question": f"is there {i}?", "answer": answer}
        for i, answer in enumerate(answers)
    ]


def test_vqa_rad_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "vqa-rad"
    rows = bare_rows("no", "Yes", "left lobe")
    write_parquet(folder / "data" / "train-00000-of-00001-eb8844602202be60.parquet", rows)
    write_parquet(folder / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", rows[:2])
    assert detect_format(folder) == "vqa_rad"
    train, test = load(folder, "train"), load(folder)
    assert [r.answer_type for r in train.records] == ["yesno", "yesno", "open"]
    assert [r.answer for r in train.records] == ["no", "Yes", "left lobe"]
    assert all(r.dataset == "vqa_rad" and r.options is None for r in train.records)
    assert load_image(train.records[2].images[0]).getpixel((0, 0)) == (2, 2, 2)
    # Rows have no ids of their own, and those made for them differ between splits.
    assert not {r.id for r in train.records} & {r.id for r in test.records}
    assert train.records[2].meta == {}


def osf_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "qid": number,
        "phrase_type": "freeform",
        "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
        "image_case_url": "https://example.org/case",
        "image_name": "synpic54610.jpg",
        "image_organ": "HEAD",
        "evaluation": "not evaluated",
        "question": "Are regions of the brain infarcted?",
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": "Yes",
        "answer_type": "CLOSED",
    }
    return {**row, **changes}


def osf_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    touch(folder / "VQA_RAD Image Folder" / "synpic54610.jpg", 5)
    write_json(folder / "VQA_RAD Dataset Public.json", rows)
    return folder


def test_vqa_rad_osf_traps(tmp_path: Path) -> None:
    no_url = osf_row(4, answer="Left MCA")
    del no_url["image_case_url"]
    rows = [
        osf_row(1),
        osf_row(2, answer_type="CLOSED ", phrase_type="test_freeform"),
        osf_row(3, answer=3, answer_type="OPEN"),
        no_url,
        osf_row(5, answer=4.0, answer_type="OPEN", phrase_type="test_para"),
        osf_row(6, answer="1.5 cm", answer_type="open", phrase_type="para"),
    ]
    folder = osf_set(tmp_path, rows)
    train, test = load(folder, "train", format="vqa_rad"), load(folder, "test", format="vqa_rad")
    assert {r.id: (r.answer, r.answer_type) for r in train.records} == {
        "vqa_rad:1": ("Yes", "yesno"),
        "vqa_rad:3": ("3", "open"),
        "vqa_rad:4": ("Left MCA", "closed"),
        "vqa_rad:6": ("1.5 cm", "open"),
    }
    assert {r.id: (r.answer, r.answer_type) for r in test.records} == {
        "vqa_rad:2": ("Yes", "yesno"),
        "vqa_rad:5": ("4", "open"),
    }
    assert reasons(train) == {"row is of the test split": 2}
    assert reasons(test) == {"row is of the train split": 4}
    assert read_encoded(train.records[0].images[0]) == png(5)
    assert "image_case_url" not in train.records[2].meta
    assert train.records[0].meta["image_organ"] == "HEAD"
    assert detect_format(folder / "VQA_RAD Dataset Public.json") == "vqa_rad"
    with pytest.raises(ValueError, match="validation"):
        load(folder, "validation", format="vqa_rad")


def test_vqa_rad_organ_decides_the_specialty(tmp_path: Path) -> None:
    rows = [
        osf_row(1),
        osf_row(2, image_organ="CHEST", question="Is the heart enlarged?"),
        osf_row(3, image_organ="CHEST", question="Is there a tumor?"),
        osf_row(4, question="Is this a newborn?"),
    ]
    result = load(osf_set(tmp_path, rows), "train", format="vqa_rad")
    assert [r.specialty for r in result.records] == [
        "brain_senses",
        "adult_medicine",
        "oncology_surgery",
        "pediatrics",
    ]
    assert result.specialty_rules == {
        "image_organ": 1,
        "default": 1,
        "oncology_word": 1,
        "child_word": 1,
    }


# ---- PathVQA


def test_pathvqa_shards_and_case(tmp_path: Path) -> None:
    folder = tmp_path / "path-vqa"
    for number, answers in enumerate([("Yes", "no"), ("liver", "NO")]):
        name = f"train-{number:05}-of-00002-abcdef0123456789.parquet"
        write_parquet(folder / "data" / name, bare_rows(*answers))
    assert detect_format(folder) == "pathvqa"
    result = load(folder, "train")
    assert [r.answer_type for r in result.records] == ["yesno", "yesno", "open", "yesno"]
    assert [r.answer for r in result.records] == ["Yes", "no", "liver", "NO"]
    assert len({r.id for r in result.records}) == 4
    assert [read_encoded(r.images[0]) for r in result.records] == [png(0), png(1)] * 2


def test_a_missing_shard_is_no_smaller_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "path-vqa"
    for number in (0, 2):
        write_parquet(folder / f"data/train-{number:05}-of-00003.parquet", bare_rows("no"))
    for name in (None, "pathvqa"):
        with pytest.raises(ValueError, match=r"shard 1 of 3 is missing .*download it"):
            load(folder, "train", format=name)


def test_bare_columns_elsewhere_are_no_data_set_of_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_parquet(folder / "test.parquet", bare_rows("no"))
    assert detect_format(folder) == "huggingface"
    assert load(folder, format="pathvqa").records[0].dataset == "pathvqa"


@pytest.mark.parametrize("bad", [None, "", "  "])
def test_bare_rows_without_an_answer(tmp_path: Path, bad: Any) -> None:
    file = write_parquet(tmp_path / "vqa-rad" / "test.parquet", bare_rows("no", bad))
    result = load(file)
    assert [(row.row, row.field) for row in result.rejected] == [(2, "answer")]


# ---- PubMedVision


def pubmed_row(
    number: int, images: tuple[str, ...] = ("images/a.jpg",), **changes: Any
) -> dict[str, Any]:
    row = {
        "id": f"Alignment_VQA_{number}",
        "image": list(images),
        "conversations": [
            {"from": "human", "value": "What do the scans show?"},
            {"from": "gpt", "value": "An effusion of the left pleura."},
        ],
        "modality": "Computed Tomography",
        "body_part": "Thorax",
    }
    return {**row, **changes}


ANSWER = pubmed_row(1)["conversations"][1]


def test_pubmedvision_rows(tmp_path: Path) -> None:
    touch(tmp_path / "images/a.jpg", 1)
    touch(tmp_path / "images/b.jpg", 2)
    rows = [
        pubmed_row(1),
        pubmed_row(2, ("images/a.jpg", "images/b.jpg")),
        pubmed_row(3, ("images/never_published.jpg",)),
    ]
    write_json(tmp_path / "PubMedVision_Alignment_VQA.json", rows)
    write_json(tmp_path / "PubMedVision_InstructionTuning_VQA.json", [pubmed_row(4, id="I_4")])
    assert detect_format(tmp_path) == "pubmedvision"
    result = load(tmp_path, "train")
    assert [r.id for r in result.records] == [
        "pubmedvision:Alignment_VQA_1",
        "pubmedvision:Alignment_VQA_2",
        "pubmedvision:I_4",
    ]
    assert [len(r.images) for r in result.records] == [1, 2, 1]
    assert [read_encoded(i) for i in result.records[1].images] == [png(1), png(2)]
    first = result.records[0]
    assert (first.question, first.answer, first.answer_type) == (
        "What do the scans show?",
        "An effusion of the left pleura.",
        "open",
    )
    assert first.meta == {"modality": "Computed Tomography", "body_part": "Thorax"}
    (row,) = result.rejected
    assert (row.row, row.id, row.reason) == (3, "Alignment_VQA_3", "image file is missing")
    assert "never_published.jpg" in row.value
    with pytest.raises(ValueError, match="split 'test'"):
        load(tmp_path, "test", format="pubmedvision")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conversations": []}, "not a list of two turns"),
        ({"conversations": [{"from": "human", "value": "q"}] * 2}, "turn is not from gpt"),
        ({"conversations": [{"from": "gpt", "value": "q"}] * 2}, "turn is not from human"),
        ({"conversations": pubmed_row(1)["conversations"] * 2}, "more than one question"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, ANSWER]},
            "question has no text",
        ),
        ({"image": []}, "row has no image"),
        ({"image": [None]}, "image is null"),
        ({"image": [3]}, "image is not a file name"),
    ],
)
def test_bad_pubmedvision_rows(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    touch(tmp_path / "images/a.jpg")
    file = write_json(tmp_path / "p.json", [pubmed_row(1), pubmed_row(2, **changes)])
    (row,) = load(file, "train").rejected
    assert reason in row.reason and row.row == 2


def test_pubmedvision_is_no_source_of_traces(tmp_path: Path) -> None:
    touch(tmp_path / "images/a.jpg")
    file = write_json(tmp_path / "p.json", [pubmed_row(1)])
    with pytest.raises(ValueError, match="PubMedVision has no reasoning traces"):
        load(file, "train", require_reasoning=True)


def test_pubmedvision_specialties(tmp_path: Path) -> None:
    touch(tmp_path / "images/a.jpg")

    def ask(text: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": text}, {"from": "gpt", "value": "A tumor in a child."}]

    cases = [
        ("What is shown?", "Brain", "brain_senses", "body_part"),
        ("What is shown?", "Eye", "brain_senses", "body_part"),
        ("What is shown?", "Thorax", "adult_medicine", "default"),
        ("What does the scan of the 17-year-old show?", "Thorax", "pediatrics", "age_under_18"),
        ("What of the 18-year-old boy?", "Thorax", "adult_medicine", "default"),
        ("With a 2-year history, a 40-year-old: what?", "Thorax", "adult_medicine", "default"),
        ("A one-year-old: what?", "Thorax", "pediatrics", "age_under_18"),
        ("Pregnant, at 20 weeks' gestation: what?", "Pelvis", "adult_medicine", "default"),
        ("Which carcinoma is this?", "Thorax", "oncology_surgery", "oncology_word"),
        ("After the resection: what?", "Thorax", "oncology_surgery", "surgery_word"),
    ]
    rows = [
        pubmed_row(i, conversations=ask(text), body_part=part)
        for i, (text, part, _, _) in enumerate(cases)
    ]
    result = load(write_json(tmp_path / "p.json", rows), "train")
    got = [(r.specialty, assign_specialty(replace(r, specialty=None))[1]) for r in result.records]
    assert got == [(specialty, rule) for _, _, specialty, rule in cases]


# ---- HuatuoGPT's bundle


def huatuo_row(**changes: Any) -> dict[str, Any]:
    row = {
        "image": ["images/x.png"],
        "question": "Which technique is this?",
        "options": ["MRI", "CT", "PET", "X-ray"],
        "answer": "CT",
        "dataset": "OmniMedVQA",
        "subset": "CT(Computed Tomography)",
    }
    return {**row, **changes}


def huatuo_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    touch(folder / "images/x.png")
    write_json(folder / "medical_multimodel_evaluation_data.json", rows)
    return folder


def test_huatuo_text_becomes_a_letter(tmp_path: Path) -> None:
    ten = [f"choice {i}" for i in range(10)]
    rows = [
        huatuo_row(),
        huatuo_row(options=ten, answer="choice 9", dataset="VQA-RAD", subset=None),
        huatuo_row(options=["yes", "no"], answer="Yes"),
        huatuo_row(options=["CT", "CT", "MRI"], answer="CT"),
        huatuo_row(options=["CT", "CT", "MRI"], answer="MRI"),
        huatuo_row(answer="Ultrasound"),
        huatuo_row(options=["CT", None, "MRI"]),
    ]
    folder = huatuo_set(tmp_path, rows)
    assert detect_format(folder) == "huatuo"
    result = load(folder)
    assert [(r.answer_label, r.answer) for r in result.records] == [
        ("B", "CT"),
        ("J", "choice 9"),
        ("A", "yes"),
        ("C", "MRI"),
    ]
    assert result.records[0].meta == {"dataset": "OmniMedVQA", "subset": "CT(Computed Tomography)"}
    assert {row.row: row.reason for row in result.rejected} == {
        4: "answer is the text of more than one option",
        6: "answer is not among the options",
        7: "an option before the last one is empty",
    }


def test_huatuo_subset_decides_the_specialty(tmp_path: Path) -> None:
    subsets = ["Fundus Photography", "OCT (Optical Coherence Tomography", "X-Ray", None]
    result = load(huatuo_set(tmp_path, [huatuo_row(subset=s) for s in subsets]))
    assert [r.specialty for r in result.records] == ["brain_senses"] * 2 + ["adult_medicine"] * 2
    assert result.specialty_rules == {"subset": 2, "default": 2}


# ---- images in zips


def test_slake_images_in_a_zip(tmp_path: Path) -> None:
    write_json(tmp_path / "test.json", [slake_row(1), slake_row(2, img_name="xmlab2/source.jpg")])
    with zipfile.ZipFile(tmp_path / "imgs.zip", "w") as out:
        for number in (2, 9):
            out.writestr(f"imgs/xmlab{number}/source.jpg", png(number))
    assert [read_encoded(r.images[0]) for r in load(tmp_path).records] == [png(9), png(2)]


def test_images_in_a_zip(tmp_path: Path) -> None:
    write_json(tmp_path / "medical_multimodel_evaluation_data.json", [huatuo_row()])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as out:
        out.writestr("images/x.png", png(3))
    (record,) = load(tmp_path).records
    assert read_encoded(record.images[0]) == png(3)


# ---- any row at all


def test_any_slake_row() -> None:
    rows = [slake_row(1), slake_row(2, answer="Left"), slake_row(3, answer_type="OPEN")]

    def check(row: dict[str, Any], record: Record) -> None:
        assert str(row["answer"]).strip().startswith(record.answer[:1])
        assert record.answer_type in ("yesno", "closed", "open")
        assert (record.answer_type == "yesno") <= (record.answer.lower() in ("yes", "no"))

    fuzz_parser(slake.LOADER, rows, context_for(Path("/data/test.json"), slake.LOADER), check)


def test_any_vqa_rad_row() -> None:
    rows = [
        osf_row(1, phrase_type="test_freeform"),
        osf_row(2, answer=3, phrase_type="test_para"),
        {
            "image": ImageRef(cell=(Path("t.parquet"), 0, "image", -1)),
            "question": "q",
            "answer": "no",
        },
    ]

    def check(row: dict[str, Any], record: Record) -> None:
        assert str(row["answer"]).strip() in (
            record.answer,
            f"{record.answer}.0",
            f"{row['answer']}",
        )
        assert record.split == "test" and len(record.images) >= 1

    fuzz_parser(vqa_rad.LOADER, rows, context_for(Path("/data/test.json"), vqa_rad.LOADER), check)


def test_any_pathvqa_row() -> None:
    rows = [{"image": ImageRef(data=b"x"), "question": "q", "answer": a} for a in ("Yes", "cell")]

    def check(row: dict[str, Any], record: Record) -> None:
        assert (record.answer_type == "yesno") == (record.answer.lower() in ("yes", "no"))

    fuzz_parser(pathvqa.LOADER, rows, context_for(Path("/d/test.parquet"), pathvqa.LOADER), check)


def test_any_pubmedvision_row() -> None:
    rows = [pubmed_row(1), pubmed_row(2, ("a.jpg", "b.jpg"))]

    def check(row: dict[str, Any], record: Record) -> None:
        assert record.answer == row["conversations"][1]["value"].strip()
        assert record.images and record.answer_type == "open"

    context = context_for(Path("/data/train.json"), pubmedvision.LOADER)
    fuzz_parser(pubmedvision.LOADER, rows, context, check)


def test_any_huatuo_row() -> None:
    rows = [huatuo_row(), huatuo_row(options=["yes", "no"], answer="no")]

    def check(row: dict[str, Any], record: Record) -> None:
        def plain(text: Any) -> str:
            return " ".join(str(text).casefold().split())

        assert plain(record.answer) in plain(row["answer"])

    fuzz_parser(huatuo.LOADER, rows, context_for(Path("/data/test.json"), huatuo.LOADER), check)
