"""The coding rules of a file (`guide_rules.toml` or a hospital's own): which apply, which a stay breaks, repairs."""

import argparse
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.rule_kinds import Case, Needs
from utils.icd10.rules_file import FORBIDDEN, GUIDE, Rule, read_rules


class Removed(NamedTuple):
    """A diagnosis that a repair leaves out, and the rule that it would break together with those before it."""

    diagnosis: Diagnosis
    rule: str


class RuleSet:
    """The rules that apply to stays of a year.

    Attributes:
        version: of the file, as it says.
        rules: by name.
        digest: of the file's content.
    """

    def __init__(self, version: str, rules: Iterable[Rule], digest: str = "") -> None:
        self.version = version
        self.digest = digest
        self.rules = {rule.name: rule for rule in rules}
        self._forbidding = [rule for rule in self.rules.values() if rule.severity == FORBIDDEN]
        conditions = [rule.condition for rule in self._forbidding]
        self._of_codes = [condition for condition in conditions if condition.defines("allows")]
        self._of_pairs = [condition for condition in conditions if condition.defines("excluded")]
        self._needs = [condition for condition in conditions if isinstance(condition, Needs)]
        self._final = [rule for rule in self._forbidding if rule.condition.is_final]
        self._by_year: dict[int | None, RuleSet] = {}

    @classmethod
    def from_file(cls, path: Path) -> "RuleSet":
        """Read a file of rules.

        Raises:
            UserError: an entry is wrong, or an example is not what it is an example of.
        """
        version, rules = read_rules(path)
        return cls(version, rules, hashlib.sha256(path.read_bytes()).hexdigest())

    def in_year(self, year: str | int | None) -> "RuleSet":
        """Return the rules that are valid in a year; for an unknown one, those that have no end."""
        key = int(text) if (text := str(year)).isdecimal() else None
        if key not in self._by_year:
            self._by_year[key] = RuleSet(self.version, self._valid(key), self.digest)
        return self._by_year[key]

    def _valid(self, year: int | None) -> Iterator[Rule]:
        return (rule for rule in self.rules.values() if rule.is_valid(year))

    def of_severity(self, severity: str) -> Mapping[str, Rule]:
        """Return the rules with a severity."""
        return {name: rule for name, rule in self.rules.items() if rule.severity == severity}

    def not_enforced(self) -> list[str]:
        """Return the names of the forbidding rules that decoding can break: a finished answer is checked for them."""
        return [rule.name for rule in self._forbidding if not rule.condition.is_enforced]

    def check(self, case: Case) -> Iterator[tuple[Rule, Sequence[str]]]:
        """Yield the rules that apply to a stay, each with the codes that break it, if any."""
        for rule in self.rules.values():
            codes = rule.condition.check(case)
            if codes is not None:
                yield rule, codes

    def broken(
        self, coding: Sequence[Diagnosis], table: Cim10Table, facts: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Return the names of the rules that a coding breaks."""
        return [rule.name for rule, codes in self.check(Case.build(coding, table, facts)) if codes]

    def repaired(
        self, coding: Sequence[Diagnosis], table: Cim10Table, facts: Mapping[str, Any] | None = None
    ) -> tuple[list[Diagnosis], list[Removed]]:
        """Return a coding without the codes that break a forbidding rule, alone or with a code before them.

        Rules that want further codes cannot be repaired so, and may still be broken.

        Args:
            coding: diagnoses in the order of the answer.
            table: CIM-10 table.
            facts: `sex` and `age`, if known.
        """
        kept: list[Diagnosis] = []
        removed = []
        for diagnosis in coding:
            case = Case.build([*kept, diagnosis], table, facts)
            rule = next((rule for rule in self._final if rule.condition.check(case)), None)
            if rule is None:
                kept.append(diagnosis)
            else:
                removed.append(Removed(diagnosis, rule.name))
        return kept, removed

    # --- While an answer is written -----------------------------------------------------------------------------------

    def allows(self, role: str, entry: Cim10Entry | None) -> bool:
        """Return whether an entry of the table can have a role; False if there is none."""
        return entry is not None and all(condition.allows(role, entry) for condition in self._of_codes)

    def may_have_dr(self, dp: str) -> bool:
        """Return whether a stay with this DP can have a DR."""
        return not any(needs.forbids_dr(dp) for needs in self._needs)

    def must_have_dr(self, dp: str) -> bool:
        """Return whether a stay with this DP cannot be without a DR."""
        return any(needs.requires_dr(dp) for needs in self._needs)

    def excluded(self, chosen_role: str, chosen: str, role: str, table: Cim10Table) -> frozenset[str]:
        """Return the codes that cannot have a role in a stay with a chosen code in its role."""
        found = (condition.excluded(chosen_role, chosen, role, table) for condition in self._of_pairs)
        return frozenset(code for codes in found for code in codes)


@functools.cache
def guide_rules() -> RuleSet:
    """Return the rules of the guide MCO that this project has."""
    return RuleSet.from_file(GUIDE)


def add_rules_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that `parse_rules` reads."""
    parser.add_argument("--rules", type=Path, metavar="FILE", help="coding rules (toml) in place of those of the guide")


def parse_rules(path: Path | None) -> RuleSet:
    """Return the rules of the option --rules.

    Raises:
        UserError: as for `RuleSet.from_file`.
    """
    return RuleSet.from_file(path) if path else guide_rules()
