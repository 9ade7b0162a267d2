"""Rules of the guide MCO that the preparation of stays follows (D1 and D2, on the DR)."""

from collections.abc import Sequence

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import chapter

# DP of chapter XXI that take no DR: suspicion, contact, birth, history.
_WITHOUT_DR = ("Z03", "Z04", "Z20", "Z21", "Z22", "Z380", *(f"Z{number}" for number in range(80, 93)))
_SESSIONS = ("Z491", "Z510", "Z511")


def may_have_dr(dp: str) -> bool:
    """Return whether a stay with this DP can have a DR: only "codes Z" can, and not all of them."""
    return chapter(dp) == "XXI" and not dp.startswith(_WITHOUT_DR)


def lacks_dr(diagnoses: Sequence[Diagnosis]) -> bool:
    """Return whether a stay's DP is a session (chemotherapy, radiotherapy, dialysis) and it has no DR."""
    return diagnoses[0].code.startswith(_SESSIONS) and all(item.role != "DR" for item in diagnoses)
