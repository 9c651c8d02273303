"""`mmedx data build` against a real HTTP server that fails in every way: nothing lost, nothing asked twice."""

from __future__ import annotations

import collections
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace
from PIL import Image

from mmedx_fast.builder.build import build, estimate
from mmedx_fast.builder.config import BuildConfig
from mmedx_fast.builder.http_reply import retry_after
from mmedx_fast.builder.journal import JournalError
from mmedx_fast.builder.teacher import BudgetError, QuestionError, TeacherError
from mmedx_fast.cli import main
from mmedx_fast.data.images import load_image
from mmedx_fast.data.loaders import load_records
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.phantom import make_split
from mmedx_fast.data.records import GUIDELINE_NAMES, ImageRef, Record

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location(
    "teacher_server", Path(__file__).with_name("_teacher_server.py")
)
helper = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helper)

RECORDS = make_split("train", 12, 3, set())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_mmedexpert([replace(r, reasoning={}) for r in RECORDS], folder, "train")
    return folder


@pytest.fixture
def server() -> Iterator[Any]:
    with helper.serving(RECORDS) as made:
        yield made


def config(source: Path, out: Path, server: Any, **changes: Any) -> BuildConfig:
    """A config with ``section__key`` changes."""
    raw: dict[str, Any] = {
        "output": str(out),
        "sources": [{"name": "clinic", "path": str(source)}],
        "teacher": {
            "base_urls": [server.url],
            "model": "teacher",
            "attempts": 3,
            "concurrency": 4,
            "timeout": 1.0,
            "backoff": 0.01,
            "max_backoff": 0.05,
            "max_retries": 8,
            "price_input": 1000.0,
            "price_output": 10000.0,
        },
        "decontamination": {"none_to_check": True},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = raw
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return BuildConfig.model_validate(raw)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(out: Path) -> dict[str, str]:
    """What must not depend on the way there."""
    return {name: (out / name).read_text() for name in ("train.jsonl", "dropped.jsonl")}


def test_every_question_under_every_guideline(source, server, tmp_path):
    server.together = 2  # on a busy machine one answer may be out before the next request is in
    sheet = build(config(source, tmp_path / "out", server))
    made = load_records(tmp_path / "out", split="train", require_reasoning=True)
    assert not made.rejected
    assert [r.id for r in made.records] == [r.id for r in RECORDS]
    for record, original in zip(made.records, RECORDS, strict=True):
        assert record.reasoning == original.reasoning
        assert record.specialty == original.specialty and record.options == original.options
        assert record.meta["traces"].keys() == original.reasoning.keys()
    assert dict(map(tuple, sheet["funnel"])) == {
        **{"read": 12, "rejected": 0, "answer_type": 0, "image": 0, "contaminated": 0},
        **{"duplicate": 0, "not taken": 0, "taken up": 12, "no trace passed": 0, "kept": 12},
    }
    assert sheet["traces"]["answers"] == sheet["traces"]["kept"] == 48
    assert sheet["teacher"]["tokens_in"] == 4800 and sheet["teacher"]["tokens_out"] == 1920
    assert sheet["teacher"]["cost"] == pytest.approx(4.8 + 19.2)
    assert sheet["counts"]["license"] == {"Apache-2.0": 12}
    assert sheet["counts"]["source"] == {"clinic": 12}
    assert set(server.asked.values()) == {1} and 1 < server.most_busy <= 4
    # A second build asks nothing and gives the same.
    before = files(tmp_path / "out")
    server.reset()
    build(config(source, tmp_path / "out", server))
    assert not server.bodies and files(tmp_path / "out") == before


def test_what_is_sent(source, server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret-123")
    cfg = config(
        source,
        tmp_path / "out",
        server,
        guidelines=["bayesian"],
        teacher__api_key_env="A_KEY",
        teacher__extra_body={"max_tokens": None, "max_completion_tokens": 77, "stop": ["x"]},
        teacher__max_pixels=3136,
    )
    build(cfg)
    assert {h["Authorization"] for h in server.headers} == {"Bearer sk-secret-123"}
    body = server.bodies[0]
    assert body["max_completion_tokens"] == 77 and "max_tokens" not in body and "top_p" not in body
    assert body["messages"][0]["role"] == "system" and "<think>" in body["messages"][0]["content"]
    parts = body["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    head, _, data = parts[0]["image_url"]["url"].partition(",")
    import base64

    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and image.width * image.height <= 3136
    text = parts[1]["text"]
    record = next(r for r in RECORDS if text.startswith(r.question))
    for letter, option in record.options.items():
        assert f"{letter}. {option}" in text
    assert "right answer is" not in text
    assert len({b["seed"] for b in server.bodies}) == len(server.bodies) == 12
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"sk-secret-123" not in everything and b"A_KEY" in everything


def test_the_answer_is_revealed_only_where_asked_for(source, server, tmp_path):
    build(config(source, tmp_path / "out", server, teacher__reveal_answer=True))
    for body in server.bodies:
        text = body["messages"][1]["content"][-1]["text"]
        record = next(r for r in RECORDS if text.startswith(r.question))
        assert f"the right answer is {record.answer_label}. {record.answer}." in text


FAULTS = (
    "500 502 503 429 429:0.05 stall drip drop broken_json empty_choices no_message number html truncated"
).split()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_a_retry_and_nothing_else(source, server, tmp_path, fault):
    server.fault = lambda n: fault if n % 5 == 1 else None
    slow = fault in ("stall", "drip")
    limit = {"guidelines": ["intuitive"] if slow else ["intuitive", "analytic"]}
    sheet = build(
        config(source, tmp_path / "out", server, teacher__timeout=0.4 if slow else 5.0, **limit)
    )
    count = 12 if slow else 24
    assert sheet["traces"]["kept"] == sheet["traces"]["answers"] == count
    assert set(server.answered.values()) == {1} and len(server.answered) == count
    journal = read(tmp_path / "out" / "journal.jsonl")
    assert len(journal) == count == len({entry["key"] for entry in journal})
    faults = sum(server.asked.values()) - count
    assert faults >= count // 5
    assert sum(sheet["teacher"]["retries"].values()) == faults


def test_retry_after_is_honoured_by_all_requests_to_that_server(source, server, tmp_path):
    server.fault = lambda n: "429:0.6" if n == 0 else None
    build(config(source, tmp_path / "out", server, teacher__concurrency=1))
    assert server.times[1] - server.times[0] >= 0.6
    server.reset()
    server.fault = lambda n: "503:9999" if n == 0 else None
    with pytest.raises(TeacherError, match=r"wait for 9999 s.*teacher\.max_retry_after"):
        build(config(source, tmp_path / "other", server))


def test_retry_after_in_all_its_forms():
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert retry_after("7") == 7.0 and retry_after("0.5") == 0.5 and retry_after("-3") == 0.0
    assert 25 < retry_after(soon) <= 30
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after(None) is None and retry_after("soon") is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_errors_that_no_retry_mends_stop_at_once_with_the_servers_words(
    source, server, tmp_path, status
):
    server.fault = lambda n: str(status) if n == 5 else None
    with pytest.raises(TeacherError, match=f"answers with {status}: said {status}"):
        build(config(source, tmp_path / "out", server, teacher__on_error="stop"))
    # Those under way were awaited and kept; nothing was sent after it but what was under way.
    assert len(read(tmp_path / "out" / "journal.jsonl")) == len(server.answered) < 24
    server.fault = lambda n: None
    sheet = build(config(source, tmp_path / "out", server))
    assert sheet["traces"]["kept"] == 48 and set(server.answered.values()) == {1}


def test_a_key_that_the_server_repeats_is_not_shown(source, server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret-123")
    monkeypatch.setattr(
        helper._Handler,
        "_misbehave",
        lambda self, fault: self._send(401, '{"error": {"message": "bad key sk-secret-123"}}'),
    )
    server.fault = lambda n: "401"
    with pytest.raises(TeacherError, match=r"bad key \*\*\*.*api_key_env") as caught:
        build(config(source, tmp_path / "out", server, teacher__api_key_env="A_KEY"))
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("A_KEY")
    with pytest.raises(TeacherError, match="A_KEY .* is not set"):
        build(config(source, tmp_path / "out", server, teacher__api_key_env="A_KEY"))


def test_a_server_that_stays_down_stops_the_build_and_it_goes_on_later(source, server, tmp_path):
    server.fault = lambda n: "500" if n >= 20 else None
    with pytest.raises(QuestionError, match=r"no answer after 3 tries.*said 500"):
        build(config(source, tmp_path / "out", server, teacher__max_retries=2))
    assert len(read(tmp_path / "out" / "journal.jsonl")) == 20
    server.fault = lambda n: None
    build(config(source, tmp_path / "out", server))
    assert len(server.answered) == 48 and set(server.answered.values()) == {1}


def test_refused_questions_are_dropped_where_that_is_wanted(source, server, tmp_path, monkeypatch):
    poor = RECORDS[3].question
    plain = helper._Handler._answer

    def answer(self, owner, number, key, body):
        if poor in body["messages"][1]["content"][-1]["text"]:
            self._misbehave("400")
        else:
            plain(self, owner, number, key, body)

    monkeypatch.setattr(helper._Handler, "_answer", answer)
    sheet = build(config(source, tmp_path / "out", server, teacher__on_error="drop"))
    assert sheet["data"]["questions"] == 11
    assert sheet["traces"]["without_answer"] == {"teacher": 4, "not_asked": 0}
    dropped = [row for row in read(tmp_path / "out" / "dropped.jsonl") if "guideline" in row]
    assert {row["id"] for row in dropped} == {RECORDS[3].id} and len(dropped) == 4
    assert all("said 400" in row["evidence"]["problem"] for row in dropped)
    server.fault = lambda n: "400"
    monkeypatch.setattr(helper._Handler, "_answer", plain)
    with pytest.raises(QuestionError, match="said 400"):  # not one of them is answered any more
        build(
            config(
                source, tmp_path / "o2", server, teacher__on_error="drop", teacher__max_failures=5
            )
        )


def test_attempts_until_one_passes(source, server, tmp_path):
    seen: collections.Counter[tuple[str, str]] = collections.Counter()

    def wrong(name: str, guideline: str, seed: int) -> bool:
        seen[name, guideline] += 1
        stubborn = (name, guideline) == (RECORDS[0].id, "bayesian")
        return stubborn or (guideline == "analytic" and seen[name, guideline] == 1)

    server.wrong = wrong
    sheet = build(config(source, tmp_path / "out", server))
    # 48 first attempts, 13 second ones, 1 third.
    assert sheet["traces"]["answers"] == sum(server.asked.values()) == 48 + 13 + 1
    assert sheet["traces"]["failed"]["answer"] == 12 + 3
    assert sheet["traces"]["kept"] == 47
    assert sheet["traces"]["kept_by_attempt"] == {"1": 35, "2": 12}
    dropped = read(tmp_path / "out" / "dropped.jsonl")
    assert len(dropped) == 15 and {row["reason"] for row in dropped} == {"answer"}
    mine = [row for row in dropped if row["id"] == RECORDS[0].id and row["guideline"] == "bayesian"]
    assert [row["attempt"] for row in mine] == [1, 2, 3]
    assert all(row["evidence"]["predicted"] != row["evidence"]["gold"] for row in mine)
    assert len({body["seed"] for body in server.bodies}) == 62


def test_several_endpoints_share_the_questions_and_stand_in_for_one_another(
    source, server, tmp_path
):
    with helper.serving(RECORDS) as second:
        urls = [server.url, second.url]
        sheet = build(config(source, tmp_path / "out", server, teacher__base_urls=urls))
        assert len(server.answered) == len(second.answered) == 24
        assert sheet["traces"]["kept"] == 48
        # A question's prompts meet in one prefix cache.
        asked = [{b["messages"][1]["content"][-1]["text"].split("\n")[0] for b in s.bodies}
                 for s in (server, second)]  # fmt: skip
        assert not asked[0] & asked[1]
        second.fault = lambda n: "500"
        server.reset()
        build(config(source, tmp_path / "two", server, teacher__base_urls=urls))
        assert len(server.answered) == 48


def test_the_budget_is_never_exceeded(source, server, tmp_path):
    # An answer costs 0.1 + 0.4; at most 1.0 * prompt + 10 * max_tokens / 1000 is put aside.
    changes = {"teacher__budget": 5.0, "teacher__max_tokens": 100}
    with pytest.raises(BudgetError, match=r"budget of 5\.0000 USD.*--from-journal"):
        build(config(source, tmp_path / "out", server, **changes))
    count = len(read(tmp_path / "out" / "journal.jsonl"))
    assert 0 < 0.5 * count <= 5.0
    with pytest.raises(BudgetError):
        build(config(source, tmp_path / "out", server, **changes))
    again = len(read(tmp_path / "out" / "journal.jsonl"))
    assert count <= again and 0.5 * again <= 5.0
    asked = sum(server.asked.values())
    sheet = build(config(source, tmp_path / "out", server, **changes), from_journal=True)
    assert sheet["traces"]["answers"] == sheet["traces"]["kept"] == again
    assert sum(server.asked.values()) == asked
    assert sum(count for _, count in sheet["funnel"][1:8]) == 12
    sheet = build(config(source, tmp_path / "out", server))
    assert sheet["traces"]["kept"] == 48 and set(server.answered.values()) == {1}


def test_tokens_are_estimated_where_the_server_does_not_report_them(source, server, tmp_path):
    server.usage = None
    sheet = build(config(source, tmp_path / "out", server))
    assert sheet["teacher"]["answers_with_estimated_tokens"] == 48
    journal = read(tmp_path / "out" / "journal.jsonl")
    assert all(e["estimated"] and abs(e["tokens_out"] - len(e["text"]) / 4) <= 1 for e in journal)


def test_a_dry_run_asks_nothing_and_knows_what_is_answered(source, server, tmp_path):
    cfg = config(source, tmp_path / "out", server, teacher__expected_output_tokens=50)
    found = estimate(cfg)
    assert not server.bodies
    assert found["requests"] == {"least": 48, "most": 144}
    assert found["tokens_out"] == {"least": 2400, "most": 144 * 1024}
    assert found["cost"]["least"] == pytest.approx(
        found["tokens_in"]["least"] / 1e6 * 1000 + 2400 / 1e6 * 10000
    )
    build(cfg, limit=5)
    assert len(server.bodies) == 20
    found = estimate(cfg)
    assert found["requests"]["least"] == 28 and found["answered_before"] == 20
    assert found["mean_output_tokens"] == 40
    build(cfg)
    assert set(server.answered.values()) == {1} and len(server.answered) == 48


def test_balance_is_met_exactly_or_the_sources_are_used_up(source, server, tmp_path):
    bad = {r.id for r in RECORDS if r.specialty == "adult_medicine"}
    bad.remove(max(bad))
    server.wrong = lambda name, guideline, seed: name in bad
    wanted = {"adult_medicine": 2, "pediatrics": 2, "brain_senses": 0}
    sheet = build(
        config(
            source,
            tmp_path / "out",
            server,
            balance__questions=wanted,
            balance__traces={"bayesian": 3, "analytic": 0},
        )
    )
    assert sheet["counts"]["specialty"] == {
        **{"adult_medicine": 1, "pediatrics": 2, "brain_senses": 0, "oncology_surgery": 3}
    }
    kept = sheet["traces"]["kept_by_guideline"]
    assert kept.get("bayesian", 0) == 3 and "analytic" not in kept
    assert kept["intuitive"] == kept["differential"] == 6
    left = [r for r in read(tmp_path / "out" / "dropped.jsonl") if r["reason"] == "not_taken"]
    assert len(left) == dict(map(tuple, sheet["funnel"]))["not taken"] == 12 - 3 - 2 - 3


# -- the funnel on questions with known faults ----------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageRef(data=buffer.getvalue())


def copy_of(record: Record, name: str, how: str, **changes: Any) -> Record:
    """The same question from elsewhere: another file, other blanks, options in another order."""
    image = load_image(record.images[0])
    if how == "half":
        ref = encoded(image.resize((image.width // 2, image.height // 2)), "PNG")
    elif how == "jpeg":
        ref = encoded(image, "JPEG", quality=60)
    elif how == "tint":
        r, g, b = image.split()
        ref = encoded(Image.merge("RGB", (r, g.point(lambda v: v * 0.8), b)), "WEBP", quality=80)
    else:
        ref = record.images[0]
    text = record.question.replace(" ", "  ").replace(". ", " .\n").upper()
    texts = [*record.options.values()][::-1]
    options = dict(zip(record.options, texts, strict=True))
    label = next(k for k, v in options.items() if v == record.answer)
    shown = {"images": (ref,), "question": text, "options": options, "answer_label": label}
    return replace(record, id=name, **shown | changes)


def test_the_funnel_counts_every_question_once(server, tmp_path):
    """Known duplicates, known contamination, broken rows and images: each found, nothing else."""
    everything = make_split("train", 40, 9, set())
    good, test = everything[:20], everything[20:]
    rows = list(good)
    rows += [
        copy_of(good[i], f"dup-{i}", how) for i, how in enumerate(("half", "jpeg", "tint", ""))
    ]
    rows += [copy_of(test[i], f"leak-{i}", how) for i, how in enumerate(("half", "jpeg", "tint"))]
    # A test image under another question and a test question with another image are no leaks.
    rows.append(replace(good[4], id="same-image", images=test[4].images))
    rows.append(replace(test[6], id="same-text", images=good[0].images))
    rows.append(replace(good[5], id="open", options=None, answer_label=None,
                                    answer_type="open", question="Describe it."))  # fmt: skip
    rows.append(replace(good[6], id="unreadable"))
    folder = tmp_path / "data"
    write_mmedexpert([replace(r, reasoning={}) for r in rows], folder, "train")
    lines = (folder / "train.jsonl").read_text().splitlines()
    broken = json.loads(lines[-1])
    broken["images"] = ["images/broken.png"]
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "train.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(broken), "{oops"]) + "\n"
    )
    write_mmedexpert(test, tmp_path / "test", "test")
    server.records = {" ".join(r.question.split()): r for r in rows}
    cfg = config(
        folder,
        tmp_path / "out",
        server,
        decontamination={"evaluation": [{"name": "clinic_test", "path": str(tmp_path / "test")}]},
    )
    sheet = build(cfg)
    assert dict(map(tuple, sheet["funnel"])) == {
        **{"read": 32, "rejected": 1, "answer_type": 1, "image": 1, "contaminated": 3},
        **{"duplicate": 4, "not taken": 0, "taken up": 22, "no trace passed": 0, "kept": 22},
    }
    dropped = {row["id"]: row for row in read(tmp_path / "out" / "dropped.jsonl")}
    assert {name: row["reason"] for name, row in dropped.items()} == {
        **{f"dup-{i}": "duplicate" for i in range(4)},
        **{f"leak-{i}": "contaminated" for i in range(3)},
        **{"open": "answer_type", "unreadable": "image"},
    }
    for i in range(4):
        assert dropped[f"dup-{i}"]["evidence"]["id"] == good[i].id
    for i in range(3):
        evidence = dropped[f"leak-{i}"]["evidence"]
        assert evidence["id"] == test[i].id and evidence["set"] == "clinic_test"
        assert evidence["rule"] == "image_and_text" and evidence["image_distance"] <= 0.18
    assert len(read(tmp_path / "out" / "rejected.jsonl")) == 1
    assert "broken.png" in dropped["unreadable"]["evidence"]["problem"]
    assert sheet["evaluation_sets"][0]["questions"] == 20
    shown = (tmp_path / "out" / "datasheet.md").read_text()
    for text in ("in an evaluation set | 3", "near-duplicate | 4", "clinic_test", "differential"):
        assert text in shown
    assert sheet == json.loads((tmp_path / "out" / "datasheet.json").read_text())


# -- killed and interrupted -----------------------------------------------------------------------


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmedx_fast.cli", "data", "build", str(path), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(server: Any, count: int) -> None:
    until = time.monotonic() + 60
    while len(server.answered) < count:
        assert time.monotonic() < until
        time.sleep(0.002)


def wrong_by_seed(name: str, guideline: str, seed: int) -> bool:
    return seed % 3 == 0


def test_killed_at_any_moment_it_goes_on_to_the_same_data(source, server, tmp_path):
    server.wrong = wrong_by_seed
    changes = {"balance__questions": {"pediatrics": 2}, "seed": 5, "min_guidelines": 2}
    build(config(source, tmp_path / "unbroken", server, **changes))
    want = files(tmp_path / "unbroken")
    asked = len(server.answered)
    server.reset()
    server.delay = 0.03
    out = tmp_path / "out"
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(config(source, out, server, **changes).model_dump(mode="json")))
    kept: set[str] = set()
    for count in (7, 23, 41):
        process = start(path)
        wait_for(server, count)
        process.kill()
        process.wait()
        # The last line may be torn; what is whole before it counts.
        whole = (out / "journal.jsonl").read_bytes().rpartition(b"\n")[0]
        entries = [json.loads(line) for line in whole.splitlines()]
        assert kept <= {entry["key"] for entry in entries}
        kept = {entry["key"] for entry in entries}
        assert len(server.answered) - len(kept) <= 4  # no more than were under way
    with (out / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"key": "torn')
    server.delay = 0
    process = start(path)
    assert process.wait(120) == 0, process.stderr.read()
    assert files(out) == want
    # Three kills with four requests under way each.
    assert asked == len(server.answered) and sum(server.answered.values()) <= asked + 12
    assert len(read(out / "journal.jsonl")) == asked


def test_ctrl_c_keeps_what_was_under_way_and_names_the_command(source, server, tmp_path):
    server.delay = 0.3
    out, path = tmp_path / "out", tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(config(source, out, server).model_dump(mode="json")))
    process = start(path, "teacher.attempts=2")
    wait_for(server, 5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    count = len(read(out / "journal.jsonl"))
    assert f"{count} answers are kept" in said and "journal.jsonl" in said
    assert f"Go on with: mmedx data build {path} teacher.attempts=2" in said
    assert count == len(server.answered) == sum(server.asked.values()) < 48


def test_two_builds_cannot_share_a_folder(source, server, tmp_path):
    from mmedx_fast.builder.journal import Journal

    with Journal(tmp_path / "out" / "journal.jsonl"):
        with pytest.raises(JournalError, match="in use by another process.*output="):
            build(config(source, tmp_path / "out", server))


def test_the_command(source, server, tmp_path, capsys):
    path = tmp_path / "build.yaml"
    cfg = config(source, tmp_path / "out", server)
    path.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert main(["data", "build", str(path), "--dry-run", "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was asked" in said and not server.bodies
    assert main(["data", "build", str(path), "--limit", "3", "guidelines=[bayesian]"]) == 0
    said = capsys.readouterr().out
    assert "datasheet.md" in said and len(server.bodies) == 3
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("kept")] == ["3", "3"]
    assert main(["data", "build", str(path), "--limit", "0"]) == 2
    assert main(["data", "build", str(path), "teacher.modle=x"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    assert main(["data", "build", str(path), "sources=[]"]) == 2


def test_a_teacher_whose_answers_all_fail_is_explained(source, server, tmp_path):
    server.wrong = lambda name, guideline, seed: True
    with pytest.raises(ValueError, match="no question is left.*144 x answer"):
        build(config(source, tmp_path / "out", server))
    assert set(GUIDELINE_NAMES) == {e["guideline"] for e in read(tmp_path / "out/journal.jsonl")}
