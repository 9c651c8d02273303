"""The exported table as pandas, which VLMEvalKit uses, reads it back: every answer survives."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmedx_fast import vlmeval_export
from mmedx_fast.cli import main
from mmedx_fast.scoring import extract_answer
from mmedx_fast.scoring_peers import vlmevalkit_match
from mmedx_fast.vlmeval_export import vlmevalkit_table, write_table

COMPLETIONS = [
    "<think>x</think><answer>{letter}</answer>",
    "<answer>{letter}. {text}</answer>",
    "<answer>{text}</answer>",
    "the rub decides\n\nThe answer is {letter}.",
    "A patient, surely",
    "<answer>A or B</answer>",
    "",
]
TEXTS = [
    "None", "NA", "n/a", "=A1+B1", "+5 mmHg", "tab\there", "two\nlines", '"quoted"', "1.50",
    "A patient with B", "\x07bell", "Z", "answer is C", "caf\u00e9 \u7b54", "'", "null", "CT",
]  # fmt: skip


def predictions(count: int = 120, **more: Any) -> list[dict[str, Any]]:
    rng = random.Random(7)
    rows = []
    for i in range(count):
        letters = "ABCDEFGHIJ"[: rng.randint(2, 10)]
        options = dict(zip(letters, rng.sample(TEXTS, len(letters)), strict=True))
        letter = rng.choice(letters)
        completion = rng.choice(COMPLETIONS).format(letter=letter, text=options[letter])
        predicted = extract_answer(completion, options)
        label = rng.choice(letters)
        rows.append(
            {
                "id": f"gmai:{i}",
                "specialty": "pediatrics",
                "question": f"What is this?\tLook\r\nwell {i}",
                "options": options,
                "answer": options[label],
                "answer_label": label,
                "completion": completion,
                "predicted": predicted,
                "correct": predicted == label,
                "meta": {"category": rng.choice(["Bone", "None"]), "split": "val"},
                **more,
            }
        )
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(path, sep="\t") if path.suffix == ".tsv" else pandas.read_excel(path)
    return frame.to_dict("records")


@pytest.mark.parametrize("suffix", [".tsv", ".xlsx"])
def test_every_prediction_is_matched_as_our_strict_answer(tmp_path: Path, suffix: str) -> None:
    if suffix == ".xlsx":
        pytest.importorskip("openpyxl")
    rows = predictions()
    path = tmp_path / f"model_GMAI{suffix}"
    table = vlmevalkit_table(rows)
    write_table(table, path)
    back = read(path)
    assert len(back) == len(rows) and {row["predicted"] for row in rows} >= {None, "A", "B"}
    for ours, theirs in zip(rows, back, strict=True):
        # What VLMEvalKit takes for a choice: a column of one capital letter that is not missing.
        choices = {
            letter: str(theirs[letter])
            for letter in "ABCDEFGHIJ"
            if theirs[letter] == theirs[letter]
        }
        assert set(choices) == set(ours["options"])
        assert vlmevalkit_match(str(theirs["prediction"]), choices) == ours["predicted"]
        hit = vlmevalkit_match(str(theirs["prediction"]), choices) == theirs["answer"]
        assert hit == ours["correct"]
        assert theirs["index"] == int(ours["id"].removeprefix("gmai:"))
        assert str(theirs["question"]).split() == ours["question"].split()
        assert theirs["category"] in ("Bone", "None.") and theirs["split"] == "val"
    assert table.stopped == sum(
        text in ("None", "NA", "n/a", "null") for row in rows for text in row["options"].values()
    )


def test_columns_are_those_its_evaluation_reads() -> None:
    plain = [row | {"meta": {}} for row in predictions(3)]
    table = vlmevalkit_table(plain)
    assert table.columns[:2] == ["index", "question"] and table.columns[-1] == "category"
    assert {row[-1] for row in table.rows} == {"pediatrics"}
    own = [row | {"meta": {"index": f"q-{i}", "l2-category": "x"}} for i, row in enumerate(plain)]
    table = vlmevalkit_table(own)
    assert [row[0] for row in table.rows] == ["q-0", "q-1", "q-2"]
    assert table.columns[-3:] == ["prediction", "category", "l2-category"]


def test_what_cannot_be_exported_is_counted_or_named(tmp_path: Path) -> None:
    rows = predictions(4)
    open_row = rows[0] | {"options": None, "id": "open:1"}
    assert vlmevalkit_table([open_row, *rows]).left_out == 1
    with pytest.raises(ValueError, match="none of the 1 predictions has options"):
        vlmevalkit_table([open_row])
    with pytest.raises(ValueError, match=r"index 0 \(question 'gmai:0'\) comes twice"):
        vlmevalkit_table([*rows, rows[0]])
    with pytest.raises(ValueError, match="'gmai:0' has answer_label 'Q'"):
        vlmevalkit_table([rows[0] | {"answer_label": "Q"}])
    with pytest.raises(ValueError, match=r"unknown suffix '.csv'; use .tsv or .xlsx"):
        write_table(vlmevalkit_table(rows), tmp_path / "x.csv")


def test_the_command_writes_beside_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [*predictions(5), predictions(1)[0] | {"options": None, "id": "open:1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(vlmeval_export, "has_openpyxl", lambda: False)
    assert main(["export", str(path), "--to", "vlmevalkit"]) == 0
    printed = capsys.readouterr().out
    made = tmp_path / "predictions.vlmevalkit.tsv"
    assert f"{made}: 5 questions" in printed and "1 without options left out" in printed
    assert "openpyxl is not installed; set PRED_FORMAT=tsv" in printed
    assert main(["export", str(path), "--to", "vlmevalkit", "--out", str(tmp_path / "m.xlsx")]) == 2
    assert "pip install openpyxl" in capsys.readouterr().err
