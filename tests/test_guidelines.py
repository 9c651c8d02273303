"""Adherence: genuine traces score on their own guideline, and no cheap text scores on any."""

import cProfile
import dataclasses
import pstats
import random

import pytest

from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.guidelines import GUIDELINES, adherence, adherence_all


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    question: str
    options: dict[str, str]
    answer: str
    findings: tuple[str, ...] = ()


CHEST = Case(
    "A 61-year-old man has sudden pleuritic chest pain and dyspnoea five days after a knee "
    "replacement. "
    "His calf is swollen, the heart rate is 118/min and the lungs are clear on auscultation. "
    "What is the most likely diagnosis?",
    {
        "A": "Pneumonia",
        "B": "Pulmonary embolism",
        "C": "Myocardial infarction",
        "D": "Pneumothorax",
        "E": "Aortic dissection",
    },
    "B",
)
CHILD = Case(
    "A 6-year-old girl limps after a fall. There is tenderness at the distal tibia and fever. "
    "The film is shown.",
    {
        "A": "Salter-Harris fracture",
        "B": "Osteomyelitis",
        "C": "Ewing sarcoma",
        "D": "Rickets",
        "E": "Bone cyst",
    },
    "B",
    ("periosteal reaction", "metaphyseal lucency"),
)
HEADACHE = Case(
    "A 58-year-old woman has eye pain, headache and nausea since an evening at the cinema. The "
    "pupil is "
    "mid-dilated and the cornea is hazy. Which diagnosis fits best?",
    {
        "A": "Migraine",
        "B": "Acute angle-closure glaucoma",
        "C": "Anterior uveitis",
        "D": "Optic neuritis",
    },
    "B",
)

