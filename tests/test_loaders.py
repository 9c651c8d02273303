"""Loaders on fixtures in the published shapes, and everything that can be wrong with a row."""

import dataclasses
import io
import itertools
import json
import re
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image

from mmedx_fast.data.conclusion import concluded_option
from mmedx_fast.data.images import ImageError, image_digest, load_image
from mmedx_fast.data.loaders import (
    LoadResult,
    assert_disjoint,
    detect_format,
    load_records,
)
from mmedx_fast.data.medxpertqa import strip_choices
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.records import GUIDELINE_NAMES, ImageRef, Record
from mmedx_fast.data.rows import RowError

OPTIONS = {"A": "Sarcoidosis", "B": "Pneumonia", "C": "Asthma", "D": "Gout", "E": "Fibrosis"}
STEM = "A 41-year-old man has a cough (Figure A).  What is the diagnosis?"
CHOICES = "\nAnswer Choices: " + " ".join(f"({k}) {v}" for k, v in OPTIONS.items())
FIELDS = {
    "medical_task": "Diagnosis",
    "body_system": "Respiratory",
    "question_type": "Reasoning",
}


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), value).save(out, "PNG")
    return out.getvalue()


def write_lines(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        (folder / name).write_bytes(png(index))


def hub_row(number: int, count: int = 1, **changes: Any) -> dict[str, Any]:
    """A row as on the hub; images are named by figure letter."""
    names = [f"MM-{number}-{letter}.jpeg" for letter in "abcdef"[:count]]
    row = {"id": f"MM-{number}", "question": STEM + CHOICES, "options": OPTIONS, "label": "C"}
    return {**row, "images": names, **FIELDS, **changes}


def github_row(row: dict[str, Any]) -> dict[str, Any]:
    """The same row as the GitHub evaluation input spells it."""
    return {
        **row,
        "options": [{"letter": k, "content": v} for k, v in row["options"].items()],
        "label": [row["label"]],
        "images": [{"image_path": name} for name in row["images"]],
    }


def expert_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"q{number}",
        "specialty": "brain_senses",
        "images": [],
        "question": "Which lobe is affected?",
        "options": {"A": "Frontal", "B": "Parietal"},
        "answer_label": "B",
        "answer": "Parietal",
        "reasoning": "The lesion lies behind the central sulcus. Therefore the answer is B.",
        "paradigm": "analytic",
        "source": "own",
        "license": "CC-BY-4.0",
    }
    return {**row, **changes}


# ---- MedXpertQA


def test_both_public_spellings_give_identical_records(tmp_path: Path) -> None:
    rows = [hub_row(0, 1), hub_row(1, 2), hub_row(2, 6, id="mm-2"), hub_row(3, 0)]
    for name, spelled in (("hub", rows), ("github", [github_row(row) for row in rows])):
        write_lines(tmp_path / f"{name}.jsonl", spelled)
    for row in rows:
        touch(tmp_path / "images", *row["images"])
    hub = load_records(tmp_path / "hub.jsonl", split="test")
    github = load_records(tmp_path / "github.jsonl", split="test")
    assert hub.records == github.records and hub.format == github.format == "medxpertqa"
    assert not hub.rejected and not github.rejected
    assert [len(r.images) for r in hub.records] == [1, 2, 6, 0]
    first = hub.records[0]
    assert first.question == STEM
    assert first.options == OPTIONS and list(first.options) == list("ABCDE")
    assert (first.answer_label, first.answer, first.answer_type) == ("C", "Asthma", "mcq")
    assert first.meta == FIELDS and first.split == "test" and first.dataset == "medxpertqa"
    assert [r.id for r in hub.records] == [
        f"medxpertqa:{i}" for i in ("MM-0", "MM-1", "mm-2", "MM-3")
    ]
    figures = [ref.path.name for ref in hub.records[2].images if ref.path]
    assert figures == [f"MM-2-{letter}.jpeg" for letter in "abcdef"]


