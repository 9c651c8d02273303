"""Routing by the rules, on the traps that real stems hold."""

from typing import Any

import pytest

from mmedx_fast.data.patient_age import patient_age
from mmedx_fast.data.records import SPECIALTIES, Record
from mmedx_fast.data.specialties import (
    assign_specialty,
    count_specialties,
    load_rules,
    parse_rules,
)


def record(question: str, dataset: str = "medxpertqa", **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "id": "x",
        "split": "test",
        "images": (),
        "options": {"A": "Glioblastoma", "B": "Acute leukemia in a child"},
        "answer_label": "A",
        "answer": "Glioblastoma",
    }
    return Record(dataset=dataset, question=question, **{**fields, **changes})


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("A 17-year-old boy", 17),
        ("An 18-year-old man", 18),
        ("with a 2-year history of knee pain, a 41-year-old woman", 41),
        ("A radiograph taken 4 years ago; the patient is 63 years old", 63),
        ("A one-year-old girl", 1),
        ("A seventeen-year-old", 17),
        ("A thirty-five-year-old farmer", 35),
        ("A twenty one year old", 21),
        ("45 yo M with cough", 45),
        ("45yo", 45),
        ("a 45 y/o man", 45),
        ("a 45 y.o. man", 45),
        ("a man aged 52", 52),
        ("a child aged 9 months", 0.75),
        ("A 6-month-old infant", 0.5),
        ("A 36-hour-old neonate", 36 / 8766),
        ("A 10-day-old", 10 / 365.25),
        ("A 1.5-year-old", 1.5),
        ("A man with a 3-week-old fracture", None),
        ("A 52-year-old man with a 3-day-old surgical wound", 52),
        ("A 3-week-old fracture in a 70-year-old", 70),
        ("A woman at 20 weeks' gestation", None),
        ("pain for 5 years", None),
        ("A 12-year-old sustained a wrist fracture", 12),
        ("A 5-month-old boy is brought in by his 28-year-old mother", 5 / 12),
        ("A 28-year-old woman brings her 3-month-old son", 0.25),
        ("The 31-year-old mother of a 2-year-old boy", 2),
        ("built by 30 years of old habits", None),
        ("She is 17 years of age.", 17),
        ("A girl of eleven years of age", 11),
        ("common over 40 years of age", None),
        ("ill since 5 years of age; now 31 years of age", 31),
        ("Age: 12 years. Sex: M.", 12),
        ("Age : 45, male", 45),
        ("Image: 12 slices", None),
        ("the last stage: 4", None),
        ("A boy, 12 y, with fever", 12),
        ("Woman, 63 years.", 63),
        ("A woman, 3 weeks postpartum", None),
        ("A man, 5 years after surgery", None),
        ("A 12-year-and-3-month-old girl", 12.25),
        ("A 25-year-and-3-month-old man", 25.25),
        ("a boy 2 years and 6 months old", 2.5),
        ("A 28-year-old woman brings her 1-year-and-6-month-old son", 1.5),
        ("", None),
    ],
)
def test_patient_age(text: str, years: float | None) -> None:
    assert patient_age(text) == (None if years is None else pytest.approx(years, rel=1e-6))


@pytest.mark.parametrize("years", range(1, 100))
def test_ages_at_every_year(years: int) -> None:
    assert patient_age(f"A {years}-year-old patient, ill for {100 - years} days") == years
    expected = "pediatrics" if years < 18 else "adult_medicine"
    assert assign_specialty(record(f"A {years}-year-old patient"))[0] == expected


@pytest.mark.parametrize(
    ("question", "specialty", "rule"),
    [
        ("A 17-year-old has a fracture", "pediatrics", "age_under_18"),
        ("An 18-year-old boy has a cough", "adult_medicine", "default"),
        ("A newborn with a murmur", "pediatrics", "child_word"),
        ("Two children have a rash", "pediatrics", "child_word"),
        ("A 30-year-old woman who was a preterm child", "adult_medicine", "default"),
        ("A 30-year-old pregnant woman at 20 weeks' gestation", "adult_medicine", "default"),
        ("A pregnant woman at 20 weeks' gestation", "adult_medicine", "default"),
        ("A 40-year-old with a 2-year history of cough", "adult_medicine", "default"),
        ("A 40-year-old with seizures and vertigo", "brain_senses", "brain_word"),
        ("A 40-year-old with a seizure after a seizure", "adult_medicine", "default"),
        ("A 40-year-old with pain in one ear, early on", "adult_medicine", "default"),
        ("A 40-year-old with reduced visual acuity of one eye", "brain_senses", "brain_word"),
        ("A 60-year-old with adenocarcinoma", "oncology_surgery", "oncology_word"),
        ("A 60-year-old with a retroperitoneal liposarcoma", "oncology_surgery", "oncology_word"),
        ("A 60-year-old; tumours are seen", "oncology_surgery", "oncology_word"),
        ("A 60-year-old after appendectomy", "oncology_surgery", "surgery_word"),
        ("A 60-year-old after surgery", "oncology_surgery", "surgery_word"),
        ("A 60-year-old with a fractured hip", "oncology_surgery", "surgery_word"),
        ("Which finding is shown?", "adult_medicine", "default"),
    ],
)
def test_text_rules(question: str, specialty: str, rule: str) -> None:
    assert assign_specialty(record(question)) == (specialty, rule)


