"""Build coded stays from a hospital's tables, and record why anything is left out.

A stay keeps one DP, at most one DR, and its DAS without the DP, the DR and duplicates, sorted by how often they occur
with this DP in the corpus. Where several units of a stay have a DP, the stay's is the one that the tables or the user
name; the others become DAS. Labels come from the CIM-10 table.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from model.errors import UserError
from model.wording import counted
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import ROLES, Cim10Table, normalize_code
from utils.icd10.roles import DOCUMENTARY, UNIT_DP
from utils.icd10.rules import RuleSet, guide_rules
from utils.icd10.rules_file import FORBIDDEN
from utils.icd10.stays import CodeRow, LeftOut, StayNotes

NO_TEXT = "without text"
NO_CODES = "without codes"
NO_DP = "without a usable DP"
OF_DROPPED_STAY = "of a dropped stay"
TWO_PATIENTS = "with documents or codes of two patients"

FIRST, LAST = "first", "last"  # unit whose DP is the stay's
_FALSE = ("", "0", "n", "non", "no", "false", "faux")

TableOf = Callable[[str], Cim10Table | str]  # the CIM-10 table of a stay, or why there is none
RulesOf = Callable[[str], RuleSet]


class CodedStay(NamedTuple):
    """A stay with its codes in the order of the answer: DP, DR if any, DAS."""

    id: str
    diagnoses: list[Diagnosis]


class Corpus(NamedTuple):
    """Stays in the order of their notes, and what was left out or changed.

    Attributes:
        stays: usable stays.
        left_out: stays and codes that are not used.
        moved: codes whose role was changed, by reason.
    """

    stays: list[CodedStay]
    left_out: list[LeftOut]
    moved: dict[str, list[str]]


def build_corpus(
    notes: StayNotes,
    codes: Mapping[str, Sequence[CodeRow]],
    table_of: TableOf,
    unit: str | None = None,
    refused: Mapping[str, str] | None = None,
    rules_of: RulesOf = lambda stay: guide_rules(),
) -> Corpus:
    """Build the corpus from the notes and the codes of each stay.

    Every stay of either mapping is kept or left out once; so is every code.

    Args:
        notes: note of each stay.
        codes: codes of each stay.
        table_of: returns the CIM-10 table of a stay, or the reason why there is none.
        unit: "first" or "last": the unit whose DP is the stay's, where the table does not say it.
        refused: reasons by stay, for stays that are not to be used.
        rules_of: returns the coding rules of a stay's year.

    Raises:
        UserError: stays have several DP or DR, and nothing says which one is the stay's.
    """
    builder = _Builder(table_of, unit, rules_of)
    for stay in dict.fromkeys((*notes, *codes)):
        rows = codes.get(stay, ())
        reason = (refused or {}).get(stay) or (NO_CODES if not rows else None if notes.has_text(stay) else NO_TEXT)
        builder.add(stay, rows, reason)
    builder.require_one_main_diagnosis()
    return Corpus(builder.ordered_stays(), builder.left_out, dict(builder.moved))


class _Builder:
    def __init__(self, table_of: TableOf, unit: str | None, rules_of: RulesOf) -> None:
        self.left_out: list[LeftOut] = []
        self.moved: defaultdict[str, list[str]] = defaultdict(list)
        self._table_of = table_of
        self._unit = unit
        self._rules_of = rules_of
        self._usable: dict[str, dict[str, list[str]]] = {}
        self._undecided: dict[str, list[str]] = {}  # what several units have, by stay

    def add(self, stay: str, rows: Sequence[CodeRow], reason: str | None) -> None:
        """Add a stay, or leave it out for a reason."""
        table = "" if reason else self._table_of(stay)
        if isinstance(table, str):
            self._leave_out_stay(stay, reason or table, [(row.role, row.code) for row in rows])
            return
        rows = self._settle_units(stay, rows)
        by_role: dict[str, list[str]] = {role: [] for role in ROLES}
        for row in rows:
            problem = rejection_reason(row.role, row.code, table, self._rules_of(stay))
            if problem is None and row.code in by_role[row.role]:
                problem = f"duplicate {row.role}"
            if problem:
                self._leave_out_code(stay, row.role, row.code, problem)
            else:
                by_role[row.role].append(row.code)
        if by_role["DP"]:
            self._usable[stay] = self._without_repetitions(stay, by_role)
        else:
            self._leave_out_stay(stay, NO_DP, [(role, code) for role, found in by_role.items() for code in found])

    def _leave_out_stay(self, stay: str, reason: str, codes: Iterable[tuple[str, str]]) -> None:
        self.left_out.append(LeftOut("stay", reason, stay))
        for role, code in codes:
            self._leave_out_code(stay, role, code, OF_DROPPED_STAY)

    def _leave_out_code(self, stay: str, role: str, code: str, reason: str) -> None:
        self.left_out.append(LeftOut("code", reason, stay, role, code))

    def _settle_units(self, stay: str, rows: Sequence[CodeRow]) -> list[CodeRow]:
        """Return the codes with at most one DP and one DR: those of other units become DAS."""
        if len(rows) < 2:
            return [row._replace(role="DP") if row.role == UNIT_DP else row for row in rows]
        main = self._choose(stay, _main_candidates(rows))
        related = [row for row in rows if row.role == "DR" and (main is None or row.code != main.code)]
        same_unit = [row for row in related if main is not None and row.unit == main.unit]
        dr = self._choose(stay, same_unit or related)
        settled = []
        for row in rows:
            role = row.role
            if role in ("DP", UNIT_DP) and main is not None:
                role = "DP" if row.code == main.code else "DAS"
            elif role == "DR" and dr is not None and row.code not in (dr.code, main.code if main else None):
                role = "DAS"
            if role == "DR" and main is not None and not self._rules_of(stay).may_have_dr(main.code):
                self._move(stay, row, "DR beside a DP that takes none (guide MCO), kept as DAS")
                role = "DAS"
            elif role == "DAS" and row.role != "DAS":
                self._move(stay, row, f"{row.role.split()[0]} of another unit, kept as DAS")
            settled.append(row._replace(role=role))
        return settled

    def _move(self, stay: str, row: CodeRow, reason: str) -> None:
        self.moved[reason].append(f"{row.role} {row.code} of stay {stay}")

    def _choose(self, stay: str, rows: Sequence[CodeRow]) -> CodeRow | None:
        """Return the row of the only code, or of the chosen unit; note the stay if nothing says which one."""
        if len({row.code for row in rows}) < 2:
            return rows[0] if rows else None
        if self._unit is None:
            self._undecided.setdefault(stay, []).append(" and ".join(f"{row.role} {row.code}" for row in rows[:3]))
            return rows[0]
        numbered = all(row.unit.isdecimal() for row in rows)
        ordered = sorted(rows, key=lambda row: int(row.unit)) if numbered else list(rows)
        return ordered[0 if self._unit == FIRST else -1]

    def require_one_main_diagnosis(self) -> None:
        """Raise UserError if stays have several DP or DR and nothing says which one is the stay's."""
        if self._undecided:
            examples = "; ".join(f"{stay}: {', '.join(found)}" for stay, found in list(self._undecided.items())[:5])
            stays = counted(len(self._undecided), "stay has", "stays have")
            raise UserError(
                f"{stays} several DP or DR, as of several units (RUM): {examples}. Say which is the stay's: "
                "--columns main=COLUMN (a column that marks the stay's DP or has its code), or --several_dp first or "
                "last (unit). The others become DAS."
            )

    def _without_repetitions(self, stay: str, by_role: dict[str, list[str]]) -> dict[str, list[str]]:
        dp = by_role["DP"][0]
        dr = next((code for code in by_role["DR"] if code != dp), None)
        for role in ROLES[1:]:
            for code in by_role[role]:
                if code == dp or (code == dr and role != "DR"):
                    self._leave_out_code(stay, role, code, "also its DP or DR")
        das = [code for code in by_role["DAS"] if code not in (dp, dr)]
        return {"DP": [dp], "DR": [dr] if dr else [], "DAS": das}

    def ordered_stays(self) -> list[CodedStay]:
        """Return the usable stays, their DAS sorted by how often they occur with the DP."""
        pairs = Counter((found["DP"][0], code) for found in self._usable.values() for code in found["DAS"])
        frequency = Counter(code for found in self._usable.values() for code in found["DAS"])
        stays = []
        for stay, found in self._usable.items():
            dp = found["DP"][0]
            # Ties: the code that is more frequent as DAS, then alphabetical order, so that the order is unique.
            found["DAS"].sort(key=lambda code: (-pairs[dp, code], -frequency[code], code))
            table = self._table_of(stay)
            assert isinstance(table, Cim10Table)
            stays.append(
                CodedStay(
                    stay,
                    [Diagnosis(role, code, table.label(code) or "") for role in ROLES for code in found[role]],
                )
            )
        return stays


