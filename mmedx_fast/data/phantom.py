"""The phantom clinic: a procedural, clearly synthetic dataset in the project's own format.

Four specialties, each with its own kind of image and its own (invented) rule book; five options; the right
one needs the image AND the vignette. Deterministic by seed; the splits share neither stems nor images.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from mmedx_fast.data.phantom_cases import CLINICS, CONTEXTS, Clinic
from mmedx_fast.data.phantom_images import RENDERERS
from mmedx_fast.data.phantom_traces import TRACES
from mmedx_fast.data.records import ImageRef, Record

LETTERS = "ABCDE"
SPLITS = ("train", "validation", "test")
FORMAT_VERSION = 1
NOTICE = (
    "Synthetic data of the phantom clinic. Images are drawn, vignettes are templates and the rules that link "
    "findings to diagnoses are invented. It holds no medical knowledge and must not be used as such."
)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _stem(clinic: Clinic, clue: int, rng: np.random.Generator) -> str:
    age = int(rng.integers(clinic.ages[0], clinic.ages[1] + 1))
    sex = rng.choice(["woman", "man"]) if age >= 18 else rng.choice(["girl", "boy"])
    wording = rng.choice(clinic.clues[clue].wordings)
    context = rng.choice(CONTEXTS)
    return (
        f"A {age}-year-old {sex} has {wording}. {context}. "
        f"The {clinic.image} is given. What is the most likely diagnosis?"
    )


def make_record(
    clinic: Clinic,
    finding: int,
    clue: int,
    *,
    index: int,
    split: str,
    rng: np.random.Generator,
    used_stems: set[str],
    diagnosis: str | None = None,
) -> Record:
    """One question. ``diagnosis`` overrides the rule book (the base model is pre-trained on random ones)."""
    stem = _stem(clinic, clue, rng)
    for _ in range(1000):
        if stem not in used_stems:
            break
        stem = _stem(clinic, clue, rng)
    else:
        raise ValueError(
            f"phantom: no unused vignette is left for {clinic.specialty}; ask for fewer questions"
        )
    used_stems.add(stem)
    answer = diagnosis or clinic.diagnosis(finding, clue)
    options = dict(zip(LETTERS, (str(d) for d in rng.permutation(clinic.diagnoses)), strict=True))
    label = next(letter for letter, text in options.items() if text == answer)
    found, told = clinic.findings[finding], clinic.clues[clue]
    traces = {name: make(clinic, found, told, answer, rng) for name, make in TRACES.items()}
    return Record(
        id=f"phantom-{split}-{clinic.specialty}-{index:05d}",
        dataset="phantom",
        split=split,
        images=(ImageRef(data=_png(RENDERERS[clinic.specialty](finding, rng))),),
        question=stem,
        options=options,
        answer_label=label,
        answer=answer,
        reasoning=traces,
        specialty=clinic.specialty,
        meta={
            "finding": found.name,
            "clue": told.name,
            "source": "phantom",
            "license": "Apache-2.0",
        },
    )


def make_split(split: str, count: int, seed: int, used_stems: set[str]) -> list[Record]:
    """``count`` questions, spread evenly over specialties and over each rule book's cells."""
    records = []
    for number, clinic in enumerate(CLINICS.values()):
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        share = count // len(CLINICS) + (number < count % len(CLINICS))
        cells = [(f, c) for f in range(len(clinic.findings)) for c in range(len(clinic.clues))]
        order: list[int] = []
        while len(order) < share:
            order.extend(int(i) for i in rng.permutation(len(cells)))
        for index in range(share):
            finding, clue = cells[order[index]]
            records.append(
                make_record(
                    clinic, finding, clue, index=index, split=split, rng=rng, used_stems=used_stems
                )
            )
    return records


def write_phantom(folder: Path, *, train: int, validation: int, test: int, seed: int) -> Path:
    """Write the three splits as MMedExpert JSONL + PNG; a folder already written by the same call is kept."""
    from mmedx_fast.data.mmedexpert import write_mmedexpert

    recipe = {
        "format": FORMAT_VERSION,
        "train": train,
        "validation": validation,
        "test": test,
        "seed": seed,
        "notice": NOTICE,
    }
    card = folder / "phantom.json"
    if card.is_file() and json.loads(card.read_text()) == recipe:
        return folder
    used: set[str] = set()
    for split, count in zip(SPLITS, (train, validation, test), strict=True):
        write_mmedexpert(make_split(split, count, seed, used), folder, split)
    card.write_text(json.dumps(recipe, indent=1))
    return folder


def pretraining_corpus(count: int, seed: int) -> list[Record]:
    """Questions whose diagnosis is drawn at random from the options: format and findings, no rule book."""
    rng = np.random.default_rng([seed, 77])
    clinics = list(CLINICS.values())
    records = []
    for index in range(count):
        clinic = clinics[index % len(clinics)]
        finding, clue = int(rng.integers(4)), int(rng.integers(4))
        diagnosis = str(rng.choice(clinic.diagnoses))
        records.append(
            make_record(
                clinic,
                finding,
                clue,
                index=index,
                split="pretrain",
                rng=rng,
                used_stems=set(),
                diagnosis=diagnosis,
            )
        )
    return records


def content_hash(records: list[Record]) -> str:
    """A hash over stems, options, answers and image bytes; equal exactly when the data is equal."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(
            json.dumps(
                [record.id, record.question, record.options, record.answer, record.reasoning]
            ).encode()
        )
        for image in record.images:
            digest.update(image.data or b"")
    return digest.hexdigest()
