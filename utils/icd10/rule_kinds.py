"""The kinds of coding rules: what each checks in a finished stay, and what it forbids while an answer is written."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.icd10.answers import Diagnosis
from utils.icd10.code_sets import CodeSet, codes_in
from utils.icd10.codes import ROLES, Cim10Entry, Cim10Table
from utils.icd10.people import parse_age, parse_sex

DP, DR, DAS = ROLES


class Case(NamedTuple):
    """A stay as the rules see it.

    Attributes:
        codes: all codes, also those without a role.
        of: codes by role, with repetitions.
        table: CIM-10 table.
        sex: M, F or None.
        age: in years, None if unknown.
    """

    codes: frozenset[str]
    of: Mapping[str, Sequence[str]]
    table: Cim10Table
    sex: str | None = None
    age: int | None = None

    @classmethod
    def build(cls, coding: Sequence[Diagnosis], table: Cim10Table, facts: Mapping[str, Any] | None = None) -> "Case":
        """Build the case of a coding and of `sex` and `age`, if facts has them."""
        of = {role: sorted(item.code for item in coding if item.role == role) for role in ROLES}
        sex, age = (str((facts or {}).get(name, "")) for name in ("sex", "age"))
        codes = frozenset(item.code for item in coding)
        return cls(codes, of, table, parse_sex(sex) if sex else None, parse_age(age) if age else None)


class Condition:
    """A kind of rule with its parameters. `is_enforced` says whether decoding cannot break it.

    `is_final`: a stay that breaks it breaks it whatever codes are added, so that leaving out a code repairs it.
    """

    is_enforced = True
    is_final = True

    def check(self, case: Case) -> Sequence[str] | None:
        """Return the sorted codes that break the rule; None where the rule does not apply."""
        raise NotImplementedError

    def allows(self, role: str, entry: Cim10Entry) -> bool:
        """Return whether an entry of the table can have a role in any stay."""
        return True

    def excluded(self, chosen_role: str, chosen: str, role: str, table: Cim10Table) -> Iterable[str]:
        """Return the codes that cannot have a role in a stay with a chosen code in its role."""
        return ()

    @classmethod
    def defines(cls, method: str) -> bool:
        """Return whether this kind has a method of its own."""
        return getattr(cls, method) is not getattr(Condition, method)


@dataclass(frozen=True, eq=False)
class Listed(Condition):
    """Codes are in the table."""

    def check(self, case: Case) -> Sequence[str] | None:
        return sorted(code for code in case.codes if code not in case.table) if case.codes else None


@dataclass(frozen=True, eq=False)
class Types(Condition):
    """Codes of a role have one of the types MCO/HAD of the table."""

    role: str
    types: frozenset[int]

    def check(self, case: Case) -> Sequence[str] | None:
        entries = [entry for code in dict.fromkeys(case.of[self.role]) if (entry := case.table.get(code))]
        return [entry.code for entry in entries if entry.type not in self.types] if entries else None

    def allows(self, role: str, entry: Cim10Entry) -> bool:
        return role != self.role or entry.type in self.types


@dataclass(frozen=True, eq=False)
class Count(Condition):
    """A stay has at least, or at most, so many different codes in a role. Each answer has one DP and at most one DR."""

    role: str
    at_least: int = 0
    at_most: int | None = None

    @property
    def is_enforced(self) -> bool:  # type: ignore[override]
        return self.at_least == 0 or self.role == DP

    @property
    def is_final(self) -> bool:  # type: ignore[override]
        return self.at_least == 0

    def check(self, case: Case) -> Sequence[str] | None:
        codes = list(dict.fromkeys(case.of[self.role]))
        if len(codes) < self.at_least:
            return sorted(case.codes) or ["(none)"]
        return codes if self.at_most is not None and len(codes) > self.at_most else []


@dataclass(frozen=True, eq=False)
class Selection:
    """Codes of a role, or of any, that are in a set, or are any."""

    role: str | None = None
    codes: CodeSet | None = None
    exceptions: CodeSet | None = None

    def has(self, code: str) -> bool:
        """Return whether a code is selected, if it has the role."""
        return (self.codes is None or code in self.codes) and (self.exceptions is None or code not in self.exceptions)

    def of(self, case: Case) -> Sequence[str]:
        """Return the sorted codes of a stay."""
        codes = sorted(case.codes) if self.role is None else list(dict.fromkeys(case.of[self.role]))
        return [code for code in codes if self.has(code)]


@dataclass(frozen=True, eq=False)
class Needs(Condition):
    """A stay with a selected code has a needed one. A stay without any code in the needed role of a set is not judged.

    `if_table_has`: the rule does not apply where the table has none of these codes.
    """

    selected: Selection
    needed: Selection
    if_table_has: CodeSet | None = None

    @property
    def is_enforced(self) -> bool:  # type: ignore[override]
        return self.is_final or self._requires_dr

    @property
    def is_final(self) -> bool:  # type: ignore[override]
        """The DP is written before the DR; other needed codes may follow."""
        return (self.selected.role, self.needed.role) == (DR, DP) and self.if_table_has is None

    @property
    def _requires_dr(self) -> bool:
        roles = (self.selected.role, self.needed.role)
        return roles == (DP, DR) and not (self.needed.codes or self.needed.exceptions or self.if_table_has)

    def check(self, case: Case) -> Sequence[str] | None:
        selected = self.selected.of(case)
        if not selected or (self.if_table_has and not codes_in(case.table, self.if_table_has)):
            return None
        if self.needed.role and self.needed.codes and not case.of[self.needed.role]:
            return None
        return [] if self.needed.of(case) else selected

    def forbids_dr(self, dp: str) -> bool:
        """Return whether a stay with this DP has no DR at all."""
        every_dr = self.selected.codes is None and self.selected.exceptions is None
        return self.is_final and every_dr and not self.needed.has(dp)

    def requires_dr(self, dp: str) -> bool:
        """Return whether a stay with this DP has a DR."""
        return self._requires_dr and self.selected.has(dp)

    def excluded(self, chosen_role: str, chosen: str, role: str, table: Cim10Table) -> Iterable[str]:
        codes = self.selected.codes
        if not self.is_final or codes is None or (chosen_role, role) != (DP, DR) or self.needed.has(chosen):
            return ()
        return [code for code in codes_in(table, codes) if self.selected.has(code)]


@dataclass(frozen=True, eq=False)
class Distinct(Condition):
    """A code of a role is not in the others; a role among its own others has no code twice."""

    role: str
    others: tuple[str, ...]

    def check(self, case: Case) -> Sequence[str] | None:
        codes = case.of[self.role]
        others = [code for role in self.others if role != self.role for code in case.of[role]]
        repeats = self.role in self.others
        if not codes or not (others or repeats):
            return None
        return [code for code in dict.fromkeys(codes) if code in others or (repeats and codes.count(code) > 1)]

    def excluded(self, chosen_role: str, chosen: str, role: str, table: Cim10Table) -> Iterable[str]:
        pairs = ((role, chosen_role), (chosen_role, role))
        return [chosen] if any(one == self.role and other in self.others for one, other in pairs) else ()


@dataclass(frozen=True, eq=False)
class Ancestors(Condition):
    """No code is the parent of another, or the parent's parent."""

    def check(self, case: Case) -> Sequence[str] | None:
        found: set[str] = set()
        for code in case.codes:
            if parents := case.codes.intersection(case.table.ancestors(code)):
                found |= {code, *parents}
        return sorted(found) if case.codes else None

    def excluded(self, chosen_role: str, chosen: str, role: str, table: Cim10Table) -> Iterable[str]:
        return [*table.ancestors(chosen), *_descendants(chosen, table)]