GENUINE = {
    "differential": [
        (
            CHEST,
            "The differential includes pneumonia, pulmonary embolism, pneumothorax and myocardial "
            "infarction. "
            "Clear lungs make pneumonia and pneumothorax less likely. Nothing here radiates or "
            "presses, which "
            "argues against myocardial infarction, and the pain is pleuritic. A swollen calf after "
            "a recent knee "
            "replacement supports pulmonary embolism. The most likely diagnosis is pulmonary "
            "embolism.",
        ),
        (
            CHILD,
            "Possible diagnoses are osteomyelitis, Ewing sarcoma and rickets. Rickets is unlikely "
            "without "
            "cupping. Fever and periosteal reaction favour osteomyelitis. Therefore the answer is "
            "osteomyelitis.",
        ),
        (
            HEADACHE,
            "I would consider these causes:\n1. Migraine\n2. Acute angle-closure glaucoma\n3. "
            "Anterior uveitis\n"
            "Migraine does not explain a hazy cornea, so it is ruled out. Uveitis would give a "
            "small pupil "
            "rather than a wide one, and anterior uveitis is therefore less likely. The "
            "mid-dilated pupil with "
            "headache points to acute angle-closure glaucoma. The best answer is B.",
        ),
        (
            CHEST,
            "Candidates: pneumonia, pulmonary embolism, aortic dissection. Pneumonia is unlikely "
            "with clear "
            "lungs. The swollen calf supports pulmonary embolism. The answer is pulmonary "
            "embolism.",
        ),
    ],
    "intuitive": [
        (
            CHEST,
            "Sudden pleuritic pain, dyspnoea and a swollen calf soon after knee surgery are "
            "classic for "
            "pulmonary embolism. The answer is B.",
        ),
        (
            CHILD,
            "Fever with tenderness and a periosteal reaction in a limping child is typical of "
            "osteomyelitis. "
            "So the answer is osteomyelitis.",
        ),
        (
            HEADACHE,
            "I recognise this picture at once. Eye pain with a mid-dilated pupil and a hazy cornea "
            "suggests "
            "acute angle-closure glaucoma. That is the most likely diagnosis: acute angle-closure "
            "glaucoma.",
        ),
    ],
    "analytic": [
        (
            CHEST,
            "Immobility after the knee replacement slows venous flow, which leads to a thrombus "
            "and a swollen "
            "calf. A piece of this thrombus breaks off and obstructs the pulmonary arteries, "
            "causing dead space "
            "and dyspnoea. Dyspnoea and the fast heart rate therefore result from ventilation "
            "without "
            "perfusion, while the airways stay dry and the lungs clear. The whole chain is best "
            "explained by "
            "pulmonary embolism.",
        ),
        (
            CHILD,
            "Bacteria settle in the slow metaphyseal vessels and trigger inflammation. The "
            "inflammation causes "
            "fever and pus, and pus lifting the periosteum leads to a periosteal reaction. "
            "Therefore the answer "
            "is osteomyelitis.",
        ),
        (
            HEADACHE,
            "In the dark the pupil widens and the iris blocks the drainage of aqueous, which leads "
            "to a rise of "
            "pressure. The high pressure forces fluid into the cornea, resulting in a hazy cornea. "
            "Stretching "
            "of the eye wall causes pain and reflex nausea. Thus the answer is B.",
        ),
    ],
    "bayesian": [
        (
            CHEST,
            "The prior probability of pulmonary embolism after joint surgery is about 15%. A "
            "swollen calf "
            "raises it to 50%. Pleuritic pain with clear lungs raises it further to 80%. The "
            "posterior "
            "probability of pulmonary embolism is 80%, so the answer is B.",
        ),
        (
            CHILD,
            "Prior: osteomyelitis 30%, Ewing sarcoma 20%. Fever raises osteomyelitis to 60% and "
            "lowers Ewing "
            "sarcoma to 10%. The metaphyseal lucency raises osteomyelitis to 85%. With a posterior "
            "of 85% the "
            "answer is osteomyelitis.",
        ),
        (
            HEADACHE,
            "Before the examination the base rate of acute angle-closure glaucoma in such headache "
            "is 0.1, and "
            "that of migraine 0.6. The hazy cornea lowers migraine from 0.6 to 0.1. It increases "
            "acute "
            "angle-closure glaucoma to 0.6, and the mid-dilated pupil with eye pain increases "
            "acute "
            "angle-closure glaucoma to 0.88. The post-test probability of acute angle-closure "
            "glaucoma is 0.88. "
            "Acute angle-closure glaucoma is the most likely diagnosis.",
        ),
    ],
}
FLAT = [(name, case, text) for name, pairs in GENUINE.items() for case, text in pairs]


def scores(case: Case, text: str, answer: str | None = "own") -> dict[str, float]:
    answer = case.answer if answer == "own" else answer
    judged = adherence_all(
        text, question=case.question, options=case.options, answer=answer, findings=case.findings
    )
    return {name: result.score for name, result in judged.items()}


def assert_worthless(case: Case, text: str, answer: str | None = "own") -> None:
    got = scores(case, text, answer)
    assert max(got.values()) < 0.35, (got, text)


@pytest.mark.parametrize(("name", "case", "text"), FLAT)
def test_genuine_traces_score_on_their_own_guideline_above_all_others(
    name: str, case: Case, text: str
) -> None:
    got = scores(case, text)
    detail = adherence(
        text, name, question=case.question, options=case.options, answer=case.answer,
        findings=case.findings,
    )  # fmt: skip
    assert got[name] >= 0.85, detail
    assert all(got[other] < got[name] - 0.3 for other in GUIDELINE_NAMES if other != name), got
    assert detail.score == got[name]


@pytest.mark.parametrize("name", GUIDELINE_NAMES)
def test_a_short_trace_can_reach_one(name: str) -> None:
    short = [(c, t) for c, t in GENUINE[name] if 20 <= len(t.split()) <= 50]
    assert short and any(scores(case, text)[name] == 1.0 for case, text in short)