def test_text_subset_with_ten_options(tmp_path: Path) -> None:
    options = {letter: f"choice {letter}" for letter in "ABCDEFGHIJ"}
    row = hub_row(0, id="Text-0", options=options, label="J")
    del row["images"]
    record = load_records(write_lines(tmp_path / "test.jsonl", [row]), split="test").records[0]
    assert record.images == () and record.answer == "choice J"
    assert record.options == options


@pytest.mark.parametrize("place", ["beside", "images", "parent", "zip", "zip_images", "zip_parent"])
def test_images_are_found(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "MM"
    write_lines(folder / "test.jsonl", [hub_row(0)])
    name = "MM-0-a.jpeg"
    if place.startswith("zip"):
        archive = (tmp_path if place == "zip_parent" else folder) / "images.zip"
        with zipfile.ZipFile(archive, "w") as out:
            out.writestr(name if place == "zip" else f"images/{name}", png())
    else:
        homes = {"beside": folder, "images": folder / "images", "parent": tmp_path / "images"}
        touch(homes[place], name)
    (ref,) = load_records(folder, split="test").records[0].images
    assert load_image(ref).size == (8, 8)


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_in_image_names_may_be_those_of_another_machine(
    tmp_path: Path, zipped: bool
) -> None:
    rows = [hub_row(0, images=["data/v1/MM-0-a.jpeg"])]
    write_lines(tmp_path / "test.jsonl", rows)
    if zipped:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as out:
            out.writestr("MM/images/MM-0-a.jpeg", png())
    else:
        touch(tmp_path / "images", "MM-0-a.jpeg")
    (ref,) = load_records(tmp_path, split="test").records[0].images
    assert load_image(ref).size == (8, 8)


def test_last_component_is_not_guessed_between_two_members(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [hub_row(0), hub_row(1, images=["x/MM-0-a.jpeg"])])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as out:
        out.writestr("x/MM-0-a.jpeg", png(1))
        out.writestr("y/MM-0-a.jpeg", png(2))
    result = load_records(tmp_path, split="test")
    assert [r.images[0].member for r in result.records] == [
        (tmp_path / "images.zip", "x/MM-0-a.jpeg")
    ]
    assert [row.reason for row in result.rejected] == ["image file is missing"]


def test_missing_image_is_rejected_by_name_unless_unchecked(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "test.jsonl", [hub_row(0), hub_row(1, 0)])
    result = load_records(file, split="test")
    assert [r.id for r in result.records] == ["medxpertqa:MM-1"]
    (row,) = result.rejected
    assert (row.row, row.id, row.field) == (1, "MM-0", "images")
    assert "MM-0-a.jpeg" in row.value and row.reason == "image file is missing"
    unchecked = load_records(file, split="test", check_images=False)
    assert len(unchecked.records) == 2
    with pytest.raises(ImageError, match="MM-0-a.jpeg"):
        load_image(unchecked.records[0].images[0])


def test_images_are_not_opened_at_load_time(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [hub_row(0)])
    (tmp_path / "MM-0-a.jpeg").write_bytes(b"no image at all")
    assert len(load_records(tmp_path, split="test").records) == 1


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"label": "F"}, "label", "answer is not among the options"),
        ({"label": None}, "label", "label is missing or empty"),
        ({"label": ["A", "B"]}, "label", "not exactly one gold letter"),
        ({"options": {"A": "x"}, "label": "A"}, "options", "fewer than two options"),
        ({"options": {"A": "x", "BB": "y"}}, "options", "option letter is not one letter"),
        ({"options": {"A": "x", "a": "y"}}, "options", "twice there"),
        ({"options": {"A": "x", "B": " "}}, "options.B", "option text is missing or empty"),
        ({"options": [{"letter": "A"}]}, "options", "letter and content"),
        ({"options": "A"}, "options", "not a mapping"),
        ({"question": ""}, "question", "question is missing or empty"),
        ({"question": 3}, "question", "question is not text"),
        ({"question": CHOICES}, "question", "question has no text before its options"),
        ({"images": "a.png"}, "images", "images is not a list"),
        ({"images": [7]}, "images", "image is not a file name"),
        ({"id": None}, "id", "id is missing or empty"),
        ({"specialty": "cardiology"}, "specialty", "specialty is not one of"),
    ],
)
def test_bad_medxpertqa_rows_are_counted(
    tmp_path: Path, changes: dict[str, Any], field: str, reason: str
) -> None:
    rows = [hub_row(0, 0), hub_row(1, 0, **changes), hub_row(2, 0)]
    result = load_records(write_lines(tmp_path / "test.jsonl", rows), split="test")
    assert [r.id for r in result.records] == ["medxpertqa:MM-0", "medxpertqa:MM-2"]
    (row,) = result.rejected
    assert (row.row, row.field) == (2, field) and reason in row.reason
    assert row.file == str(tmp_path / "test.jsonl")
    assert result.reasons[row.reason] == 1 and row.reason in result.summary()


