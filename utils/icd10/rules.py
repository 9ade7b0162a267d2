"""Coding rules that codes, sex and age can decide, and advice.

Sources: "guide MCO" is ATIH's methodological guide of the PMSI in MCO, which the preparation of stays follows, too;
"volume 1" and "volume 2" are of WHO's ICD-10. The grouping function's lists of codes by sex and age are not public to
us: those of `_TRAITS` are ours, a conservative subset of what the titles of the categories say.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import CODE_PATTERN, ROLES, Cim10Table, chapter
from utils.icd10.people import MALE, parse_age, parse_sex

# DP of chapter XXI that take no DR: suspicion, contact, birth, history.
_WITHOUT_DR = ("Z03", "Z04", "Z20", "Z21", "Z22", "Z380", *(f"Z{number}" for number in range(80, 93)))
_SESSIONS = ("Z491", "Z510", "Z511")
# A code that begins like the first excludes those that begin like the second; `.` is any character.
_EXCLUDED = tuple(
    (re.compile(one), re.compile(other))
    for one, other in (
        ("Z21", "B2[0-4]"),  # infected without disease, HIV disease
        ("I64", "I6[0-3]"),  # stroke of unknown kind, of a known kind
        ("I69", "Z8670"),  # sequelae, history without any
        ("Z43", "Z93"),  # attention to an artificial opening, its mere presence
        ("E440", "E43"),  # moderate, severe malnutrition
        (r"E11\d0", r"E11\d8"),  # guide MCO, type 2 diabetes: the 5th character 0 says insulin, 8 says no insulin
    )
)
_TRAITS_TEXT = {
    # Volume 1: the 83 categories with an asterisk. 1,031 codes of the table of 2019, 950 of them of type 0.
    "asterisk": "D63 D77 E35 E90 F00 F02 G01-G02 G05 G07 G13 G22 G26 G32 G46 G53 G55 G59 G63 G73 G94 G99 H03 H06 H13 "
    "H19 H22 H28 H32 H36 H42 H45 H48 H58 H62 H67 H75 H82 H94 I32 I39 I41 I43 I52 I68 I79 I98 J17 J91 J99 K23 K67 K77 "
    "K87 K93 L14 L45 L54 L62 L86 L99 M01 M03 M07 M09 M14 M36 M49 M63 M68 M73 M82 M90 N08 N16 N22 N29 N33 N37 N51 N74 "
    "N77 P75",
    "disease": "A00-Q99 S00-T98",  # what can be the cause that a dagger marks
    # Ours, after the lists of volume 2 of categories of one sex, without those that are only more frequent in it.
    "female": "A34 B373 C51-C58 C796 D06 D070-D073 D25-D28 D39 E28 E894 F525 F53 I863 L292 M830 N70-N77 N80-N98 "
    "N992-N993 O00-O99 P546 Q50-Q52 R87 S314 S374-S376 T192-T193 T833 Z014 Z124 Z32-Z37 Z39 Z875 Z975",
    "male": "B260 C60-C63 D074-D076 D29 D40 E29 E895 F524 I861 L291 N40-N51 Q53-Q55 R86 S312-S313 Z125",
    "pregnancy": "O00-O99 Z32-Z37 Z39",
    "newborn": "P00-P96 Z38",
    "adult": "F00-F01 F03 G30 N40 N95",  # dementia, prostate, menopause
    # Chapter XX has the circumstances of injuries, poisonings and effects of external agents.
    "injury": "S00-T35 T51-T78",
    "cause": "V01-Y98",
}
_CONTRADICTIONS = (("female", "male"), ("newborn", "adult"), ("newborn", "pregnancy"))
_SYMPTOMS = (  # of chapter XVIII, and diseases of which they are a part; ours
    ("R05", "J00-J22 J40-J47"),  # cough: respiratory infection, COPD, asthma
    ("R060", "I50 J12-J18 J44-J46 J80-J81 J96"),  # dyspnea: heart failure, pneumonia, COPD, respiratory failure
    ("R072-R074", "I20-I22"),  # chest pain: coronary disease
    ("R10", "K35-K37 K56 K80-K81 K85 N20 N23"),  # abdominal pain: appendicitis, ileus, stones, pancreatitis
    ("R11", "A00-A09 K56"),  # nausea: gastroenteritis, ileus
    ("R17", "B15-B19 K70-K74 K80 K83"),  # jaundice: hepatitis, cirrhosis, stones
    ("R30", "N10 N30 N390"),  # painful micturition: urinary infection
    ("R50", "A00-B99 J09-J18 N10 N390"),  # fever: infection
    ("R51", "G43-G44"),  # headache: migraine
    ("R56", "G40-G41"),  # convulsions: epilepsy
    ("R73", "E10-E14"),  # high blood sugar: diabetes
)
# Years, wide enough for what a newborn keeps, early disease and every pregnancy; ours.
_NEWBORN_BELOW, _ADULT_FROM, _PREGNANT = 18, 15, range(9, 66)

Ranges = Sequence[tuple[str, str]]


def _ranges(text: str) -> Ranges:
    """Return the first and last code of each range of `C51-C58 D06`."""
    return tuple((part.split("-")[0], part.split("-")[-1]) for part in text.split())


def _is_in(code: str, ranges: Ranges) -> bool:
    return any(first <= code[: len(first)] <= last for first, last in ranges)


_TRAITS = {name: _ranges(text) for name, text in _TRAITS_TEXT.items()}
_CAUSES_OF = [(_ranges(symptom), _ranges(causes)) for symptom, causes in _SYMPTOMS]


@functools.lru_cache(1 << 16)
def _traits(code: str) -> tuple[str, ...]:
    """Return the traits of a code, "symptom" and "exclusive" among them; a malformed one has none."""
    if not re.fullmatch(CODE_PATTERN, code):
        return ()
    found = [name for name, ranges in _TRAITS.items() if _is_in(code, ranges)]
    found += ["symptom"] if any(_is_in(code, symptom) for symptom, _ in _CAUSES_OF) else []
    found += ["exclusive"] if any(pattern.match(code) for pair in _EXCLUDED for pattern in pair) else []
    return tuple(found)


@functools.lru_cache(1 << 16)
def may_have_dr(dp: str) -> bool:
    """Return whether a stay with this DP can have a DR: only "codes Z" can, and not all of them."""
    return chapter(dp) == "XXI" and not dp.startswith(_WITHOUT_DR)


class Case(NamedTuple):
    """A stay as the rules see it: its codes, by role and by trait, the CIM-10 table, `sex` M or F, `age` in years."""

    codes: frozenset[str]
    of: Mapping[str, frozenset[str]]
    with_trait: Mapping[str, Sequence[str]]
    table: Cim10Table
    sex: str | None
    age: int | None

    @classmethod
    def build(cls, coding: Sequence[Diagnosis], table: Cim10Table, facts: Mapping[str, Any] | None = None) -> "Case":
        """Build the case of a coding and of `sex` and `age`, if facts has them."""
        of = {role: frozenset(item.code for item in coding if item.role == role) for role in ROLES}
        sex, age = (str((facts or {}).get(name, "")) for name in ("sex", "age"))
        codes = frozenset(item.code for item in coding)
        with_trait: dict[str, list[str]] = {}
        for code in sorted(codes):
            for trait in _traits(code):
                with_trait.setdefault(trait, []).append(code)
        return cls(codes, of, with_trait, table, parse_sex(sex) if sex else None, parse_age(age) if age else None)

    def having(self, trait: str) -> Sequence[str]:
        """Return the sorted codes with a trait of `_traits`."""
        return self.with_trait.get(trait, ())


Check = Callable[[Case], Sequence[str] | None]  # the codes that break a rule; None where the rule does not apply


def _dr_without_z(case: Case) -> Sequence[str] | None:
    if not (case.of["DR"] and case.of["DP"]):
        return None
    return [] if any(map(may_have_dr, case.of["DP"])) else sorted(case.of["DR"])


def _dr_is_dp(case: Case) -> Sequence[str] | None:
    return sorted(case.of["DR"] & case.of["DP"]) if case.of["DR"] and case.of["DP"] else None


def _das_is_dp_or_dr(case: Case) -> Sequence[str] | None:
    return sorted(case.of["DAS"] & (case.of["DP"] | case.of["DR"])) if case.of["DAS"] else None


def _session_without_dr(case: Case) -> Sequence[str] | None:
    sessions = sorted(dp for dp in case.of["DP"] if dp.startswith(_SESSIONS))
    return ([] if case.of["DR"] else sessions) if sessions else None


def _parent_and_child(case: Case) -> Sequence[str] | None:
    if not case.codes:
        return None
    found: set[str] = set()
    for code in case.codes:
        if parents := case.codes.intersection(case.table.ancestors(code)):
            found |= {code, *parents}
    return sorted(found)


def _excluded_pair(case: Case) -> Sequence[str] | None:
    found: set[str] = set()
    codes = case.having("exclusive")
    for pair in _EXCLUDED if len(codes) > 1 else ():
        matching = [{code for code in codes if pattern.match(code)} for pattern in pair]
        found.update(*matching if all(matching) else ())
    return sorted(found) if case.codes else None


def _asterisk_without_dagger(case: Case) -> Sequence[str] | None:
    asterisks = case.having("asterisk")
    causes = [code for code in case.having("disease") if code not in asterisks]
    return [code for code in asterisks if not any(map(_dagger_test(code, case.table), causes))] if asterisks else None


def _dagger_test(asterisk: str, table: Cim10Table) -> Callable[[str], bool]:
    """Return whether a code is in the categories that the asterisk code's label names in parentheses, if any."""
    named = [
        (found[1], found[2] or found[1])
        for group in re.findall(r"\([A-Z]\d\d[^)]*\)", table.label(asterisk) or "")
        for found in re.finditer(r"\b([A-Z]\d\d)(?:\.[\d-])?(?:\s*-\s*([A-Z]\d\d))?", group)
    ]
    return lambda code: not named or _is_in(code, named)


