"""Breakdowns against a plain recount with dictionaries, at a size that must not be kept."""

import itertools
import random
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from mmedx_fast.eval_breakdown import breakdown, group_of
from mmedx_fast.stats import wilson_interval


def row(number: int, rng: random.Random) -> dict[str, Any]:
    return {
        "id": f"toy:{number}",
        "specialty": rng.choice(["pediatrics", "adult_medicine"]),
        "images": ["a.png"] * rng.choice([1, 1, 1, 2, 6]),
        "predicted": rng.choice(["A", "B", None]),
        "finish_reason": rng.choice(["stop", "length"]),
        "correct": rng.random() < 0.6,
        "correct_medevalkit": rng.random() < 0.7,
        "answer_type": "mcq",
        "meta": {
            "question_type": rng.choice(["Reasoning", "Understanding"]),
            "modality": rng.choice([["CT", "MRI"], ["MRI", "CT"], "X-ray", None]),
        },
    }


def many(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(5)
    return (row(i, rng) for i in range(count))


def test_every_group_is_what_a_recount_says() -> None:
    rows = list(many(700))
    found = breakdown(iter(rows))
    assert set(found["columns"]) == {
        "specialty", "question_type", "modality", "answer_type", "image_count",
    }  # fmt: skip
    for column, table in found["columns"].items():
        recount = defaultdict(list)
        for item in rows:
            if column == "image_count":
                name = str(len(item["images"]))
            else:
                value = item.get(column, item["meta"].get(column))
                name = {"['CT', 'MRI']": "CT, MRI", "['MRI', 'CT']": "CT, MRI"}.get(
                    str(value), str(value or "(none)")
                )
            recount[name].append(item)
        assert set(table["groups"]) == set(recount) and table["folded"] == 0
        for name, part in recount.items():
            group = table["groups"][name]
            assert group["n"] == len(part) and group["small"] == (len(part) < 30)
            for key, rate in (
                ("accuracy", sum(r["correct"] for r in part)),
                ("medevalkit_accuracy", sum(r["correct_medevalkit"] for r in part)),
                ("unparsed_rate", sum(r["predicted"] is None for r in part)),
                ("truncated_rate", sum(r["finish_reason"] == "length" for r in part)),
            ):
                assert group[key] == rate / len(part)
            low, high = group["interval"]
            assert low <= group["accuracy"] <= high
        macro = table["macro"]
        mean = sum(g["accuracy"] for g in table["groups"].values()) / len(table["groups"])
        assert macro["accuracy"] == pytest.approx(mean)
        assert macro["interval"][0] < mean < macro["interval"][1]


def test_few_right_or_wrong_have_wilson_s_interval() -> None:
    rows = [{"correct": i < 3, "specialty": "rare"} for i in range(12)]
    rows += [{"correct": i < 40, "specialty": "common"} for i in range(80)]
    groups = breakdown(rows, ["specialty"])["columns"]["specialty"]["groups"]
    assert groups["rare"]["interval"] == list(wilson_interval(3, 12))
    assert (groups["rare"]["method"], groups["rare"]["small"]) == ("wilson", True)
    assert (groups["common"]["method"], groups["common"]["small"]) == ("bootstrap", False)


def test_memory_goes_with_the_groups_not_with_the_rows() -> None:
    first = next(many(1))

    def peak(count: int) -> int:
        tracemalloc.start()
        found = breakdown(itertools.chain(({**first, "set": str(i % 7)}) for i in range(count)))
        assert found["overall"]["n"] == count
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(50)
    assert peak(20_000) < peak(200) + 100_000  # bytes


def test_a_column_of_ids_is_folded_and_says_so() -> None:
    rows = [{"correct": True, "id": str(i)} for i in range(260)]
    table = breakdown(rows, ["id"])["columns"]["id"]
    assert table["folded"] == 60 == table["groups"]["(others)"]["n"]
    assert len(table["groups"]) == 201


def test_groups_and_bad_input() -> None:
    assert group_of({"department": "", "meta": {"department": "ENT"}}, "department") == "ENT"
    assert group_of({"department": "", "meta": {"department": ""}}, "department") is None
    assert group_of({"meta": {"department": "ENT"}}, "department") == "ENT"
    assert group_of({"meta": None}, "department") is None
    assert group_of({"images": []}, "image_count") == "0"
    with pytest.raises(ValueError, match="no prediction rows"):
        breakdown([])
    with pytest.raises(ValueError, match="no row has the column 'departement'"):
        breakdown([{"correct": True}], ["departement"])
    with pytest.raises(ValueError, match=r"row 1 \('x'\) has no key 'correct'"):
        breakdown([{"correct": True}, {"id": "x"}])
