"""Compare a coder's codes with a model's: each disagreement is a correction to accept or refuse.

Disagreements are ordered by confidence x effect. The effect is a rank and not a price: a DP decides the group of the
stay, a DR that of a stay with a Z code as DP, a DAS counts by its level in a list of complications, if one is given.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from model.errors import UserError
from utils.icd10.answers import Diagnosis
from utils.icd10.cells import identifier, optional_text, sortable_date
from utils.icd10.codes import ROLES, Cim10Table, category, normalize_code, respell
from utils.icd10.mapping import TableMapping, find_columns
from utils.icd10.predictions import NOTHING_MORE, Prediction
from utils.icd10.review_items import Item, StayToReview
from utils.icd10.stays import read_header
from utils.tables.jsonl import SkippedRowError
from utils.tables.read_table import has_fixed_columns, read_table

DP_EFFECT, DR_EFFECT = 10.0, 5.0
LEVELS = (1, 2, 3, 4)  # of complications; 1 is none
_LISTED = 2  # level of a code in a list without levels
_LIST_CODE = ("code", "diag", "diagnostic", "cim10", "cim_10", "concept_code")
_LIST_LEVEL = ("niveau", "level", "severity", "cma", "niveau_cma", "gravite", "gravité")
FACTS = {  # what disagreements are counted by, and the names of its column
    "specialty": ("specialty", "specialite", "spécialité", "service", "um", "unit", "unite", "unité"),
    "coder": ("coder", "codeur", "codeuse", "tim", "utilisateur", "user"),
}
MONTH = "month"


def read_complications(path: Path, encoding: str) -> dict[str, int]:
    """Return the level of each code of a list of complications (CMA), from 1 to 4.

    Raises:
        UserError: the list has no column of codes, or a level is wrong.
    """
    header = read_header(path, encoding)
    code, level = (
        next((name for name in header if name.casefold() in known), None) for known in (_LIST_CODE, _LIST_LEVEL)
    )
    if code is None:
        raise UserError(
            f"{path}: no column of codes; expected one named {', '.join(_LIST_CODE[:4])}, and one of levels."
        )
    if level is None:
        print(
            f"warning: {path} has no column of levels (niveau, level, severity, cma): every code counts as level "
            f"{_LISTED}. Found {', '.join(header)}.",
            file=sys.stderr,
        )
    levels = {}
    for number, row in read_table(path, encoding):
        if isinstance(row, SkippedRowError):
            raise UserError(f"{path}, row {number}: {row.reason}.")
        text = optional_text(row[level]) if level else str(_LISTED)
        if text not in map(str, LEVELS):
            raise UserError(f"{path}, row {number}: level {text[:20]!r}; expected 1, 2, 3 or 4.")
        levels[normalize_code(respell(optional_text(row[code])))] = int(text)
    return levels


def read_facts(path: Path, encoding: str, mapping: TableMapping, by: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the month of discharge, and what else stays are counted by, for each stay of a table of codes.

    Args:
        path: the table; rows of jsonl have no such columns.
        encoding: of text formats.
        mapping: columns that the user gave.
        by: columns that the user gave in place of FACTS.

    Raises:
        UserError: a column of `by` is missing.
    """
    if not has_fixed_columns(path):
        return {}
    header = read_header(path, encoding)
    if missing := [column for column in by if column not in header]:
        raise UserError(f"--by: no column {', '.join(missing)} in {path}; found {', '.join(header)}.")
    columns = find_columns(path, "codes", header, mapping, rows_are_stays=True)
    wanted = {column: column for column in by} or {
        fact: found[0]
        for fact, names in FACTS.items()
        if (found := [name for name in header if name.casefold() in names])
    }
    facts: dict[str, dict[str, str]] = {}
    for _, row in read_table(path, encoding):
        if isinstance(row, dict):
            cells = {fact: optional_text(row[column]) for fact, column in wanted.items()}
            cells[MONTH] = sortable_date(columns.get(row, "discharge"))[:7]
            known = facts.setdefault(identifier(columns.get(row, "stay")), {})
            known |= {fact: text for fact, text in cells.items() if text and fact not in known}
    return facts