def _wrong_sex(case: Case) -> Sequence[str] | None:
    return case.having("female" if case.sex == MALE else "male") if case.sex and case.codes else None


def _wrong_age(case: Case) -> Sequence[str] | None:
    if case.age is None or not case.codes:
        return None
    found = [
        *(case.having("newborn") if case.age >= _NEWBORN_BELOW else ()),
        *(case.having("adult") if case.age < _ADULT_FROM else ()),
        *(case.having("pregnancy") if case.age not in _PREGNANT else ()),
    ]
    return sorted(found)


def _contradiction(case: Case) -> Sequence[str] | None:
    if not case.codes:
        return None
    pairs = [[case.having(trait) for trait in pair] for pair in _CONTRADICTIONS]
    return sorted({code for pair in pairs if all(pair) for codes in pair for code in codes})


def _asterisk_as_dp(case: Case) -> Sequence[str] | None:
    asterisks = case.having("asterisk")
    return [code for code in asterisks if code in case.of["DP"]] if asterisks else None


def _injury_without_cause(case: Case) -> Sequence[str] | None:
    injuries = case.having("injury")
    if not injuries or not case.table.has_external_causes:  # ATIH publishes the table with and without chapter XX
        return None
    return [] if case.having("cause") else injuries


def _symptom_with_cause(case: Case) -> Sequence[str] | None:
    symptoms = case.having("symptom")
    return [code for code in symptoms if _has_cause(code, case.codes)] if symptoms else None


