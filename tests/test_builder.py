"""The parts of `mmedx data build`: config, journal, matching of texts and images, trace filters, order."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image, ImageEnhance

from mmedx_fast._paths import find_config
from mmedx_fast.atomic import DiskFullError
from mmedx_fast.builder.collect import shuffled
from mmedx_fast.builder.config import (
    BuildConfig,
    DecontaminationConfig,
    DuplicateConfig,
    FilterConfig,
    MatchConfig,
    load_build_config,
)
from mmedx_fast.builder.features import (
    ImageFeatures,
    ImageHasher,
    containment,
    jaccard,
    perceptual_hash,
    text_features,
    words,
)
from mmedx_fast.builder.journal import Journal, JournalError
from mmedx_fast.builder.matching import Item, Matcher
from mmedx_fast.builder.prompt import teacher_messages
from mmedx_fast.builder.sources import Candidate, screen
from mmedx_fast.builder.teacher import BudgetError, Ledger, Reply, make_ask
from mmedx_fast.builder.trace_filters import judge, stated_findings
from mmedx_fast.config import ConfigError
from mmedx_fast.data.images import ImageError, load_image
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.phantom import make_split
from mmedx_fast.data.records import GUIDELINE_NAMES, SPECIALTIES, ImageRef, Record

PHANTOM = make_split("train", 80, 0, set())
LONG = (
    "A forty five year old farmer comes with three weeks of low fever, night sweats and a dry cough. He keeps "
    "sheep and goats and has helped at several births this spring. On examination the spleen is felt two "
    "fingers below the ribs, and a new murmur is heard at the apex."
)
MINIMAL: dict[str, Any] = {
    "output": "out",
    "sources": [{"name": "a", "path": "somewhere"}],
    "teacher": {"base_urls": ["http://localhost:1/v1"], "model": "m"},
    "decontamination": {"none_to_check": True},
}


def make_config(**changes: Any) -> BuildConfig:
    return BuildConfig.model_validate(MINIMAL | changes)


def question(name: str, text: str, options: dict[str, str] | None = None) -> Record:
    options = {"A": "Q fever", "B": "Influenza"} if options is None else options
    return Record(
        id=name, dataset="d", split="train", images=(), question=text, options=options,
        answer_label="A", answer=options["A"], specialty="adult_medicine",
    )  # fmt: skip


def features(image: Image.Image) -> ImageFeatures:
    return ImageFeatures("", perceptual_hash(image), image.width * image.height)


def item(record: Record, *images: Image.Image) -> Item:
    return Item(record.id, "set", text_features(record), tuple(map(features, images)))


# -- config ---------------------------------------------------------------------------------------


def test_the_shipped_config_loads_and_comes_back_from_yaml(tmp_path):
    cfg = load_build_config(find_config("datasets/mmedexpert_build.yaml"))
    (tmp_path / "again.yaml").write_text(cfg.to_yaml())
    assert load_build_config(tmp_path / "again.yaml") == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.modle=x", "teacher.modle: unknown key; did you mean 'model'"),
        ("sources=[{name: a, path: b, licence: MIT}]", "sources.0.licence.*did you mean 'license'"),
        ("decontamination.evaluation=[{name: a, pth: b}]", "did you mean 'path'"),
        ("sources=[{name: a, path: b}, {name: a, path: c}]", "different names"),
        ("sources=[]", "different names"),
        ("guidelines=[bayes]", "guidelines must be"),
        ("min_guidelines=5", "exceeds the 4 guidelines"),
        ("teacher.base_urls=[]", "base_urls is empty"),
        ("teacher.base_urls=[localhost:8000]", "is no address"),
        ("teacher.temperature=0", "attempts = 4 at temperature 0"),
        ("teacher.budget=3", "budget needs price_input"),
        ("teacher.kind=vllm", "belong to kind = openai"),
        ("teacher.api_key_env=sk-12-34", "api_key_env"),
        ("filters.max_words=3", "min_words = 15 exceeds max_words = 3"),
        ("balance.questions={adults: 3}", "unknown .'adults'.; choose from"),
        ("balance.traces={bayesian: -3}", "must not be negative"),
        ("decontamination.none_to_check=false", "name the sets that models will be tested on"),
        ("duplicates.rules=[]", "enabled=false"),
        ("duplicates.rules=[texts]", "duplicates.rules.0"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(tmp_path, override, message):
    path = tmp_path / "build.yaml"
    path.write_text(json.dumps(MINIMAL))
    load_build_config(path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_build_config(path, [override])
    assert str(path) in str(caught.value)


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path):
    path = tmp_path / "build.yaml"
    path.write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match="api_key_env") as caught:
        load_build_config(path, ["teacher.base_urls=['https://me:hunter2@host/v1']"])
    assert "hunter2" not in str(caught.value)


# -- journal --------------------------------------------------------------------------------------


def entry(key: str, text: str = "t", **changes: Any) -> dict[str, Any]:
    return {"key": key, "text": text, "tokens_in": 3, "tokens_out": 5, "estimated": False} | changes


def test_a_journal_cut_anywhere_keeps_every_whole_line(tmp_path):
    """At each byte: what a kill in the middle of a write can leave."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.append(entry(str(number), "ünïcode \n" * number))
        assert journal.totals == {"replies": 3, "tokens_in": 9, "tokens_out": 15, "estimated": 0}
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with Journal(path) as journal:
            assert (
                len(journal) == kept and [str(n) in journal for n in range(kept)] == [True] * kept
            )
            journal.append(entry("new", "after"))
            assert journal.get("new")["text"] == "after"
            for number in range(kept):
                assert journal.get(str(number))["text"] == "ünïcode \n" * number
        with Journal(path) as journal:
            assert len(journal) == kept + 1


