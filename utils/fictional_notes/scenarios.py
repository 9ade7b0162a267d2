"""Fictional hospital stays: patient, length of stay, and the codes that a medical coder would keep."""

import random
from dataclasses import dataclass

from utils.fictional_notes.catalogue import Catalogue, Condition
from utils.icd10.answers import Diagnosis

MAX_DAS = 7
# Relative frequencies of 0, 1, ... 7 associated diagnoses.
_DAS_COUNTS = (10, 16, 20, 18, 14, 10, 7, 5)
# Fraction of the stays for cancer that are for a session (chemotherapy...) rather than for the cancer itself.
_SESSION_SHARE = 0.6
# With a table, fraction of the stays whose main diagnosis is known by its label only.
_OTHERS_SHARE = 0.3
# Added to the frequency of diagnoses that are associated with the main or the related one.
_ASSOCIATED_BONUS = 30


@dataclass(frozen=True)
class FictionalStay:
    """A stay; `days` is 0 if the patient is discharged on the day of admission."""

    sex: str
    age: int
    days: int
    dp: Condition
    dr: Condition | None
    das: tuple[Condition, ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All coded diagnoses: DP, DR, DAS."""
        return (*self.reasons, *self.das)

    @property
    def reasons(self) -> tuple[Condition, ...]:
        """The reasons for admission: DP and DR."""
        return (self.dp,) if self.dr is None else (self.dp, self.dr)

    def diagnoses(self) -> list[Diagnosis]:
        """Return the codes with roles and labels."""
        roles = ["DP", "DR"][: len(self.reasons)] + ["DAS"] * len(self.das)
        return [Diagnosis(role, item.code, item.label) for role, item in zip(roles, self.conditions)]


def sample_stay(rng: random.Random, catalogue: Catalogue, max_das: int = MAX_DAS) -> FictionalStay:
    """Draw a plausible stay: frequent main diagnoses, sessions for cancers, DAS that fit sex, age and reason."""
    reasons = _reasons(rng, catalogue)
    sex = rng.choice(min((reason.sex for reason in reasons), key=len))
    age = rng.randint(max(reason.age[0] for reason in reasons), min(reason.age[1] for reason in reasons))
    count = rng.choices(range(max_das + 1), _DAS_COUNTS[: max_das + 1])[0]
    das = _associated(rng, catalogue, reasons, sex, age, count)
    days = rng.randint(*reasons[0].stay)
    if days > 1:  # complications lengthen a stay, but neither a session nor day surgery
        days += sum(rng.randint(0, 2) for item in das if item.kind != "chronic")
    return FictionalStay(sex, age, days, reasons[0], reasons[1] if len(reasons) > 1 else None, das)


def _reasons(rng: random.Random, catalogue: Catalogue) -> list[Condition]:
    """Draw the main diagnosis, and the related one for a session."""
    if catalogue.others and rng.random() < _OTHERS_SHARE:
        disease = rng.choice(catalogue.others)
    else:
        frequent = [item for item in catalogue.common.values() if item.dp and item.may_be("DP")]
        disease = rng.choices(frequent, [item.dp for item in frequent])[0]
    sessions = [catalogue.common[code] for code in disease.sessions if code in catalogue.common]
    sessions = [session for session in sessions if session.may_be("DP") and disease.may_be("DR")]
    if sessions and rng.random() < _SESSION_SHARE:
        return [rng.choice(sessions), disease]
    return [disease]


def _associated(
    rng: random.Random, catalogue: Catalogue, reasons: list[Condition], sex: str, age: int, count: int
) -> tuple[Condition, ...]:
    expected = {code for reason in reasons for code in reason.associated}
    weights = {
        item.code: item.das + (_ASSOCIATED_BONUS if item.code in expected else 0)
        for item in catalogue.common.values()
        if item.may_be("DAS") and sex in item.sex and item.age[0] <= age <= item.age[1]
        # A stay of a day or less includes no acute disease unrelated to its reason.
        if reasons[0].stay[0] > 1 or item.kind == "chronic" or item.code in expected
    }
    taken = {reason.group for reason in reasons}
    chosen: list[Condition] = []
    while len(chosen) < count:
        left = [code for code, weight in weights.items() if weight and catalogue.common[code].group not in taken]
        if not left:
            break
        item = catalogue.common[rng.choices(left, [weights[code] for code in left])[0]]
        chosen.append(item)
        taken.add(item.group)
    return tuple(chosen)
