"""Answer extraction and scorers against the tables of observed behaviour, and adversarial spans."""

import time

import pytest

from mmedx_fast.scoring import (
    answer_span,
    extract_answer,
    format_ok,
    gold_letter,
    last_boxed,
    medevalkit_score,
    normalise,
    strict_score,
    think_text,
)

OPTIONS = {
    "A": "Myocardial infarction",
    "B": "Pericarditis",
    "C": "Pulmonary embolism",
    "D": "Aortic dissection",
    "E": "Costochondritis",
}


@pytest.mark.parametrize(
    "text",
    [
        "<think>x</think><answer>B</answer>",
        "<think>x</think><answer> b </answer>",
        "<answer>B. Pericarditis</answer>",
        "<answer>(B)</answer>",
        "<answer>(B) Pericarditis</answer>",
        "<answer>**B**</answer>",
        "<answer>**B.** Pericarditis</answer>",
        "<answer>B: pericarditis</answer>",
        "<answer>B Pericarditis</answer>",
        "<answer>\n  pericarditis.\n</answer>",
        "<answer>[Pericarditis]</answer>",
        "<answer>B. The pain is relieved by sitting up</answer>",
        r"<answer>\boxed{B}</answer>",
        r"\boxed{B}",
        r"\boxed{B. Pericarditis}",
        r"\boxed{\text{B}}",
        r"\boxed{\mathrm{\text{Pericarditis}}}",
        r"\boxed{A} and on second thoughts \boxed {B}",
        r"\boxed{B} then \boxed{unclosed",
        "The answer is B.",
        "Final answer: B",
        "**Answer:** B",
        "The answer is A at first sight.\nSo the final answer is: (B) Pericarditis.",
        "<think>the answer is A</think>\nThe answer is B",
        "The answer is A, or rather the answer is B",
        "<answer>B</answer> </answer>",
        "<answer>A</answer> wait <answer>B</answer>",
        "<think><answer>A</answer></think><answer>B</answer>",
        "<answer>A <answer>B</answer>",
        "<think>A fits, I thought <answer>B</answer>",
        "The answer is B. <think>Or is the answer: C, cut by the length lim",
    ],
)
def test_strict_reads_b(text: str) -> None:
    assert extract_answer(text, OPTIONS) == "B"
    assert strict_score(text, OPTIONS, "B") == strict_score(text, OPTIONS, "Pericarditis") == 1.0
    assert strict_score(text, OPTIONS, "A") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B. Pericarditis without any tag",
        "<think>Pericarditis fits, cut by the length lim",
        "<answer></answer>",
        "<answer>F</answer>",
        "<answer>J</answer>",
        "<answer>A patient with chest pain</answer>",
        "<answer>A or B</answer>",
        "<answer>A, B</answer>",
        "<answer>A. B. C.</answer>",
        "<answer>A) or B)</answer>",
        "<answer>B. Costochondritis</answer>",
        "<answer>ABCDE</answer>",
        "<answer>carditis</answer>",
        "<answer>Pericarditis and pulmonary embolism</answer>",
        "<answer>B",
        r"\boxed{",
        "<think>The answer is B.</think>",
        "<think>At first sight the answer is B, but",
        r"<think>\boxed{B} might do</think> or <think> so the answer is B",
        "<answer>unsure</answer> the answer is B",
        "<answer>A) is wrong, B) is right</answer>",
        "<answer>B. Not this one</answer>",
        "<answer>B. is ruled out by the ECG</answer>",
        "<answer>B. Pericarditis or A. Myocardial infarction</answer>",
        "<answer>B. Dissection</answer>",
        "The answer is not B.",
    ],
)
def test_strict_never_guesses(text: str) -> None:
    assert extract_answer(text, OPTIONS) is None
    assert all(strict_score(text, OPTIONS, letter) == 0.0 for letter in OPTIONS)


ORGANS = {"A": "Liver", "B": "Spleen", "C": "Kidney"}


@pytest.mark.parametrize(
    "span",
    [
        "C) can be excluded",
        "C) eliminated",
        "C. is improbable",
        "C) no",
        "C. I reject this",
        "C. Definitely not",
        "C. The findings are against this",
        "B. does not fit",
        "B. doesn\u2019t fit",
        "B. less probable than kidney",
        "B, but A is better",
        "B. although A fits too",
        "B. A is better",
        "B. No: it is the kidney.",
        "B. The correct organ is the liver.",
        "B. The kidney",
        "B. Kidneys",
        "B) is what I first thought; the right organ is the kidney",
        "B) was my first thought",
        "B. I do not think so",
        "B. Spleen is ruled out",
        "B) Spleen: no",
        "B. Spleen (excluded)",
        "B. Spleen, but the liver is better",
        "B. Spleen; the right one is liver",
        "B. It is not the spleen",
    ],
)
def test_a_letter_that_its_own_span_takes_back_is_not_read(span: str) -> None:
    for text in (f"<answer>{span}</answer>", f"\\boxed{{{span}}}", f"The answer is {span}"):
        assert extract_answer(text, ORGANS) is None