def test_option_prefixes_go_only_when_all_options_carry_them(tmp_path: Path) -> None:
    with_prefix = {"A": "(A) Gout", "B": "b. Asthma", "C": 'C: "Fever"'}
    own_text = {"A": "A. fumigatus", "B": "Candida", "C": "Mucor"}
    rows = [hub_row(0, 0, options=with_prefix), hub_row(1, 0, options=own_text)]
    first, second = load_records(write_lines(tmp_path / "test.jsonl", rows), split="test").records
    assert first.options == {"A": "Gout", "B": "Asthma", "C": "Fever"}
    assert second.options == own_text


def test_medxpertqa_has_nothing_to_train_on(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "train.jsonl", [hub_row(0, 0)])
    with pytest.raises(ValueError, match="all 1 rows were rejected.*no reasoning traces"):
        load_records(file, split="train", require_reasoning=True)


# ---- finding the split and the format


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_validation_by_any_name(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "MM" / f"{name}.jsonl", [hub_row(0, 0)])
    for path in (tmp_path / "MM", tmp_path):
        assert load_records(path, split="validation").records[0].split == "validation"


def test_split_that_is_not_there_or_ambiguous(tmp_path: Path) -> None:
    for subset in ("MM", "Text"):
        write_lines(tmp_path / subset / "test.jsonl", [hub_row(0, 0)])
    with pytest.raises(ValueError, match=r"MM/test.jsonl, Text/test.jsonl"):
        load_records(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"split 'train'.*train.jsonl.*test.jsonl"):
        load_records(tmp_path / "MM", split="train")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_records(tmp_path / "gone", split="test")


def test_formats_are_told_apart(tmp_path: Path) -> None:
    files = {
        "medxpertqa": write_lines(tmp_path / "a.jsonl", ["{broken", hub_row(0)]),
        "mmedexpert": write_lines(tmp_path / "b" / "train.jsonl", [expert_row(0)]).parent,
    }
    assert {name: detect_format(path) for name, path in files.items()} == {n: n for n in files}
    odd = write_lines(tmp_path / "c.jsonl", [{"text": "hello"}])
    with pytest.raises(ValueError, match=r"not recognised \(columns found: text\).*medxpertqa"):
        load_records(odd, split="test")
    with pytest.raises(ValueError, match="'csv' is unknown"):
        load_records(odd, split="test", format="csv")


# ---- lines


def test_broken_lines_are_rejected_with_their_numbers(tmp_path: Path) -> None:
    good = [json.dumps(expert_row(i)).encode() for i in range(3)]
    lone = json.dumps(expert_row(8, question="half \ud800 pair")).encode()
    lines = [
        b"\xef\xbb\xbf" + good[0],
        b"",
        b"{not json",
        good[1] + b"\r",
        b"[1, 2]",
        b'"text"',
        b'{"id": "\xff"}',
        lone,
        b"[" * 100_000,
        b'{"id": ' + b"9" * 5000 + b"}",
        good[2],  # without a line end
    ]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    result = load_records(tmp_path, split="train")
    assert [r.id for r in result.records] == [f"mmedexpert:q{i}" for i in range(3)]
    assert {row.row: row.reason for row in result.rejected} == {
        3: "malformed JSON",
        5: "not a JSON object",
        6: "not a JSON object",
        7: "not valid UTF-8",
        8: "not valid UTF-8",
        9: "malformed JSON",
        10: "malformed JSON",
    }
    assert all(len(row.value) <= 200 for row in result.rejected)


