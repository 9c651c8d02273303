"""Five more questions, of other specialties, with a genuine trace of each guideline in free form."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    question: str
    options: dict[str, str]
    answer: str
    findings: tuple[str, ...] = ()


MOLE = Case(
    "A 47-year-old gardener shows a pigmented lesion on the back that has grown and bled over four "
    "months. It is asymmetric with an irregular border and several colours. There is no itching. "
    "Which diagnosis is most likely?",
    {
        "A": "Seborrhoeic keratosis",
        "B": "Basal cell carcinoma",
        "C": "Melanoma",
        "D": "Dermatofibroma",
        "E": "Haemangioma",
    },
    "C",
    ("atypical pigment network", "blue-white veil"),
)
WEAKNESS = Case(
    "A 33-year-old man develops tingling feet and ascending leg weakness over five days, two weeks "
    "after a bout of diarrhoea. Ankle and knee reflexes are absent. Spinal fluid has a high protein "
    "and few cells. What is the diagnosis?",
    {
        "A": "Guillain-Barr\u00e9 syndrome",
        "B": "Myasthenia gravis",
        "C": "Transverse myelitis",
        "D": "Multiple sclerosis",
        "E": "Hypokalaemic paralysis",
    },
    "A",
)
TODDLER = Case(
    "A 3-year-old boy has had fever for six days. He has red eyes without discharge, cracked lips, a "
    "strawberry tongue, swollen hands and a large cervical lymph node. What is the most likely "
    "diagnosis?",
    {
        "A": "Scarlet fever",
        "B": "Measles",
        "C": "Stevens-Johnson syndrome",
        "D": "Kawasaki disease",
    },
    "D",
)
BELLY = Case(
    "A 52-year-old woman who drinks heavily has severe epigastric pain that bores through to the back "
    "and eases on leaning forward, with vomiting. Lipase is ten times the upper limit and the abdomen "
    "is tender. What explains this picture?",
    {
        "A": "Perforated duodenal ulcer",
        "B": "Acute cholecystitis",
        "C": "Mesenteric ischaemia",
        "D": "Acute pancreatitis",
        "E": "Inferior myocardial infarction",
    },
    "D",
)
FLOATERS = Case(
    "A short-sighted 61-year-old woman sees flashes and floaters and then a curtain across the lower "
    "field of one eye. The eye is painless and white. Ophthalmoscopy shows a billowing grey membrane. "
    "Choose the diagnosis.",
    {
        "A": "Central retinal artery occlusion",
        "B": "Retinal detachment",
        "C": "Vitreous haemorrhage",
        "D": "Acute angle-closure glaucoma",
    },
    "B",
)

IMAGING = {"A": "Ultrasound", "B": "Magnetic resonance imaging", "C": "Computed tomography"}
FILM = {"A": "Pneumonia", "B": "Pneumothorax", "C": "Pleural effusion", "D": "Cardiomegaly"}
# Questions about an image in which no finding stands.
SHORT_STEMS = (
    Case("What abnormality is seen in this chest X-ray?", FILM, "C"),
    Case("Which imaging modality was used to obtain this image?", IMAGING, "B"),
    Case(
        "Which organ system is shown in this part of the body?",
        {"A": "Respiratory", "B": "Urinary", "C": "Nervous"},
        "A",
    ),
    Case("Is there evidence of an abnormality of the lung in the image?", FILM, "A"),
    Case("What imaging technique is used here, and where is the lesion located?", IMAGING, "C"),
)
# The first of them with what its image shows, and traces that argue from that.
SHOWN = dataclasses.replace(
    SHORT_STEMS[0], findings=("blunted costophrenic angle", "meniscus sign", "basal opacity")
)
SHOWN_TRACES = {
    "differential": "The differential includes pneumonia, pleural effusion and pneumothorax. Pneumothorax is "
    "ruled out by the basal opacity, as air would rise to the apex. The blunted costophrenic angle "
    "with a meniscus supports pleural effusion. Therefore the answer is C.",
    "intuitive": "A blunted costophrenic angle with a meniscus at its upper edge and a basal opacity is classic "
    "for pleural effusion. The answer is pleural effusion.",
    "analytic": "A raised hydrostatic pressure in the pleural capillaries leads to fluid between lung and wall. "
    "Gravity draws this fluid down, causing a blunted costophrenic angle. Surface tension of the fluid "
    "results in the meniscus at its edge. Therefore the answer is pleural effusion.",
    "bayesian": "The prior probability of pleural effusion is 20%. The blunted costophrenic angle raises it to "
    "60%. The meniscus with basal opacity raises it to 90%. The posterior probability of pleural "
    "effusion is 90%, so the answer is C.",
}  # fmt: skip

TRACES: dict[str, list[tuple[Case, str]]] = {
    "differential": [
        (
            MOLE,
            "## Differential\n- **Melanoma**\n- Seborrhoeic keratosis\n- Basal cell carcinoma\n\n"
            "A seborrhoeic keratosis looks stuck on and does not explain a blue-white veil. Basal "
            "cell carcinoma is less likely because nothing here is pearly or rolled at its margin. "
            "The irregular border together with bleeding strongly supports melanoma.\n\n"
            "**Conclusion:** the most likely diagnosis is **melanoma** (C).",
        ),
        (
            WEAKNESS,
            "Possible causes of this picture include GBS, myasthenia gravis and transverse myelitis. "
            "Myasthenia gravis is unlikely, as absent reflexes and tingling are foreign to a disorder "
            "of the junction. Transverse myelitis would give a sensory level and brisk jerks. High "
            "protein with few cells after diarrhoea favours Guillain-Barr\u00e9 syndrome. Therefore "
            "the answer is A.",
        ),
        (
            TODDLER,
            "1. Kawasaki disease: six days of fever with a strawberry tongue and swollen hands fit.\n"
            "2. Scarlet fever: less likely, since red eyes and cracked lips are not part of it.\n"
            "3. Measles: unlikely without cough, coryza or Koplik spots.\n"
            "On balance the cervical node and cracked lips also support Kawasaki disease.\n"
            "Final answer is D.",
        ),
        (
            BELLY,
            "The differential includes acute pancreatitis, perforated duodenal ulcer, mesenteric "
            "ischaemia and acute cholecystitis. A perforation would cause a rigid belly and free gas, "
            "so perforated duodenal ulcer is less likely given the relief on leaning forward. Nothing "
            "points to the gallbladder, and acute cholecystitis does not explain pain in the back. The "
            "tenfold lipase and heavy drinking support acute pancreatitis. Best explained by acute "
            "pancreatitis.",
        ),
        (
            FLOATERS,
            "I would consider retinal detachment, vitreous haemorrhage and CRAO.\n* Vitreous "
            "haemorrhage: unlikely, because the grey membrane could be seen at all.\n* CRAO: argues "
            "against it that flashes and floaters came first.\n* Flashes, then a curtain over the "
            "lower field, indicate retinal detachment.\nThus the answer is **B**.",
        ),
    ],
    "intuitive": [
        (
            MOLE,
            "An asymmetric lesion with an irregular border, several colours and a blue-white veil is "
            "characteristic of melanoma. I conclude melanoma.",
        ),
        (
            WEAKNESS,
            "**Pattern:** ascending weakness with absent reflexes after diarrhoea, and a high protein "
            "in the spinal fluid, is the classic picture of Guillain-Barr\u00e9 syndrome.\n\n**Answer: "
            "A**",
        ),
        (
            TODDLER,
            "Prolonged fever, red eyes, cracked lips and a strawberry tongue in a small boy point to "
            "Kawasaki disease. The answer is D.",
        ),
        (
            BELLY,
            "Boring epigastric pain through to the back, eased by leaning forward, plus a very high "
            "lipase in someone who drinks is typical of acute pancreatitis. So the diagnosis is acute "
            "pancreatitis.",
        ),
        (
            FLOATERS,
            "Flashes, floaters and a curtain in a short-sighted eye, with a grey membrane, are "
            "pathognomonic: this picture means retinal detachment. The answer is (B) Retinal "
            "detachment.",
        ),
    ],
    "analytic": [
        (
            MOLE,
            "Ultraviolet light damages the DNA of melanocytes, and mutation of a growth pathway leads "
            "to clonal proliferation. Clones that grow at different speeds result in an asymmetric "
            "lesion with an irregular border. Pigment at several depths of the skin causes several "
            "colours, and the fragile new vessels over the tumour explain why it bled. Therefore the "
            "diagnosis is melanoma.",
        ),
        (
            WEAKNESS,
            "Step 1. Antibodies raised against gut bacteria cross-react with myelin, which leads to "
            "demyelination of the peripheral nerve roots.\nStep 2. Demyelination blocks conduction, "
            "causing ascending weakness and the loss of reflexes.\nStep 3. Because inflamed roots leak "
            "albumin, the spinal fluid protein is high while cells stay few.\nThe mechanism is best "
            "explained by GBS (A).",
        ),
        (
            TODDLER,
            "An unknown trigger activates the immune system of the vessel wall, and cytokines cause "
            "high fever. The same inflammation of small vessels leads to red eyes and cracked lips. "
            "Capillary leak results in swollen hands, and stimulation of lymphocytes produces the "
            "large cervical node. Thus the answer is Kawasaki disease.",
        ),
        (
            BELLY,
            "- Alcohol sensitises the acinar cells, which leads to activation of trypsin inside the "
            "pancreas.\n- Activated enzymes digest the gland, causing inflammation and the epigastric "
            "pain; due to its retroperitoneal place this is felt in the back.\n- Injured cells spill "
            "enzyme into the blood, resulting in a high lipase.\n- Hence the answer is D.",
        ),
        (
            FLOATERS,
            "A long myopic eye puts traction on the thinned periphery, and this traction causes flashes "
            "and a tear. Through the tear fluid from the vitreous enters, which leads to separation of "
            "the retina. The separated retina no longer feeds its photoreceptors, resulting in a "
            "curtain across the field. Therefore the answer is retinal detachment.",
        ),
    ],
    "bayesian": [
        (
            MOLE,
            "**Prior:** in a growing mole the pre-test probability of melanoma is about 10%, that of "
            "seborrhoeic keratosis 50%.\n- The irregular border raises melanoma to 35%.\n- The "
            "blue-white veil raises it to 75% and lowers seborrhoeic keratosis to 10%.\n- It has bled, "
            "which lifts melanoma to 85%.\n**Posterior:** melanoma 85%. The answer is C.",
        ),
        (
            WEAKNESS,
            "Base rate among men with subacute leg weakness: GBS 30%, transverse myelitis 20%. Absent "
            "reflexes increase GBS to 60% and reduce transverse myelitis to 8%. High protein with few "
            "cells increases GBS to 88%. Post-test probability of GBS: 88%. Therefore the answer is A.",
        ),
        (
            TODDLER,
            "I start from a prevalence of Kawasaki disease of 5% in febrile toddlers. Fever for six days "
            "raises it to 20%. Cracked lips and a strawberry tongue (LR about 8) raise it further to "
            "65%. Swollen hands bring Kawasaki disease up to 85%. The posterior probability is 85%, so "
            "the most likely diagnosis is Kawasaki disease.",
        ),
        (
            BELLY,
            "1. Prior probability of acute pancreatitis in a heavy drinker with such pain: 0.30.\n"
            "2. Relief on leaning forward increases it to 0.50.\n"
            "3. A lipase ten times the limit increases it to 0.95.\n"
            "4. The posterior of acute pancreatitis is 0.95.\nThe answer is D.",
        ),
        (
            FLOATERS,
            "Prior for retinal detachment in a short-sighted eye with flashes is 15%, for vitreous "
            "haemorrhage 15%. The curtain raises retinal detachment from 15% to 60%. The billowing grey "
            "membrane increases it to 95% and drops vitreous haemorrhage to 3%. The posterior "
            "probability of retinal detachment is 95%; the answer is B.",
        ),
    ],
}
