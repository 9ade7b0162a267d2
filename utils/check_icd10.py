"""Check a table of codes against the coding rules.

`python -m utils.check_icd10 CODES --cim10 TABLE [--rules FILE] [--out VIOLATIONS.csv]`

CODES is a table of codes as `utils.prepare_icd10_data` reads them (csv, tsv, xlsx, parquet, jsonl): a row per code, or
per stay or unit with columns for DP, DR and DAS. A stay in which each unit (RUM) has a DP is checked by unit. TABLE is
ATIH's CIM-10 table, or several with the years of discharge: `2024=TABLE 2025=TABLE`; each rule counts in its years,
and stays without a table of their year are not checked, with a warning.

Prints for each rule how many stays break it, out of those to which it applies. `--out` writes a line for each stay and
rule: stay, severity, rule, codes. The exit code is 1 if a forbidding rule is broken, and 0 otherwise.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.cli import run_cli
from model.errors import UserError
from model.wording import counted
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import ROLES, Cim10Table
from utils.icd10.mapping import TableMapping, read_mapping
from utils.icd10.people import People
from utils.icd10.roles import UNIT_DP, parse_roles
from utils.icd10.rule_kinds import Case
from utils.icd10.rule_report import BrokenRule, check_stays
from utils.icd10.rules import RuleSet, add_rules_option, parse_rules
from utils.icd10.rules_file import FORBIDDEN, SEVERITIES
from utils.icd10.stays import CodeRow, LeftOut, read_codes, recognize
from utils.icd10.table_years import TableYears
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import require_own_names, save
from utils.tables.read_table import FILE_TYPES, add_encoding_option

_HEADER = ("rule", "severity", "broken", "of", "what breaks it (reference)")


def coded_stays(stay: str, rows: Sequence[CodeRow]) -> Iterator[tuple[str, list[Diagnosis]]]:
    """Yield the identifier and the diagnoses of a stay, or of each of its units if each has a DP.

    In a stay that is checked as a whole, the DP of units are DAS where the table has the stay's DP.
    """
    units = dict.fromkeys(row.unit for row in rows if row.unit)
    with_dp = {row.unit for row in rows if row.role in ("DP", UNIT_DP)}
    if len(units) > 1 and all(row.unit for row in rows) and with_dp.issuperset(units):
        for unit in units:
            of_unit = [row for row in rows if row.unit == unit]
            yield f"{stay} unit {unit}", _diagnoses(of_unit, "DP")
    else:
        has_dp = any(row.role == "DP" for row in rows)
        yield stay, _diagnoses(rows, "DAS" if has_dp else "DP")


def _diagnoses(rows: Sequence[CodeRow], role_of_unit_dp: str) -> list[Diagnosis]:
    roles = dict(zip(ROLES, ROLES)) | {UNIT_DP: role_of_unit_dp}
    return [Diagnosis(roles[row.role], row.code) for row in rows if row.role in roles]


def read_cases(
    path: Path, tables: TableYears, rules: RuleSet, mapping: TableMapping, encoding: str
) -> list[tuple[str, RuleSet, Case]]:
    """Return identifier, rules of its year and case of each stay of a table of codes.

    Raises:
        UserError: the table cannot be read, or no stay has a CIM-10 table.
    """
    columns = recognize(path, "codes", mapping, encoding)
    print(columns.describe(path), flush=True)
    left_out: list[LeftOut] = []
    people = People()
    codes, _, facts = read_codes(path, columns, mapping.roles, encoding, left_out, people)
    cases: list[tuple[str, RuleSet, Case]] = []
    unchecked: dict[str, list[str]] = {}  # stays by reason
    for stay, rows in codes.items():
        table = tables.of(stay, facts.discharges)
        if not isinstance(table, Cim10Table):
            unchecked.setdefault(table, []).append(stay)
            continue
        date = facts.discharges.get(stay)
        person = people.facts(stay, date)
        valid = rules.in_year((date or "")[:4])
        cases += [(name, valid, Case.build(coding, table, person)) for name, coding in coded_stays(stay, rows)]
    not_checked = [
        f"{counted(len(stays), 'stay')} not checked, {reason} (e.g. {stays[0]})" for reason, stays in unchecked.items()
    ]
    if not_checked and not cases:
        raise UserError(f"{path}: {'; '.join(not_checked)}.")
    for warning in not_checked:
        print(f"warning: {warning}", file=sys.stderr)
    for reason, count in Counter(found.reason for found in left_out).items():
        print(f"warning: {counted(count, 'row')} left out, {reason}", file=sys.stderr)
    for warning in people.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return cases


def table_of_rules(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rules in columns, those that are broken most often first within each severity."""
    ordered = sorted(report, key=lambda name: (SEVERITIES.index(report[name]["severity"]), -report[name]["count"]))
    rows = [
        (name, rule["severity"], f"{rule['count']:,}", f"{rule['of']:,}", f"{rule['title']} ({rule['reference']})")
        for name in ordered
        for rule in [report[name]]
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in (2, 3) else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in (_HEADER, *rows)
    )


def _violations(broken: Sequence[BrokenRule]) -> str:
    buffer = io.StringIO()
    writer = CsvWriter(buffer, BrokenRule._fields)
    for found in broken:
        writer.write(*found)
    return buffer.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path, metavar="CODES", help=f"table of codes ({FILE_TYPES})")
    parser.add_argument(
        "--cim10", required=True, nargs="+", metavar="TABLE", help="ATIH's CIM-10 table, or YEAR=TABLE ..."
    )
    add_rules_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="csv of the stays that break rules")
    parser.add_argument("--columns", metavar="MAPPING", help="FIELD=COLUMN,... or a YAML file")
    parser.add_argument("--roles", metavar="STATUS=ROLE,...", help="DP, DR, DAS or ignore for other statuses")
    add_encoding_option(parser)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    rules, tables = parse_rules(args.rules), TableYears(args.cim10)
    require_own_names([args.out], [args.codes, args.rules, *tables.paths])
    mapping = read_mapping(args.columns)
    mapping.roles.update(parse_roles(args.roles))
    cases = read_cases(args.codes, tables, rules, mapping, args.encoding)
    report, broken = check_stays(cases, rules)
    if args.out:
        save({args.out: _violations(broken)})
    print(table_of_rules(report))
    stays = {severity: len({found.stay for found in broken if found.severity == severity}) for severity in SEVERITIES}
    breaking, to_check = (f"{stays[severity]:,}" for severity in SEVERITIES)
    checked = counted(len(cases), "stay")
    listed = f"See {args.out}" if args.out else "--out VIOLATIONS.csv names them" if broken else ""
    summary = f"{checked} checked: {breaking} with a broken rule, {to_check} to check (rules {rules.version})."
    print(f"{summary} {listed}".strip())
    if stays[FORBIDDEN]:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