def test_overlong_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmedx_fast.data.rows.MAX_LINE_BYTES", 2000)
    rows = [expert_row(0), expert_row(1, question="x" * 9000), expert_row(2)]
    result = load_records(write_lines(tmp_path / "train.jsonl", rows), split="train")
    assert [r.id for r in result.records] == ["mmedexpert:q0", "mmedexpert:q2"]
    assert [(row.row, row.reason) for row in result.rejected] == [(2, "line over 2000 bytes")]


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "test.jsonl").write_text(content)
    for path in (tmp_path / "test.jsonl", tmp_path):
        for format in (None, "mmedexpert"):
            with pytest.raises(ValueError, match=r"test.jsonl.*(is empty|no data rows)"):
                load_records(path, split="test", format=format)


def test_all_rows_rejected_says_why(tmp_path: Path) -> None:
    rows = [hub_row(i, 0, label="Z") for i in range(3)]
    with pytest.raises(ValueError, match=r"all 3 rows.*3 x answer is not among.*test.jsonl:1"):
        load_records(write_lines(tmp_path / "test.jsonl", rows), split="test")


def test_duplicate_id_names_both_rows(tmp_path: Path) -> None:
    rows = [hub_row(0, 0), hub_row(1, 0), hub_row(0, 0)]
    file = write_lines(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"test.jsonl:3.*'medxpertqa:MM-0'.*test.jsonl:1"):
        load_records(file, split="test")


def test_limit_and_order(tmp_path: Path) -> None:
    rows = [hub_row(0, 0), hub_row(1, 0, label="Z"), *(hub_row(i, 0) for i in range(2, 9))]
    file = write_lines(tmp_path / "test.jsonl", rows)
    result = load_records(file, split="test", limit=3)
    assert [r.id for r in result.records] == [f"medxpertqa:MM-{i}" for i in (0, 2, 3)]
    assert len(result.rejected) == 1
    assert load_records(file, split="test", limit=99).records[:3] == result.records
    with pytest.raises(ValueError, match="limit is 0"):
        load_records(file, split="test", limit=0)