def _main_candidates(rows: Sequence[CodeRow]) -> list[CodeRow]:
    """Return the rows that can be the stay's DP: those that the table marks, else its DP, else the DP of its units."""
    mains = [row for row in rows if row.role in ("DP", UNIT_DP)]
    marked = [
        row
        for row in mains
        if row.main.casefold() not in _FALSE and normalize_code(row.main) in (row.code, *_flags(row))
    ]
    stays_own = [row for row in mains if row.role == "DP"]
    return marked or stays_own or mains


def _flags(row: CodeRow) -> tuple[str, ...]:
    """Return the flag of a row as a code, if it is one and not the code of a DP."""
    flag = normalize_code(row.main)
    return () if len(flag) >= 3 and flag[1:3].isdecimal() else (flag,)


def rejection_reason(role: str, code: str, table: Cim10Table, rules: RuleSet) -> str | None:
    """Return why a code is not accepted in a role, or None if it is."""
    entry = table.get(code)
    if role == DOCUMENTARY:
        return "DAD, a documentary diagnosis (--roles DAD=DAS keeps it)"
    if role not in ROLES:
        return "with a status that is left out (--roles)"
    if entry is None:
        return "not in the CIM-10 table"
    if entry.closed_in:
        return f"closed in {entry.closed_in} (valid for stays discharged before: --columns discharge=COLUMN)"
    if entry.type == 3:
        return "a category with children or a closed code"
    return None if rules.allows(role, entry) else f"forbidden as {role}"


