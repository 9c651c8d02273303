"""R1-style training sets and generic Hugging Face folders, each with the trap that its format holds,
and that no row is taken for another format's.
"""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedx_fast.data import (
    easyr1,
    huggingface,
    med_r1,
    medix_r1,
    medvlm_r1,
    medvlthinker,
    openmedreason,
)
from mmedx_fast.data.fields import image_findings, letter_or_text, place_images, split_option_lines
from mmedx_fast.data.images import read_encoded
from mmedx_fast.data.loaders import LOADERS, LoadResult, detect_format, load_records
from mmedx_fast.data.med_r1 import split_inline_options
from mmedx_fast.data.records import ImageRef, Record
from mmedx_fast.data.rows import Loader, RowError


def _helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = _helper("_fuzz")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), value).save(out, "PNG")
    return out.getvalue()


def touch(file: Path, value: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(value))
    return file


def write_json(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]], images: str = "images") -> Path:
    """``images`` is the name of the column that holds encoded images, one or a list a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in rows[0]}
    single = isinstance(columns[images][0], bytes)
    cells = [
        {"bytes": v, "path": None} if single else [{"bytes": b, "path": None} for b in v]
        for v in columns[images]
    ]
    columns[images] = pa.array(cells, STRUCT if single else pa.list_(STRUCT))
    pq.write_table(pa.table(columns), file)
    return file


def load(path: Path, split: str = "train", **options: Any) -> LoadResult:
    return load_records(path, split=split, **options)


def rejected(result: LoadResult) -> dict[int, str]:
    return {row.row: row.reason for row in result.rejected}


# ---- Med-R1


def med_row(**changes: Any) -> dict[str, Any]:
    row = {
        "image": "Images/Chest CT/a b (1).png",
        "problem": "What is shown? A)MRI, B)CT, C)PET, D)X-ray",
        "solution": "<answer> B </answer>",
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    ("problem", "stem", "options"),
    [
        ("What? A)x, B)y", "What?", ["x", "y"]),
        ("What? A) x, B) y, C) z", "What?", ["x", "y", "z"]),
        (
            "What? A)left, right and both, B)none, C)z",
            "What?",
            ["left, right and both", "none", "z"],
        ),
        ("What? A)vitamins (A, B), B)iron", "What?", ["vitamins (A, B)", "iron"]),
        ("What? A)x (a, (B, C), d), B)y", "What?", ["x (a, (B, C), d)", "y"]),
        ("Of (A) and (B), what? A)x, B)y", "Of (A) and (B), what?", ["x", "y"]),
        ("What?\nA)x\nB)y", "What?", ["x", "y"]),
        ("What? A)x., B)y.", "What?", ["x.", "y."]),
    ],
)
def test_inline_options(problem: str, stem: str, options: list[str]) -> None:
    assert split_inline_options(problem) == (stem, dict(zip("ABC", options, strict=False)))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("What? A)x, B)y, B)z", "without doubt"),
        ("What? A)x, C)y", "without doubt"),
        ("What? A)type B) of x, B)y", "without doubt"),
        ("What? A)x, B)y, A)z, B)w", "without doubt"),
        ("What? B)x, C)y", "without doubt"),
        ("What? A)x", "options are missing"),
        ("What?", "options are missing"),
        ("A)x, B)y", "no text before"),
    ],
)
def test_inline_options_in_doubt_are_rejected(problem: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        split_inline_options(problem)


def test_med_r1_split_of_several_files(tmp_path: Path) -> None:
    splits = tmp_path / "Splits" / "modality"
    touch(tmp_path / "Images/Chest CT/a b (1).png", 4)
    rows = [
        med_row(),
        med_row(solution="<answer>d</answer>"),
        med_row(solution="<answer> E </answer>"),
    ]
    write_json(splits / "train" / "CT_train.json", rows)
    write_json(splits / "train" / "MR_train.json", [med_row(solution="B")])
    write_json(splits / "test" / "CT_test.json", [med_row()])
    for path in (splits, tmp_path, splits / "train"):
        result = load(path, format="med_r1")
        assert [(r.answer_label, r.answer) for r in result.records] == [("B", "CT"), ("D", "X-ray")]
        assert [row.reason for row in result.rejected] == [
            "answer is not among the options",
            "solution is not a letter in an answer tag",
        ]
    first = result.records[0]
    assert first.question == "What is shown?" and list(first.options or ()) == list("ABCD")
    assert read_encoded(first.images[0]) == png(4)
    test = load(splits / "test" / "CT_test.json", "test")
    assert test.format == "med_r1"
    assert not {r.id for r in test.records} & {r.id for r in result.records}
    write_json(tmp_path / "Splits/question_type/train/x.json", [med_row()])
    with pytest.raises(ValueError, match=r"several folders for split 'train'.*give the one meant"):
        load(tmp_path, format="med_r1")


# ---- MedVLM-R1


def medvlm_row(**changes: Any) -> dict[str, Any]:
    row = {
        "image": ["images/x.png"],
        "problem": "Which plane?\nA) Axial\nB) Coronal",
        "solution": "B",
        "question": "Which plane?",
        "options": ["Axial", "Coronal"],
        "answer": "Coronal",
        "dataset": "OmniMedVQA",
        "subset": "MR (Mag-netic Resonance Imaging)",
    }
    return {**row, **changes}


def test_medvlm_r1(tmp_path: Path) -> None:
    touch(tmp_path / "images/x.png")
    rows = [
        medvlm_row(),
        medvlm_row(answer="B) Coronal", options=["A) Axial", "B) Coronal"]),
        medvlm_row(solution="A"),
        medvlm_row(solution="C"),
        medvlm_row(options=None),
        medvlm_row(subset="Fundus Photography"),
    ]
    write_json(tmp_path / "MRI_CT_XRAY_300each_dataset.json", rows)
    result = load(tmp_path)
    assert result.format == "medvlm_r1"
    assert [(r.answer_label, r.answer) for r in result.records] == [("B", "Coronal")] * 3
    assert result.records[1].options == {"A": "Axial", "B": "Coronal"}
    assert result.records[0].question == "Which plane?"
    assert result.records[0].meta["dataset"] == "OmniMedVQA"
    assert rejected(result) == {
        3: "answer is not the text of the labelled option",
        4: "answer is not among the options",
        5: "options are missing",
    }
    assert [r.specialty for r in result.records] == ["adult_medicine"] * 2 + ["brain_senses"]


# ---- MedVLThinker


def thinker_row(**changes: Any) -> dict[str, Any]:
    row = {
        "images": [png(1)],
        "question": "What is the next step?",
        "options": json.dumps({"A": "Wait", "B": "Operate"}),
        "answer_label": "B",
        "answer": "Operate",
        "reasoning": "The lesion grows.\nTherefore the answer is B.",
        "dataset_name": "pmc_vqa",
        "dataset_index": 7,
        "hash": "ab",
        "misc": json.dumps({"body_system": "Nervous", "medical_task": "Treatment"}),
    }
    return {**row, **changes}


def test_medvlthinker_parquet(tmp_path: Path) -> None:
    rows = [
        thinker_row(),
        thinker_row(images=[], reasoning=None, misc=None),
        thinker_row(images=[png(3), png(4)], reasoning="<think>a</think>\n<answer> B </answer>"),
        thinker_row(options="A: Wait, B: Operate"),
        thinker_row(answer_label="C"),
        thinker_row(answer="Wait"),
        thinker_row(reasoning="<think>a</think><answer>A</answer>"),
        thinker_row(reasoning="Therefore the answer is A."),
        thinker_row(reasoning="<think>a <think> b"),
        thinker_row(misc="{"),
    ]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    result = load(tmp_path)
    assert result.format == "medvlthinker"
    first, text, two = result.records
    assert (first.answer_label, first.answer, first.options) == (
        "B",
        "Operate",
        {"A": "Wait", "B": "Operate"},
    )
    assert first.reasoning == {"": "The lesion grows.\nTherefore the answer is B."}
    assert (first.specialty, result.specialty_rules["body_system"]) == ("brain_senses", 2)
    assert first.meta == {
        "body_system": "Nervous",
        "medical_task": "Treatment",
        "dataset_name": "pmc_vqa",
        "dataset_index": 7,
        "hash": "ab",
    }
    assert text.images == () and text.reasoning == {}
    assert [read_encoded(i) for i in two.images] == [png(3), png(4)] and two.reasoning == {"": "a"}
    assert rejected(result) == {
        4: "options is text but not JSON",
        5: "answer is not among the options",
        6: "answer is not the text of the labelled option",
        7: "reasoning ends on another option than the answer",
        8: "reasoning ends on another option than the answer",
        9: "reasoning contains a think or answer tag",
        10: "misc is text but not JSON",
    }
    trained = load(tmp_path, require_reasoning=True)
    assert len(trained.records) == 2
    assert rejected(trained)[2] == "reasoning is empty and a trace is needed to train on"


# ---- MediX-R1


def medix_row(**changes: Any) -> dict[str, Any]:
    row = {"image": [png(1)], "problem": "<image>Which side?", "solution": "<CT_SCAN>left lung"}
    return {**row, **changes}


def test_medix_r1(tmp_path: Path) -> None:
    rows = [
        medix_row(),
        medix_row(solution="<MRI>Yes", problem="Is it there?"),
        medix_row(solution="<X_RAY> 3 ", image=[png(2), png(3)], problem="<image><image>How many?"),
        medix_row(solution="<FUNDUS>p < 0.5 <b>"),
        medix_row(solution="left lung"),
        medix_row(solution="<CT_SCAN> "),
        medix_row(problem="<image><image>Which?"),
        medix_row(problem="<image>"),
    ]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, "image")
    result = load(tmp_path)
    assert result.format == "medix_r1"
    assert [(r.answer, r.answer_type, r.meta["modality"]) for r in result.records] == [
        ("left lung", "open", "CT_SCAN"),
        ("Yes", "yesno", "MRI"),
        ("3", "open", "X_RAY"),
        ("p < 0.5 <b>", "open", "FUNDUS"),
    ]
    assert [r.question for r in result.records] == [
        "Which side?",
        "Is it there?",
        "How many?",
        "Which side?",
    ]
    assert [read_encoded(i) for i in result.records[2].images] == [png(2), png(3)]
    assert rejected(result) == {
        5: "solution does not begin with <MODALITY_TAG>",
        6: "solution has no answer after its tag",
        7: "number of <image> tokens is not the number of images",
        8: "question has no text",
    }


# ---- OpenMedReason


def open_row(**changes: Any) -> dict[str, Any]:
    row = {
        "image": png(1),
        "question": "A 50-year-old.\nWhat is it?\nA. Cyst\nB. Abscess\nC. Clot",
        "reasoning": "<think>It is dark.\nSo fluid.</think>\nA cyst, then.\n<answer>A</answer>",
        "answer": "A",
    }
    return {**row, **changes}


def test_openmedreason(tmp_path: Path) -> None:
    rows = [
        open_row(),
        open_row(reasoning="<think>x</think><answer>B</answer>"),
        open_row(reasoning="Plain words."),
        open_row(question="What is it?"),
        open_row(answer="D"),
        open_row(question="A. Cyst\nB. Abscess"),
        open_row(reasoning="<think>x</think><answer>Q</answer>"),
        open_row(reasoning="<think>cut off"),
        open_row(reasoning=None),
    ]
    write_parquet(tmp_path / "train.parquet", rows, "image")
    result = load(tmp_path)
    assert result.format == "openmedreason"
    first, plain, none = result.records
    assert first.question == "A 50-year-old.\nWhat is it?"
    assert first.options == {"A": "Cyst", "B": "Abscess", "C": "Clot"}
    assert (first.answer_label, first.answer) == ("A", "Cyst")
    assert first.reasoning == {"": "It is dark.\nSo fluid.\n\nA cyst, then."}
    assert plain.reasoning == {"": "Plain words."} and none.reasoning == {}
    assert rejected(result) == {
        2: "reasoning ends on another option than the answer",
        4: "question does not end with lines of options",
        5: "answer is not among the options",
        6: "question has no text before its options",
        7: "answer inside the reasoning is not among the options",
        8: "reasoning contains a think or answer tag",
    }
    trained = load(tmp_path, require_reasoning=True).records
    assert [r.reasoning for r in trained] == [first.reasoning, plain.reasoning]


@pytest.mark.parametrize(
    ("question", "stem", "options"),
    [
        ("Q?\nA. x\nB. y", "Q?", ["x", "y"]),
        ("Q?\n\nOptions:\n(A) x\n(B) y\n", "Q?", ["x", "y"]),
        ("Q?\nAnswer Choices:\nA) x\nB) y", "Q?", ["x", "y"]),
        ("Q?\nA: x\n   goes on\nB: y", "Q?", ["x goes on", "y"]),
        ("A. fumigatus grows.\nWhy?\nA. x\nB. y", "A. fumigatus grows.\nWhy?", ["x", "y"]),
        ("Q?\nA. x\nC. y", "Q?\nA. x\nC. y", None),
        ("Q?\nA. x", "Q?\nA. x", None),
        ("Vitamin A. or B.?", "Vitamin A. or B.?", None),
    ],
)
def test_option_lines(question: str, stem: str, options: list[str] | None) -> None:
    expected = options and dict(zip("ABC", options, strict=False))
    assert split_option_lines(question) == (stem, expected)


# ---- EasyR1


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("<image>Which?", 1, "Which?"),
        ("<image> <image>\nWhich?", 2, "Which?"),
        ("Which?<image>", 1, "Which?"),
        ("In <image>, which?", 1, "In the image, which?"),
        ("<image>Is <image> like <image>?", 3, "Is Figure B like Figure C?"),
        ("What is new in <image> against <image>?", 2, "What is new in Figure A against Figure B?"),
        ("Which?", 0, "Which?"),
    ],
)
def test_image_tokens(text: str, count: int, expected: str) -> None:
    assert place_images(text, count, "problem", needed=True) == expected


def easy_row(**changes: Any) -> dict[str, Any]:
    return {"images": ["a.png"], "problem": "<image>Which side?", "answer": "left", **changes}


def test_easyr1(tmp_path: Path) -> None:
    touch(tmp_path / "images/a.png", 1)
    touch(tmp_path / "images/b.png", 2)
    rows = [
        easy_row(),
        easy_row(images=["a.png", "b.png"]),
        easy_row(problem="Which side?"),
        easy_row(problem="<image><image>Which side?"),
        easy_row(images=[], problem="Is it?", answer="yes"),
        easy_row(problem="<image>Which?\nA. left\nB. right", answer="B"),
        easy_row(problem="<image>Which?\nA. left\nB. right", answer="right"),
        easy_row(problem="<image>Which?\nA. left\nB. right", answer="C"),
        easy_row(images=["a.png", "b.png"], problem="Is <image> like <image>?", answer=2),
        easy_row(images=["gone.png"]),
    ]
    file = tmp_path / "train.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # one object a line
    result = load(tmp_path)
    assert result.format == "easyr1"
    assert [(r.answer_type, r.answer_label, r.answer) for r in result.records] == [
        ("open", None, "left"),
        ("yesno", None, "yes"),
        ("mcq", "B", "right"),
        ("mcq", "B", "right"),
        ("open", None, "2"),
    ]
    assert result.records[2].question == "Which?"
    assert result.records[4].question == "Is Figure A like Figure B?"
    mismatch = "number of <image> tokens is not the number of images"
    assert rejected(result) == {
        2: mismatch,
        3: mismatch,
        4: mismatch,
        8: "answer is not among the options",
        10: "image file is missing",
    }


# ---- generic Hugging Face folders


def any_row(**changes: Any) -> dict[str, Any]:
    return {"image": png(1), "question": "Which?", "options": ["a", "b"], "answer": "b", **changes}


def test_huggingface_options_in_every_spelling(tmp_path: Path) -> None:
    touch(tmp_path / "images/a.png")
    base = {"images": ["images/a.png"], "question": "Which?"}
    rows = [
        {**base, "options": ["a", "b"], "answer": "B"},
        {**base, "options": {"A": "a", "B": "b"}, "answer": "b"},
        {**base, "options": '["a", "b"]', "answer": "(B)"},
        {**base, "choices": ["a", "b", None], "answer": "b"},
        {**base, "A": "a", "B": "b", "C": None, "answer": "B"},
        {**base, "options": None, "answer": "no"},
        {**base, "answer": "a cyst"},
        {**base, "options": [1, 2], "answer": 2},
        {**base, "options": ["B", "b"], "answer": "b"},
        {**base, "options": ["a", "b"], "answer": 1},
    ]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = load(tmp_path, "validation")
    assert result.format == "huggingface"
    assert [(r.answer_type, r.answer_label, r.answer) for r in result.records] == [
        *[("mcq", "B", "b")] * 5,
        ("yesno", None, "no"),
        ("open", None, "a cyst"),
        ("mcq", "B", "2"),
        ("mcq", "B", "b"),
    ]
    assert all(r.meta == {} for r in result.records)
    assert rejected(result) == {10: "answer is not among the options"}


@pytest.mark.parametrize("name", ["findings", "finding"])
def test_findings_are_texts_or_none(tmp_path: Path, name: str) -> None:
    """They are first read by rewards and scores, hours after the data was loaded."""
    touch(tmp_path / "images/a.png")
    given = [None, "", "a mass", ["a mass", None, "free air"], [], 3, ["a mass", 3], {"a": "mass"}]
    base: dict[str, Any] = {"images": ["images/a.png"], "question": "?", "answer": "b"}
    expert = {**base, "options": {"A": "a", "B": "b"}, "answer_label": "B"}
    folder = [{**base, name: x} for x in given]
    experts = [{**expert, "id": str(i), "meta": {name: x}} for i, x in enumerate(given)]
    want = [(), (), ("a mass",), ("a mass", "free air"), ()]
    reason = f"{name} is not text or a list of texts"
    for kind, some in (("huggingface", folder), ("mmedexpert", experts)):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        result = load(file, format=kind)
        assert [image_findings(r.meta) for r in result.records] == want, kind
        assert rejected(result) == {6: reason, 7: reason, 8: reason}, kind
    assert image_findings({"findings": None, "finding": "a mass"}) == ("a mass",)


def test_huggingface_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "options": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("string"),
        }
    )
    rows = [any_row(image={"bytes": png(i), "path": None}, question=f"q{i}") for i in range(5)]
    made = datasets.Dataset.from_list(rows, features=features)
    both = datasets.DatasetDict({"train": made.select(range(3)), "test": made.select([3, 4])})
    both.save_to_disk(str(tmp_path / "saved"))
    assert detect_format(tmp_path / "saved") == "huggingface"
    train, test = load(tmp_path / "saved"), load(tmp_path / "saved", "test")
    assert [r.question for r in train.records] == ["q0", "q1", "q2"]
    assert [read_encoded(r.images[0]) for r in test.records] == [png(3), png(4)]
    assert load(tmp_path / "saved" / "test", "test").records == test.records
    assert not {r.id for r in train.records} & {r.id for r in test.records}
    with pytest.raises(ValueError, match=r"no split 'validation'.*it has train, test"):
        load(tmp_path / "saved", "validation", format="huggingface")


@pytest.mark.parametrize(
    "name",
    [
        "train.parquet",
        "data/train.parquet",
        "data/train-00000-of-00001.parquet",
        "data/train-00000-of-00001-0123456789abcdef.parquet",
        "default/train/0000.parquet",
        "default/train-00000-of-00001.parquet",
    ],
)
def test_hub_layouts(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / name, [any_row()], "image")
    write_parquet(tmp_path / name.replace("train", "test"), [any_row(), any_row()], "image")
    assert len(load(tmp_path, format="huggingface").records) == 1
    assert len(load(tmp_path, "test", format="huggingface").records) == 2


def test_hub_layouts_in_doubt(tmp_path: Path) -> None:
    for name in ("a/train.parquet", "b/train.parquet"):
        write_parquet(tmp_path / name, [any_row()], "image")
    with pytest.raises(ValueError, match=r"a/train.parquet, b/train.parquet.*give the one meant"):
        load(tmp_path, format="huggingface")
    twice = tmp_path / "two"
    for tail in ("aaaa", "bbbb"):
        write_parquet(twice / f"test-00000-of-00001-{tail}.parquet", [any_row()], "image")
    with pytest.raises(ValueError, match="two versions of the same shard"):
        load(twice, "test", format="huggingface")
    with pytest.raises(ValueError, match=r"no file for split 'validation'.*test-00000"):
        load(twice, "validation", format="huggingface")


def test_paths_inside_parquet_are_looked_for(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a.png", 9)
    cells = [{"bytes": None, "path": name} for name in ("images/a.png", "images/gone.png")]
    table = {
        "image": pa.array([*cells, None], STRUCT),
        "question": ["q"] * 3,
        "options": [["a", "b"]] * 3,
        "answer": ["a"] * 3,
    }
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    result = load(tmp_path)
    assert read_encoded(result.records[0].images[0]) == png(9)
    assert result.records[1].images == ()
    assert rejected(result) == {2: "image file is missing"}


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        ("xyz", "B", "B"),
        ("xyz", " (b). ", "B"),
        ("xyz", "Y", "B"),
        ("xyz", "B. y", "B"),
        ("xyz", "B. z", None),
        ("xyz", "D", None),
        ("xyx", "x", None),  # two options say so
        ("Xyx", "x", "C"),  # exactly before regardless of case
        ("xBz", "B", "B"),
        ("Bxz", "B", None),  # the letter of x, the text of A
        ("xyz", "x y", None),
    ],
)
def test_gold_letter(options: str, answer: str, letter: str | None) -> None:
    given = dict(zip("ABC", options, strict=True))
    if letter is None:
        with pytest.raises(RowError):
            letter_or_text(given, answer)
    else:
        assert letter_or_text(given, answer) == letter


# ---- which format a row is of

CELL = ImageRef(cell=(Path("/data/set/train.parquet"), 0, "image", -1))
ROWS: dict[str, list[dict[str, Any]]] = {
    "medxpertqa": [{"id": "MM-0", "question": "q", "options": {}, "label": "A", "images": []}],
    "mmedexpert": [
        {"id": "q0", "images": [], "question": "q", "options": {"A": "x"}, "answer_label": "A",
         "answer": "x", "reasoning": "r"},
        {"id": "q0", "dataset": "d", "images": [], "question": "q", "options": None,
         "answer_label": None, "answer": "x"},
    ],
    "omnimedvqa": [
        {"dataset": "d", "question_id": "d_1", "question_type": "t", "question": "q",
         "gt_answer": "a", "image_path": "Images/a.png", "option_A": "a", "option_B": "b",
         "modality_type": "CT"},
    ],
    "pmc_vqa": [
        {"Figure_path": "a.jpg", "Question": "q", "Answer": "a", "Choice A": "A:a",
         "Choice B": "B:b", "Choice C": "C:c", "Choice D": "D:d", "Answer_label": "A"},
    ],
    "vlmeval_tsv": [
        {"index": "0", "image": "aaaa", "question": "q", "A": "a", "B": "b", "answer": "A"},
    ],
    "slake": [{"img_name": "a", "question": "q", "answer": "a", "q_lang": "en", "qid": 1}],
    "vqa_rad": [
        {"qid": 1, "phrase_type": "para", "image_name": "a", "question": "q", "answer": "a"},
        {"image": ImageRef(cell=(Path("/d/VQA_RAD/test.parquet"), 0, "image", -1)),
         "question": "q", "answer": "a"},
    ],
    "pathvqa": [
        {"image": ImageRef(cell=(Path("/d/path-vqa/data/test.parquet"), 0, "image", -1)),
         "question": "q", "answer": "a"},
    ],
    "pubmedvision": [{"id": "1", "image": [], "conversations": [], "modality": "m"}],
    "huatuo": [{"image": [], "question": "q", "options": ["a"], "answer": "a", "dataset": "d"}],
    "med_r1": [med_row()],
    "medvlm_r1": [medvlm_row()],
    "medvlthinker": [thinker_row(), {k: v for k, v in thinker_row().items() if k != "reasoning"}],
    "medix_r1": [medix_row()],
    "openmedreason": [open_row()],
    "easyr1": [easy_row(), {"problem": "q", "answer": "a"}],
    "huggingface": [any_row(), {"image": CELL, "question": "q", "answer": "a"}],
}  # fmt: skip


def test_there_is_a_row_of_every_format() -> None:
    assert ROWS.keys() == LOADERS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_of_one_format(name: str) -> None:
    for row in ROWS[name]:
        assert [loader.name for loader in LOADERS.values() if loader.detect(row)] == [name]


# ---- any row at all


def folded(text: Any) -> str:
    return " ".join(str(text).casefold().split())


def try_rows(loader: Loader, rows: list[dict[str, Any]], gold: str) -> None:
    """The gold text of an accepted row is still what the row says: its letter's option or itself."""

    def check(row: dict[str, Any], record: Record) -> None:
        said = folded(row[gold])
        if record.options is None:
            assert folded(record.answer) in said
            return
        letter = str(record.answer_label)
        assert folded(record.answer) in said or letter.casefold() in said

    context = fuzz.context_for(Path("/data/train.json"), loader)
    fuzz.fuzz_parser(loader, rows, context, check)