def test_order_of_rules() -> None:
    nervous = {"body_system": "Nervous"}
    assert assign_specialty(record("A 50-year-old", meta=nervous)) == (
        "brain_senses",
        "body_system",
    )
    assert assign_specialty(record("A 5-year-old", meta=nervous))[0] == "pediatrics"
    assert assign_specialty(record("A 50-year-old with stroke, vertigo and cancer"))[0] == (
        "brain_senses"
    )


def test_column_overrides_everything() -> None:
    explicit = record("A 5-year-old", specialty="adult_medicine", meta={"body_system": "Nervous"})
    assert assign_specialty(explicit) == ("adult_medicine", "column")


def test_options_and_answer_are_never_read() -> None:
    """The options of ``record`` are full of tumours and children."""
    assert assign_specialty(record("A 50-year-old with fever")) == ("adult_medicine", "default")


@pytest.mark.parametrize(
    ("dataset", "meta", "specialty"),
    [
        ("gmai", {"department": "Neurosurgery"}, "brain_senses"),
        ("gmai", {"Department": "Ophthalmology"}, "brain_senses"),
        (
            "gmai",
            {"department": "Otolaryngology (ENT)/Head and Neck Surgery"},
            "brain_senses",
        ),
        ("gmai", {"department": "Oncology (Medical)"}, "oncology_surgery"),
        ("gmai", {"department": "General Surgery"}, "oncology_surgery"),
        ("gmai", {"department": "Urology"}, "oncology_surgery"),
        ("gmai", {"department": "Dermatology"}, "adult_medicine"),
        ("gmai", {}, "adult_medicine"),
        ("omnimedvqa", {"modality_type": "Fundus Photography"}, "brain_senses"),
        ("omnimedvqa", {"modality_type": "OCT (Optical Coherence Tomography"}, "brain_senses"),
        ("omnimedvqa", {"modality_type": "X-Ray", "dataset": "ISIC2018"}, "oncology_surgery"),
        ("omnimedvqa", {"modality_type": "X-Ray", "dataset": "Chest CT Scan"}, "oncology_surgery"),
        ("omnimedvqa", {"modality_type": "X-Ray", "dataset": "Knee"}, "adult_medicine"),
        ("slake", {"location": "Brain_Tissue"}, "brain_senses"),
        ("slake", {"location": "Abdomen"}, "adult_medicine"),
        ("pubmedvision", {"body_part": "Ear"}, "brain_senses"),
        ("pubmedvision", {"body_part": "Earlobe"}, "adult_medicine"),
    ],
)
def test_maps_of_other_data_sets(dataset: str, meta: dict[str, str], specialty: str) -> None:
    assert assign_specialty(record("What is shown?", dataset=dataset, meta=meta))[0] == specialty


def test_counts_keep_zeros_and_order() -> None:
    counts = count_specialties([record("A 5-year-old"), record("x"), record("A 6-year-old")])
    assert list(counts.items()) == [
        ("adult_medicine", 1),
        ("pediatrics", 2),
        ("brain_senses", 0),
        ("oncology_surgery", 0),
    ]
    assert tuple(counts) == SPECIALTIES


def test_shipped_rules_end_in_a_default() -> None:
    rules = load_rules()
    assert {"default", "gmai", "omnimedvqa", "slake", "pubmedvision"} <= rules.keys()
    assert all(entries[-1].always for entries in rules.values())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "r", "specialty": "cardiology"}, "'cardiology'"),
        ({"name": "r", "specialty": "pediatrics", "age_over": 3}, "age_over"),
        ({"name": "r", "specialty": "pediatrics", "age_below": 3}, "must end with"),
        ({"name": "r", "field": "f", "values": {"x": "nose"}}, "'nose'"),
    ],
)
def test_wrong_rules_are_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rules({"datasets": {"default": [rule]}})