def test_rejected_rows_are_written(tmp_path: Path) -> None:
    rows = [hub_row(0, 0), hub_row(1, 0, label="Z"), "{"]
    result = load_records(write_lines(tmp_path / "test.jsonl", rows), split="test")
    path = result.write_rejected(tmp_path / "run" / "rejected.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [dataclasses.asdict(row) for row in result.rejected]
    assert written[0] == {
        "file": str(tmp_path / "test.jsonl"),
        "row": 2,
        "id": "MM-1",
        "field": "label",
        "value": "'Z'",
        "reason": "answer is not among the options",
    }
    assert [p.name for p in path.parent.iterdir()] == ["rejected.jsonl"]


def test_reading_is_line_by_line(tmp_path: Path) -> None:
    """The first records of a large file cost the memory of those rows alone."""
    row = json.dumps(expert_row(0, question="word " * 2000))
    with (tmp_path / "train.jsonl").open("w") as out:
        for index in range(2000):
            out.write(row.replace('"q0"', f'"q{index}"') + "\n")
    assert (tmp_path / "train.jsonl").stat().st_size > 20_000_000
    tracemalloc.start()
    load_records(tmp_path, split="train", limit=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_specialties_are_assigned_and_counted(tmp_path: Path) -> None:
    rows = [
        hub_row(0, 0, question="A 5-year-old has a cough"),
        hub_row(1, 0, body_system="Nervous"),
        hub_row(2, 0, specialty="oncology_surgery"),
    ]
    result = load_records(write_lines(tmp_path / "test.jsonl", rows), split="test")
    assert [r.specialty for r in result.records] == [
        "pediatrics",
        "brain_senses",
        "oncology_surgery",
    ]
    assert result.specialty_rules == {"age_under_18": 1, "body_system": 1, "column": 1}


# ---- MMedExpert


def load_rows(folder: Path, rows: Iterable[Any], **options: Any) -> LoadResult:
    return load_records(write_lines(folder / "train.jsonl", rows), split="train", **options)


def test_mmedexpert_row(tmp_path: Path) -> None:
    touch(tmp_path / "images", "scan.png")
    record = load_rows(tmp_path, [expert_row(0, images=["images/scan.png"])]).records[0]
    assert record == Record(
        id="mmedexpert:q0",
        dataset="mmedexpert",
        split="train",
        images=(ImageRef(path=tmp_path / "images" / "scan.png"),),
        question="Which lobe is affected?",
        options={"A": "Frontal", "B": "Parietal"},
        answer_label="B",
        answer="Parietal",
        reasoning={"analytic": expert_row(0)["reasoning"]},
        specialty="brain_senses",
        meta={"source": "own", "license": "CC-BY-4.0"},
    )


def test_several_traces_a_question(tmp_path: Path) -> None:
    traces = {name: f"By the {name} way, so parietal." for name in GUIDELINE_NAMES}
    rows = [expert_row(0, reasoning=traces, paradigm=None), expert_row(1, paradigm=None)]
    first, second = load_rows(tmp_path, rows, require_reasoning=True).records
    assert first.reasoning == traces and list(first.reasoning) == list(GUIDELINE_NAMES)
    assert list(second.reasoning) == [""]


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"reasoning": "<think>x</think>"}, "reasoning.analytic", "think or answer tag"),
        ({"reasoning": "so <answer>B"}, "reasoning.analytic", "think or answer tag"),
        ({"reasoning": "It is frontal. The answer is A."}, "reasoning.analytic", "another option"),
        ({"reasoning": "Therefore, frontal."}, "reasoning.analytic", "another option"),
        ({"reasoning": ["x"]}, "reasoning.analytic", "not text"),
        ({"reasoning": {"bayesian": " "}, "paradigm": None}, "reasoning.bayesian", "empty"),
        ({"reasoning": {"analytic": "x"}}, "paradigm", "reasoning names its own"),
        ({"paradigm": "tarot"}, "paradigm", "guideline is not one of"),
        ({"answer": "Frontal"}, "answer", "not the text of the labelled option"),
        ({"answer_label": "C"}, "answer_label", "answer is not among the options"),
        ({"answer_label": None, "answer": "Occipital"}, "answer", "not among the options"),
        ({"options": None, "answer": ""}, "answer", "answer is missing"),
        ({"images": ["no.png"]}, "images", "image file is missing"),
        ({"images": ["x" * 5000]}, "images", "image file is missing"),
        ({"images": [" "]}, "images", "image name is empty"),
        ({"images": "no.png"}, "images", "not a list"),
        ({"specialty": "tarot"}, "specialty", "specialty is not one of"),
        ({"answer_type": "essay"}, "answer_type", "answer_type is unknown"),
        ({"meta": 3}, "meta", "meta is not an object"),
    ],
)
def test_bad_mmedexpert_rows_are_counted(
    tmp_path: Path, changes: dict[str, Any], field: str, reason: str
) -> None:
    result = load_rows(tmp_path, [expert_row(0), expert_row(1, **changes)])
    assert len(result.records) == 1
    (row,) = result.rejected
    assert (row.row, row.id, row.field) == (2, "q1", field)
    assert reason in row.reason


@pytest.mark.parametrize("empty", [None, "", "  ", {}])
def test_empty_reasoning_matters_only_for_training(tmp_path: Path, empty: Any) -> None:
    rows = [expert_row(0, paradigm=None), expert_row(1, reasoning=empty, paradigm=None)]
    assert [r.reasoning for r in load_rows(tmp_path, rows).records][1] == {}
    result = load_rows(tmp_path, rows, require_reasoning=True)
    assert len(result.records) == 1
    assert [row.reason for row in result.rejected] == [
        "reasoning is empty and a trace is needed to train on"
    ]