@pytest.mark.parametrize(("name", "case", "text"), FLAT)
def test_contradiction_with_the_answer_is_worthless(name: str, case: Case, text: str) -> None:
    for letter in case.options:
        if letter != case.answer:
            assert_worthless(case, text, letter)
    assert_worthless(case, text, None)
    other = next(letter for letter in case.options if letter != case.answer)
    assert_worthless(case, f"{text} But in the end the answer is {case.options[other]}.")


def test_conclusions_on_the_way_must_not_contradict() -> None:
    case, text = GENUINE["differential"][3]
    assert_worthless(case, f"The answer is pneumonia. {text}")
    assert_worthless(case, f"{text} Thus the diagnosis is pneumothorax.")
    listed = text.replace("Candidates: ", "The differential diagnosis is ")
    assert scores(case, listed)["differential"] == 1.0
    rejected = text.replace("Pneumonia is unlikely", "Pneumonia is therefore unlikely")
    assert scores(case, rejected)["differential"] == 1.0
    turned = text.replace(
        "The answer is pulmonary", "The answer is, rather than pneumonia, pulmonary"
    )
    assert scores(case, turned)["differential"] == 1.0


def test_the_answer_may_be_given_as_text() -> None:
    for _name, case, text in FLAT:
        assert scores(case, text) == scores(case, text, case.options[case.answer])


@pytest.mark.parametrize("case", [CHEST, CHILD, HEADACHE])
def test_empty_short_and_copied_texts_are_worthless(case: Case) -> None:
    right = case.options[case.answer]
    options = " ".join(f"{letter}. {text}" for letter, text in case.options.items())
    for text in (
        "",
        "   \n",
        f"The answer is {right}.",
        case.question,
        f"{case.question} {options}",
        f"{case.question} Therefore the answer is {right}.",
        f"{case.question} {options} The most likely diagnosis is {right}.",
        f"The answer is {right}. " * 12,
    ):
        assert_worthless(case, text)


STUFFED = [
    "prior probability posterior probability 5% 10% 20% because suggests {right}",
    "Differential diagnosis, less likely, ruled out, supports, favours. Because, leads to, results "
    "in, due to, "
    "causes. Prior probability 5%, 10%, posterior 20%. Therefore the answer is {right}.",
    "Differential: {all}. Less likely. Ruled out. Argues against. Supports. Therefore the answer "
    "is {right}.",
    "Because of this and due to that, it leads to something. It results in inflammation, "
    "obstruction and "
    "pressure because of the mechanism. Therefore the answer is {right}.",
    "Inflammation ischaemia obstruction pressure hypoxia. Because leads to results in due to "
    "causing. "
    "The answer is {right}.",
    "The findings are classic for the disease, consistent with it and suggest it strongly. It is "
    "characteristic and pathognomonic. The answer is {right}.",
    "The prior probability is 10%. The first finding raises it to 40%. The second finding raises "
    "it to 90%. "
    "The posterior probability is 90%, so the answer is {right}.",
    "The prior probability of {right} is 10%. It raises to 40%. It increases to 90%. The posterior "
    "probability "
    "of {right} is 90%, so the answer is {right}.",
    "The differential diagnosis is wide and we must consider all of it. Each one is possible, but "
    "one of them "
    "is better than the others. Therefore the answer is {right}.",
]


@pytest.mark.parametrize("case", [CHEST, CHILD, HEADACHE])
@pytest.mark.parametrize("template", STUFFED)
def test_keyword_lists_are_worthless(case: Case, template: str) -> None:
    names = ", ".join(case.options.values())
    assert_worthless(case, template.format(right=case.options[case.answer], all=names))


def test_word_soup_of_cues_findings_and_options_is_worthless() -> None:
    rng = random.Random(0)
    cues = (
        "differential possible consider less likely ruled out against supports favours suggests "
        "classic for "
        "consistent with because leads to results in due to causing inflammation pressure "
        "obstruction prior "
        "probability posterior raises lowers 10% 30% 60% 90% therefore the of is a and it"
    ).split()
    high = 0
    for _ in range(400):
        case = rng.choice([CHEST, CHILD, HEADACHE])
        pool = cues + case.question.rstrip(".?").split() + list(case.options.values()) * 3
        body = ". ".join(" ".join(rng.choices(pool, k=rng.randint(5, 14))) for _ in range(4))
        text = f"{body}. Therefore the answer is {case.options[case.answer]}."
        high += max(scores(case, text).values()) >= 0.35
    assert high <= 4  # a soup can be a sentence by chance, but not for a policy to find and live on


