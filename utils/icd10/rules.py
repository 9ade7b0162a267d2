"""Rules of the guide MCO: those on the DR (D1 and D2), which the preparation of stays follows, and exclusions."""

from collections.abc import Collection, Sequence

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import chapter

# DP of chapter XXI that take no DR: suspicion, contact, birth, history.
_WITHOUT_DR = ("Z03", "Z04", "Z20", "Z21", "Z22", "Z380", *(f"Z{number}" for number in range(80, 93)))
# A code that begins like one of the first excludes those that begin like one of the second.
_EXCLUDED = (
    (("Z21",), ("B20", "B21", "B22", "B23", "B24")),
    (("I64",), ("I60", "I61", "I62", "I63")),
    (("I69",), ("Z8670",)),
    (("Z43",), ("Z93",)),
    (("E440",), ("E43",)),
)
_SESSIONS = ("Z491", "Z510", "Z511")


def may_have_dr(dp: str) -> bool:
    """Return whether a stay with this DP can have a DR: only "codes Z" can, and not all of them."""
    return chapter(dp) == "XXI" and not dp.startswith(_WITHOUT_DR)


def is_session(dp: str) -> bool:
    """Return whether a DP is a session of chemotherapy, radiotherapy or dialysis, which takes a DR."""
    return dp.startswith(_SESSIONS)


def excluded_pairs(codes: Collection[str]) -> list[tuple[str, str]]:
    """Return the pairs of a stay's codes that exclude each other."""
    return [
        (one, other)
        for first, second in _EXCLUDED
        for one in codes
        if one.startswith(first)
        for other in codes
        if other.startswith(second)
    ]


def lacks_dr(diagnoses: Sequence[Diagnosis]) -> bool:
    """Return whether a stay's DP is a session (chemotherapy, radiotherapy, dialysis) and it has no DR."""
    return is_session(diagnoses[0].code) and all(item.role != "DR" for item in diagnoses)
