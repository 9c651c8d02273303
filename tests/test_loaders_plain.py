"""The shortcut for plain lines gives what the careful way gives, or leaves the line to it; the same of
the specialty rules' and the age's shortcuts.
"""

import copy
import dataclasses
import functools
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from mmedx_fast.data import patient_age as ages
from mmedx_fast.data import rows as rows_module
from mmedx_fast.data.image_finder import ImageFinder
from mmedx_fast.data.loaders import LOADERS, load_records
from mmedx_fast.data.records import ImageRef, Record, image_in
from mmedx_fast.data.rows import RowContext, RowError, are_plain, clean_options, read_jsonl
from mmedx_fast.data.specialties import assign_specialty
from tests._fuzz import mutate

EXPERT: dict[str, Any] = {
    "id": "q1",
    "dataset": None,
    "specialty": "brain_senses",
    "images": ["images/a.png"],
    "question": "Which lobe is affected?",
    "options": {"A": "Frontal", "B": "Parietal", "C": "Broca's area"},
    "answer_label": "B",
    "answer": "Parietal",
    "answer_type": "mcq",
    "reasoning": None,
    "paradigm": None,
    "source": "own",
    "license": None,
    "meta": {"n": 1},
}
SHORT = {key: EXPERT[key] for key in ("id", "question", "options", "answer_label")}
TRACED = EXPERT | {"reasoning": "Behind the sulcus. The answer is B.", "paradigm": "analytic"}
TRACES = EXPERT | {"dataset": "own", "reasoning": {"bayesian": "The answer is B.", "": "Parietal."}}
HUB: dict[str, Any] = {
    "id": "MM-1",
    "question": "What is shown?\nAnswer Choices: (A) x (B) y",
    "options": {"A": "Asthma", "B": "Gout"},
    "label": "B",
    "images": ["b.png"],
    "medical_task": "Diagnosis",
    "body_system": "Nervous",
    "question_type": "Reasoning",
}
STARTS = {
    "mmedexpert": (EXPERT, SHORT, TRACED, TRACES),
    "medxpertqa": (HUB, HUB | {"specialty": "pediatrics", "images": []}),
}
OPTION_ENDS = (
    "",
    " ",
    "(A) ",
    "A. ",
    "b: ",
    '"',
    "'",
    "\xa0",
    "x",
    "é",
    "(",
    "B cell ",
    "a) ",
    "5 %",
)


def option(rng: random.Random, *texts: str) -> str:
    ends = [rng.choice(OPTION_ENDS) if rng.random() < 0.3 else "" for _ in range(2)]
    return ends[0] + rng.choice(texts) + ends[1]


def options_of(letters: str, rng: random.Random) -> dict[str, str]:
    return {letter: option(rng, "Gout", "Gout", "Parietal", "") for letter in letters}


def contexts(folder: Path, name: str) -> list[RowContext]:
    (folder / "images").mkdir(exist_ok=True)
    for image in ("images/a.png", "images/b.png", "x", "A"):
        (folder / image).touch()
    file = folder / "train.jsonl"
    levels = LOADERS[name].image_levels
    return [
        RowContext("train", required, ImageFinder(file, check=check, levels=levels), file)
        for required in (False, True)
        for check in (True, False)
    ]


