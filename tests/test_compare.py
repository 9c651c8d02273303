"""Paired comparison of two files of predictions, and what is wrong with them by name."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmedx_fast.cli import main
from mmedx_fast.compare import compare, comparison_table
from mmedx_fast.predictions import read_predictions
from mmedx_fast.stats import holm, mcnemar_counts, paired_interval


def rows(seed: int, rate: float, count: int = 300, **more: Any) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "id": f"toy:{i}",
            "set": "one" if i % 3 else "two",
            "specialty": "pediatrics" if i % 2 else "adult_medicine",
            "guideline": ("differential", "intuitive")[i % 2],
            "answer": "yes",
            "answer_label": "A",
            "correct": rng.random() < rate,
            **more,
        }
        for i in range(count)
    ]


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_each_set_and_all_together_by_hand() -> None:
    first, second = rows(1, 0.5), rows(2, 0.62)
    shuffled = random.Random(0).sample(second, len(second))
    parts = {part.name: part for part in compare(first, shuffled)}
    assert list(parts) == ["all", "one", "two"]
    for name, part in parts.items():
        pairs = [
            (a["correct"], b["correct"])
            for a, b in zip(first, second, strict=True)
            if name in ("all", a["set"])
        ]
        only = (sum(a > b for a, b in pairs), sum(b > a for a, b in pairs))
        assert (part.only_first, part.only_second) == only and part.n == len(pairs)
        assert part.first == sum(a for a, _ in pairs) / len(pairs)
        assert part.second == sum(b for _, b in pairs) / len(pairs)
        assert part.difference == paired_interval(*only, len(pairs))
        assert (part.p_value, part.mid_p) == mcnemar_counts(*only)[2:]
    assert parts["all"].holm_p is None
    sets = [parts["one"], parts["two"]]
    assert [part.holm_p for part in sets] == holm([part.p_value for part in sets])


def test_a_column_instead_of_the_set_and_a_single_set() -> None:
    parts = compare(rows(1, 0.5), rows(2, 0.6), by="specialty")
    assert [part.name for part in parts] == ["all", "adult_medicine", "pediatrics"]
    single = [dict(row, set="only") for row in rows(1, 0.5)]
    assert [part.name for part in compare(single, single)] == ["all"]
    assert compare(single, single)[0].p_value == 1.0
    nested = [dict(row, meta={"modality": "CT"}) for row in single]
    assert [part.name for part in compare(nested, nested, by="modality")] == ["all", "CT"]


def test_questions_asked_under_each_guideline_are_compared_guideline_by_guideline() -> None:
    each = [dict(row, guideline=name) for row in rows(1, 0.5) for name in ("analytic", "bayesian")]
    with pytest.raises(ValueError, match=r"'toy:0' comes twice in the first file.*--by guideline"):
        compare(each, each)
    parts = compare(each, each, by="guideline")
    assert [(part.name, part.n) for part in parts] == [("analytic", 300), ("bayesian", 300)]


def test_files_of_other_questions_are_refused_by_id() -> None:
    first, second = rows(1, 0.5, 20), rows(2, 0.5, 12)
    message = r"8 only in the first \(toy:12, toy:13, toy:14, toy:15, toy:16 and 3 more\)"
    with pytest.raises(ValueError, match=message):
        compare(first, second)
    with pytest.raises(ValueError, match=r"8 only in the second"):
        compare(second, first)
    other = [dict(row, answer_label="B") for row in first]
    with pytest.raises(ValueError, match="'toy:0' has answer 'A' in the first file and 'B'"):
        compare(first, other)
    moved = [dict(row, specialty="brain_senses") for row in first]
    with pytest.raises(ValueError, match="'toy:0' has specialty 'adult_medicine'"):
        compare(first, moved, by="specialty")
    with pytest.raises(ValueError, match="the second file holds no predictions"):
        compare(first, [])
    with pytest.raises(ValueError, match="no row of the first file has the column 'modalty'"):
        compare(first, first, by="modalty")


def test_the_command_reads_files_and_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = rows(1, 0.2), rows(2, 0.8)
    whole = write(tmp_path / "a" / "predictions.jsonl", a)
    for name in ("one", "two"):
        part = [row for row in b if row["set"] == name]
        write(tmp_path / "b" / name / "predictions.jsonl", part)
    assert main(["compare", str(whole), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert comparison_table(compare(a, b)) in printed and "<0.0001" in printed
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--by", "specialty"]) == 0
    assert "adult_medicine" in capsys.readouterr().out
    assert main(["compare", str(whole), str(tmp_path / "b" / "one")]) == 2
    assert "100 only in the first (toy:0, toy:3" in capsys.readouterr().err
    assert main(["compare", str(whole), str(tmp_path / "none")]) == 2
    assert "nor a folder with predictions.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "corr', "line 2: not JSON"),
        ("[1]", "line 2: a list, not an object"),
        ('{"id": "x"}', "line 2: no key 'correct'"),
        ('{"id": "x", "correct": "false"}', "line 2: correct is 'false'"),
        ('{"id": "x", "correct": null}', "line 2: correct is None"),
        ('{"id": "x", "correct": 0.5}', "line 2: correct is 0.5"),
        ('{"id": "x", "correct": 2}', "line 2: correct is 2"),
        ('{"id": "x", "correct": true, "meta": "y"}', "line 2: meta is 'y'"),
        ('{"id": "x\xff", "correct": true}', "line 2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    path = write(tmp_path / "p.jsonl", rows(1, 0.5, 1))
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    assert main(["compare", str(path), str(path)]) == 2
    assert f"{path}, {message}" in capsys.readouterr().err


def test_ones_and_zeros_are_right_and_wrong(tmp_path: Path) -> None:
    made = rows(1, 0.5)
    numbers = [{**row, "correct": int(row["correct"]), "meta": None} for row in made]
    path = write(tmp_path / "p.jsonl", numbers)
    assert compare(read_predictions(path), made)[0].difference.value == 0
