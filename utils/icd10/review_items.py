"""What a review page shows of each stay: the note, proposed codes to decide on, and why it comes where it does."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import ROLES


class Evidence(NamedTuple):
    """A sentence of the note, and its document, date and cues such as "negation"."""

    text: str
    about: str


class Item(NamedTuple):
    """A code to decide on.

    Attributes:
        role: DP, DR or DAS; "" where the model gave none.
        coded: the coder's code, "" in a worklist.
        proposed: the model's code, "" to remove the coder's.
        label: of the proposed code, or of the coder's.
        confidence: probability that the proposal is right, calibrated if the run is; None if unknown.
        effect: how much the code matters, see `utils.icd10.second_reading`; 1 in a worklist.
        evidence: sentences of the note that support the code.
    """

    role: str
    coded: str
    proposed: str
    label: str
    confidence: float | None
    effect: float = 1.0
    evidence: tuple[Evidence, ...] = ()


class StayToReview(NamedTuple):
    """A stay on the page.

    Attributes:
        stay: identifier.
        note: hash of the note, "" if there is no note.
        text: the note.
        priority: stays with a higher one come first.
        items: codes to decide on.
        agreed: codes on which coder and model agree.
        decision: `auto`, `to_review` or "".
        reason: of the decision.
        facts: what stays can be filtered by, such as the specialty.
        broken: what the codes break of the coding rules.
    """

    stay: str
    note: str
    text: str
    priority: float
    items: list[Item]
    agreed: tuple[Diagnosis, ...] = ()
    decision: str = ""
    reason: str = ""
    facts: Mapping[str, str] = {}
    broken: tuple[str, ...] = ()


def confidence_of(code: Mapping[str, Any]) -> float | None:
    """Return the confidence of a code of an answer, or the model's probability where nothing is calibrated."""
    return code.get("confidence", code.get("probability"))


def evidence_of(code: Mapping[str, Any]) -> tuple[Evidence, ...]:
    """Return the sentences that support a code, if the row of `utils.explain_icd10` has any."""
    found = []
    for row in code.get("evidence") or ():
        about = (row.get("document"), row.get("date"), *row.get("marks", ()))
        found.append(Evidence(str(row["sentence"]), ", ".join(filter(None, about))))
    return tuple(found)


def proposals(codes: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Return the codes of an answer as items, the DP first."""
    items = [
        Item(code["role"] or "", "", code["code"], code["label"], confidence_of(code), evidence=evidence_of(code))
        for code in codes
    ]
    return sorted(items, key=lambda item: ROLES.index(item.role) if item.role else len(ROLES))


def doubt(items: Iterable[Item]) -> float:
    """Return how unsure the main diagnosis is, from 0 to 1; 1 without one."""
    sure = [item.confidence or 0.0 for item in items if item.role == "DP"]
    return 1.0 - sure[0] if len(sure) == 1 else 1.0