def test_any_med_r1_row() -> None:
    try_rows(med_r1.LOADER, [med_row(), med_row(solution="<answer> D </answer>")], "solution")


def test_any_medvlm_r1_row() -> None:
    try_rows(medvlm_r1.LOADER, [medvlm_row(), medvlm_row(solution="A", answer="Axial")], "solution")


def test_any_medvlthinker_row() -> None:
    rows = [thinker_row(images=[CELL]), thinker_row(images=[], reasoning="<think>a</think>")]
    try_rows(medvlthinker.LOADER, rows, "answer_label")


def test_any_medix_r1_row() -> None:
    try_rows(medix_r1.LOADER, [medix_row(image=[CELL]), medix_row(image=None)], "solution")


def test_any_openmedreason_row() -> None:
    try_rows(openmedreason.LOADER, [open_row(image=CELL), open_row(image="a.png")], "answer")


def test_any_easyr1_row() -> None:
    rows = [easy_row(), easy_row(problem="<image>Q?\nA. left\nB. right", answer="B")]
    try_rows(easyr1.LOADER, rows, "answer")


def test_any_huggingface_row() -> None:
    rows = [any_row(image=CELL), any_row(image="a.png", options=None, answer=3.0)]
    try_rows(huggingface.LOADER, rows, "answer")
