"""The phantom clinic: deterministic, disjoint, no shortcut, and traces that follow their guideline."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mmedx_fast.data import phantom
from mmedx_fast.data.phantom_cases import CLINICS
from mmedx_fast.data.records import GUIDELINE_NAMES, SPECIALTIES, Record
from mmedx_fast.guidelines import adherence


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    used: set[str] = set()
    return {
        split: phantom.make_split(split, count, 0, used)
        for split, count in (("train", 640), ("validation", 40), ("test", 160))
    }


def test_same_seed_same_data_and_another_seed_other_data() -> None:
    first, again, other = (
        phantom.content_hash(phantom.make_split("test", 20, seed, set())) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_splits_share_neither_ids_nor_stems_nor_images(splits: dict[str, list[Record]]) -> None:
    seen: dict[object, str] = {}
    for split, records in splits.items():
        for record in records:
            for key in (record.id, record.question, record.images[0].data):
                assert key not in seen, (split, seen.get(key), record.id)
                seen[key] = split


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_rule_book_needs_both_readings(specialty: str) -> None:
    """The best guess from the finding alone, or from the clue alone, is right in 6 of 16 cells."""
    clinic = CLINICS[specialty]
    table = np.array([[clinic.diagnosis(f, c) for c in range(4)] for f in range(4)])
    assert len(clinic.diagnoses) == 5 and set(table.flat) == set(clinic.diagnoses)
    for lines in (table, table.T):
        assert sum(max(Counter(line).values()) for line in lines) == 6


def test_questions_are_well_formed(splits: dict[str, list[Record]]) -> None:
    for record in (r for records in splits.values() for r in records):
        assert record.options is not None and list(record.options) == list("ABCDE")
        assert record.options[record.answer_label or ""] == record.answer
        assert set(record.reasoning) == set(GUIDELINE_NAMES)
        assert not any(option in record.question for option in record.options.values())


@pytest.mark.parametrize("guideline", GUIDELINE_NAMES)
def test_traces_meet_their_own_guideline_best(
    splits: dict[str, list[Record]], guideline: str
) -> None:
    for record in splits["test"]:
        scores = {
            name: adherence(
                record.reasoning[guideline],
                name,
                question=record.question,
                options=record.options,
                answer=record.answer,
                findings=(record.meta["finding"],),
            ).score
            for name in GUIDELINE_NAMES
        }
        assert scores[guideline] >= 0.85, (record.id, scores, record.reasoning[guideline])
        assert max(scores, key=lambda name: scores[name]) == guideline


def _image_features(record: Record) -> np.ndarray:
    image = Image.open(io.BytesIO(record.images[0].data or b"")).convert("RGB").resize((28, 28))
    return np.asarray(image, dtype=np.float32).ravel() / 255


def _phrases(record: Record) -> set[str]:
    """Runs of one to three words of question and options."""
    text = record.question + " " + " ".join(f"{k}-{v}" for k, v in (record.options or {}).items())
    words = re.findall(r"[a-z0-9-]+", text.lower())
    return {" ".join(words[at : at + n]) for n in (1, 2, 3) for at in range(len(words) - n + 1)}


def _principal(train: Tensor, held: Tensor, components: int) -> tuple[Tensor, Tensor]:
    mean = train.mean(0)
    basis = torch.linalg.svd(train - mean, full_matrices=False).Vh[:components].T
    return (train - mean) @ basis, (held - mean) @ basis


def _fitted(model: nn.Module, x: Tensor, y: Tensor, decay: float) -> nn.Module:
    """The model at the least cross-entropy plus ``decay`` / 2 of its squared weights."""
    weights = list(model.parameters())
    search = torch.optim.LBFGS(weights, max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = functional.cross_entropy(model(x), y)
        value = value + decay / 2 * sum(w.square().sum() for w in weights)
        value.backward()
        return value

    search.step(loss)
    return model


def _linear(x: Tensor, y: Tensor, held: Tensor, decay: float = 1e-4) -> Tensor:
    return _fitted(nn.Linear(x.shape[1], int(y.max()) + 1), x, y, decay)(held).argmax(1)


def _network(x: Tensor, y: Tensor, held: Tensor) -> Tensor:
    layers = nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, int(y.max()) + 1)
    return _fitted(nn.Sequential(*layers), x, y, 1e-3)(held).argmax(1)


def _neighbours(x: Tensor, y: Tensor, held: Tensor) -> Tensor:
    """The vote of the nine nearest."""
    nearest = torch.cdist(held, x).topk(9, largest=False).indices
    return functional.one_hot(y)[nearest].sum(1).argmax(1)


def test_no_shortcut_through_image_or_text_alone(splits: dict[str, list[Record]]) -> None:
    """Strong classifiers on one modality stay near chance; given the two readings together they solve it.

    "Together" is the product of what each modality's own classifier reads (finding, clue).
    """
    train, test = splits["train"], splits["test"]
    parts = (train, test)
    images = [torch.from_numpy(np.stack([_image_features(r) for r in part])) for part in parts]
    vocabulary = sorted(set().union(*map(_phrases, train)))
    texts = [
        torch.tensor([[float(w in said) for w in vocabulary] for said in map(_phrases, part)])
        for part in parts
    ]
    seen = _principal(images[0], images[1], 60)
    read = _principal(texts[0], texts[1], 200)
    predictions: dict[str, list[str]] = {}

    def score(model: Any, features: Any, target: str) -> float:
        pick = (lambda r: r.answer) if target == "answer" else (lambda r: r.meta[target])
        names = sorted({pick(r) for r in train})
        known = torch.tensor([names.index(pick(r)) for r in train])
        predictions[target] = [names[i] for i in model(features[0], known, features[1])]
        return float(
            np.mean([g == pick(r) for g, r in zip(predictions[target], test, strict=True)])
        )

    for features in (seen, read):
        for model in (_linear, _network, _neighbours):
            assert score(model, features, "answer") <= 0.45

    assert score(_linear, seen, "finding") >= 0.95
    assert score(_linear, read, "clue") >= 0.95
    pairs = [[f"{r.meta['finding']}|{r.meta['clue']}"] for r in train]
    table = dict(zip((p[0] for p in pairs), (r.answer for r in train), strict=True))
    both = [
        table.get(f"{finding}|{clue}")
        for finding, clue in zip(predictions["finding"], predictions["clue"], strict=True)
    ]
    assert np.mean([guess == r.answer for guess, r in zip(both, test, strict=True)]) > 0.9


def test_written_folder_loads_through_the_common_loader(tmp_path: Path) -> None:
    from mmedx_fast.data.loaders import load_records

    phantom.write_phantom(tmp_path, train=24, validation=20, test=20, seed=1)
    used: set[str] = set()
    made = phantom.make_split("train", 24, 1, used)
    loaded = load_records(tmp_path, split="train")
    assert not loaded.rejected
    assert [(r.id, r.question, r.options, r.answer, r.reasoning) for r in loaded.records] == [
        (r.id, r.question, r.options, r.answer, r.reasoning) for r in made
    ]


def test_too_many_questions_is_an_error_that_says_so() -> None:
    clinic = CLINICS["pediatrics"]
    rng = np.random.default_rng(0)
    used: set[str] = set()
    with pytest.raises(ValueError, match="fewer questions"):
        for index in range(10_000):
            phantom.make_record(clinic, 0, 0, index=index, split="train", rng=rng, used_stems=used)