def test_open_questions_and_labels_left_out(tmp_path: Path) -> None:
    rows = [
        expert_row(0, options=None, answer_label=None, answer="Broca's area"),
        expert_row(1, answer_label=None),
        expert_row(2, answer_label="b", answer=None),
    ]
    opened, by_text, by_letter = load_rows(tmp_path, rows).records
    assert (opened.answer_type, opened.answer, opened.options) == ("open", "Broca's area", None)
    assert by_text.answer_label == by_letter.answer_label == "B"
    assert by_letter.answer == "Parietal"


CASES = {
    "A": "B cell lymphoma",
    "B": "T cell lymphoma",
    "C": "Vitamin K deficiency",
    "D": "Lymphoma",
}


@pytest.mark.parametrize(
    ("reasoning", "letter"),
    [
        ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("**Answer: D**", "D"),
        ("Hence option B, because of the marker.", "B"),
        ("The answer is B cell lymphoma.", "A"),
        ("The answer is T cell lymphoma, as said.", "B"),
        ("The answer is the lymphoma.", "D"),
        ("The answer is vitamin K deficiency", "C"),
        ("Therefore this is most likely B cell lymphoma.", "A"),
        ("The answer is A. This fits the marker.", "A"),
        ("The answer is A patient matter.", None),
        ("Options B and C are wrong.", None),
        ("Option B, (C) and D are excluded.", None),
        ("Therefore T cell lymphoma is unlikely.", None),
        ("Therefore B cell lymphoma rather than T cell lymphoma.", None),
        ("T cell lymphoma is common.", None),
        ("The answer is Z.", None),
        ("", None),
    ],
)
def test_concluded_option(reasoning: str, letter: str | None) -> None:
    assert concluded_option(reasoning, CASES) == letter


def test_an_early_mention_does_not_count() -> None:
    text = (
        "One may think the answer is A. But the count is low. And the film is dark. It fits gout."
    )
    assert concluded_option(text, OPTIONS) is None


# ---- writing


def sample_records(folder: Path) -> list[Record]:
    touch(folder, "outside.png")
    with zipfile.ZipFile(folder / "in.zip", "w") as out:
        out.writestr("m.png", png(3))
    images = (
        ImageRef(path=folder / "outside.png"),
        ImageRef(data=png(9)),
        ImageRef(member=(folder / "in.zip", "m.png")),
    )
    base = Record(
        id="clinic:a/1",
        dataset="clinic",
        split="train",
        images=images,
        question='Über "café" \u2028 line?',
        options={"A": "Frontal", "B": "Parietal"},
        answer_label="B",
        answer="Parietal",
        reasoning={"differential": "First.\nThen, so parietal.", "bayesian": "Prior 5 %."},
        specialty="pediatrics",
        meta={"source": "own", "license": None, "question": "a column's name", "n": [1, {"x": 2}]},
    )
    return [
        base,
        replace(base, id="clinic:a 1", reasoning={"": "One trace."}, images=images[1:]),
        replace(base, id="clinic:2", reasoning={"intuitive": "One."}, images=()),
        replace(
            base,
            id="clinic:3",
            options=None,
            answer_label=None,
            answer_type="open",
            reasoning={},
            images=(),
            meta={},
        ),
    ]


def test_written_records_load_again_unchanged(tmp_path: Path) -> None:
    records = sample_records(tmp_path / "sources")
    folder = tmp_path / "out"
    file = write_mmedexpert(records, folder, "train")
    loaded = load_records(folder, split="train").records

    def apart(record: Record) -> tuple[Record, list[str]]:
        return replace(record, images=()), [image_digest(ref) for ref in record.images]

    assert [apart(r) for r in loaded] == [apart(r) for r in records]
    assert detect_format(folder) == "mmedexpert"
    # Writing what lies in the folder already copies nothing and changes no byte.
    before = file.read_bytes(), sorted(p.name for p in (folder / "images").iterdir())
    write_mmedexpert(loaded, folder, "train")
    assert (file.read_bytes(), sorted(p.name for p in (folder / "images").iterdir())) == before
    assert load_records(folder, split="train").records == loaded
    assert not [p for p in folder.rglob("*") if ".part" in p.name]