def changed(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        return mutate(row, rng)
    texts = options_of(rng.choice(("AB", "ABC", "ABCD", "BA", "AC", "A", "Ab")), rng)
    answer = rng.choice([*texts.values(), None])
    return row | {"options": texts, ("answer" if "answer" in row else "id"): answer}


@pytest.mark.parametrize("name", STARTS)
def test_plain_lines_give_the_record_that_the_careful_way_gives(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    loader = LOADERS[name]
    assert loader.plain is not None
    pairs = [(context, loader.plain(context)) for context in contexts(tmp_path, name)]
    plain_ones = 0
    for _ in range(10_000):
        row = changed(copy.deepcopy(rng.choice(STARTS[name])), rng)
        try:
            line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode() + b"\n"
        except (TypeError, ValueError):  # bytes and half surrogates, which no line of JSON holds
            continue
        context, plain = pairs[rng.choice((0, 0, 0, 1, 2, 3))]
        record = plain(line)
        if record is None:
            continue
        plain_ones += 1
        read = rows_module._parse_line(line)
        assert isinstance(read, dict)
        assert record == loader.parse(read, 1, context), line
        assert type(record) is Record
        assert record.options is None or list(record.options) == [*read["options"]]
    assert 1000 < plain_ones < 9000


@pytest.mark.parametrize("name", STARTS)
def test_rows_as_published_take_the_shortcut(tmp_path: Path, name: str) -> None:
    """Every start row does: else the comparison above would be one of refusals."""
    loader = LOADERS[name]
    assert loader.plain is not None
    plain = loader.plain(contexts(tmp_path, name)[0])
    for row in STARTS[name]:
        assert plain(json.dumps(row).encode()) is not None


def test_shortcut_and_careful_way_load_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts(tmp_path, "mmedexpert")
    rng = random.Random(0)
    lines = [b"", b" \t", b"{broken", b'{"id": "\\ud800"}', b"[1]"]
    while len(lines) < 800:
        row = copy.deepcopy(rng.choice(STARTS["mmedexpert"]))
        if rng.random() < 0.7:
            row["options"] = options_of(rng.choice(("AB", "ABC", "BA", "A")), rng)
        lines.append(json.dumps(row | {"id": f"q{len(lines)}"}, ensure_ascii=False).encode())
    rng.shuffle(lines)
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    monkeypatch.setattr(rows_module, "_BLOCK_BYTES", 5000)
    with_shortcut = load_records(tmp_path, split="train", format="mmedexpert")
    monkeypatch.setitem(
        LOADERS, "mmedexpert", dataclasses.replace(LOADERS["mmedexpert"], plain=None)
    )
    assert load_records(tmp_path, split="train", format="mmedexpert") == with_shortcut
    assert len(with_shortcut.records) > 100 and len(with_shortcut.rejected) > 10


def test_options_called_plain_are_those_that_cleaning_leaves() -> None:
    rng = random.Random(1)
    plain = 0
    for _ in range(20_000):
        options = options_of(rng.choice(("AB", "AB", "ABC", "BA", "AC", "A", "ab")), rng)
        if are_plain(options):
            plain += 1
            assert clean_options(options) == options
    assert plain > 1000


# ---- lines


def lines_by_hand(content: bytes, longest: int) -> list[tuple[int, str]]:
    """Number and first characters of each line that is not blank, overlong ones marked."""
    found = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if len(line) >= longest:
            found.append((number, "over"))
        elif line.strip():
            found.append((number, json.loads(line)["t"]))
    return found


def test_blocks_of_any_size_give_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    file = tmp_path / "x.jsonl"
    for _ in range(300):
        texts = ["y" * rng.choice((0, 1, 5, 30, 57, 58, 59, 60, 200)) for _ in range(12)]
        lines = [rng.choice(("", " ", json.dumps({"t": text}))).encode() for text in texts]
        content = b"\n".join(lines) + rng.choice((b"", b"\n"))
        file.write_bytes(content)
        monkeypatch.setattr(rows_module, "_BLOCK_BYTES", rng.choice((1, 7, 64, 1000)))
        monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 66)
        found = [(n, "over" if isinstance(r, RowError) else r["t"]) for n, r in read_jsonl(file)]
        assert found == lines_by_hand(content, 66)


def test_surrogates_that_the_quick_decoder_takes_are_whole() -> None:
    """Nothing keeps half pairs from it but itself."""
    rng = random.Random(3)
    taken = 0
    parts = (
        "\\ud800",
        "\\uDBFF",
        "\\udc00",
        "\\uDfff",
        "\\u0041",
        "\\\\ud83d",
        "x",
        "\\ud83d\\ude00",
    )
    for _ in range(20_000):
        line = f'{{"t": "{"".join(rng.choices(parts, k=rng.randrange(6)))}"}}'.encode()
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        taken += 1
        assert row == json.loads(line)
        row["t"].encode("utf-8")
    assert taken > 1000


# ---- records made the quick way


def test_an_image_in_a_folder_is_the_one_with_its_path() -> None:
    def lazy() -> ImageRef:
        return image_in(Path("/data/images"), "a b.png")

    eager = ImageRef(path=Path("/data/images/a b.png"))
    assert lazy() == eager and eager == lazy() and lazy() == lazy()
    assert hash(lazy()) == hash(eager) and str(lazy()) == str(eager) and repr(lazy()) == repr(eager)
    assert lazy().data is None and lazy().path == eager.path
    for made in (lazy(), eager):
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == copy.copy(made) == eager
        assert dataclasses.asdict(made) == dataclasses.asdict(eager)
        assert dataclasses.replace(made, path=Path("b")) == ImageRef(path=Path("b"))
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.path = None  # type: ignore[misc]
        with pytest.raises(AttributeError, match="nothing"):
            made.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ValueError, match="exactly one"):
        dataclasses.replace(lazy(), data=b"x")


def test_a_record_is_copied_pickled_and_never_changed() -> None:
    values: dict[str, Any] = {name: name for name in Record.__struct_fields__}
    values["images"] = (image_in(Path("/data"), "a.png"), ImageRef(data=b"x"))
    made = Record(**values)
    assert msgspec.structs.replace(made, id="y") == Record(**values | {"id": "y"}) != made
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == copy.copy(made) == made
    with pytest.raises(AttributeError, match="immutable"):
        made.id = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Record(*values.values())  # type: ignore[call-arg]
    one, other = (Record(**dict.fromkeys(list(values)[:8], "x")) for _ in range(2))
    assert one == other and one.meta is not other.meta and one.reasoning is not other.reasoning