class SecondReader:
    """Finds the disagreements of stays.

    Args:
        complications: level of codes, from `read_complications`.
        table: for labels that predictions do not have.
    """

    def __init__(self, complications: Mapping[str, int], table: Cim10Table | None) -> None:
        self._complications = complications
        self._table = table

    def disagreements(self, coded: Prediction, predicted: Prediction) -> list[Item]:
        """Return the corrections that the model proposes, by confidence x effect; codes without a role are DAS."""
        ours, theirs = _by_role(coded.diagnoses), _by_role(predicted.diagnoses)
        pairs = [(role, *pair) for role in ROLES[:2] for pair in _single(role, ours[role], theirs[role])]
        replaced = {before for _, before, _ in pairs}
        kept = {code for role in ROLES[:2] for code in ours[role] if code not in replaced}
        proposed = {code for _, _, code in pairs}
        missing = [code for code in ours["DAS"] if code not in {*theirs["DAS"], *proposed, *kept}]
        added = [code for code in theirs["DAS"] if code not in {*ours["DAS"], *kept}]
        pairs += [("DAS", before, code) for before, code in _paired(missing, added)]
        items = [self._item(role, before, code, predicted) for role, before, code in pairs]
        return sorted(items, key=lambda item: (-score(item), -item.effect, item.role, item.coded, item.proposed))

    def _item(self, role: str, before: str, code: str, predicted: Prediction) -> Item:
        chances = predicted.confidence or predicted.probability
        labels = {item.code: item.label for item in predicted.diagnoses}
        shown = code or before
        label = labels.get(shown) or (self._table.label(shown) if self._table else None) or ""
        return Item(role, before, code, label, chances.get(code or NOTHING_MORE), self._effect(role, before, code))

    def _effect(self, role: str, before: str, code: str) -> float:
        levels = [self._complications.get(found, 1) for found in (before, code) if found]
        return {"DP": DP_EFFECT, "DR": DR_EFFECT}.get(role, float(max(levels)))


def score(item: Item) -> float:
    """Return confidence x effect, by which disagreements are ordered; 0 where the confidence is not known."""
    return (item.confidence or 0.0) * item.effect


def _by_role(diagnoses: Iterable[Diagnosis]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for item in diagnoses:
        if item.code not in found[item.role or "DAS"]:
            found[item.role or "DAS"].append(item.code)
    return found


def _single(role: str, ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the disagreement about a role that a stay has once: (coded, proposed). A DP is never removed."""
    before, code = (codes[0] if codes else "" for codes in (ours, theirs))
    return [(before, code)] if before != code and (code or role != "DP") else []


def _paired(missing: Sequence[str], added: Sequence[str]) -> list[tuple[str, str]]:
    """Return codes to replace by another one of their category, codes to add, and codes to remove."""
    free, pairs = list(missing), []
    for code in added:
        before = next((found for found in free if category(found) == category(code)), "")
        if before:
            free.remove(before)
        pairs.append((before, code))
    return [*pairs, *((code, "") for code in free)]


def agreed(coded: Prediction, items: Sequence[Item]) -> tuple[Diagnosis, ...]:
    """Return the coder's codes that no correction touches."""
    touched = {(item.role, item.coded) for item in items}
    return tuple(item for item in coded.diagnoses if (item.role, item.code) not in touched)


def count_by_fact(
    stays: Sequence[StayToReview], facts: Mapping[str, Mapping[str, str]]
) -> dict[str, list[tuple[str, ...]]]:
    """Return, for each fact, rows of a value and its numbers of stays, of those with a disagreement, and by its role.

    Args:
        stays: stays with disagreements.
        facts: of all compared stays, by stay.
    """
    different = {found.stay: {item.role for item in found.items} for found in stays}
    counts: dict[str, dict[str, list[int]]] = {}
    for stay, known in facts.items():
        for fact, value in known.items():
            row = counts.setdefault(fact, {}).setdefault(value, [0] * (2 + len(ROLES)))
            roles = different.get(stay, set())
            for place, counts_here in enumerate((True, bool(roles), *(role in roles for role in ROLES))):
                row[place] += counts_here
    return {
        fact: [(value, *(f"{count:,}" for count in row)) for value, row in sorted(of_fact.items())]
        for fact, of_fact in counts.items()
    }
