"""Build coded stays from a hospital's tables, and record why anything is dropped.

A stay keeps one DP and at most one DR (if it has several, the most frequent in the corpus) and its DAS without the DP,
the DR and duplicates, sorted by how often they occur with this DP in the corpus. Labels come from the table.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import ROLES, Cim10Table, normalize_code

CodeRow = tuple[str, str]  # condition_status_source_value, concept_code
Dropped = defaultdict[str, list[str]]  # reason -> descriptions of what was dropped

NO_TEXT = "without text"
NO_CODES = "without codes"
NO_DP = "without a usable DP"
OF_DROPPED_STAY = "of a dropped stay"


class CodedStay(NamedTuple):
    """A stay with its note and its codes in the order of the answer: DP, DR if any, DAS."""

    id: str
    text: str
    diagnoses: list[Diagnosis]


class Corpus(NamedTuple):
    """Stays in the order of their notes, and what was dropped, by reason: ids of stays, descriptions of codes."""

    stays: list[CodedStay]
    dropped_stays: Dropped
    dropped_codes: Dropped


def build_corpus(texts: Mapping[str, str], codes: Mapping[str, Sequence[CodeRow]], table: Cim10Table) -> Corpus:
    """Build the corpus from the text and the codes of each stay.

    Every stay of either mapping is kept or listed once in `dropped_stays`. Every code is kept or listed once in
    `dropped_codes`.
    """
    dropped_stays: Dropped = defaultdict(list)
    dropped_codes: Dropped = defaultdict(list)
    usable: dict[str, dict[str, list[str]]] = {}
    for stay in dict.fromkeys((*texts, *codes)):
        rows = codes.get(stay, ())
        if not texts.get(stay, "").strip() or not rows:
            dropped_stays[NO_CODES if not rows else NO_TEXT].append(stay)
            dropped_codes[OF_DROPPED_STAY] += [_describe(role, code, stay) for role, code in rows]
            continue
        by_role = _usable_codes(stay, rows, table, dropped_codes)
        if by_role["DP"]:
            usable[stay] = by_role
        else:
            dropped_stays[NO_DP].append(stay)
            dropped_codes[OF_DROPPED_STAY] += [
                _describe(role, code, stay) for role, found in by_role.items() for code in found
            ]
    chosen = _choose(usable, dropped_codes)
    return Corpus(
        [
            CodedStay(
                stay, texts[stay].strip(), [Diagnosis(role, code, table.label(code) or "") for role, code in found]
            )
            for stay, found in chosen.items()
        ],
        dropped_stays,
        dropped_codes,
    )


def _describe(role: str, code: str, stay: str) -> str:
    return f"{role} {code} of stay {stay}"


def _usable_codes(stay: str, rows: Sequence[CodeRow], table: Cim10Table, dropped: Dropped) -> dict[str, list[str]]:
    """Return the distinct codes of each role that the PMSI accepts in it."""
    usable: dict[str, list[str]] = {role: [] for role in ROLES}
    for status, written in rows:
        role, code = status.strip().upper(), normalize_code(written)
        reason = _rejection_reason(role, code, table)
        if reason is None and code in usable[role]:
            reason = f"duplicate {role}"
        if reason:
            dropped[reason].append(_describe(status, written, stay))
        else:
            usable[role].append(code)
    return usable


def _rejection_reason(role: str, code: str, table: Cim10Table) -> str | None:
    """Return why a code is not accepted in a role, or None if it is."""
    entry = table.get(code)
    if role not in ROLES:
        return f"with a status other than {', '.join(ROLES)}"
    if entry is None:
        return "not in the CIM-10 table"
    if entry.type == 3:
        return "a category with children or a closed code"
    return None if table.allows(role, code) else f"forbidden as {role}"


def _choose(usable: Mapping[str, dict[str, list[str]]], dropped: Dropped) -> dict[str, list[tuple[str, str]]]:
    """Return (role, code) pairs of each stay in the order of its answer."""
    frequency = Counter(
        (role, code) for by_role in usable.values() for role, codes in by_role.items() for code in codes
    )
    chosen: dict[str, dict[str, list[str]]] = {}
    for stay, by_role in usable.items():
        # On ties, max returns the code that the hospital lists first.
        dp = max(by_role["DP"], key=lambda code: frequency["DP", code])
        dr = max((code for code in by_role["DR"] if code != dp), key=lambda code: frequency["DR", code], default=None)
        das = [code for code in by_role["DAS"] if code not in (dp, dr)]
        chosen[stay] = {"DP": [dp], "DR": [dr] if dr else [], "DAS": das}
        for role, codes in by_role.items():
            for code in codes:
                if code not in chosen[stay][role]:
                    reason = "also its DP or DR" if code in (dp, dr) else f"another {role} is more frequent"
                    dropped[reason].append(_describe(role, code, stay))
    pairs = Counter((found["DP"][0], code) for found in chosen.values() for code in found["DAS"])
    for found in chosen.values():
        dp = found["DP"][0]
        # Ties: the code that is more frequent as DAS, then alphabetical order, so that the order to learn is unique.
        found["DAS"].sort(key=lambda code: (-pairs[dp, code], -frequency["DAS", code], code))
    return {stay: [(role, code) for role in ROLES for code in found[role]] for stay, found in chosen.items()}
