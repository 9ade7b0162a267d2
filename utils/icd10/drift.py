"""Compare what a journal has, week by week, with the stays that the model was trained on.

A week is that of the coding (ISO 8601). Of a reviewed stay the final codes count, of another one the proposed ones.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from utils.icd10.calibration import TO_REVIEW
from utils.icd10.codes import chapter
from utils.icd10.decisions import ACCEPTED, ADDED
from utils.icd10.journal import Journal
from utils.icd10.review_items import confidence_of

RECENT_WEEKS = 4  # whose code frequencies are compared
_FEWEST = 5  # stays with a code, in training and recently together, to compare its frequency


class CodedOnce(NamedTuple):
    """A stay of the journal.

    Attributes:
        week: such as 2026-W48.
        codes: its codes.
        dp: its DP, None without one.
        confidence: of the DP, None if unknown.
        marked: `auto`, `to_review` or None.
        decisions: about its proposed codes and added ones; None if it is not reviewed.
    """

    week: str
    codes: frozenset[str]
    dp: str | None
    confidence: float | None
    marked: str | None
    decisions: Sequence[str] | None


class Period(NamedTuple):
    """Figures of a week, or of the training stays; None where there is nothing to count.

    Attributes:
        stays: number of stays.
        codes: mean number of codes of a stay.
        confidence: mean confidence of the DP.
        accepted: share of the reviewed proposals that were accepted; for training, of right DP in validation.
        to_review: share of stays that are marked so.
        unknown: share of codes that training does not have.
        distance: half the sum of absolute differences in the shares of chapters of the DP: 0 for the same, at most 1.
    """

    stays: int
    codes: float | None
    confidence: float | None = None
    accepted: float | None = None
    to_review: float | None = None
    unknown: float | None = None
    distance: float | None = None


class Shift(NamedTuple):
    """A code's share of stays in training and recently, and the difference in standard errors (two proportions)."""

    code: str
    before: float
    now: float
    z: float


class Training(NamedTuple):
    """The stays that the model was trained on: number, number with each code, and with each chapter of the DP."""

    stays: int
    codes: Counter[str]
    chapters: Counter[str]

    @classmethod
    def of(cls, stays: Iterable[tuple[str | None, Iterable[str]]]) -> "Training":
        """Count stays, each as its DP and its codes."""
        number, codes, chapters = 0, Counter[str](), Counter[str]()
        for dp, found in stays:
            number += 1
            codes.update(set(found))
            chapters.update([chapter(dp) or "none"] if dp else [])
        return cls(number, codes, chapters)


def coded_once(journal: Journal) -> list[CodedOnce]:
    """Return the stays of a journal, each note as it was coded and reviewed last."""
    stays = []
    for key in journal.coded:
        coded = journal.proposal(key)
        year, week, _ = datetime.fromisoformat(coded["time"]).isocalendar()
        mains = [item for item in coded["codes"] if item["role"] == "DP"]
        found, decisions = [item["code"] for item in coded["codes"]], None
        dp = mains[0]["code"] if mains else None
        if review := journal.reviewed.get(key):
            decisions = [item["decision"] for item in review["codes"]]
            found = [item["final"] for item in review["codes"] if item["final"]]
            dp = next((item["final"] for item in review["codes"] if item["role"] == "DP" and item["final"]), None)
        confidence = confidence_of(mains[0]) if len(mains) == 1 else None
        name = f"{year}-W{week:02}"
        stays.append(CodedOnce(name, frozenset(found), dp, confidence, coded.get("decision"), decisions))
    return stays


def by_week(stays: Sequence[CodedOnce], training: Training) -> dict[str, Period]:
    """Return the figures of each week, in order."""
    weeks: dict[str, list[CodedOnce]] = {}
    for found in sorted(stays, key=lambda found: found.week):
        weeks.setdefault(found.week, []).append(found)
    return {week: _period(of_week, training) for week, of_week in weeks.items()}


def _period(stays: Sequence[CodedOnce], training: Training) -> Period:
    codes = [code for found in stays for code in found.codes]
    decided = [decision for found in stays for decision in found.decisions or () if decision != ADDED]
    return Period(
        len(stays),
        _mean([len(found.codes) for found in stays]),
        _mean([found.confidence for found in stays if found.confidence is not None]),
        _mean([decision == ACCEPTED for decision in decided]),
        _mean([found.marked == TO_REVIEW for found in stays if found.marked]),
        _mean([code not in training.codes for code in codes]),
        _distance(training.chapters, Counter(chapter(found.dp) or "none" for found in stays if found.dp)),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _distance(one: Mapping[str, int], other: Mapping[str, int]) -> float | None:
    totals = sum(one.values()), sum(other.values())
    if not all(totals):
        return None
    return sum(abs(one.get(key, 0) / totals[0] - other.get(key, 0) / totals[1]) for key in {*one, *other}) / 2


def reference(training: Training, known: Mapping[str, Any]) -> Period:
    """Return the figures of the training stays.

    Args:
        training: the stays.
        known: what `Marker.reference` says about validation stays.
    """
    codes = sum(training.codes.values()) / training.stays if training.stays else None
    return Period(training.stays, codes, known.get("confidence"), known.get("right"), known.get("to_review"))


def shifts(stays: Sequence[CodedOnce], training: Training, most: int = 20) -> list[Shift]:
    """Return the codes whose frequency in the latest weeks differs most from that in training, by |z|."""
    weeks = sorted({found.week for found in stays})[-RECENT_WEEKS:]
    recent = [found for found in stays if found.week in weeks]
    counts = Counter(code for found in recent for code in found.codes)
    found = []
    for code in {*counts, *training.codes}:
        before, now = training.codes[code], counts[code]
        pooled = (before + now) / (training.stays + len(recent))
        error = math.sqrt(pooled * (1 - pooled) * (1 / training.stays + 1 / len(recent)))
        if before + now >= _FEWEST and error > 0:
            shares = before / training.stays, now / len(recent)
            found.append(Shift(code, *shares, (shares[1] - shares[0]) / error))
    return sorted(found, key=lambda shift: (-abs(shift.z), shift.code))[:most]
