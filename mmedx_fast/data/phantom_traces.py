"""Step-by-step traces of the phantom clinic under each of the four guidelines.

Each trace first names and scores what the image and the vignette show, then reasons in its guideline's form,
so that a diagnosis is always concluded from both. They satisfy the criteria of ``mmedx_fast.guidelines``.
"""

from __future__ import annotations

import numpy as np

from mmedx_fast.data.phantom_cases import Clinic, Term


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _opening(clinic: Clinic, finding: Term, clue: Term) -> str:
    f, c = clinic.findings.index(finding), clinic.clues.index(clue)
    return (
        f"The {clinic.image} shows {_article(finding.name)} ({clinic.finding_points[f]}) and the history "
        f"tells of {clue.name} ({clinic.clue_points[c]}), score {clinic.score(f, c)}."
    )


def _close(diagnosis: str) -> str:
    return f"Therefore the most likely diagnosis is {diagnosis}."


def differential(
    clinic: Clinic, finding: Term, clue: Term, diagnosis: str, rng: np.random.Generator
) -> str:
    others = [d for d in clinic.diagnoses if d != diagnosis]
    excluded, other = (str(name) for name in rng.choice(others, 2, replace=False))
    listed = [str(name) for name in rng.permutation([diagnosis, excluded, other])]
    return (
        f"{_opening(clinic, finding, clue)} "
        f"The differential diagnosis includes {listed[0]}, {listed[1]} and {listed[2]}. "
        f"The {finding.name} with {clue.name} supports {diagnosis}. "
        f"{excluded.capitalize()} is less likely because it does not explain the {finding.name}. "
        f"{_close(diagnosis)}"
    )


def intuitive(
    clinic: Clinic, finding: Term, clue: Term, diagnosis: str, rng: np.random.Generator
) -> str:
    verb = rng.choice(["is characteristic of", "is classic for", "strongly suggests"])
    return (
        f"{_opening(clinic, finding, clue)} "
        f"The {finding.name} together with {clue.name} {verb} {diagnosis}. "
        f"{_close(diagnosis)}"
    )


def analytic(
    clinic: Clinic, finding: Term, clue: Term, diagnosis: str, rng: np.random.Generator
) -> str:
    first, second = clue.mechanism, finding.mechanism
    return (
        f"{_opening(clinic, finding, clue)} "
        f"The {clue.name} {clue.link} {first}. "
        f"The {first} leads to {second} in {diagnosis}. "
        f"The {second} results in the {finding.name}. "
        f"{_close(diagnosis)}"
    )


def bayesian(
    clinic: Clinic, finding: Term, clue: Term, diagnosis: str, rng: np.random.Generator
) -> str:
    prior, middle, last = (
        int(rng.choice(values)) for values in ((10, 20, 30), (40, 50, 60), (80, 85, 90))
    )
    return (
        f"{_opening(clinic, finding, clue)} "
        f"The prior probability of {diagnosis} is {prior}%. "
        f"The {finding.name} raises the probability to {middle}%. "
        f"The {clue.name} raises the probability to {last}%. "
        f"The posterior probability of {diagnosis} is {last}%. "
        f"{_close(diagnosis)}"
    )


TRACES = {
    "differential": differential,
    "intuitive": intuitive,
    "analytic": analytic,
    "bayesian": bayesian,
}