def test_the_quick_find_looks_where_the_other_looks(tmp_path: Path) -> None:
    """Names in both folders, in one, in none; asked in any order."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    for name in ("both", "beside"):
        (tmp_path / "set" / name).touch()
    for name in ("both", "inner", " "):
        (tmp_path / "set" / "images" / name).touch()
    (tmp_path / "images" / "outer").touch()
    names = [
        "both",
        "beside",
        "inner",
        "outer",
        "none",
        " ",
        "images/both",
        "images/outer",
        "z/inner",
    ]
    rng = random.Random(4)

    def found(finder: ImageFinder, name: str, *, quick: bool) -> Any:
        try:
            return finder.usual([name])[0] if quick else finder.find(name)
        except RowError as error:
            return str(error)

    for _ in range(50):
        kept = ImageFinder(tmp_path / "set" / "x.jsonl")
        for name in rng.choices(names, k=30):
            fresh = ImageFinder(tmp_path / "set" / "x.jsonl")
            assert found(kept, name, quick=True) == found(fresh, name, quick=False)


# ---- ages and specialties

WORDS = (
    "of age age: age, over boy, woman, 3-month and ) "
    "A An the is one two ten tenderness bone often twenty thirty-five seven years year yr y mo months week wks "
    "days hours old o yo y/o y.o. aged aged: o' brings brought her his mother son wound fracture ago history "
    "5 17 200 1.5 .5 3x 45yo 12-year-old 6-month-old 2-week-old one-year-old twenty-one - . , ' ſix nıne 5\xa0years é "
    "cranial nerve nerves visual acuity eye eyes retina carcinoma liposarcoma2 surgery 99 boys child cancer "
    "seizure seizures vertigo blurred vision optic disc fractured Stroke EAR early"
).split(" ")


def age_by_one_pattern(text: str) -> float | None:
    """The definition: one pattern over the whole text, no shortcuts."""
    if not ages._CUE.search(text):
        return None
    brought = {match.end() for match in ages._BROUGHT_CHILD.finditer(text)}
    kept = [
        (start in brought, years)
        for match in ages._AGE.finditer(text)
        for start, years in [ages._years(match)]
        if not ages._NOT_A_PERSON.match(text, match.end())
        and not ages._PARENT.match(text, match.end())
        and not ages._of_another_time(match)
        and years <= 120
    ]
    return next((years for own, years in kept if own), kept[0][1] if kept else None)


def random_text(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randrange(1, 12))
    return "".join(word + rng.choice((" ", " ", " ", "-", "  ", ", ", "")) for word in words)


def test_ages_are_those_of_the_one_pattern() -> None:
    rng = random.Random(5)
    stated = 0
    for _ in range(20_000):
        text = random_text(rng)
        age = age_by_one_pattern(text)
        stated += age is not None
        assert ages.patient_age(text) == age, text
    assert 2000 < stated < 18_000
    far = "A ten" + " " * 200 + "year-old"
    assert ages.patient_age(far) == age_by_one_pattern(far) == 10


@functools.cache
def raw_rules() -> list[dict[str, Any]]:
    file = Path(rows_module.__file__).with_name("specialties.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))["datasets"]["default"]


@functools.cache
def entry(text: str) -> re.Pattern[str]:
    spellings = [re.escape(s.strip().lower()).replace(r"\*", r"\w*") for s in text.split("|")]
    return re.compile(rf"(?<= )(?:{'|'.join(spellings)})(?= )")


def decided_by_hand(text: str) -> tuple[str, str]:
    """The default rules as ``specialties.yaml`` states them, each entry looked for by itself."""
    words = re.findall(r"\w+", text.lower())
    spaced = f" {' '.join(words)} "
    age = age_by_one_pattern(text)

    def holds(name: str) -> bool:
        return entry(name).search(spaced) is not None

    for rule in raw_rules():
        if "age_below" in rule:
            applies = age is not None and age < rule["age_below"]
        elif "words_without_age" in rule:
            applies = age is None and any(map(holds, rule["words_without_age"]))
        elif "words" in rule:
            applies = sum(map(holds, rule["words"])) >= rule.get("at_least", 1)
        else:
            applies = "field" not in rule
        if applies:
            return rule["specialty"], rule["name"]
    raise AssertionError("no rule applies")


def test_rules_decide_as_each_entry_by_itself() -> None:
    rng = random.Random(6)
    base = Record(
        id="x",
        dataset="own",
        split="s",
        images=(),
        question="",
        options=None,
        answer_label=None,
        answer="a",
        answer_type="open",
    )
    rules = set()
    for _ in range(2000):
        text = random_text(rng)
        decided = assign_specialty(msgspec.structs.replace(base, question=text))
        assert decided == decided_by_hand(text), text
        rules.add(decided[1])
    assert len(rules) == 6