@pytest.mark.parametrize("case", [CHEST, CHILD, HEADACHE])
def test_all_paradigms_at_once_are_worthless(case: Case) -> None:
    parts = [next(text for c, text in GENUINE[name] if c is case) for name in GUIDELINE_NAMES]
    for order in (parts, parts[::-1], parts[2:] + parts[:2]):
        assert_worthless(case, " ".join(order))
    right, other, third = "BAC" if case is not CHILD else "BCD"
    finding = {CHEST: "swollen calf", CHILD: "fever", HEADACHE: "hazy cornea"}[case]
    second = {CHEST: "dyspnoea", CHILD: "tenderness", HEADACHE: "headache"}[case]
    texts = case.options
    assert_worthless(
        case,
        f"The differential is {texts[right]}, {texts[other]} and {texts[third]}. {texts[other]} is "
        f"less likely "
        f"without further signs. The {finding} with {second} suggests {texts[right]}. Obstruction "
        f"causes "
        f"pressure, which leads to {finding}. The prior probability of {texts[right]} is 30%. The "
        f"{finding} "
        f"raises it to 60% and the posterior is 80%. Therefore the answer is {texts[right]}.",
    )


@pytest.mark.parametrize(
    "numbers",
    [
        (50, 30, 20, 20),  # "raises" to less
        (20, 20, 20, 20),  # nothing moves
        (20, 150, 200, 200),  # beyond 100 %
        (20, 50, 40, 40),  # the second one falls
        (20, 50, 80, 30),  # the posterior turns back
        (-10, 50, 80, 80),
        (80, 60, 90, 90),
    ],
)
def test_wrong_numbers_in_the_right_order_are_worthless(numbers: tuple[int, ...]) -> None:
    template = (
        "The prior probability of pulmonary embolism is {}%. The swollen calf raises it to {}%. "
        "Pleuritic pain "
        "raises it to {}%. The posterior probability of pulmonary embolism is {}%, so the answer "
        "is B."
    )
    assert scores(CHEST, template.format(20, 50, 80, 80))["bayesian"] == 1.0
    result = adherence(
        template.format(*numbers),
        "bayesian",
        question=CHEST.question,
        options=CHEST.options,
        answer="B",
    )
    assert not result.criteria["B3_numbers"] and result.score < 0.35
    assert_worthless(CHEST, template.format(*numbers))


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "The prior probability of pulmonary embolism is 20% and of pneumonia 60%. The swollen "
            "calf raises "
            "pulmonary embolism to 40%. Dyspnoea raises pulmonary embolism to 50%. The posterior "
            "of pulmonary "
            "embolism is 50%, so the answer is B.",
            "B6_highest",
        ),
        (
            "The prior probability of pulmonary embolism is 60% and of pneumonia 50%. The swollen "
            "calf raises "
            "pulmonary embolism to 70%. Dyspnoea raises pulmonary embolism to 90%. The posterior "
            "of pulmonary "
            "embolism is 90%, so the answer is B.",
            "B5_sums",
        ),
        (
            "The prior probability of pulmonary embolism is 20%. The swollen calf raises it from "
            "30% to 50%. "
            "Dyspnoea raises it to 90%. The posterior of pulmonary embolism is 90%, so the answer "
            "is B.",
            "B3_numbers",
        ),
        (
            "The prior probability of pulmonary embolism is 20%. The swollen calf raises it to "
            "50%. A swollen "
            "calf raises it to 90%. The posterior of pulmonary embolism is 90%, so the answer is "
            "B.",
            "B2_updates",
        ),
        (
            "The prior probability of pulmonary embolism is 20%. The swollen calf raises it to "
            "50%. Dyspnoea "
            "raises it to 90%. This is high enough, so the answer is B.",
            "B4_posterior",
        ),
    ],
)
def test_bayesian_criteria_one_by_one(text: str, lost: str) -> None:
    result = adherence(text, "bayesian", question=CHEST.question, options=CHEST.options, answer="B")
    assert [name for name, met in result.criteria.items() if not met] == [lost]


