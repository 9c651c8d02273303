"""``mmedx data inspect``: exact counts, rows that cannot be used, and a page that stands alone."""

import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedx_fast.cli import main
from mmedx_fast.data.loaders import load_records
from mmedx_fast.data.phantom import write_phantom
from mmedx_fast.data.records import ImageRef
from mmedx_fast.inspection import Inspection, SplitCounts, inspect_data, report_text
from mmedx_fast.inspection_html import page
from mmedx_fast.report_samples import _reference


def png(colour: tuple[int, int, int] = (9, 9, 9)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (900, 600), colour).save(out, "PNG")
    return out.getvalue()


def row(question: str, **changes: Any) -> dict[str, Any]:
    return {"images": ["a.png"], "question": question, "answer": "left", **changes}


ROWS = [
    row("A 7-year-old boy: <b>which</b> side & why?", options=["x < y", "z"], answer="B"),
    row("Which tumor?", options=["x", "z"], answer="A", source="<i>own</i>"),
    row("Two?", images=["a.png", "b.png"], answer="yes"),
    row("Eye and ear?", images=[]),
    row("Damaged?", images=["broken.png"], answer="No"),
    row("Gone?", images=["a.png", "gone.png"]),
    row("Gone too?", images=["gone.png"]),
    row("Bad letter?", options=["x", "z"], answer="Q"),
    row("No answer?", answer=None),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png((200, 10, 10)))
    (tmp_path / "images" / "b.png").write_bytes(png((10, 10, 200)))
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    write(tmp_path / "test.jsonl", ROWS)
    return tmp_path


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return file


def only(found: Inspection) -> SplitCounts:
    (split,) = found.splits
    return split


def test_everything_is_counted(folder: Path) -> None:
    split = only(inspect_data(folder))
    assert (split.split, split.records, split.cut) == ("test", 5, False)
    assert split.specialties == {
        ("pediatrics", "age_under_18"): 1,
        ("oncology_surgery", "oncology_word"): 1,
        ("brain_senses", "brain_word"): 1,
        ("adult_medicine", "default"): 2,
    }
    assert split.answer_types == {"mcq": 2, "yesno": 2, "open": 1}
    assert split.images == {0: 1, 1: 3, 2: 1}
    assert split.options == {0: 3, 2: 2}
    rejected = {reason: problem.count for reason, problem in split.rejected.items()}
    assert rejected == {
        "image file is missing": 2,
        "answer is not among the options": 1,
        "answer is missing or empty": 1,
    }
    assert "test.jsonl:8: answer='Q'" in split.rejected["answer is not among the options"].first
    assert "gone.png" in split.rejected["image file is missing"].first
    # What it calls usable and rejected is what training will.
    loaded = load_records(folder, split="test")
    assert len(loaded.records) == split.records and dict(loaded.reasons) == rejected
    assert (
        sum(n for (_, r), n in split.specialties.items() if r == "default")
        == (loaded.specialty_rules["default"])
    )


def test_text_names_every_count(folder: Path) -> None:
    text = report_text(inspect_data(folder))
    assert f"{folder}: huggingface" in text and "test: 5 questions in test.jsonl" in text
    assert re.search(r"oncology_surgery \(oncology_word 1\) +1\n", text)
    assert re.search(r"brain_senses \(brain_word 1\) +1\n", text)
    assert "rejected: 4 rows" in text and "2 x image file is missing" in text
    assert re.search(r"first: .*test.jsonl:9: answer=None: answer is missing", text)
    assert "train: not read" in text


def test_splits_and_limit(folder: Path) -> None:
    write(folder / "train.jsonl", ROWS[:4])
    found = inspect_data(folder)
    assert [(s.split, s.records) for s in found.splits] == [("train", 4), ("test", 5)]
    assert list(found.unread) == ["validation"]
    assert [s.split for s in inspect_data(folder, split="test").splits] == ["test"]
    cut = only(inspect_data(folder, split="test", limit=3))
    assert (cut.records, cut.cut) == (3, True)
    file = inspect_data(folder / "train.jsonl")
    assert [(s.split, s.records) for s in file.splits] == [("train", 4)]
    with pytest.raises(ValueError, match="split 'dev2'"):
        inspect_data(folder, split="dev2")


def test_files_that_do_not_belong_together(folder: Path) -> None:
    for name in ("one", "two"):
        write(folder / "sets" / name / "test.jsonl", [row(name, images=[])])
    found = inspect_data(folder / "sets")
    assert [(s.split, s.path.parent.name, s.records) for s in found.splits] == [
        ("test", "one", 1),
        ("test", "two", 1),
    ]
    assert "two/test.jsonl" in report_text(found)


def test_shards_are_one_split(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number in range(2):
        images = pa.array([{"bytes": png(), "path": None}] * 3, struct)
        table = pa.table({"image": images, "question": ["q"] * 3, "answer": ["yes"] * 3})
        (tmp_path / "path-vqa").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "path-vqa" / f"test-0000{number}-of-00002.parquet")
    found = inspect_data(tmp_path / "path-vqa", samples=2)
    split = only(found)
    assert (found.format, split.records, len(split.files)) == ("pathvqa", 6, 2)
    assert page(found).count("<img ") == 2
    # A split that lacks a shard is not read as if it were whole.
    (tmp_path / "path-vqa" / "train-00000-of-00002.parquet").write_bytes(
        (tmp_path / "path-vqa" / "test-00000-of-00002.parquet").read_bytes()
    )
    found = inspect_data(tmp_path / "path-vqa")
    assert [s.split for s in found.splits] == ["test"]
    assert "shard 1 of 2 is missing" in found.unread["train"]
    assert "shard 1 of 2 is missing" in report_text(found) and "shard 1 of 2" in page(found)