def repair(
    corpus: Corpus, table_of: TableOf, rules_of: RulesOf, facts_of: Callable[[str], Mapping[str, Any]]
) -> Corpus:
    """Return a corpus without the codes that break a forbidding rule; a stay that still breaks one is left out.

    Args:
        corpus: coded stays.
        table_of: returns the CIM-10 table of a stay.
        rules_of: returns the coding rules of a stay's year.
        facts_of: returns `sex` and `age` of a stay, where known.
    """
    stays, left_out = [], list(corpus.left_out)
    for stay in corpus.stays:
        table, rules, facts = table_of(stay.id), rules_of(stay.id), facts_of(stay.id)
        assert isinstance(table, Cim10Table)  # other stays are not in the corpus
        kept, removed = rules.repaired(stay.diagnoses, table, facts)
        for item, rule in removed:
            left_out.append(LeftOut("code", f"breaks the rule {rule} (--repair)", stay.id, str(item.role), item.code))
        forbidding = rules.of_severity(FORBIDDEN)
        if broken := [name for name in rules.broken(kept, table, facts) if name in forbidding]:
            left_out.append(LeftOut("stay", f"breaks the rule {broken[0]} (--repair)", stay.id))
            left_out += [LeftOut("code", OF_DROPPED_STAY, stay.id, str(item.role), item.code) for item in kept]
        else:
            stays.append(stay._replace(diagnoses=kept))
    return corpus._replace(stays=stays, left_out=left_out)