def _descendants(code: str, table: Cim10Table) -> list[str]:
    children = table.children(code)
    return [*children, *(found for child in children for found in _descendants(child, table))]


@dataclass(frozen=True, eq=False)
class Exclude(Condition):
    """No stay has a code of one set and one of the other. Applies to stays with a code of any of the sets."""

    pairs: tuple[tuple[CodeSet, CodeSet], ...]

    def check(self, case: Case) -> Sequence[str] | None:
        found: set[str] = set()
        applies = False
        for pair in self.pairs:
            one, other = ([code for code in case.codes if code in codes] for codes in pair)
            applies = applies or bool(one or other)
            found.update((*one, *other) if one and other else ())
        return sorted(found) if applies else None

    def allows(self, role: str, entry: Cim10Entry) -> bool:
        return not any(entry.code in one and entry.code in other for one, other in self.pairs)

    def excluded(self, chosen_role: str, chosen: str, role: str, table: Cim10Table) -> Iterable[str]:
        for one, other in self.pairs:
            if chosen in one:
                yield from codes_in(table, other)
            if chosen in other:
                yield from codes_in(table, one)


@dataclass(frozen=True, eq=False)
class NotAs(Condition):
    """Codes of a set do not have a role."""

    role: str
    codes: CodeSet

    def check(self, case: Case) -> Sequence[str] | None:
        found = sorted(code for code in case.codes if code in self.codes)
        return [code for code in found if code in case.of[self.role]] if found else None

    def allows(self, role: str, entry: Cim10Entry) -> bool:
        return role != self.role or entry.code not in self.codes