@pytest.mark.parametrize(
    "span",
    [
        "B. Spleen, since the liver is normal",
        "B. Spleen, not the liver",
        "B. Spleen rather than liver",
        "B. Spleen. The liver and kidney are clear",
        "B: spleen, no doubt",
        "B. The spleen is enlarged",
        "B. This fits best",
        "B) Spleen, as vitamin C is low",
    ],
)
def test_a_letter_that_its_span_upholds_is_read(span: str) -> None:
    assert extract_answer(f"<answer>{span}</answer>", ORGANS) == "B"


def test_a_denial_within_the_letter_s_own_text_denies_nothing() -> None:
    options = {
        "A": "No abnormality",
        "B": "None of the above",
        "C": "Not visible",
        "D": "Excluded by the film",
        "E": "Less likely than not",
    }
    for letter, text in options.items():
        for more in ("", ".", ", as seen", " on this view", " - surely"):
            span = f"<answer>{letter}. {text}{more}</answer>"
            assert extract_answer(span, options) == letter, span
            denied = f"<answer>{letter}. {text} is ruled out</answer>"
            assert extract_answer(denied, options) is None
    assert extract_answer("<answer>A. No abnormalities seen</answer>", options) == "A"


def test_every_option_text_and_letter_round_trips() -> None:
    tricky = {
        "A": "E. coli",
        "B": "HER2+",
        "C": "HER2-",
        "D": "Vitamin C",
        "E": "A fracture (type B)",
    }
    for letter, text in (OPTIONS | {}).items():
        assert extract_answer(f"<answer>{text}</answer>", OPTIONS) == letter
    for letter, text in tricky.items():
        for span in (letter, text, f"{letter}. {text}", f"({letter}) {text}", f" {text.upper()}. "):
            assert extract_answer(f"<answer>{span}</answer>", tricky) == letter, span


def test_a_species_is_no_option_letter() -> None:
    options = {"A": "Candida albicans", "B": "E. coli", "C": "Aspergillus fumigatus", "E": "None"}
    assert extract_answer("<answer>E. coli</answer>", options) == "B"
    assert extract_answer("<answer>E. coli from the gut</answer>", options) is None
    assert extract_answer("<answer>E. coli, as in most cases</answer>", options) is None
    assert extract_answer("<answer>A. fumigatus</answer>", options) is None
    assert extract_answer("<answer>A. albicans</answer>", options) == "A"
    assert extract_answer("<answer>C. fumigatus</answer>", options) == "C"


def test_duplicate_option_texts_are_ambiguous() -> None:
    options = {"A": "Same", "B": "same.", "C": "Other"}
    assert extract_answer("<answer>same</answer>", options) is None
    assert extract_answer("<answer>B. same</answer>", options) == "B"
    assert extract_answer("<answer>B</answer>", options) == "B"


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("<answer>Yes.</answer>", "yes", 1.0),
        ("<answer>no</answer>", "No", 1.0),
        ("<answer>Yes, nodule</answer>", "yes", 0.0),
        ("<answer>T2</answer>", "T2", 1.0),
        ("<answer>left  lung</answer>", "Left Lung", 1.0),
        ("<answer></answer>", "yes", 0.0),
        ("yes", "yes", 0.0),
    ],
)
def test_strict_without_options_is_the_normalised_text(text: str, gold: str, score: float) -> None:
    assert strict_score(text, None, gold) == score


def test_gold_must_be_an_option() -> None:
    with pytest.raises(ValueError, match="'Gout' is neither a letter nor the text"):
        gold_letter(OPTIONS, "Gout")
    assert gold_letter(OPTIONS, "b") == gold_letter(OPTIONS, "Pericarditis") == "B"


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("<think>x</think><answer>B</answer>", "B", 1.0),
        ("B. Pericarditis", "B", 1.0),
        ("(B)", "B", 1.0),
        ("(B) Pericarditis", "B", 1.0),
        ("**B**", "B", 1.0),
        ("Pericarditis", "B", 1.0),
        (r"\boxed{B}", "B", 1.0),
        (r"\boxed{B. Pericarditis}", "B", 1.0),
        (r"<answer>\boxed{B}</answer>", "B", 1.0),
        (r"\boxed{\text{B}}", "B", 0.0),
        ("The answer is B.", "B", 1.0),
        ("Final answer: B", "B", 1.0),
        ("B\n\nbecause of the rub", "B", 1.0),
        ("the rub decides\n\nB. It is clear", "B", 1.0),
        ("", "A", 1.0),
        ("", "B", 0.0),
        ("<answer>A</answer><answer>B</answer>", "A", 0.0),
        ("<answer>A</answer><answer>B</answer>", "B", 0.0),
        ("<think>the rub makes pericarditis likel", "B", 1.0),
        ("<answer>aortic disection</answer>", "D", 1.0),
        (r"\boxed{} B", "B", 0.0),
        ("boxed but not so", "A", 0.0),  # the word "None" then, which is like "e. costochondritis"
        ("<ANSWER>B</ANSWER>", "B", 1.0),  # no tag to it, but near enough
        ("A patient has pericarditis", "B", 1.0),
        ("A patient has pericarditis", "A", 0.0),
    ],
)
def test_medevalkit_multiple_choice_table(text: str, gold: str, score: float) -> None:
    if text.startswith("<answer>A</answer>"):
        # Two blocks are joined to "A B", which is no option: the similarity decides, here for
        # neither.
        options = {"A": "Ischaemia", "B": "Pericarditis", "C": "A b"}
        assert medevalkit_score(text, options, gold) == score
    else:
        assert medevalkit_score(text, OPTIONS, gold) == score