def _has_cause(symptom: str, codes: Collection[str]) -> bool:
    causes = [cause for ranges, causes in _CAUSES_OF if _is_in(symptom, ranges) for cause in causes]
    return any(_is_in(code, causes) for code in codes)


class Rule(NamedTuple):
    """A rule: what breaks it (the plural, for tables of counts), where it is documented, and its function."""

    title: str
    source: str
    check: Check


RULES = {
    "DR_without_Z": Rule("stays with a DR whose DP takes none", "guide MCO, DR, D1 and D2", _dr_without_z),
    "DR_is_DP": Rule("stays whose DR is the DP", "guide MCO, DR", _dr_is_dp),
    "DAS_is_DP_or_DR": Rule("stays with a DAS that is the DP or the DR", "guide MCO, DAS", _das_is_dp_or_dr),
    "session_without_DR": Rule("sessions without a DR", "guide MCO, DR", _session_without_dr),
    "parent_and_child": Rule("stays with a code and its parent", "CIM-10 table", _parent_and_child),
    "excluded_pair": Rule("stays with two codes that exclude each other", "guide MCO, coding", _excluded_pair),
    "asterisk_without_dagger": Rule(
        "stays with an asterisk code without its dagger code", "volume 2, 3.1.3", _asterisk_without_dagger
    ),
    "wrong_sex": Rule("stays with a code of the other sex", "our list, after volume 2", _wrong_sex),
    "wrong_age": Rule("stays with a code of another age", "our list", _wrong_age),
    "contradiction": Rule(
        "stays with codes of both sexes, or of a newborn and an adult", "our lists of sex and age", _contradiction
    ),
}
ADVICE = {
    "asterisk_as_DP": Rule(
        "stays with an asterisk code as DP, right only where care is for the manifestation",
        "volume 2, 3.1.3",
        _asterisk_as_dp,
    ),
    "injury_without_cause": Rule(
        "stays with an injury and no external cause of chapter XX", "volume 2, rules of coding", _injury_without_cause
    ),
    "symptom_with_cause": Rule(
        "stays with a symptom and a disease of which it is a part", "our list, after chapter XVIII", _symptom_with_cause
    ),
}