class PersonCase(NamedTuple):
    """Codes that patients of a sex, or of an age in years, do not have."""

    codes: CodeSet
    sex: str | None = None
    age_from: int | None = None
    age_below: int | None = None

    def is_known(self, case: Case) -> bool:
        """Return whether the stay says enough about the patient."""
        return (self.sex is None or case.sex is not None) and (
            (self.age_from is None and self.age_below is None) or case.age is not None
        )

    def applies(self, case: Case) -> bool:
        """Return whether the patient, who is known, is meant."""
        age = case.age or 0
        return (
            (self.sex is None or case.sex == self.sex)
            and (self.age_from is None or age >= self.age_from)
            and (self.age_below is None or age < self.age_below)
        )


@dataclass(frozen=True, eq=False)
class Person(Condition):
    """Codes by sex and age; decoding does not know the patient."""

    cases: tuple[PersonCase, ...]
    is_enforced = False

    def check(self, case: Case) -> Sequence[str] | None:
        known = [found for found in self.cases if found.is_known(case)]
        if not known or not case.codes:
            return None
        meant = [found for found in known if found.applies(case)]
        return sorted(code for code in case.codes if any(code in found.codes for found in meant))


@dataclass(frozen=True, eq=False)
class Dagger(Condition):
    """An asterisk code has a cause: in the categories that its label names in parentheses, or, if none, any."""

    codes: CodeSet
    causes: CodeSet
    is_enforced = False
    is_final = False

    def check(self, case: Case) -> Sequence[str] | None:
        asterisks = sorted(code for code in case.codes if code in self.codes)
        causes = [code for code in case.codes if code in self.causes and code not in self.codes]
        return [code for code in asterisks if not any(map(_is_cause(code, case.table), causes))] if asterisks else None


def _is_cause(asterisk: str, table: Cim10Table) -> Callable[[str], bool]:
    """Return whether a code is in the categories that the asterisk code's label names in parentheses, if any."""
    named = [
        (found[1], found[2] or found[1])
        for group in re.findall(r"\([A-Z]\d\d[^)]*\)", table.label(asterisk) or "")
        for found in re.finditer(r"\b([A-Z]\d\d)(?:\.[\d-])?(?:\s*-\s*([A-Z]\d\d))?", group)
    ]
    return lambda code: not named or any(first <= code[:3] <= last for first, last in named)
