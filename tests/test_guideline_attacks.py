"""Guideline adherence under an automatic search for texts that are paid without having been thought.

Every attack makes random texts over eight questions; the distribution of the best score a text gets under
any guideline is bounded. What remains are fills that happen to be true sentences.
"""

import importlib.util
import itertools
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.guidelines import adherence, adherence_all


def _helper(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        f"helper_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


HELPER = _helper("_traces")
TRACES = HELPER.TRACES
GUIDELINE_TESTS = _helper("test_guidelines")
FLAT = [
    (n, c, t)
    for source in (GUIDELINE_TESTS.GENUINE, TRACES)
    for n, p in source.items()
    for c, t in p
]
FREE = [(name, GUIDELINE_TESTS.CHEST, text) for name, text in GUIDELINE_TESTS.FREE_FORM]
CASES = list(dict.fromkeys(case for _, case, _ in FLAT))
PAID = 0.35


def scores(case: Any, text: str) -> dict[str, float]:
    judged = adherence_all(
        text, question=case.question, options=case.options, answer=case.answer,
        findings=case.findings,
    )  # fmt: skip
    return {name: result.score for name, result in judged.items()}


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def right(case: Any) -> str:
    return case.options[case.answer]


def wrong(rng: random.Random, case: Any) -> list[str]:
    return rng.sample([t for letter, t in case.options.items() if letter != case.answer], 2)


def replace(text: str, names: dict[str, str]) -> str:
    keys = sorted(names, key=len, reverse=True)
    lowered = {key.lower(): value for key, value in names.items()}
    pattern = "|".join(map(re.escape, keys))
    return re.sub(pattern, lambda m: lowered[m.group().lower()], text, flags=re.IGNORECASE)


def own(rng: random.Random, case: Any) -> str:
    return rng.choice([text for _, known, text in FLAT if known is case])


def foreign(rng: random.Random, case: Any) -> tuple[Any, str]:
    return rng.choice([(known, text) for _, known, text in FLAT if known is not case])


# -- the attacks -----------------------------------------------------------------------------------


def another_question_s_trace(rng: random.Random, case: Any) -> str:
    return foreign(rng, case)[1]


def another_question_s_trace_with_our_answer(rng: random.Random, case: Any) -> str:
    theirs, text = foreign(rng, case)
    text = replace(text, {right(theirs): right(case)})
    return re.sub(rf"(answer is \W*){theirs.answer}\b", rf"\g<1>{case.answer}", text)


def another_question_s_trace_with_our_options(rng: random.Random, case: Any) -> str:
    theirs, _ = pair = foreign(rng, case)
    ours = rng.sample(list(case.options.values()), len(case.options))
    ours.remove(right(case))
    losing = [text for letter, text in theirs.options.items() if letter != theirs.answer]
    names = dict(zip(losing, ours, strict=False)) | {right(theirs): right(case)}
    return re.sub(
        rf"(answer is \W*){theirs.answer}\b", rf"\g<1>{case.answer}", replace(pair[1], names)
    )


def other_questions_sentences_recombined(rng: random.Random, case: Any) -> str:
    pool = [(known, s) for _, known, t in FLAT if known is not case for s in sentences(t)]
    body = [
        replace(
            s, {name: rng.choice(list(case.options.values())) for name in known.options.values()}
        )
        for known, s in rng.sample(pool, rng.randint(3, 6))
    ]
    return f"{' '.join(body)} Therefore the answer is {right(case)}."


def genuine_trace_with_the_options_swapped(rng: random.Random, case: Any) -> str:
    names = list(case.options.values())
    turned = names[1:] + names[:1]
    text = own(rng, case)
    swapped = replace(text, dict(zip(names, turned, strict=True)))
    # Named by letter or initials alone, the answer was not swapped.
    return swapped if right(case).lower() in text.lower() else ""


def negated_conclusion(rng: random.Random, case: Any) -> str:
    end = rng.choice(
        [
            "Therefore the answer is not {}.", "The diagnosis is unlikely to be {}.",
            "Therefore {} is excluded.", "It is not the case that the answer is {}.",
            "The answer is certainly never {}.", "The most likely diagnosis is anything but {}.",
            "{} is not the most likely diagnosis.",
        ]
    )  # fmt: skip
    return " ".join([*sentences(own(rng, case))[:-1], end.format(right(case))])


NEGATIONS = {
    r"\bsupports?\b": "does not support", r"\braises\b": "does not raise",
    r"\bincreases?\b": "does not increase", r"\bleads to\b": "never leads to",
    r"\bcausing\b": "not causing", r"\bcauses?\b": "does not cause", r"\bclassic\b": "not at all classic",
    r"\btypical of\b": "hardly typical of", r"\bcharacteristic of\b": "never characteristic of",
    r"\bsuggests\b": "never suggests", r"\bfavours?\b": "does not favour", r"\bpoints? to\b": "does not point to",
    r"\bindicate\b": "do not indicate", r"\bless likely\b": "more likely", r"\bunlikely\b": "likely",
    r"\bresulting in\b": "not resulting in", r"\bresults? in\b": "does not result in",
    r"\bpathognomonic: this picture means\b": "not pathognomonic: this picture never means",
}  # fmt: skip


def negated_evidence(rng: random.Random, case: Any) -> str:
    before = text = own(rng, case)
    for pattern, said in NEGATIONS.items():
        text = re.sub(pattern, said, text)
    return text if text != before else ""


FILLS = {
    "differential": "The differential includes {o}, {r} and {p}. {o} is less likely because of the {a}. "
    "The {b} with the {c} supports {r}. The answer is {r}.",
    "exclusion": "The differential includes {o}, {r} and {p}. {o} is less likely without {a}. The {b} and "
    "{c} supports {r}. The answer is {r}.",
    "intuitive": "The {a} with {b} and {c} is classic for {r}. The answer is {r}.",
    "analytic": "The {a} causes inflammation and leads to {b}. The {b} causes pressure and results in "
    "{c}. Because of {c}, obstruction leads to {a}. Therefore the answer is {r}.",
    "bayesian": "The prior probability of {r} is 20%. The {a} raises it to 50%. The {b} raises it to "
    "80%. The posterior probability of {r} is 80%, so the answer is {r}.",
}


def fill(name: str, size: int) -> Callable[[random.Random, Any], str]:
    def attack(rng: random.Random, case: Any) -> str:
        words = re.findall(r"[A-Za-z-]+", case.question)

        def some() -> str:
            at = rng.randrange(len(words) - size + 1)
            return " ".join(words[at : at + size])

        o, p = wrong(rng, case)
        return FILLS[name].format(r=right(case), o=o, p=p, a=some(), b=some(), c=some())

    return attack


def clauses_with_cues(rng: random.Random, case: Any) -> str:
    clauses = [
        c.strip() for c in re.split(r"[,.?]| and | with ", case.question) if " " in c.strip()
    ]
    cues = [
        "The differential includes {r}, {o} and {p}.", "{c} supports {r}.", "{c} is classic for {r}.",
        "{o} is less likely because {c}.", "{c} leads to inflammation.", "{c} raises it to 50%.",
        "Because of obstruction, {c} results in {d}.", "The prior probability of {r} is 20%.",
        "{c} raises it to 80%.", "The posterior probability of {r} is 80%.", "{p} is unlikely without {d}.",
    ]  # fmt: skip
    o, p = wrong(rng, case)
    parts = [
        cue.format(r=right(case), o=o, p=p, c=rng.choice(clauses), d=rng.choice(clauses))
        for cue in rng.sample(cues, rng.randint(3, 6))
    ]
    return f"{' '.join(parts)} Therefore the answer is {right(case)}."


# Two findings of each vignette, for texts that need no more of it than that.
TWO_FINDINGS = {
    "gardener": ("irregular border", "several colours"), "tingling": ("tingling feet", "leg weakness"),
    "strawberry": ("fever", "cracked lips"), "epigastric": ("epigastric pain", "vomiting"),
    "floaters": ("flashes", "floaters"), "pleuritic": ("dyspnoea", "chest pain"),
    "limps": ("tenderness", "fever"), "cinema": ("headache", "nausea"),
}  # fmt: skip
CHAIN = (
    "Fluid leads to pressure. Pressure leads to collapse. Collapse leads to hypoxia. Hypoxia leads to {a} "
    "with {b}. Therefore the answer is {x}."
)
RULED_OUT = (
    "The differential includes {x}, {o} and {p}. {o} is ruled out by the {a}. {x} fits the {b} {a}. "
    "Therefore the answer is {x}."
)


def chain_of_bare_mechanisms(rng: random.Random, case: Any) -> str:
    a, b = next(pair for word, pair in TWO_FINDINGS.items() if word in case.question)
    return CHAIN.format(a=a, b=b, x=right(case))


@pytest.mark.parametrize("template", [CHAIN, RULED_OUT])
def test_a_fixed_text_about_a_short_stem_is_not_paid(template: str) -> None:
    for case in HELPER.SHORT_STEMS:
        words = re.findall(r"[A-Za-z-]+", case.question)
        o, p = wrong(random.Random(0), case)
        for a, b in itertools.permutations(words, 2):
            text = template.format(a=a, b=b, x=right(case), o=o, p=p)
            assert max(scores(case, text).values()) < PAID, text


def test_a_question_without_findings_has_no_guideline() -> None:
    for case in HELPER.SHORT_STEMS:
        for name, text in HELPER.SHOWN_TRACES.items():
            judged = adherence(
                text, name, question=case.question, options=case.options, answer=case.answer
            )
            assert not judged.applies and judged.score == 0.0
    for case in CASES:
        assert all(
            judged.applies
            for judged in adherence_all(
                "", question=case.question, options=case.options, answer=None
            ).values()
        )


@pytest.mark.parametrize("name", GUIDELINE_NAMES)
def test_traces_about_what_the_row_says_the_image_shows_are_paid(name: str) -> None:
    got = scores(HELPER.SHOWN, HELPER.SHOWN_TRACES[name])
    assert got[name] > 0.85, got
    assert all(got[other] < PAID for other in GUIDELINE_NAMES if other != name), got


def test_a_chain_of_bare_mechanisms_is_paid_for_no_option() -> None:
    for word, pair in TWO_FINDINGS.items():
        case = next(case for case in CASES if word in case.question)
        for a, b in itertools.permutations(pair):
            for letter, text in case.options.items():
                judged = adherence(
                    CHAIN.format(a=a, b=b, x=text), "analytic", question=case.question,
                    options=case.options, answer=letter, findings=case.findings,
                )  # fmt: skip
                assert not judged.criteria["A3_explains"] and judged.score < PAID


# Share of texts that may be paid. A fill with the stem's own words is now and then a true sentence ("The
# curtain with flashes and floaters is classic for retinal detachment"), which no reader of form refuses.
ATTACKS: list[tuple[Callable[[random.Random, Any], str], float]] = [
    (another_question_s_trace, 0.0),
    (another_question_s_trace_with_our_answer, 0.02),
    (another_question_s_trace_with_our_options, 0.01),
    (other_questions_sentences_recombined, 0.01),
    (genuine_trace_with_the_options_swapped, 0.0),
    (negated_conclusion, 0.0),
    (negated_evidence, 0.04),
    (clauses_with_cues, 0.06),
    (chain_of_bare_mechanisms, 0.0),
    *((fill(name, 1), 0.15 if name == "differential" else 0.05) for name in FILLS),
    *((fill(name, 2), 0.15) for name in FILLS),
]


@pytest.mark.parametrize(("name", "case", "text"), [*FLAT, *FREE])
def test_genuine_traces_of_every_specialty_and_style(name: str, case: Any, text: str) -> None:
    got = scores(case, text)
    assert got[name] > 0.85, adherence(
        text, name, question=case.question, options=case.options, answer=case.answer,
        findings=case.findings,
    )  # fmt: skip
    assert all(got[other] < PAID for other in GUIDELINE_NAMES if other != name), got


def test_there_are_eight_genuine_traces_of_each_guideline_at_least() -> None:
    for name in GUIDELINE_NAMES:
        assert sum(known == name for known, _, _ in [*FLAT, *FREE]) >= 8
    assert len(CASES) >= 8


@pytest.mark.parametrize(("attack", "share"), ATTACKS)
def test_attacks_are_not_paid(attack: Callable[[random.Random, Any], str], share: float) -> None:
    rng = random.Random(11)
    found = []
    for number in range(200):
        case = CASES[number % len(CASES)]
        text = attack(rng, case)
        found.append((max(scores(case, text).values()), text))
    found.sort(reverse=True)
    paid = [item for item in found if item[0] >= PAID]
    assert len(paid) <= share * len(found), (len(paid), paid[:3])
    assert sum(score for score, _ in found) / len(found) < 0.25


def test_a_false_absence_is_no_evidence() -> None:
    said = 0
    for case in CASES:
        for finding in ("fever", "headache", "floaters", "vomiting", "dyspnoea", "cracked lips"):
            if finding in case.question:
                o, p = wrong(random.Random(0), case)
                text = (
                    f"The differential includes {o}, {p} and {right(case)}. {o} is less likely without "
                    f"{finding}. This whole picture supports {right(case)}. The answer is {right(case)}."
                )
                judged = adherence(
                    text, "differential", question=case.question, options=case.options,
                    answer=case.answer,
                )  # fmt: skip
                assert not judged.criteria["D3_exclusion"] and judged.score < PAID
                said += 1
    assert said >= 5