@pytest.mark.parametrize("letter", ["F", "J"])
def test_medevalkit_letter_out_of_range_is_a_guess(letter: str) -> None:
    text = f"<answer>{letter}</answer>"
    assert sum(medevalkit_score(text, OPTIONS, gold) for gold in OPTIONS) == 1.0
    assert extract_answer(text, OPTIONS) is None


def test_medevalkit_answer_tag_switch() -> None:
    text = "<think>pericarditis</think><answer>C</answer>\n\nB"
    assert medevalkit_score(text, OPTIONS, "C") == 1.0
    assert medevalkit_score(text, OPTIONS, "B", answer_tag=False) == 1.0


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("Yes", "yes", 1.0),
        ("Yes, nodule", "yes", 0.0),  # "nodule" holds "no"
        ("it is abnormal", "no", 1.0),
        ("<answer>no</answer>", "no", 1.0),
        (r"yes \boxed{no}", "no", 1.0),
        ("I do not know", "no", 1.0),
        ("Yes, I know", "yes", 0.0),
        ("maybe", "yes", 0.0),
        ("yes and no", "yes", 0.0),
        ("", "no", 0.0),
        ("", "left", 0.0),
        ("<answer>Left</answer> lung", "left", 1.0),
        (r"<answer>right</answer> \boxed{Left}", "left", 1.0),
        ("<answer>left</answer><answer>right</answer>", "left", 0.0),
        ("<think>left", "left", 0.0),
        ("T2.\n", "t2", 1.0),
        ("Left.\n", "left", 1.0),
        ("left lung", "left", 0.0),
    ],
)
def test_medevalkit_closed_and_open_rules(text: str, gold: str, score: float) -> None:
    assert medevalkit_score(text, None, gold) == score


@pytest.mark.parametrize(
    ("text", "gold", "raw", "any_case"),
    [
        ("yes", "Yes", 1.0, 1.0),
        ("Yes.", "Yes", 1.0, 1.0),
        ("Yes, it is", "Yes", 0.0, 1.0),
        ("It is abnormal", "No", 0.0, 1.0),
        ("Yes, it is", "yes", 1.0, 1.0),
    ],
)
def test_medevalkit_raw_gold_switch(text: str, gold: str, raw: float, any_case: float) -> None:
    assert medevalkit_score(text, None, gold, raw_gold=True) == raw
    assert medevalkit_score(text, None, gold) == any_case


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a\nb</think><answer>B</answer>", True),
        (" <think>a</think>\n\n<answer>B\n</answer>\n", True),
        ("<think></think><answer>B</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think><answer>B</answer> extra", False),
        ("Sure. <think>a</think><answer>B</answer>", False),
        ("<think>a</think><answer>A</answer><answer>B</answer>", False),
        ("<think><think>a</think><answer>B</answer>", False),
        ("<think>a <answer>B</answer></think>", False),
        ("<answer>B</answer><think>a</think>", False),
        ("<think>a", False),
        ("", False),
    ],
)
def test_format(text: str, good: bool) -> None:
    assert format_ok(text) is good


def test_degenerate_texts_are_read_in_linear_time() -> None:
    start = time.process_time()
    for piece in (r"\boxed{", "<answer>", "<think>", "answer: ", "**", r"\text{", "{}"):
        text = piece * 20_000
        assert extract_answer(text, OPTIONS) is None
        assert not format_ok(text)
    for opening in (r"\text{", r"\boxed{", "{", "<answer>", "<think>"):
        closing = {"<": "</" + opening[1:]}.get(opening[0], "}")
        text = opening * 20_000 + "B" + closing * 20_000
        for whole in (text, f"<answer>{text}</answer>", f"answer: {text}"):
            assert extract_answer(whole, OPTIONS) in ("B", None)
            think_text(whole)
    assert time.process_time() - start < 2.0


def test_helpers() -> None:
    assert think_text("<think> a\nb </think><answer>B</answer>") == "a\nb"
    assert think_text("<think>cut off") == "cut off"
    assert think_text("plain <answer>B</answer>") == "plain"
    assert last_boxed(r"\boxed{a{b}c}") == "a{b}c" and last_boxed("none") is None
    assert last_boxed(r"\boxed{a \boxed{b}} {c} \boxed{d") == "b"
    assert answer_span("answer: ") == ""
    assert normalise(' "(Left\u00a0 Lung)." ') == "left lung"
