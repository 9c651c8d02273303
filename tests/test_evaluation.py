"""Asking sets of any size: votes, the journal, chunks, prompts, and runs with several sets."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mmedx_fast.config import Config, ConfigError, DataConfig, EvalConfig, load_config
from mmedx_fast.data.records import GUIDELINE_NAMES, ImageRef, Record
from mmedx_fast.eval_breakdown import group_of
from mmedx_fast.evaluation.asking import Asking
from mmedx_fast.evaluation.chunks import Questioner
from mmedx_fast.evaluation.journal import Journal, JournalError, entries
from mmedx_fast.evaluation.medevalkit import MedEvalKitPrompts
from mmedx_fast.evaluation.metrics import metrics_of, read_rows, summarise
from mmedx_fast.evaluation.results import NothingAnsweredError, conclude
from mmedx_fast.evaluation.rows import prediction_row
from mmedx_fast.evaluation.votes import ks, majority_vote, pass_at_k
from mmedx_fast.prompts import PromptBuilder
from mmedx_fast.rollout import Rollout, Sampling, create_engine
from mmedx_fast.tiny import assets_folder
from tests._canned import CannedEngine, CannedPrompts, records

ROOT = Path(__file__).resolve().parents[1]
DATA = DataConfig(max_prompt_length=400)


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder.from_folder(assets_folder(), DATA)


@pytest.fixture(scope="module")
def canned() -> PromptBuilder:
    return CannedPrompts.from_folder(assets_folder(), DATA)


# -- votes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([i < correct for i in range(n)], k))
        share = Fraction(sum(any(choice) for choice in choices), len(choices))
        assert pass_at_k(n, correct, k) == pytest.approx(float(share), abs=1e-12)
    assert pass_at_k(n, 1, 1) == pytest.approx(1 / n)
    for bad in ((n, n + 1, 1), (n, 0, 0), (n, 0, n + 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*bad)
    assert ks(1) == [1] and ks(8) == [1, 2, 4, 8] and ks(6) == [1, 2, 4, 6]


@given(
    st.lists(
        st.tuples(st.sampled_from(["A", "B", "C", None]), st.integers(-9, 0)),
        min_size=1,
        max_size=9,
    )
)
def test_a_vote_is_the_most_given_answer_then_the_most_confident_then_the_first(
    answers: list[tuple[str | None, int]],
) -> None:
    said = [a for a, _ in answers]
    sure: list[float] = [float(c) for _, c in answers]
    found = majority_vote(said, sure)
    read = [a for a in said if a is not None]
    if not read:
        assert found == (None, {}, False, 0)
        return
    counts = {a: read.count(a) for a in read}
    top = [a for a in counts if counts[a] == max(counts.values())]
    mean = {a: Fraction(sum(c for b, c in answers if a == b), counts[a]) for a in top}
    best = [a for a in top if mean[a] == max(mean.values())]
    assert found.votes == counts and found.tie == (len(top) > 1)
    assert found.predicted == min(best, key=said.index)
    own = [i for i, a in enumerate(said) if a == found.predicted]
    assert found.chosen in own and sure[found.chosen] == max(sure[i] for i in own)


def test_a_vote_needs_answers() -> None:
    cases: list[tuple[list[str | None], list[float]]] = [([], []), (["A"], [])]
    for said, sure in cases:
        with pytest.raises(ValueError, match="at least one"):
            majority_vote(said, sure)


# -- the journal ---------------------------------------------------------------------------------


def write_journal(path: Path, upto: int) -> None:
    journal = Journal(path, "f")
    for number in range(journal.count, upto):
        kind: Any = "reject" if number == 2 else "row"
        journal.add(kind, {"id": f"q{number}", "text": "a\nb é\u2028" * number})
        journal.flush()
    journal.close()


def test_a_journal_cut_at_any_byte_goes_on_to_the_same_file(tmp_path: Path) -> None:
    write_journal(tmp_path / "whole", 5)
    whole = (tmp_path / "whole").read_bytes()
    broken = tmp_path / "broken"
    for cut in range(len(whole) + 1):
        broken.write_bytes(whole[:cut])
        write_journal(broken, 5)
        assert broken.read_bytes() == whole, cut
    found = [(kind, number, json.loads(text)["id"]) for kind, number, text in entries(broken)]
    assert found == [("reject" if n == 2 else "row", n, f"q{n}") for n in range(5)]


def test_a_damaged_byte_ends_what_is_believed(tmp_path: Path) -> None:
    write_journal(tmp_path / "whole", 5)
    whole = (tmp_path / "whole").read_bytes()
    lines = whole.splitlines(keepends=True)
    for place in range(0, len(whole), 3):
        damaged = tmp_path / "damaged"
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        ends = list(itertools.accumulate(map(len, lines)))
        good = sum(end <= place for end in ends)
        assert len(list(entries(damaged))) == max(0, good - 1)
        write_journal(damaged, 5)
        assert damaged.read_bytes() == whole


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    write_journal(tmp_path / "j", 3)
    with pytest.raises(JournalError, match=r"j holds answers .*fingerprint f, now g.*delete"):
        Journal(tmp_path / "j", "g")
    assert len(list(entries(tmp_path / "j"))) == 3


# -- chunks --------------------------------------------------------------------------------------


def evaluate(
    folder: Path,
    builder: PromptBuilder,
    asked: list[Record],
    engine: CannedEngine | None = None,
    chunk: int = 4,
    asking: Asking | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    engine = engine or CannedEngine()
    questioner = Questioner(
        engine=engine, builder=builder, asking=asking or Asking(), chunk_size=chunk
    )
    questioner.answer(iter(asked), "mine", folder / "predictions.journal", "f")
    found = conclude(folder, "mine")
    return list(read_rows(folder / "predictions.jsonl")), found


SAMPLED = Asking(guideline="each", sampling=Sampling(n=3, seed=7))


def test_the_size_of_a_chunk_changes_nothing(tmp_path: Path, canned: PromptBuilder) -> None:
    asked = list(records(23))
    made = {
        chunk: evaluate(tmp_path / str(chunk), canned, asked, chunk=chunk, asking=SAMPLED)
        for chunk in (1, 4, 23, 100)
    }
    rows, found = made[100]
    assert [row["id"] for row in rows] == [record.id for record in asked]
    for other, counted in made.values():
        assert other == rows
        assert {**counted, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize("fail_at", range(7))
def test_a_stopped_evaluation_goes_on_and_asks_nothing_twice(
    fail_at: int, tmp_path: Path, canned: PromptBuilder
) -> None:
    asked = list(records(23))
    asked[5] = replace(asked[5], images=(ImageRef(path=tmp_path / "none.png"),))
    whole = evaluate(tmp_path / "whole", canned, asked)
    first, second = CannedEngine(fail_at=fail_at), CannedEngine()
    if fail_at < 6:
        with pytest.raises(RuntimeError, match="canned"):
            evaluate(tmp_path / "broken", canned, asked, first)
        with (tmp_path / "broken" / "predictions.journal").open("ab") as torn:
            torn.write(b"00000000 row 99 {")
    rows, found = evaluate(tmp_path / "broken", canned, asked, second, chunk=3)
    assert rows == whole[0] and found["rejected"] == whole[1]["rejected"] == 1
    assert {**found, "seconds": 0} == {**whole[1], "seconds": 0}
    both = [*first.asked, *second.asked]
    assert sorted(both) == sorted({(row["id"], row["guideline"]) for row in rows})
    reason = json.loads((tmp_path / "broken" / "rejected.jsonl").read_text())
    assert reason["id"] == asked[5].id and "none.png" in reason["reason"]


def test_data_that_changed_under_a_journal_is_refused(
    tmp_path: Path, canned: PromptBuilder
) -> None:
    asked = list(records(9))
    with pytest.raises(RuntimeError, match="canned"):
        evaluate(tmp_path, canned, asked, CannedEngine(fail_at=1))
    with pytest.raises(JournalError, match=r"question 0 was 'q000000' and is now 'q000001'"):
        evaluate(tmp_path, canned, asked[1:])
    with pytest.raises(JournalError, match=r"4 questions were asked and the data now has 2"):
        evaluate(tmp_path, canned, asked[:2])
    assert len(evaluate(tmp_path, canned, asked)[0]) == 9


def test_no_usable_question_is_an_error_that_names_the_reasons(
    tmp_path: Path, canned: PromptBuilder
) -> None:
    gone = [replace(r, images=(ImageRef(path=Path("x")),)) for r in records(3)]
    with pytest.raises(NothingAnsweredError, match=r"none of 3 .*rejected.jsonl"):
        evaluate(tmp_path, canned, gone)


def script(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "_canned.py"), f"--folder={folder}", *more]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    folder.mkdir(exist_ok=True)
    pipe = subprocess.PIPE
    return subprocess.Popen(script(folder, *more), env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.slow
def test_killed_evaluation_gives_the_same_predictions(tmp_path: Path) -> None:
    more = ["--count=200", "--chunk=10", "--pause=0.05"]
    killed, whole = start(tmp_path / "a", *more), start(tmp_path / "b", *more)
    journal = tmp_path / "a" / "predictions.journal"
    while not journal.exists() or journal.read_bytes().count(b" row ") < 50:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = sum(1 for _ in entries(journal))
    found = finish(start(tmp_path / "a", *more))
    assert found["calls"] == (200 - done) // 10 and finish(whole)["calls"] == 20
    ours, theirs = (tmp_path / name / "predictions.jsonl" for name in "ab")
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_a_hundred_thousand_questions(tmp_path: Path) -> None:
    """Nor with images, which in all would be 480 MB here."""
    from PIL import Image

    Image.new("RGB", (200, 200), "gray").save(tmp_path / "a.png")
    many = finish(start(tmp_path / "many", "--count=100000"))
    assert many["questions"] == 100_000 and many["after"] - many["before"] < 120
    pictured = ["--count=4000", "--chunk=64", f"--image={tmp_path / 'a.png'}"]
    few = finish(start(tmp_path / "few", *pictured))
    assert few["questions"] == 4000 and few["after"] - few["before"] < 120


# -- how questions are asked ---------------------------------------------------------------------


def test_guidelines_by_question_and_answers_in_all() -> None:
    assert [Asking().guidelines(i)[0] for i in range(5)] == [*GUIDELINE_NAMES, GUIDELINE_NAMES[0]]
    assert Asking(guideline="analytic").guidelines(3) == ("analytic",)
    assert Asking(guideline="each").guidelines(3) == GUIDELINE_NAMES
    assert Asking(guideline="none").guidelines(3) == (None,)
    assert Asking(prompt="medevalkit").guidelines(3) == (None,)
    assert SAMPLED.answers == 12
    one = Asking.of(EvalConfig(), 3).sampling
    assert one.greedy and one.n == 1 and one.seed == 3
    several = Asking.of(EvalConfig(num_samples=5, temperature=0.5, top_p=0.9), 3).sampling
    assert not several.greedy
    assert (several.n, several.temperature, several.top_p) == (5, 0.5, 0.9)


def test_samples_vote_and_every_figure_is_that_of_its_definition(
    tmp_path: Path, canned: PromptBuilder
) -> None:
    rows, found = evaluate(tmp_path, canned, list(records(40)), asking=SAMPLED)
    for row in rows:
        assert [s["guideline"] for s in row["samples"]] == [
            name for name in GUIDELINE_NAMES for _ in range(3)
        ]
        said = [s["predicted"] for s in row["samples"]]
        vote = majority_vote(said, [s["logprob"] for s in row["samples"]])
        assert row["predicted"] == row["vote"]["predicted"] == vote.predicted
        assert row["correct"] == row["vote"]["correct"] == (vote.predicted == row["answer_label"])
        assert row["completion"] == row["samples"][vote.chosen]["completion"]
        assert row["guideline"] == "each" and row["set"] == "mine"
        assert row["tokens"] == sum(s["tokens"] for s in row["samples"])
        assert row["meta"] == {"body_system": row["meta"]["body_system"]}
    samples = [s for row in rows for s in row["samples"]]
    assert len({s["completion"] for s in rows[0]["samples"]}) > 1, "siblings differ"

    def mean(values: Iterator[float]) -> Any:
        held = list(values)
        return pytest.approx(sum(held) / len(held))

    assert found["decision"] == "vote" and found["answers"] == 480
    assert found["vote_accuracy"] == found["micro_accuracy"] == mean(r["correct"] for r in rows)
    assert found["mean_accuracy"] == mean(s["correct"] for s in samples)
    assert found["unparsed_rate"] == mean(s["predicted"] is None for s in samples)
    assert found["truncated_rate"] == mean(s["finish_reason"] == "length" for s in samples)
    assert found["vote_tie_rate"] == mean(r["vote"]["tie"] for r in rows)
    for name in GUIDELINE_NAMES:
        own = [s for s in samples if s["guideline"] == name]
        assert found["accuracy_by_guideline"][name] == mean(s["correct"] for s in own)
        assert found["adherence"][name] == mean(s["adherence"] for s in own)
    right = [sum(s["correct"] for s in r["samples"]) for r in rows]
    assert list(found["pass_at"]) == ["1", "2", "4", "8", "12"]
    for k in (1, 4, 12):
        assert found["pass_at"][str(k)] == mean(pass_at_k(12, c, k) for c in right)


def test_one_answer_has_no_vote(tmp_path: Path, canned: PromptBuilder) -> None:
    rows, found = evaluate(tmp_path, canned, list(records(8)))
    assert all(row["samples"] is None and row["vote"] is None for row in rows)
    assert found["decision"] == "greedy" and "pass_at" not in found
    assert summarise(rows)["accuracy"] == found["accuracy"]
    assert metrics_of(tmp_path / "predictions.jsonl")["micro_accuracy"] == found["micro_accuracy"]


def plain(kind: str, answer: str, images: int = 0, **more: Any) -> Record:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (60, 40), "gray").save(out, "PNG")
    common = {"dataset": "vqa", "split": "test", "options": None, "answer_label": None}
    return Record(
        **common
        | {
            "id": f"{kind}-{answer}",
            "question": f"What about the {kind} one?",
            "answer": answer,
            "answer_type": kind,
            "images": (ImageRef(data=out.getvalue()),) * images,
            "specialty": "pediatrics",
        }
        | more
    )


OPEN = [plain("yesno", "Yes", 1), plain("closed", "Left lung", 2), plain("open", "a rib fracture")]


def test_open_closed_and_yes_no_questions_in_both_prompts(
    tmp_path: Path, builder: PromptBuilder
) -> None:
    asked = [*OPEN, *(plain("open", f"answer {i}") for i in range(12)), *records(4)]
    parity = MedEvalKitPrompts.from_folder(assets_folder(), DATA)
    bare = Asking(prompt="medevalkit")
    for name, prompts, asking, engine in (
        ("train", builder, Asking(), CannedEngine()),
        ("medevalkit", parity, bare, CannedEngine(bare=True)),
    ):
        rows, found = evaluate(tmp_path / name, prompts, asked, engine, asking=asking)
        assert [row["answer_type"] for row in rows[:3]] == ["yesno", "closed", "open"]
        for row in rows:
            said = row["completion"].rpartition("<answer>")[2].removesuffix("</answer>")
            right = said == (row["answer_label"] or row["answer"])
            assert row["correct"] == row["correct_medevalkit"] == right, row
        assert 0 < found["micro_accuracy"] < 1
        guided = {row["guideline"] for row in rows}
        assert guided == ({None} if name == "medevalkit" else set(GUIDELINE_NAMES))
        assert (found["adherence"] == {}) == (name == "medevalkit")


def answered(text: str, **more: Any) -> Rollout:
    return Rollout(
        question=0, sample=0, prompt_ids=[1], token_ids=[1, 2], logprobs=[-0.1, -0.1],
        finish_reason="stop", text=text, **{"guideline": None} | more,
    )  # fmt: skip


def test_adherence_is_none_where_the_question_has_no_findings() -> None:
    trace = (
        "A blunted costophrenic angle with a meniscus and a basal opacity is classic for pleural "
        "effusion. The answer is pleural effusion."
    )
    answer = answered(
        f"<think>{trace}</think><answer>pleural effusion</answer>", guideline="intuitive"
    )
    stem = {"question": "What abnormality is seen in this chest X-ray?"}
    asked = plain("open", "pleural effusion", **stem)
    assert prediction_row(asked, "mine", [answer])["adherence"] is None
    shown = {"findings": ["blunted costophrenic angle", "meniscus", "basal opacity"]}
    told = plain("open", "pleural effusion", **stem, meta=shown)
    assert prediction_row(told, "mine", [answer])["adherence"] == 1.0


def test_the_medevalkit_column_follows_its_rule_for_the_data_set() -> None:
    def scored(text: str, record: Record) -> bool:
        return bool(prediction_row(record, "mine", [answered(text)])["correct_medevalkit"])

    chosen: dict[str, Any] = {"options": {"A": "CT", "B": "MRI", "C": "PET"}, "answer_label": "B"}
    text = "<think>mri</think><answer>C</answer>\n\nB"  # the last paragraph counts without the tag
    for dataset, right in (("pmc_vqa", True), ("omnimedvqa", False), ("medxpertqa", False)):
        assert scored(text, plain("mcq", "MRI", dataset=dataset, **chosen)) is right
    for dataset, right in (("slake", False), ("vqa_rad", True), ("pathvqa", True)):
        assert scored("Yes, it is", plain("yesno", "Yes", dataset=dataset)) is right
        assert scored("Yes, it is", plain("yesno", "yes", dataset=dataset))
        assert scored("yes", plain("yesno", "Yes", dataset=dataset))


def test_lists_of_strings_are_kept_to_be_broken_down_by() -> None:
    meta = {
        "modality": ["MRI", "CT"], "organs": ("liver",), "boxes": [[0, 1]], "ids": [1, 2],
        "traces": {"a": 1}, "long": ["x" * 300], "system": "Nervous",
    }  # fmt: skip
    row = prediction_row(plain("open", "a cyst", meta=meta), "mine", [answered("a cyst")])
    assert row["meta"] == {"modality": ["MRI", "CT"], "organs": ["liver"], "system": "Nervous"}
    assert group_of(row, "modality") == "CT, MRI"


def test_medevalkit_prompts_are_its_own_words(builder: PromptBuilder) -> None:
    parity = MedEvalKitPrompts.from_folder(assets_folder(), DATA)
    choice = next(records(1))

    def text(record: Record) -> str:
        (message,) = parity.messages(record)
        assert message["role"] == "user"
        return "".join(part.get("text", "<image>") for part in message["content"])

    assert text(choice) == (
        f"\nQuestion: {choice.question}\nOptions: \nA. pneumonia\nB. stroke\nC. scurvy\nD. melanoma\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert text(OPEN[0]) == (
        "<image>What about the yesno one?\nPlease output 'yes' or 'no'(no extra output)."
    )
    assert text(OPEN[1]) == (
        "<image_1>: <image><image_2>: <image>What about the closed one?\n"
        "Answer the question using a single word or phrase."
    )
    assert text(OPEN[2]).endswith("\nPlease answer the question concisely.")
    single = plain("open", "x", 1, dataset="medxpertqa")
    assert text(single).startswith("<image_1>: <image>")
    slake = plain("yesno", "Yes", 1, dataset="slake")
    assert text(slake).endswith("\nAnswer the question using a single word or phrase.")
    chinese = plain("closed", "肝", 1, dataset="slake", meta={"q_lang": "zh"})
    assert text(chinese).endswith("\n请用一个单词或者短语回答该问题。")
    ids = parity.question(OPEN[1]).prompt_ids(None)
    assert ids.count(parity.image_token_id) == sum(parity.question(OPEN[1]).image_tokens)
    with pytest.raises(ValueError, match="no guideline"):
        parity.messages(choice, "bayesian")
    assert builder.messages(choice)[0]["role"] == "system"


@pytest.fixture(scope="module")
def transformers_engine(builder: PromptBuilder) -> Iterator[Any]:
    cfg = load_config(None, ["rollout.engine=transformers", "model.dtype=float32"])
    model = cfg.model.model_copy(update={"path": str(assets_folder())})
    engine = create_engine(model, cfg.rollout, builder, max_model_len=450, max_images=2)
    yield engine
    engine.close()


def test_a_real_model_samples_the_same_in_any_chunk(
    tmp_path: Path, builder: PromptBuilder, transformers_engine: Any
) -> None:
    asked = [*OPEN, *records(2)]
    asking = Asking(sampling=Sampling(n=3, temperature=1.5, top_p=0.95, max_tokens=6, seed=1))
    one, whole = (
        evaluate(tmp_path / str(chunk), builder, asked, transformers_engine, chunk, asking)[0]
        for chunk in (2, 50)
    )
    assert [r["id"] for r in one] == [record.id for record in asked]
    completions = [[s["completion"] for s in row["samples"]] for row in one]
    assert completions == [[s["completion"] for s in row["samples"]] for row in whole]
    assert any(len(set(samples)) > 1 for samples in completions)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    import torch

    from mmedx_fast.rollout.transformers_engine import _nucleus

    shares = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.05, 0.05, 0.85, 0.05]])
    kept = _nucleus(shares.log(), 0.65).exp()
    torch.testing.assert_close(kept, torch.tensor([[0, 4 / 7, 3 / 7, 0], [0, 0, 1.0, 0]]))
    torch.testing.assert_close(_nucleus(shares.log(), 1.0).exp(), shares)
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0.0)


def test_bootstrap_in_blocks_is_the_bootstrap_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmedx_fast import stats

    groups = {"a": [1.0, 0.0, 1.0] * 11, "b": [0.0, 1.0] * 20}
    whole = stats.macro_average(groups)
    monkeypatch.setattr(stats, "_PICKS", 100)
    assert stats.macro_average(groups) == whole


# -- the config ----------------------------------------------------------------------------------

NEW = "sets prompt num_samples temperature top_p chunk_size browse_rows browse_images".split()


def test_runs_made_before_these_settings_keep_their_fingerprints() -> None:
    import hashlib

    dumped = Config().model_dump(mode="json")["eval"]
    before = {key: value for key, value in dumped.items() if key not in NEW}
    assert list(before) == ["models", "guideline", "max_completion_length", "samples_in_report"]
    text = json.dumps({"eval": before}, sort_keys=True)
    one = Config().fingerprint("eval")
    assert one == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert load_config(None, ["eval.chunk_size=3"]).fingerprint("eval") == one
    for change in ("eval.num_samples=4", "eval.prompt=medevalkit", "eval.sets={a: {path: x}}"):
        assert load_config(None, [change]).fingerprint("eval") != one


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.sets={a: {}}", ["eval.sets.a.path"]),
        ("eval.sets={a: {path: x, splitt: y}}", ["eval.sets.a.splitt", "'split'"]),
        ("eval.sets={a/b: {path: x}}", ["eval.sets", "a/b"]),
        ("eval.sets={a.old-1: {path: x}}", ["eval.sets", "a.old-1"]),
        ("eval.guideline=all", ["eval.guideline", "each", "none"]),
        ("eval.num_samples=0", ["eval.num_samples"]),
        ("eval.top_p=0", ["eval.top_p"]),
        ("eval={prompt: medevalkit, guideline: each}", ["medevalkit", "each"]),
        ("eval={num_samples: 900}", ["eval.num_samples", "max_num_seqs"]),
    ],
)
def test_settings_that_cannot_be_are_named(override: str, words: list[str]) -> None:
    server = ["rollout.engine=server"] if "900" in override else []
    with pytest.raises(ConfigError) as error:
        load_config(None, [override, *server])
    assert all(word in str(error.value) for word in words), error.value