def test_a_damaged_line_is_said_and_left_out(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    lines = [json.dumps(entry("a")), "{rubbish", json.dumps({"key": "b"}), json.dumps(entry("c"))]
    path.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING), Journal(path) as journal:
        assert "a" in journal and "c" in journal and "b" not in journal and len(journal) == 2
    assert [f"{path}:{n} is damaged" in caplog.text for n in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        False,
    ]


def test_a_journal_has_one_owner(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path):
        with pytest.raises(JournalError, match="in use by another process"):
            Journal(path)
    Journal(path).close()


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    write = os.write

    def full(fd: int, data: bytes) -> int:
        write(fd, data[:7])
        raise OSError(errno.ENOSPC, "full")

    with Journal(path) as journal:
        journal.append(entry("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DiskFullError, match="no space left"):
                journal.append(entry("b"))
        assert "b" not in journal
        journal.append(entry("c"))
        assert journal.get("c")["key"] == "c"
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


# -- texts ----------------------------------------------------------------------------------------


def test_blanks_case_and_punctuation_make_no_difference():
    assert (
        words("Which  PLANE,\nis\xa0shown?")
        == words("which plane is shown")
        == (["which", "plane", "is", "shown"])
    )
    assert words("左肺 CT") == ["左", "肺", "ct"] and words("") == words("?! ") == []


@given(
    st.lists(st.sampled_from("abcde"), max_size=30), st.lists(st.sampled_from("abcde"), max_size=30)
)
def test_similarities_against_plain_sets(a, b):
    """The definition, on triples of words instead of hashes of them."""
    first, second = (
        text_features(question("x", " ".join(t), {"A": "p", "B": "q"})) for t in (a, b)
    )

    def triples(t: list[str]) -> set[tuple[str, ...]]:
        n = min(3, len(t))
        return {tuple(t[i : i + n]) for i in range(len(t) - n + 1)} if n else set()

    x, y = triples(a), triples(b)
    assert jaccard(first.stem, second.stem) == (len(x & y) / len(x | y) if x and y else 0.0)
    assert containment(first.stem, second.stem) == (
        len(x & y) / min(len(x), len(y)) if x and y else 0.0
    )
    assert len(first.runs) <= max(0, len(a) - 12)


def test_the_order_of_options_makes_no_difference():
    a = question("a", "Which one?", {"A": "left main artery", "B": "vein"})
    b = question("b", "Which one?", {"A": "vein", "B": "left main artery"})
    assert text_features(a) == text_features(b)


def test_texts_alone_match_only_without_images_or_where_that_is_asked_for():
    template = question("a", "What modality is shown in this image of the chest?")
    picture, other = (load_image(r.images[0]) for r in PHANTOM[:2])
    cases = {
        ("text_only",): (True, False),
        ("text",): (True, True),
        ("image_and_text",): (False, False),
        ("long_text",): (False, False),
        ("image",): (False, False),
    }
    for rules, (bare, with_image) in cases.items():
        for every in (True, False):
            matcher = Matcher(MatchConfig(rules=rules), every_image=every)
            matcher.add(item(template))
            found = matcher.find(item(replace(template, id="b")))
            assert bool(found) == bare, rules
            matcher = Matcher(MatchConfig(rules=rules), every_image=every)
            matcher.add(item(template, picture))
            assert bool(matcher.find(item(template, other))) == with_image, rules


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda t: t, True),
        (lambda t: t.upper().replace(" ", "  ").replace(",", " ,"), True),
        (lambda t: t.replace("three weeks", "two weeks"), True),
        (lambda t: "Here is a case for you. " + t + " What is the diagnosis?", True),
        (lambda t: t[: 3 * len(t) // 4], True),
        (lambda t: " ".join(t.split()[:20]), False),  # not long any more
        (lambda t: " ".join(reversed(t.split())), False),
        (lambda t: "A girl of nine has a rash. " * 6 + t[:60], False),
    ],
)
def test_long_texts_are_found_whatever_their_images(change, same):
    matcher = Matcher(DecontaminationConfig(none_to_check=True), every_image=False)
    matcher.add(item(question("test", LONG), load_image(PHANTOM[0].images[0])))
    found = matcher.find(item(question("train", change(LONG), {"A": "x", "B": "y"})))
    assert (found is not None) == same
    if found:
        assert found["rule"] == "long_text" and found["id"] == "test" and found["set"] == "set"


def test_minhash_finds_what_comparing_all_finds():
    """Random texts with random edits: every pair over the threshold, and none under it."""
    rng = random.Random(4)
    vocabulary = [f"w{n}" for n in range(400)]
    texts = [rng.choices(vocabulary, k=rng.randint(20, 60)) for _ in range(60)]
    for text in texts[:40]:
        changed = list(text)
        for _ in range(rng.randint(0, 2)):
            changed[rng.randrange(len(changed))] = rng.choice(vocabulary)
        texts.append(changed)
    matcher = Matcher(MatchConfig(rules=("text_only",)), every_image=True)
    seen: list[Item] = []
    missed = wrong = over = 0
    for number, text in enumerate(texts):
        new = item(question(str(number), " ".join(text), {"A": f"a{number}", "B": f"b{number}"}))
        best = max((jaccard(new.text.whole, other.text.whole) for other in seen), default=0.0)
        found = matcher.find(new)
        over += best >= 0.85
        missed += best >= 0.85 and found is None
        wrong += best < 0.85 and found is not None
        matcher.add(new)
        seen.append(new)
    assert over >= 8 and missed == 0 and wrong == 0


# -- images ---------------------------------------------------------------------------------------


def reencoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return load_image(ImageRef(data=buffer.getvalue()))


def tinted(image: Image.Image) -> Image.Image:
    bands = zip(image.split(), (1.0, 0.8, 0.6), strict=True)
    return Image.merge("RGB", [band.point(lambda v, f=f: int(v * f)) for band, f in bands])


COPIES = {
    "jpeg": lambda im: reencoded(im, "JPEG", quality=60),
    "webp": lambda im: reencoded(im, "WEBP", quality=70),
    "half": lambda im: im.resize((im.width // 2, im.height // 2)),
    "double": lambda im: im.resize((im.width * 2, im.height * 2), Image.Resampling.BICUBIC),
    "stretched": lambda im: im.resize((int(im.width * 1.3), im.height)),
    "grey": lambda im: im.convert("L").convert("RGB"),
    "tinted": tinted,
    "dark": lambda im: ImageEnhance.Brightness(im).enhance(0.6),
    "half as jpeg": lambda im: reencoded(
        im.resize((im.width // 2, im.height // 2)), "JPEG", quality=90
    ),
}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [load_image(record.images[0]) for record in PHANTOM]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_found_and_no_other_image(pictures, copy):
    matcher = Matcher(MatchConfig(rules=("image",)), every_image=True)
    for record, picture in zip(PHANTOM, pictures, strict=True):
        matcher.add(item(record, picture))
    for record, picture in list(zip(PHANTOM, pictures, strict=True))[::4]:
        found = matcher.find(item(replace(record, id="copy"), COPIES[copy](picture)))
        assert found is not None and found["id"] == record.id


def test_images_of_one_template_are_told_apart(pictures):
    """Eighty phantom images, many with the same finding: none is near another."""
    for cfg in (DuplicateConfig(), DecontaminationConfig(none_to_check=True)):
        matcher = Matcher(cfg.model_copy(update={"rules": ("image",)}), every_image=False)
        for record, picture in zip(PHANTOM, pictures, strict=True):
            assert matcher.find(item(record, picture)) is None
            matcher.add(item(record, picture))


def test_image_and_text_needs_both(pictures):
    template = question("t", "Which finding does this film show?", {"A": "x", "B": "y"})
    other = question("o", "How old is the patient likely to be, judging by the bones alone?")
    matcher = Matcher(DecontaminationConfig(none_to_check=True), every_image=False)
    matcher.add(item(template, pictures[0]))
    copy = COPIES["half as jpeg"](pictures[0])
    assert matcher.find(item(template, pictures[1])) is None
    assert matcher.find(item(other, copy)) is None
    found = matcher.find(item(replace(template, options={"A": "p", "B": "q"}), copy))
    assert found is not None and found["rule"] == "image_and_text" and found["id"] == "t"


def test_all_images_of_a_duplicate_match_but_one_shared_with_a_test_set_is_enough(pictures):
    stem = question("a", "What do the two films show when they are compared?")
    pair, mixed = (pictures[0], pictures[1]), (pictures[0], pictures[2])
    for every, want in ((True, False), (False, True)):
        matcher = Matcher(MatchConfig(), every_image=every)
        matcher.add(item(stem, *pair))
        assert bool(matcher.find(item(stem, *mixed))) is want
        assert bool(matcher.find(item(stem, pair[0]))) is want
        assert matcher.find(item(stem, *map(COPIES["jpeg"], pair)))


def test_hashes_are_remembered_and_damaged_images_named(tmp_path, monkeypatch):
    cache = tmp_path / "hashes.jsonl"
    broken = question("broken", "x")
    broken = replace(broken, images=(ImageRef(data=b"\x89PNG nothing"),))
    records = [*PHANTOM[:6], broken, *PHANTOM[6:9]]
    hasher = ImageHasher(cache, 2)
    first = list(hasher.all_of(records))
    hasher.close()
    assert [record.id for record, _ in first] == [record.id for record in records]
    assert isinstance(first[6][1], ImageError)
    cache.write_bytes(cache.read_bytes()[:-20])  # killed in the middle of the last line
    opened = []

    def counted(ref: ImageRef) -> Image.Image:
        opened.append(ref)
        return load_image(ref)

    monkeypatch.setattr("mmedx_fast.builder.features.load_image", counted)
    for expected in (2, 1):  # the torn one and the broken one; then the broken one
        opened.clear()
        hasher = ImageHasher(cache, 2)
        again = list(hasher.all_of(records))
        hasher.close()
        assert len(opened) == expected
        assert [f for _, f in again if isinstance(f, tuple)] == [
            f for _, f in first if isinstance(f, tuple)
        ]


# -- screening ------------------------------------------------------------------------------------


def test_ids_licences_and_sources_of_the_new_rows(tmp_path):
    rows = [
        replace(PHANTOM[0], id="same", meta={"license": "CC0"}),
        replace(PHANTOM[1], meta={"source": "textbook"}),
    ]
    write_mmedexpert(rows, tmp_path / "a", "train")
    write_mmedexpert([replace(PHANTOM[2], id="same", meta={})], tmp_path / "b", "train")
    cfg = make_config(
        output=str(tmp_path / "out"),
        sources=[
            {"name": name, "path": str(tmp_path / name), "license": "MIT"} for name in ("a", "b")
        ],
    )
    hasher = ImageHasher(tmp_path / "hashes.jsonl", 2)
    found = screen(cfg, hasher)
    hasher.close()
    records = [candidate.record for candidate in found.candidates]
    assert [r.id for r in records] == ["same", PHANTOM[1].id, "b:same"]
    assert [r.meta["license"] for r in records] == ["CC0", "MIT", "MIT"]
    assert [r.meta["source"] for r in records] == ["a", "textbook", "b"]
    assert all(r.reasoning == {} for r in records)
    assert found.read == {"a": 2, "b": 1}


def test_the_test_set_of_a_training_config_is_checked_against(tmp_path):
    used: set[str] = set()
    make_split("train", 20, 7, used)
    make_split("validation", 20, 7, used)
    leak = make_split("test", 20, 7, used)[3]
    write_mmedexpert([PHANTOM[0], leak], tmp_path / "a", "train")
    run = tmp_path / "run.yaml"
    run.write_text("phantom: {train: 20, validation: 20, test: 20, seed: 7}")
    cfg = make_config(
        output=str(tmp_path / "out"),
        sources=[{"name": "a", "path": str(tmp_path / "a")}],
        decontamination={"run_configs": [str(run)]},
    )
    hasher = ImageHasher(tmp_path / "hashes.jsonl", 2)
    found = screen(cfg, hasher)
    hasher.close()
    assert [candidate.record.id for candidate in found.candidates] == [PHANTOM[0].id]
    assert [d.reason for d in found.dropped] == ["contaminated"]
    assert found.dropped[0].evidence["set"] == "run.test"
    assert found.evaluation[0]["questions"] == 20


def test_the_order_is_drawn_by_the_seed_and_specialties_take_turns():
    candidates = [Candidate(record, "s", ()) for record in PHANTOM]
    first = shuffled(candidates, 1)
    assert sorted(c.record.id for c in first) == sorted(r.id for r in PHANTOM)
    assert first == shuffled(candidates, 1) != shuffled(candidates, 2)
    for start in range(0, 80, 4):
        assert [c.record.specialty for c in first[start : start + 4]] == list(SPECIALTIES)
    uneven = [c for c in candidates if c.record.specialty == "pediatrics"][:3] + candidates[:5]
    assert len(shuffled(uneven, 0)) == 8


# -- the teacher's answers ------------------------------------------------------------------------

NO_FILTERS = FilterConfig(min_adherence=0, min_words=1, max_words=10**6)


def completion(record: Record, guideline: str) -> str:
    trace = record.reasoning[guideline]
    return f"<think>\n{trace}\n</think>\n<answer>{record.answer_label}</answer>"


def test_traces_pass_under_their_own_guideline_and_hardly_another():
    passed = {pair: 0 for pair in itertools.product(GUIDELINE_NAMES, GUIDELINE_NAMES)}
    for record in PHANTOM[::2]:
        bare = replace(record, meta={})  # no column tells the image's findings
        for written, asked in passed:
            verdict = judge(completion(bare, written), bare, asked, FilterConfig())
            passed[written, asked] += verdict.reason is None
            assert verdict.trace == record.reasoning[written]
            if verdict.reason is not None:
                assert verdict.reason == "guideline" and verdict.evidence["failed"]
    for (written, asked), count in passed.items():
        assert count == 40 if written == asked else count <= 2, (written, asked, count)


def test_each_filter_drops_what_is_made_to_fail_it():
    record = PHANTOM[0]
    good, wrong = (
        completion(record, "analytic"),
        next(letter for letter in record.options if letter != record.answer_label),
    )
    gold = f"<answer>{record.answer_label}</answer>"
    other = record.options[wrong]

    def reason(text: str, cfg: FilterConfig | None = None, **options: Any) -> str | None:
        return judge(text, record, "analytic", cfg or FilterConfig(), **options).reason

    assert reason(good) is None
    assert reason(good.replace(gold, f"<answer>{wrong}</answer>")) == "answer"
    assert reason(good.replace(gold, "")) == reason("") == "answer"
    assert (
        reason(good.replace(gold, f"<answer>{record.answer_label} or {wrong}</answer>")) == "answer"
    )
    assert reason(good + "\nI hope this helps.") == "format"
    assert reason(good.replace("<think>", "")) == "format"
    assert reason(completion(record, "intuitive")) == "guideline"
    assert reason(good, FilterConfig(max_words=20)) == "length"
    assert reason(good, FilterConfig(min_words=200, max_words=300)) == "length"
    assert reason(good.replace("\n</think>", " <|im_end|>\n</think>")) == "row"
    ends = f"<think>The film is odd. Therefore the answer is {wrong}.</think>{gold}"
    assert reason(ends, NO_FILTERS) == "row"
    ends = f"<think>The film is odd. Therefore it is {other}.</think>{gold}"
    assert reason(ends, NO_FILTERS) == "row"
    told = good.replace("<think>\n", "<think>\nThe provided answer fits well. ")
    assert reason(told) is None and reason(told, revealed=True) == "leak"
    assert reason(good, revealed=True) is None


def test_findings_that_a_trace_states_of_its_image():
    assert stated_findings(
        "The chest film shows a lobar opacity (2) and clear apices. The history tells of fever."
    ) == ("a lobar opacity", "clear apices")
    assert stated_findings(
        "On CT the scan reveals fat stranding, free air with an air-fluid level; so"
    ) == (("fat stranding", "free air", "an air-fluid level"))
    assert stated_findings("The patient shows signs of fatigue.") == ()
    assert stated_findings("The image shows something that takes far too many words to say") == ()


def test_open_and_yes_no_questions():
    trace = (
        "The film shows a pleural effusion. The effusion with fever suggests pneumonia. "
        "Therefore the answer is yes."
    )
    record = replace(
        question("y", "Is there a pleural effusion in this patient with fever?"),
        options=None, answer_label=None, answer="Yes", answer_type="yesno",
    )  # fmt: skip
    text = f"<think>{trace}</think><answer>{{}}</answer>"
    assert judge(text.format("yes."), record, "intuitive", NO_FILTERS).reason is None
    assert judge(text.format("No"), record, "intuitive", NO_FILTERS).reason == "answer"
    said = teacher_messages(record, "intuitive", make_config().teacher)[-1]["content"][-1]["text"]
    assert "Answer yes or no" in said and "Options" not in said


# -- keys and money -------------------------------------------------------------------------------


def test_a_key_changes_with_all_that_changes_the_answer_and_with_nothing_else():
    def key(
        record: Record = PHANTOM[0], digests=("d",), guideline="bayesian", attempt=0, **teacher
    ):
        cfg = make_config(teacher=MINIMAL["teacher"] | teacher).teacher
        return make_ask(record, digests, 100, guideline, attempt, cfg).key

    base = key()
    same = (
        {"base_urls": ["http://other/v1"]}, {"concurrency": 3}, {"timeout": 5}, {"max_retries": 1},
        {"price_input": 2}, {"attempts": 9}, {"api_key_env": "KEY"}, {"on_error": "drop"},
    )  # fmt: skip
    assert {key(**changes) for changes in same} == {base}
    assert key(replace(PHANTOM[0], id="renamed", specialty=None, meta={})) == base
    other = [
        key(digests=("e",)), key(digests=()), key(guideline="analytic"), key(attempt=1), key(PHANTOM[1]),
        key(model="n"), key(temperature=0.5), key(temperature=None), key(max_tokens=5), key(seed=1),
        key(reveal_answer=True), key(extra_instruction=""), key(system_prompt="x"), key(top_p=0.5),
        key(max_pixels=1000), key(image_format="jpeg"), key(answer_format="text"),
        key(extra_body={"x": 1}), key(replace(PHANTOM[0], question="?")),
        key(replace(PHANTOM[0], options={"A": "x", "B": "y"})),
    ]  # fmt: skip
    assert len({base, *other}) == 1 + len(other)


def test_money():
    teacher = MINIMAL["teacher"] | {
        "price_input": 2.0, "price_output": 8.0, "budget": 0.02, "max_tokens": 1000
    }  # fmt: skip
    cfg = make_config(teacher=teacher).teacher
    totals = {"replies": 2, "tokens_in": 1000, "tokens_out": 500, "estimated": 1}
    ledger = Ledger(cfg, totals)
    assert ledger.spent == pytest.approx(0.002 + 0.004) and ledger.mean_output == 250
    ask = dataclasses.replace(make_ask(PHANTOM[0], (), 0, "bayesian", 0, cfg), tokens_in=500)
    held = ledger.reserve(ask)  # 0.001 + 0.008
    assert held == pytest.approx(0.009)
    with pytest.raises(BudgetError, match=r"0\.0060 USD spent on 2 answers"):
        ledger.reserve(ask)
    ledger.release(held)
    ledger.add(Reply("x", "stop", 500, 100, False, "m", 0.1))
    assert ledger.spent == pytest.approx(0.0078) and ledger.under_way == 0
    assert ledger.reserve(ask) == pytest.approx(0.009)


def test_importing_the_command_stays_light():
    import subprocess
    import sys

    code = (
        "import sys, mmedx_fast.cli_build, mmedx_fast.builder.config as c; "
        "heavy = {'torch', 'datasketch', 'imagehash', 'scipy', 'httpx', 'vllm', 'PIL'} & sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
