"""VLMEvalKit's and MedXpertQA's readings against the tables of their observed behaviour."""

import pytest

from mmedx_fast.scoring import extract_answer
from mmedx_fast.scoring_peers import medxpertqa_match, vlmevalkit_match

OPTIONS = {
    "A": "Myocardial infarction",
    "B": "Pericarditis",
    "C": "Pulmonary embolism",
    "D": "Aortic dissection",
    "E": "Costochondritis",
}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((letter, letter) for letter in OPTIONS),
        ("B. Pericarditis", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B: it hurts more lying", None),  # the first of five tokens, and no text of an option
        ("B: it hurts lying", "B"),  # the first of four
        ("The rub decides: it is B", "B"),
        ("The answer is **B** because of the rub that all of us heard", "B"),
        ("The correct answer is C. Here is why, in very many words.", "C"),
        ("The answer is **E** because of some quite long text", None),  # that rule knows A to D
        ("the answer is benign, as we can see in this film today", "B"),  # nor a word's end
        ("<answer>B</answer>", None),  # glued to its tags
        ("<think>x</think> <answer> B </answer>", "B"),
        ("<think>x</think><answer>Pericarditis</answer>", "B"),  # by its text
        ("A patient with this rub has B", None),  # two letters
        ("A patient with this rub has pericarditis", "B"),  # then the text decides
        ("A sharp pain", "A"),  # an article
        ("Pericarditis, not costochondritis", None),
        ("pericarditis " * 30, None),  # over twice the options' length
        ("Sorry, I can't help with images of people yet. B", None),
        ("Cannot determine the answer, perhaps pericarditis", None),
        ("Failed to obtain answer via API. B", None),
        ("Failed to obtain answer via API: pericarditis", "B"),
        ("Z", None),
        ("Z pericarditis", None),
        ("b", None),
        ("", None),
        ("F", None),
    ],
)
def test_vlmevalkit_exact_matching_table(text: str, letter: str | None) -> None:
    assert vlmevalkit_match(text, OPTIONS) == letter


def test_vlmevalkit_answer_is_needs_an_option_of_that_letter() -> None:
    two = {"A": "Yes it is", "B": "No it is not"}
    assert vlmevalkit_match("I am quite sure that the answer is C indeed, my dear", two) is None


def test_a_bare_letter_is_read_for_any_options() -> None:
    for count in range(2, 27):
        options = {chr(65 + i): f"finding {i}" for i in range(min(count, 25))}
        assert all(vlmevalkit_match(letter, options) == letter for letter in options)
        assert vlmevalkit_match("Z", options) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. Pericarditis", "B"),
        ("Therefore, among A through E, the answer is B.", "B"),
        ("It hurts. A rub. Therefore, among A through E, the answer is (D).", "D"),
        ("Among A through E, D fits", "D"),
        ("I think the answer is C, not B", "C"),
        ("A patient with this rub has B", "A"),  # the article
        ("The answer is A patient's friend", "A"),
        ("The answer is b", None),
        ("ABCDE", None),
        ("Pericarditis", None),
        ("F", None),
        ("", None),
        ("The answer is B. The answer is C.", "B"),  # " answer is " once cut: up to the second
        ("<think>A or B</think><answer>C</answer>", "A"),
    ],
)
def test_medxpertqa_official_table(text: str, letter: str | None) -> None:
    assert medxpertqa_match(text, OPTIONS) == letter


def test_medxpertqa_trigger_names_the_options_there_are() -> None:
    ten = {letter: f"option {letter}" for letter in "ABCDEFGHIJ"}
    text = "B first. Therefore, among A through J, the answer is G"
    assert medxpertqa_match(text, ten) == "G"
    assert medxpertqa_match(text, {}) is None


def test_strict_does_not_share_their_accidents() -> None:
    for text in ("A sharp pain", "the answer is benign", "A patient with this rub has B"):
        assert extract_answer(text, OPTIONS) is None
