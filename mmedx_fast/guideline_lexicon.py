"""The words that the guideline criteria look for, compiled once; all are matched in lower case."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mmedx_fast.guideline_text import content_stems, stem

_DIAGNOSIS_IS = r"(?:answer|(?<!differential )(?<!possible )diagnosis)(?: is|:| must be)"
CONCLUDE = re.compile(
    r"\b(?:most likely|most probable|therefore|thus|hence|best explained by|(?:i|we) conclude"
    rf"|in conclusion|conclusion|{_DIAGNOSIS_IS})"
)
STRONG_CONCLUDE = re.compile(rf"\b(?:therefore|thus|conclude|{_DIAGNOSIS_IS})")
CLAUSE = re.compile(
    r"[,;:]|\b(?P<turn>rather than|instead of|anything but|not|never|hardly|cannot|unlike|over|than"
    r"|isn't|wasn't)\b|\b(?:whereas|while|but|although)\b"
)
TURNED = re.compile(
    r"\b(?:but|however|although|though|yet|while|whereas|would|could|might|alone|also)\b"
)
# What stands before a cue and takes it back: "does not support", "is not at all typical of".
NEGATED = re.compile(
    r"(?:\b(?:not(?! only)|never|hardly|barely|scarcely|rarely|cannot|nor|fails? to|far from"
    r"|anything but)|n't)(?:\s+(?:at all|at|all|really|even|clearly|usually|typically|necessarily|to"
    r"|be|been|being|the|a|an|very|in any way|further|simply))*\s*$"
)
EXCLUDE = re.compile(
    r"\b(?:less (?:likely|probable)|unlikely|against|rul(?:es?|ed|ing)\b(?:\s+\w+){0,5}?\s+out"
    r"|exclud(?:es?|ed|ing)|(?:do|does|did|would|could|can)(?:\s+not|n't) (?:fit|explain|match"
    r"|account|support|cause|give)|in(?:consistent|compatible) with|eliminat(?:es?|ed)"
    r"|would (?:show|cause|give|present|have|need|be))\b"
)
ABSENCE = re.compile(
    r"\b(?:no|without|absence of|absent|lack(?:s|ing)?|missing|neither|normal|clear)\b"
)
REASON = re.compile(r"\b(?:because|since|given|as)\b")
SUPPORT = re.compile(
    r"(?<!not )\b(?:support(?:s|ed|ing)?|favou?r(?:s|ed|ing)?|suggest(?:s|ed|ing|ive)?"
    r"|consistent with|compatible with|point(?:s|ed|ing)? (?:to|toward)|fit(?:s|ting)?|match(?:es)?"
    r"|indicat(?:es?|ing)|typical (?:of|for)|characteristic (?:of|for)|classic(?:al)? (?:of|for)"
    r"|explain(?:s|ed)|mo(?:re|st) likely|seen (?:in|with)|confirm(?:s|ed)?)\b"
)
LIST_CUE = re.compile(
    r"\b(?:differentials?|possib(?:le|ilities)|considerations?|candidates?|consider(?:ed|ing)?"
    r"|(?:could|may|might) be|either|alternatives?|diagnoses|includes?|including)\b"
)
ASSOCIATE = re.compile(
    r"(?<!not )\b(?:suggest(?:s|ed|ing|ive)?|consistent with|compatible with|classic(?:al)? (?:of"
    r"|for|picture)|pathognomonic|characteristic (?:of|for)|typical (?:of|for)|(?:seen|found) (?:in"
    r"|with)|point(?:s|ing)? (?:to|toward)|indicat(?:es?|ing|ive)|hallmarks? of|associated with"
    r"|pattern of|picture of|mean|means|signals?|fit|fits|match|matches)\b"
)
PROBABILITY = re.compile(
    r"%|\b(?:probabilit\w+|prior(?! to\b)|posterior probab\w*|odds|percent|likelihood ratio)\b"
)
CAUSE = re.compile(
    r"\b(?P<back>because(?: of)?|due to|owing to|secondary to|as a result of|(?:caused|produced"
    r"|triggered|driven|explained) by|result(?:s|ed|ing)? from|in response to|aris(?:es?"
    r"|ing) from)\b|\b(?:lead(?:s|ing)? to|led to|result(?:s|ed|ing)? in|caus(?:es?|ed|ing)"
    r"|produc(?:es?|ed|ing)|trigger(?:s|ed|ing)?|induc(?:es?|ed|ing)|provok(?:es?|ed|ing)|thereby"
    r"|so that|explain(?:s|ing)?)\b"
)
NEGATED_CAUSE = re.compile(
    r"(?:\b(?:not|never|hardly|cannot|nor)|n't)\s+(?:lead|result|caus|produc|trigger|induc|provok|explain)"
)
# Prefixes; each counts once. Physiology, biochemistry, tissue and growth, then eye, brain, bone,
# skin.
MECHANISM: tuple[str, ...] = tuple(
    """vessel clon nerve digest inflam isch infarct necro apopto fibro scar occlu obstruct block
    compress stretch perfus
    vasodilat vasoconstrict vascul capillar permeab leak exudat transudat oedema edema congest
    pressure hydrostatic osmo oncotic gradient resistance preload afterload contractil output
    shunt hypox oxygen ventilat alveol surfactant collaps airway bronch mucus secret cilia fluid
    drain outflow lymph thromb embol clot coagul platelet bleed haemorrh hemorrh ruptur tear
    enzyme receptor hormon insulin glucose metabol lipid calcium phosphate potassium sodium acid
    ketone vitamin mineral deficien immun antibod autoimmun complement cytokine neutrophil
    macrophage lymphocyt granuloma bacteria virus viral infect toxin invas infiltrat prolifer
    mitos mutat growth differentiat angiogen metasta malignan cell nuclei keratin
    melanocyt pigment collagen elastin epitheli endotheli membrane barrier neuron axon myelin
    demyelin synap transmitter dopamin cortex cortical tract reflex ventric cerebrospinal csf
    intracranial aqueous trabecul retin optic photoreceptor neovascul osteoblast osteoclast
    osteoid ossif resorp remodel cartilage chondro physis physeal periost callus marrow joint
    synovi tendon degenerat atroph hypertroph hyperplas dysplas regurgit stenos valve conduction
    repolari depolari filtrat glomerul tubul reabsorb peristal motil sphincter bile reflux
    stimul inhibit activat accumulat deposit fail energy shear force load trauma
    damag injur irritat elevation radiat ultraviolet erosi erod traction tension rotat herniat displac expan
    destruct swell mass""".split()
)
MECHANISM_PATTERN = re.compile(r"\b(" + "|".join(sorted(MECHANISM, key=len, reverse=True)) + r")")
_MECHANISM_STEMS = frozenset(stem(word) for word in MECHANISM)
# "the of", "with because", "leads to.": word soup, in which cues, findings and options meet by
# chance.
BROKEN = re.compile(
    r"\b(?:an?|the|of|to|with|at|for|in|due|and|because)\s*[.;]|\b(?:an?|the|of|to|with|at|for"
    r"|due)\s+(?:of|is|because|therefore|raises|lowers|suggests|supports|favours|against)\b"
    r"|\b(?:an?|the)\s+(?:to|and|with|in|at|for)\b|\b(?:of|with|for)\s+(?:to|and)\b"
)
# Pairs that no sentence has even once: the stem's words filled into a template.
SHATTERED = re.compile(
    r"\bthe\s+(?:an?|no|the|to|and|or|with|from|on|by|he|she|his|her|it|its|this|that|these|there|what"
    r"|which|are|was|were|has|had|have|does|did|since|until|into|after|also)\b(?!-)"
    r"|\b(?:in|to|of|with|without)\s+(?:are|is|has|was|were|have|had|of|and|does)\b(?!-)"
    r"|\bthe (?:most|more) (?:likely|probable) (?:with|and|of|supports?|raises|is less)\b"
    r"|\b(?:an?|the) [a-z-]+ (?:an?|the|his|her|and with|with an?d?|of with|to with)\s+(?:supports?|raises|lowers)\b"
)
# A sentence's first word in the middle of another: pieces of the stem put together.
SPLICED = re.compile(r"[a-z,] +(?:The|There|This|His|Her|He|She|It|What|Which|Choose)\b")
CUE_STEMS = content_stems(
    "makes making made rules ruled against argues argue excludes excluded fits fit explains "
    "explained differential supports favours favors suggests consistent therefore because leads "
    "leading results resulting causes causing caused produces triggers response conclude concluded "
    "conclusion unlikely absence lacks lacking missing clear would does points raises lowers"
)


def mechanisms(stems: Iterable[str]) -> set[str]:
    """Those of the stems that are of a mechanism; stemming has cut some below their prefix
    ("cytokin", "compres")."""
    return {word for word in stems if word in _MECHANISM_STEMS or MECHANISM_PATTERN.match(word)}


def affirmed(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The first match of a cue that nothing before it takes back."""
    for match in pattern.finditer(text):
        if not NEGATED.search(text, max(0, match.start() - 40), match.start()):
            return match
    return None
