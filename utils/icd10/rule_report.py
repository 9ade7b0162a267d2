"""Count the coding rules that a hospital's own codes break, and name the stays."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from utils.icd10.rules import ADVICE, RULES, Case

KINDS = {"rules": RULES, "advice": ADVICE}
_TITLES = {"rules": "Coding rules broken by these codes", "advice": "Advice on these codes (not rules)"}
_EXAMPLES = 20


class BrokenRule(NamedTuple):
    """A stay that breaks a rule of `rules.RULES`, or is against `rules.ADVICE`. `kind` is "rules" or "advice"."""

    stay: str
    kind: str
    rule: str
    codes: str


def check_stays(cases: Iterable[tuple[str, Case]]) -> tuple[dict[str, Any], list[BrokenRule]]:
    """Return the counts {kind: {rule: {count, of, examples}}} and every broken rule, in the order of the stays.

    Args:
        cases: identifier and case of each stay.
    """
    report: dict[str, Any] = {
        kind: {name: {"count": 0, "of": 0, "examples": []} for name in rules} for kind, rules in KINDS.items()
    }
    broken = []
    for stay, case in cases:
        for kind, rules in KINDS.items():
            for name, rule in rules.items():
                codes = rule.check(case)
                if codes is None:
                    continue
                counts = report[kind][name]
                counts["of"] += 1
                if codes:
                    counts["count"] += 1
                    counts["examples"] += [stay] if len(counts["examples"]) < _EXAMPLES else []
                    broken.append(BrokenRule(stay, kind, name, " ".join(codes)))
    return report, broken


def summarize_rules(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of a summary: the rules that are broken at all, then the advice that is not followed."""
    lines = []
    for kind, title in (
        ("rules", "Coding rules broken by these codes"),
        ("advice", "Advice on these codes (not rules)"),
    ):
        found = [
            f"  {rule.title} ({rule.source}): {counts['count']:,} of {counts['of']:,} (e.g. {counts['examples'][0]})"
            for name, rule in KINDS[kind].items()
            if (counts := report[kind][name])["count"]
        ]
        lines += [f"{title}:", *found] if found else []
    return lines