def test_only_bad_rows_are_a_result_and_damage_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [row("q", images=[], options=["x", "y"], answer="Q")])
    split = only(inspect_data(tmp_path))
    assert split.records == 0 and list(split.rejected) == ["answer is not among the options"]
    assert "0 questions" in report_text(inspect_data(tmp_path))
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="test.jsonl.*empty"):
        inspect_data(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        inspect_data(tmp_path / "gone", format="mmedexpert")
    with pytest.raises(ValueError, match="'tarot' is unknown"):
        inspect_data(tmp_path, format="tarot")


def test_samples_are_drawn_from_the_whole_split(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [row(f"q{i}", images=[]) for i in range(400)])
    first = only(inspect_data(tmp_path, samples=20)).samples["adult_medicine"]
    again = only(inspect_data(tmp_path, samples=20)).samples["adult_medicine"]
    numbers = [int(record.question[1:]) for record, _ in first]
    assert first == again and len(set(numbers)) == 20
    assert min(numbers) < 100 and max(numbers) > 300
    assert only(inspect_data(tmp_path)).samples["adult_medicine"] == []


class Tags(html.parser.HTMLParser):
    """Opened and closed tags in balance, images, and text."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.ids: set[str | None] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag == "img":
            self.images.append(dict(attrs))
        self.ids.add(dict(attrs).get("id"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_the_rows(folder: Path) -> None:
    text = page(inspect_data(folder, samples=4))
    seen = Tags(text)
    assert len(seen.images) == 5  # one, one, two, and the one that is there beside gone.png
    assert all(str(i["src"]).startswith("data:image/jpeg;base64,") for i in seen.images)
    for part in (
        "A 7-year-old boy: <b>which</b> side & why?",
        "A. x < y",
        "B. z ← answer",
        "source: <i>own</i>",
        "Answer: left",
        "specialty by oncology_word",
        "no image",
        "is not an image",  # broken.png
        "no such image file",  # gone.png
        "Rejected: image file is missing",
        "answer='Q'",
    ):
        assert part in seen.text, part
    assert "http" not in re.sub(r"base64,[^\"]+", "", text).replace("http-equiv", "")
    assert "split-0" in seen.ids


def test_page_of_the_phantom_clinic_shows_traces(tmp_path: Path) -> None:
    write_phantom(tmp_path, train=8, validation=2, test=4, seed=0)
    found = inspect_data(tmp_path, samples=1)
    assert [s.split for s in found.splits] == ["train", "validation", "test"]
    assert all(set(rule for _, rule in s.specialties) == {"column"} for s in found.splits)
    assert found.splits[0].reasoning == dict.fromkeys(
        ("differential", "intuitive", "analytic", "bayesian"), 8
    )
    seen = Tags(page(found))
    record = found.splits[0].samples["pediatrics"][0][0]
    assert record.reasoning["bayesian"] in seen.text and record.answer in seen.text
    assert seen.text.count("← answer") == sum(
        len(s) for f in found.splits for s in f.samples.values()
    )


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "pages" / "look.html"
    assert main(["data", "inspect", str(folder), "--html", str(out), "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "stopped at the limit" in said and str(out) in said
    assert len(Tags(out.read_text()).images) == 2
    assert main(["data", "inspect", str(folder / "gone")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["data", "inspect", str(folder), "--option", "language=zh"]) == 2
    assert "has no option 'language'" in capsys.readouterr().err
    assert main(["data", "inspect", str(folder), "--option", "language"]) == 2
    assert "give NAME=VALUE" in capsys.readouterr().err


def test_both_splits_of_one_file(tmp_path: Path) -> None:
    rows = [
        {"qid": i, "phrase_type": kind, "image_name": "a.jpg", "question": "q", "answer": "yes"}
        for i, kind in enumerate(["freeform", "test_freeform", "para"])
    ]
    image = tmp_path / "VQA_RAD Image Folder" / "a.jpg"
    image.parent.mkdir()
    image.write_bytes(png())
    file = tmp_path / "VQA_RAD Dataset Public.json"
    file.write_text(json.dumps(rows))
    for path in (tmp_path, file):
        found = inspect_data(path)
        assert [(s.split, s.records) for s in found.splits] == [("train", 2), ("test", 1)]


@pytest.mark.parametrize("position", [-1, 3])
def test_report_finds_images_inside_data_files(tmp_path: Path, position: int) -> None:
    """What a prediction keeps of an image is its text; the report opens it again from that."""
    refs = [
        ImageRef(cell=(tmp_path / "a [1]!b.parquet", 12, "image", position)),
        ImageRef(span=(tmp_path / "set@2+3.tsv", 10, 99)),
        ImageRef(member=(tmp_path / "images.zip", "images/a@1+2.png")),
        ImageRef(member=(tmp_path / "images.zip", "images/a[3]")),
        ImageRef(path=tmp_path / "images" / "a[1] (2).png"),
    ]
    assert [_reference(tmp_path, str(ref)) for ref in refs] == refs
