"""Count the coding rules that stays break, and name the stays."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from utils.icd10.rule_kinds import Case
from utils.icd10.rules import RuleSet
from utils.icd10.rules_file import FORBIDDEN, SEVERITIES, TO_CHECK

TITLES = {FORBIDDEN: "Broken coding rules", TO_CHECK: "To check (not forbidden)"}
_EXAMPLES = 20


class BrokenRule(NamedTuple):
    """A stay that breaks a rule, and the codes that break it."""

    stay: str
    severity: str
    rule: str
    codes: str


def check_stays(
    cases: Iterable[tuple[str, RuleSet, Case]], rules: RuleSet
) -> tuple[dict[str, dict[str, Any]], list[BrokenRule]]:
    """Return {rule: {severity, title, reference, count, of, examples}}, and every broken rule in the stays' order.

    Args:
        cases: identifier, rules of its year, and case of each stay.
        rules: of all years.
    """
    report: dict[str, dict[str, Any]] = {
        name: {
            "severity": rule.severity,
            "title": rule.title,
            "reference": rule.reference,
            "count": 0,
            "of": 0,
            "examples": [],
        }
        for name, rule in rules.rules.items()
    }
    broken = []
    for stay, valid, case in cases:
        for rule, codes in valid.check(case):
            counts = report[rule.name]
            counts["of"] += 1
            if codes:
                counts["count"] += 1
                counts["examples"] += [stay] if len(counts["examples"]) < _EXAMPLES else []
                broken.append(BrokenRule(stay, rule.severity, rule.name, " ".join(codes)))
    return report, broken


def summarize_rules(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a summary: the forbidding rules that are broken at all, then the others."""
    lines = []
    for severity in SEVERITIES:
        found = [
            f"  {rule['title']} ({rule['reference']}): {rule['count']:,} of {rule['of']:,} (e.g. {rule['examples'][0]})"
            for rule in report.values()
            if rule["count"] and rule["severity"] == severity
        ]
        lines += [f"{TITLES[severity]}:", *found] if found else []
    return lines