@pytest.mark.parametrize(
    "verb",
    "raises elevates bumps pushes takes drives sends adjusts moves shifts updates brings".split(),
)
def test_a_probability_moves_by_any_verb(verb: str) -> None:
    text = (
        "The prior probability of pulmonary embolism is 20%. The swollen calf {0} it to {1}%. "
        "Pleuritic pain {0} it to 80%. The posterior probability of pulmonary embolism is 80%, so the "
        "answer is B."
    )
    assert scores(CHEST, text.format(verb, 50))["bayesian"] == 1.0
    assert scores(CHEST, text.format(verb, 20))["bayesian"] < 0.35  # it did not move
    falls = scores(CHEST, text.format(verb, 10))["bayesian"]
    assert (falls < 0.35) == (verb in ("raises", "elevates", "bumps")), falls


def test_order_matters_in_a_differential() -> None:
    case, text = GENUINE["differential"][3]
    first, *middle, last = text.rstrip(".").split(". ")
    assert scores(case, text)["differential"] == 1.0
    late = ". ".join([*middle, first, last]) + "."
    assert scores(case, late)["differential"] < 0.35


def test_gates_by_name() -> None:
    case, text = GENUINE["intuitive"][0]

    def failed(text: str) -> set[str]:
        gates = adherence(
            text, "intuitive", question=case.question, options=case.options, answer=case.answer
        ).gates
        return {name for name, open_ in gates.items() if not open_}

    assert failed(text) == set()
    assert "length" in failed("The answer is B. It is so.")
    assert "length" in failed(text + " Other things were weighed too, though, at length." * 80)
    assert "sentences" in failed(text.replace(". The answer", ", so the answer"))
    assert "repeats" in failed("It may well be so.\n" * 3 + text)
    assert "diversity" in failed("so it is and " * 60 + text)
    assert "named" in failed(text.replace("B.", "clear."))
    assert failed(text.replace("The answer is B", "The answer is D")) == {"agrees"}
    assert "findings" in failed(
        "Something in this whole story is quite typical of pulmonary embolism to me. The answer is "
        "B."
    )


def test_open_questions_are_judged_by_the_answer_text() -> None:
    case, text = GENUINE["intuitive"][1]
    result = adherence(
        text, "intuitive", question=case.question, options=None, answer="Osteomyelitis",
        findings=case.findings,
    )  # fmt: skip
    assert result.score == 1.0
    wrong = adherence(text, "intuitive", question=case.question, options=None, answer="Gout")
    assert wrong.score == 0.0


def test_long_option_texts_may_be_paraphrased() -> None:
    options = {
        "A": "Start intravenous heparin infusion immediately",
        "B": "Arrange elective coronary angiography next month",
        "C": "Give oral amoxicillin for seven days",
    }
    text = (
        "Pleuritic pain with dyspnoea and a swollen calf fits treatment at once, so immediately "
        "start a heparin "
        "infusion. Therefore the answer is to start intravenous heparin now."
    )
    result = adherence(text, "intuitive", question=CHEST.question, options=options, answer="A")
    assert result.score == 1.0, result


def test_unknown_guideline_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'frequentist'.*bayesian"):
        adherence("x", "frequentist", question="", options=None, answer=None)


def test_instructions_are_short_and_part_at_the_first_word() -> None:
    assert tuple(GUIDELINES) == GUIDELINE_NAMES
    texts = [guideline.instruction for guideline in GUIDELINES.values()]
    assert len({text.split()[0] for text in texts}) == len(texts)
    assert all(len(text.split()) <= 25 and "\n" not in text for text in texts)


