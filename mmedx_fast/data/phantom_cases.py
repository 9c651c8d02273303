"""The rule book of the phantom clinic: findings, clues, diagnoses, and which pair means which diagnosis.

THE RULES ARE INVENTED. They use clinical words so that prompts and traces read like the real thing, but what
links them to a diagnosis is a made-up point score, not medicine: finding and clue count 0 to 3 points each,
and their sum, the score, decides. The base model knows the points; what a score means in a specialty is what its
expert learns.

    score       0  1  2  3  4  5  6
    diagnosis   0  0  1  2  3  4  4

Every finding and every clue meets several diagnoses, so that the best guess from either alone is right in 37.5 %
of the cells (two of the four rows in half of theirs, the other two in a quarter).
"""

from __future__ import annotations

import dataclasses

DIAGNOSIS_OF_SCORE = (0, 0, 1, 2, 3, 4, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """A finding or a clue: its short name, wordings for the vignette, and a mechanism for traces.

    ``link`` joins name and mechanism into a causal sentence ("... is due to ...", "... leads to ...").
    """

    name: str
    wordings: tuple[str, ...]
    mechanism: str
    link: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clinic:
    specialty: str
    image: str
    ages: tuple[int, int]
    findings: tuple[Term, ...]
    clues: tuple[Term, ...]
    diagnoses: tuple[str, ...]
    finding_points: tuple[int, ...]
    clue_points: tuple[int, ...]

    def score(self, finding: int, clue: int) -> int:
        return self.finding_points[finding] + self.clue_points[clue]

    def diagnosis(self, finding: int, clue: int) -> str:
        return self.diagnoses[DIAGNOSIS_OF_SCORE[self.score(finding, clue)]]


def _finding(name: str, mechanism: str) -> Term:
    return Term(name=name, wordings=(), mechanism=mechanism, link="is due to")


def _clue(name: str, link: str, mechanism: str, wording: str) -> Term:
    return Term(name=name, wordings=(name, wording), mechanism=mechanism, link=link)


CLINICS: dict[str, Clinic] = {
    clinic.specialty: clinic
    for clinic in (
        Clinic(
            specialty="adult_medicine",
            image="chest film",
            ages=(24, 84),
            findings=(
                _finding("lobar opacity", "alveolar exudate"),
                _finding("blunted costophrenic angle", "pleural fluid leak"),
                _finding("enlarged heart shadow", "ventricular dilatation"),
                _finding("apical cavity", "granuloma necrosis"),
            ),
            clues=(
                _clue("fever and cough", "are due to", "inflammation", "cough with fever"),
                _clue(
                    "leg swelling and orthopnea",
                    "are due to",
                    "venous congestion",
                    "orthopnea with leg swelling",
                ),
                _clue(
                    "pleuritic pain after a flight",
                    "is due to",
                    "vascular occlusion",
                    "after a flight pleuritic pain",
                ),
                _clue(
                    "weight loss and night sweats",
                    "are due to",
                    "cytokine release",
                    "night sweats with weight loss",
                ),
            ),
            diagnoses=(
                "pneumonia",
                "heart failure",
                "tuberculosis",
                "pulmonary embolism",
                "pericarditis",
            ),
            finding_points=(1, 2, 3, 0),
            clue_points=(0, 3, 2, 1),
        ),
        Clinic(
            specialty="pediatrics",
            image="bone film",
            ages=(2, 14),
            findings=(
                _finding("widened growth plate", "defective mineralization"),
                _finding("frayed metaphysis", "collagen weakness"),
                _finding("periosteal line", "periosteal elevation"),
                _finding("buckled cortex", "cortical compression"),
            ),
            clues=(
                _clue(
                    "bowed legs and late walking",
                    "are due to",
                    "calcium deficiency",
                    "late walking with bowed legs",
                ),
                _clue(
                    "wrist pain after a fall", "is due to", "shear force", "after a fall wrist pain"
                ),
                _clue(
                    "fever and refusal to walk",
                    "are due to",
                    "bone infection",
                    "refusal to walk with fever",
                ),
                _clue(
                    "bleeding gums and bruises",
                    "are due to",
                    "capillary fragility",
                    "bruises with bleeding gums",
                ),
            ),
            diagnoses=("rickets", "torus fracture", "osteomyelitis", "scurvy", "leukemia"),
            finding_points=(0, 1, 3, 2),
            clue_points=(0, 1, 2, 3),
        ),
        Clinic(
            specialty="brain_senses",
            image="brain scan",
            ages=(20, 88),
            findings=(
                _finding("bright crescent", "venous bleeding"),
                _finding("dark wedge", "arterial ischemia"),
                _finding("wide ventricles", "fluid retention"),
                _finding("ring lesion", "barrier disruption"),
            ),
            clues=(
                _clue(
                    "sudden arm weakness",
                    "is due to",
                    "arterial occlusion",
                    "arm weakness of sudden onset",
                ),
                _clue(
                    "headache after a fall", "is due to", "vein rupture", "after a fall headache"
                ),
                _clue(
                    "fever and confusion",
                    "are due to",
                    "cerebral inflammation",
                    "confusion with fever",
                ),
                _clue(
                    "unsteady gait and incontinence",
                    "are due to",
                    "white matter stretch",
                    "incontinence with unsteady gait",
                ),
            ),
            diagnoses=(
                "stroke",
                "subdural hematoma",
                "brain abscess",
                "hydrocephalus",
                "glioblastoma",
            ),
            finding_points=(1, 0, 3, 2),
            clue_points=(0, 1, 2, 3),
        ),
        Clinic(
            specialty="oncology_surgery",
            image="skin photograph",
            ages=(32, 86),
            findings=(
                _finding("dark patch", "melanocyte proliferation"),
                _finding("pearly nodule", "basal cell proliferation"),
                _finding("scaly plaque", "abnormal keratinization"),
                _finding("crusted ulcer", "epithelial necrosis"),
            ),
            clues=(
                _clue(
                    "rapid growth within months",
                    "is due to",
                    "clonal growth",
                    "within months rapid growth",
                ),
                _clue(
                    "years of outdoor work",
                    "lead to",
                    "ultraviolet damage",
                    "outdoor work for years",
                ),
                _clue(
                    "kidney transplant",
                    "leads to",
                    "immune suppression",
                    "transplant of the kidney",
                ),
                _clue("old burn scar", "leads to", "chronic irritation", "burn scar from old days"),
            ),
            diagnoses=(
                "melanoma",
                "basal cell carcinoma",
                "squamous cell carcinoma",
                "actinic keratosis",
                "lymphoma",
            ),
            finding_points=(0, 1, 2, 3),
            clue_points=(0, 1, 3, 2),
        ),
    )
}

# Context that carries no information about the diagnosis.
CONTEXTS: tuple[str, ...] = (
    "Blood pressure is normal",
    "There is no known allergy",
    "The pulse is regular",
    "The family history is unremarkable",
    "No medicine is taken",
    "The abdomen is soft",
)
