"""Rows a second of the loaders: ``python bench/load_rows.py [--rows 1000000]``.

Writes JSONL files of MMedExpert (specialty column, five options, answer text, one of 100,000
images,
no reasoning) and MedXpertQA (options repeated in the stem, specialty by the rules) into a temporary
folder and streams them with ``iter_records``, images checked. Prints rows per second of process time (one
thread) over slices of 20,000 rows, the same for bare ``json.loads`` of as many lines, timed in turn with it,
and by how many MiB the process's peak memory grew while it ran. Beside the median stands the fastest slice:
a neighbour on the same core slows both by half, even in process time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmedx_fast.data.loaders import iter_records
from mmedx_fast.data.records import SPECIALTIES

OPTIONS = {
    "A": "Polymyositis with interstitial lung disease",
    "B": "Amyopathic dermatomyositis",
    "C": "Sarcoidosis",
    "D": "Systemic lupus erythematosus",
    "E": "Chronic eosinophilic pneumonia",
}
STEM = (
    "A 41-year-old man presents with a three-week history of progressive dyspnea and a rash over the knuckles. "
    "Laboratory studies show a raised ferritin and a normal creatine kinase. Based on the image, which diagnosis "
    "explains the findings best (case {0})?"
)
CHOICES = "\nAnswer Choices: " + " ".join(f"({k}) {v}" for k, v in OPTIONS.items())
IMAGES = 100_000
SLICE = 20_000


def mmedexpert_row(number: int) -> dict[str, Any]:
    letter = "ABCDE"[number % 5]
    options = {key: f"{text} of type {number}" for key, text in OPTIONS.items()}
    return {
        "id": f"case-{number}",
        "specialty": SPECIALTIES[number % 4],
        "images": [f"images/{number % IMAGES}.png"],
        "question": STEM.format(number),
        "options": options,
        "answer_label": letter,
        "answer": options[letter],
        "source": "bench",
    }


def medxpertqa_row(number: int) -> dict[str, Any]:
    return {
        "id": f"MM-{number}",
        "question": STEM.format(number) + CHOICES,
        "options": OPTIONS,
        "label": "ABCDE"[number % 5],
        "images": [f"{number % IMAGES}.png"],
        "medical_task": "Diagnosis",
        "body_system": "Respiratory",
        "question_type": "Reasoning",
    }


def write(folder: Path, make: Callable[[int], dict[str, Any]], rows: int) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for number in range(IMAGES):
        (folder / "images" / f"{number}.png").touch()
    file = folder / "train.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            out.write(json.dumps(make(number)) + "\n")
    return file


def measure(name: str, file: Path, rows: int) -> None:
    with file.open("rb") as source:
        lines = list(itertools.islice(source, SLICE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = iter(iter_records(file, split="train", format=name))
    count, ours, bare = 0, [], []
    while count < rows:
        start = time.process_time()
        count += (loaded := sum(1 for _ in itertools.islice(records, SLICE)))
        middle = time.process_time()
        parsed = sum(1 for line in lines if json.loads(line))
        ours.append(loaded / (middle - start))
        bare.append(parsed / (time.process_time() - middle))
        assert loaded, f"{count} of {rows} rows were loaded"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{name}: median {statistics.median(ours):,.0f} rows/s, fastest {max(ours):,.0f}; json.loads median "
        f"{statistics.median(bare):,.0f}, fastest {max(bare):,.0f}; peak memory +{grown:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    for name, make in (("mmedexpert", mmedexpert_row), ("medxpertqa", medxpertqa_row)):
        with tempfile.TemporaryDirectory() as folder:
            measure(name, write(Path(folder), make, rows), rows)


if __name__ == "__main__":
    main()
