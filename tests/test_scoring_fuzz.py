"""Answer extraction under 10,000 generated texts: never an exception, never another letter."""

import random
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmedx_fast.scoring import (
    extract_answer,
    format_ok,
    last_boxed,
    match_option,
    medevalkit_score,
    normalise,
    strict_score,
    think_text,
)
from mmedx_fast.scoring_peers import medxpertqa_match, vlmevalkit_match

TEXTS = [
    "Myocardial infarction", "Pericarditis", "E. coli", "Hepatitis C", "Vitamin D deficiency",
    "Type A dissection", "HER2+", "HER2-", "A fracture", "T2", "None of the above", "Gout",
    "B-cell lymphoma", "Group B streptococcus", "0.9% saline", "Left (apical) pneumothorax",
]  # fmt: skip
# The one stated answer is {x}, with the text {t}; {n} is noise that states nothing.
TEMPLATES = [
    "<think>{n}</think><answer>{x}</answer>",
    "<think>{n}</think>\n<answer>{x}. {t}</answer>",
    "<answer>({x}) {t}</answer>{n}",
    "<answer>**{x}**</answer>",
    "<answer>**{x}.** {t}</answer>",
    "<answer>{x}: {t}, {n}</answer>",
    "<answer>{x} {t}</answer>",
    "<answer>{t}</answer>",
    "<answer> {t}. </answer>",
    "<answer>{t}, {n}</answer>",
    "<answer>{n} {t}</answer>",
    "<answer>{n} ({x})</answer>",
    "<answer>{x}) {n}</answer>",
    "<answer>Option {x}</answer>",
    "<answer>{n}, so {x}.</answer>",
    "{n} \\boxed{{{x}}} {n}",
    "\\boxed{{\\text{{{x}. {t}}}}}",
    "<answer>\\boxed{{{t}}}</answer>",
    "{n}\nThe answer is {x}.",
    "{n}\nFinal answer: **{x}** {t}\n{n}",
    "The answer is {t}.\n{n}",
    "The answer is option {x}, {n}",
    "{n}</think>{n}\nAnswer: ({x})",
    "<think>{n}</think><answer>{x}</answer><answer>{x}</answer>",
    "<think>{n} the answer is {x}",
    "{x}. {t}",
]
# Spans that take the letter back; {o} is another option's letter and {u} its text.
DENIALS = [
    "{x}) can be excluded", "{x}. {t} can be excluded", "{x}) eliminated", "{x}. is improbable", "{x}) no",
    "{x}. I reject this", "{x}. does not fit", "{x}. {t} does not fit", "{x}. less probable than {u}",
    "{x}, but {o} is better", "{x}. {t}, but {u} is better", "{x}. No: it is the {u}.", "{x}. The {u}",
    "{x}. The correct answer is the {u}.", "{x}) is what I first thought; the right one is the {u}",
    "{x}. {t}: rejected", "({x}) {t} could be ruled out by the film", "{x}. {t}, however {o}) fits",
]  # fmt: skip
UPHELD = ["", ".", " .", "!", ",", ";", ":", "...", ")", "]", "*", "**", '"', "'", " \n", "?", " -"]
NOISE = [
    "", "A patient came", "A 61-year-old man", "I am sure", "because of the rub", "the film is poor",
    "it hurts", "no other option fits", "a", "E.g. at night", "grade I disease", "see figure 3",
    "q.e.d.", "$", "**", "{", "}", "<b>", "\n", "vs", "...", "100%", "I. M. injection", "\u3000",
]  # fmt: skip
SOUP = [
    "<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "\\text{", "{", "}", "answer is ",
    "answer: ", "A", "B", "(B)", "b.", "**", " or ", "\n", "Gout", "gout.", "None", " ", "is not ",
    "\u0130", "\uff21", "\u0345", "\uff5b", "\u7b54\u6848:", "$", "\x00", "\ud83d\ude00",
]  # fmt: skip
FAST = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

options_of = st.permutations(TEXTS).flatmap(
    lambda texts: st.integers(2, 10).map(
        lambda count: dict(zip("ABCDEFGHIJ", texts[:count], strict=False))
    )
)


@settings(max_examples=5000, derandomize=True, **FAST)
@given(st.integers(0, 2**40))
def test_the_only_stated_answer_is_read_or_nothing(seed: int) -> None:
    rng = random.Random(seed)  # drawing each choice from hypothesis takes ten times as long
    letters = "ABCDEFGHIJ"[: rng.randint(2, 10)]
    options = dict(zip(letters, rng.sample(TEXTS, len(letters)), strict=True))
    letter, template = rng.choice(letters), rng.choice(TEMPLATES)
    said = rng.choice([letter, letter.lower()]) if "{x}<" in template else letter
    noise = " ".join(rng.choices(NOISE, k=rng.randint(0, 2)))
    text = template.format(x=said, t=options[letter], n=noise)
    read = extract_answer(text, options)
    assert read in (letter, None), (text, options)
    assert strict_score(text, options, letter) == float(read == letter)
    if template in TEMPLATES[:6] and not noise:
        assert read == letter, (text, options)


@settings(max_examples=3000, derandomize=True, **FAST)
@given(st.integers(0, 2**40))
def test_a_denied_letter_is_never_read(seed: int) -> None:
    rng = random.Random(seed)
    letters = "ABCDEFGHIJ"[: rng.randint(2, 10)]
    options = dict(zip(letters, rng.sample(TEXTS, len(letters)), strict=True))
    letter, other = rng.sample(letters, 2)
    span = rng.choice(DENIALS).format(
        x=letter, t=options[letter], o=other, u=rng.choice([str, str.lower])(options[other])
    )
    text = rng.choice(["<answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}"]).format(span)
    assert extract_answer(text, options) is None, (text, options)


@settings(max_examples=2000, derandomize=True, **FAST)
@given(st.integers(0, 2**40))
def test_a_letter_with_its_own_text_is_always_read(seed: int) -> None:
    rng = random.Random(seed)
    letters = "ABCDEFGHIJ"[: rng.randint(2, 10)]
    texts = [*TEXTS, "No abnormality", "Not visible", "Excluded by the film", "No", "A but not B"]
    options = dict(zip(letters, rng.sample(texts, len(letters)), strict=True))
    letter = rng.choice(letters)
    shape = rng.choice(["{}. {}", "({}) {}", "{}: {}", "**{}.** {}", "{}) {}", "[{}] {}"])
    said = rng.choice([str, str.lower, str.upper])(options[letter])
    text = shape.format(letter, said) + rng.choice(UPHELD)
    assert extract_answer(f"<answer>{text}</answer>", options) == letter, (text, options)


@settings(max_examples=3000, derandomize=True, **FAST)
@given(st.integers(0, 2**40))
def test_any_text_gives_none_or_an_option_and_no_exception(seed: int) -> None:
    rng = random.Random(seed)  # drawing each choice from hypothesis takes ten times as long
    text = "".join(rng.choices(SOUP + NOISE + TEXTS, k=rng.randint(0, 14)))
    options = dict(zip("ABCD", rng.sample(TEXTS, 4), strict=True))
    read = extract_answer(text, options)
    assert read is None or read in options
    if read is not None:  # what was read, read again, is itself
        assert extract_answer(f"<answer>{read}</answer>", options) == read
        assert extract_answer(f"<answer>{options[read]}</answer>", options) == read
    for other in (vlmevalkit_match(text, options), medxpertqa_match(text, options)):
        assert other is None or other in options
    assert medevalkit_score(text, options, "B") in (0.0, 1.0)
    assert medevalkit_score(text, None, "yes") in (0.0, 1.0)
    assert extract_answer(text, None) != "" and isinstance(format_ok(text), bool)
    assert len(think_text(text)) <= len(text) and len(last_boxed(text) or "") <= len(text)


@settings(max_examples=1000, derandomize=True, **FAST)
@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f" {text}\n") == once


@settings(max_examples=1000, derandomize=True, **FAST)
@given(st.text(max_size=60), options_of)
def test_any_unicode_is_survived(text: str, options: dict[str, str]) -> None:
    for whole in (text, f"<answer>{text}</answer>", f"answer is {text}"):
        assert extract_answer(whole, options) in (None, *options)
    assert match_option(text, options) in (None, *options)


def test_time_grows_with_length_alone() -> None:
    options = dict(zip("ABCDE", TEXTS, strict=False))
    pieces = [
        *SOUP,
        *NOISE,
        "A. ",
        "B) ",
        "(A) or ",
        " \\text {",
        "answer \t",
        "\\boxed {",
        "[(",
        "answer is A. ",
    ]
    start = time.process_time()
    for piece in pieces:
        text = piece * (20_000 // max(1, len(piece)))
        for whole in (
            text,
            f"<answer>{text}</answer>",
            f"<answer>B. {text}</answer>",
            f"answer: {text}",
        ):
            extract_answer(whole, options)
            format_ok(whole)
    assert (
        time.process_time() - start < 4.0
    )  # 240 texts of 20,000 characters: one quadratic one takes it all
