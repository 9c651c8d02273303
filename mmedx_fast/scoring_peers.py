"""The answer letter as two other evaluations read it, from their published behaviour.

For comparison and for the export alone: both take a stray letter for an answer, so neither may be a
reward. MedEvalKit's rules are :func:`mmedx_fast.scoring.medevalkit_score`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# As there: A to D only, in either case, and no word boundary ("the answer is benign" is a B).
_VERBOSE = re.compile(r"(?i)answer\s+is\s+\**([ABCD])\**")
_TAIL = 4  # tokens: a letter that first stands further from the end is no answer
_MEDXPERTQA_NOISE = ("I understand", "A through J", "A through E", "A through D")


def vlmevalkit_match(response: str, options: Mapping[str, str]) -> str | None:
    """The option that VLMEvalKit's exact matching reads; None where it says "Z" (wrong).

    In this order: a refusal; the one option letter that is a token, if it first stands among the
    last four; "answer is X"; the one option whose text the response contains, unless the response
    is over twice as long as all options together. It strips no tags.
    """
    if any(refusal in response for refusal in _REFUSALS):
        return None
    if _API_FAILURE not in response:
        tokens = response.translate(_BLANKED).split()
        named = [letter for letter in options if letter in tokens]
        if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - _TAIL:
            return named[0]
        if not named and "Z" in tokens:
            return None
        verbose = _VERBOSE.search(response)
        if verbose is not None and verbose.group(1).upper() in options:
            return verbose.group(1).upper()
    lower = response.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    contained = [letter for letter, text in options.items() if text.lower() in lower]
    return contained[0] if len(contained) == 1 else None


def medxpertqa_match(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that MedXpertQA's own zero-shot evaluation reads; None where it finds none.

    What stands between the first and second trigger ("Therefore, among A through E, the answer is",
    else " answer is ") if there is one, without the words "A through E"; of it the first option
    letter that is a word, in capitals: an English article "A" is a hit.
    """
    letters = list(options)
    if not letters:
        return None
    trigger = f"Therefore, among {letters[0]} through {letters[-1]}, the answer is"
    for cue in (trigger, " answer is "):
        if cue in response:
            response = response.split(cue)[1]
            break
    for phrase in _MEDXPERTQA_NOISE:
        response = response.replace(phrase, "")
    found = re.search(rf"\b({'|'.join(map(re.escape, letters))})\b", response)
    return None if found is None else found.group(1)