def test_failed_write_leaves_the_old_split(tmp_path: Path) -> None:
    records = sample_records(tmp_path / "sources")
    file = write_mmedexpert(records[:1], tmp_path, "train")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="'clinic:a/1' twice"):
        write_mmedexpert([records[0], records[0]], tmp_path, "train")
    unwritable = replace(records[2], meta={"x": object()})
    with pytest.raises(ValueError, match="'clinic:2' cannot be written as JSON"):
        write_mmedexpert([records[0], unwritable], tmp_path, "train")
    gone = replace(records[2], images=(ImageRef(path=Path("gone.png")),))
    with pytest.raises(ImageError, match="gone.png"):
        write_mmedexpert([gone], tmp_path, "train")
    assert file.read_bytes() == before
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


# ---- contamination


def test_disjoint_sets_pass_and_overlaps_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())

    def make(name: str, question: str, *images: str) -> Record:
        refs = tuple(ImageRef(path=tmp_path / image) for image in images)
        return Record(
            id=name,
            dataset="d",
            split="s",
            images=refs,
            question=question,
            options=None,
            answer_label=None,
            answer="x",
        )

    train = [make("1", "What is shown?", "a.png", "b.png"), make("2", "Why?")]
    assert_disjoint(train, [make("3", "What is shown?", "a.png", "c.png"), make("4", "Who?")])
    assert_disjoint(train, [make("3", "What is shown?")])
    with pytest.raises(ValueError, match="overlap in 1 questions: id '2' in both"):
        assert_disjoint(train, [make("2", "Something else")])
    for question in ("What is shown?", "what  is\nSHOWN?"):
        with pytest.raises(ValueError, match="test '9' asks the same .* train '1'"):
            assert_disjoint(train, [make("9", question, "b.png", "copy.png")])
    with pytest.raises(ValueError, match="test '9' asks the same .* train '2'"):
        assert_disjoint(train, [make("9", "why?")])


def test_disjoint_reads_only_images_of_shared_questions(tmp_path: Path) -> None:
    broken = ImageRef(path=tmp_path / "gone.png")
    (record,) = sample_records(tmp_path)[3:]
    train = replace(record, id="t", images=(broken,), question="One?")
    test = replace(record, id="u", images=(broken,), question="Two?")
    assert_disjoint([train], [test])


# ---- any input at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    data=st.data(), row=st.sampled_from([hub_row(0, 0), github_row(hub_row(0, 0)), expert_row(0)])
)
def test_no_value_raises_anything_but_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, row: dict[str, Any]
) -> None:
    changed = {**row, data.draw(st.sampled_from(sorted(row))): data.draw(JSON)}
    folder = tmp_path_factory.mktemp("fuzz")
    name = "medxpertqa" if "label" in row else "mmedexpert"
    (folder / "train.jsonl").write_text(json.dumps(changed))
    try:
        (record,) = load_records(folder, split="train", format=name).records
    except ValueError as error:
        assert "rejected" in str(error) and "train.jsonl:1" in str(error)
    else:
        if record.options is not None:
            assert record.options[record.answer_label or ""] == record.answer


def test_choices_are_cut_off_at_the_last_line_that_begins_with_them() -> None:
    """Every text of up to five such parts, against the rule as a regular expression."""
    for count in range(1, 6):
        for parts in itertools.product(
            ("Answer Choices:", "\n", " ", "\t", "x", "(A) y"), repeat=count
        ):
            question = "".join(parts).strip()
            marks = list(re.finditer(r"(?:^|\s*\n)\s*Answer Choices:", question))
            expected = question[: marks[-1].start()].strip() if marks else question
            if marks and not expected:
                with pytest.raises(RowError, match="no text before its options"):
                    strip_choices(question)
            else:
                assert strip_choices(question) == expected