FREE_FORM = [
    (
        "differential",
        "**Differential Diagnosis:**\n1. **Pulmonary embolism** - sudden pleuritic pain, dyspnoea "
        "and a "
        "swollen calf support this.\n2. **Pneumonia** - less likely because the lungs are clear.\n"
        "3. **Pneumothorax** - unlikely given clear auscultation.\n\n**Conclusion:** The most "
        "likely "
        "diagnosis is **B. Pulmonary embolism**.",
    ),
    (
        "differential",
        "The patient presents with pleuritic chest pain five days after a knee replacement. The "
        "differential diagnosis includes pulmonary embolism, pneumonia, pneumothorax, and "
        "myocardial "
        "infarction. Pneumonia is less likely because there is no fever and the lungs are clear. "
        "Pneumothorax would cause reduced breath sounds. The swollen calf and recent surgery "
        "strongly "
        "suggest a deep vein thrombosis with pulmonary embolism. Therefore, the correct answer is "
        "(B) "
        "Pulmonary embolism.",
    ),
    (
        "bayesian",
        "Given recent knee surgery, the pre-test probability of pulmonary embolism is "
        "approximately "
        "20-30%, compared with 10% for pneumonia. The swollen calf increases the probability of "
        "pulmonary embolism to about 60%. Clear lungs on auscultation reduce the probability of "
        "pneumonia "
        "to 3% and raise pulmonary embolism to 75%. The heart rate of 118 further increases it to "
        "85%. "
        "Thus the posterior probability of pulmonary embolism is approximately 85%, making it the "
        "most "
        "likely diagnosis. Answer: B.",
    ),
    (
        "bayesian",
        "Prior probability of PE: 20%. A swollen calf (LR 4) updates pulmonary embolism to 50%. "
        "Pleuritic "
        "chest pain (LR 3) updates this to 75%. Posterior probability: 75%. The answer is B.",
    ),
    (
        "analytic",
        "After knee replacement, venous stasis and endothelial injury lead to thrombus formation "
        "in the "
        "deep veins, which explains the swollen calf. The thrombus embolizes to the pulmonary "
        "arteries, "
        "causing ventilation-perfusion mismatch and dyspnoea. Infarction of the pleura results in "
        "pleuritic "
        "pain. Therefore the answer is B.",
    ),
]


@pytest.mark.parametrize(("name", "text"), FREE_FORM)
def test_free_form_model_output_is_read(name: str, text: str) -> None:
    got = scores(CHEST, text)
    assert got[name] == 1.0 and all(got[n] < 0.35 for n in GUIDELINE_NAMES if n != name), got


def test_any_text_gets_a_score_between_zero_and_one() -> None:
    rng = random.Random(3)
    alphabet = [
        *" \n.,:;()*%[]{}\\0123456789ABab\u0130\u00df\u7b54\u2013",
        " is ",
        " prior ",
        " 5%",
    ]
    alphabet += [
        " therefore the answer is ",
        " because ",
        "1. ",
        " from ",
        " by ",
        " (A) ",
        " not ",
    ]
    for _ in range(120):
        text, stem, *options = (
            "".join(rng.choices(alphabet, k=rng.randint(0, 60))) for _ in range(5)
        )
        named = dict(zip("ABC", options, strict=True))
        for given in (named, None):
            for result in adherence_all(text, question=stem, options=given, answer="A").values():
                assert 0.0 <= result.score <= 1.0


def test_a_text_costs_few_calls() -> None:
    # Counted, not timed, so that another load cannot fail it: 580 calls a text are about 0.8 ms.
    texts = [FLAT[i % len(FLAT)] for i in range(200)]
    with cProfile.Profile() as profile:
        for name, case, text in texts:
            adherence(
                text, name, question=case.question, options=case.options, answer=case.answer,
                findings=case.findings,
            )  # fmt: skip
    calls: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    assert calls < 800 * len(texts)
