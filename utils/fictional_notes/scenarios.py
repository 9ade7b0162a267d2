"""Fictional hospital stays: who, how long, and which codes a medical-information team would keep."""

import random
from dataclasses import dataclass

from utils.fictional_notes.catalogue import Catalogue, Condition
from utils.icd10.answers import Diagnosis

MAX_DAS = 7
# How often a stay has 0, 1, ... 7 associated diagnoses.
_DAS_COUNTS = (10, 16, 20, 18, 14, 10, 7, 5)
# A stay for cancer is for a session (chemotherapy, ...) more often than for the cancer itself.
_SESSION_SHARE = 0.6
# With a table, how often the main diagnosis is one that only its label tells.
_OTHERS_SHARE = 0.3
# Frequency that being associated with the main or related diagnosis adds to an associated diagnosis.
_ASSOCIATED_BONUS = 30


@dataclass(frozen=True)
class Stay:
    """One stay; `days` is 0 when the patient leaves on the day of admission."""

    sex: str
    age: int
    days: int
    dp: Condition
    dr: Condition | None
    das: tuple[Condition, ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All that is coded: DP, DR, DAS."""
        return (*self.reasons, *self.das)

    @property
    def reasons(self) -> tuple[Condition, ...]:
        """What the patient came for: DP and DR."""
        return (self.dp,) if self.dr is None else (self.dp, self.dr)

    def diagnoses(self) -> list[Diagnosis]:
        """The codes with roles and labels, DAS in the order of `das`."""
        roles = ["DP", "DR"][: len(self.reasons)] + ["DAS"] * len(self.das)
        return [Diagnosis(role, item.code, item.label) for role, item in zip(roles, self.conditions)]


def sample_stay(rng: random.Random, catalogue: Catalogue, max_das: int = MAX_DAS) -> Stay:
    """Draws a plausible stay: frequent main diagnoses, sessions for cancers, DAS that go with sex, age and the rest."""
    reasons = _reasons(rng, catalogue)
    sex = rng.choice(min((reason.sex for reason in reasons), key=len))
    age = rng.randint(max(reason.age[0] for reason in reasons), min(reason.age[1] for reason in reasons))
    count = rng.choices(range(max_das + 1), _DAS_COUNTS[: max_das + 1])[0]
    das = _associated(rng, catalogue, reasons, sex, age, count)
    days = rng.randint(*reasons[0].stay)
    if days > 1:  # complications lengthen a stay, not a session nor day surgery
        days += sum(rng.randint(0, 2) for item in das if item.kind != "chronic")
    return Stay(sex, age, days, reasons[0], reasons[1] if len(reasons) > 1 else None, das)


def _reasons(rng: random.Random, catalogue: Catalogue) -> list[Condition]:
    """The main diagnosis, and the related one for a session."""
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
        # Nobody goes home within a day of an acute disease that has nothing to do with the stay.
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
