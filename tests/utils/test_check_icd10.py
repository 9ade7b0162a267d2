"""Each rule of the file in each of its uses, with the file's own examples; files of rules; the checker."""

import csv
import itertools
import json
from pathlib import Path

import pytest

from model.errors import UserError
from utils import check_icd10, evaluate_icd10, prepare_icd10_data
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.metrics import rule_rates
from utils.icd10.rule_kinds import Case
from utils.icd10.rules import RuleSet, guide_rules
from utils.icd10.rules_file import FORBIDDEN, GUIDE

RULES = guide_rules().rules
STAYS = {f"{rule.name} {kind}": getattr(rule, kind) for rule in RULES.values() for kind in ("breaks", "passes")}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def table_of_all() -> Cim10Table:
    """Return a table with the codes of all examples; a code has one type in all of them."""
    entries: dict[str, Cim10Entry] = {}
    for example in STAYS.values():
        for entry in example.entries:
            assert entries.setdefault(entry.code, entry) == entry
    return Cim10Table(entries.values())


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the examples of all rules as a table of codes, one of notes, and a CIM-10 table."""
    folder = tmp_path_factory.mktemp("rules")
    with (folder / "codes.csv").open("w", newline="") as codes, (folder / "text.csv").open("w", newline="") as notes:
        code_rows, note_rows = csv.writer(codes), csv.writer(notes)
        code_rows.writerow(["stay", "role", "code", "sex", "age"])
        note_rows.writerow(["stay", "text"])
        for stay, example in STAYS.items():
            note_rows.writerow([stay, f"Une note sur le cas {stay}."])
            for item in example.coding:
                row = [stay, item.role, item.code, *(example.facts.get(name, "") for name in ("sex", "age"))]
                code_rows.writerow(row)
    lines = [f"{entry.code}|{entry.type}|N|0|X|Libellé {entry.label}\n" for entry in table_of_all()]
    (folder / "cim10.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def options(folder: Path, **names: str) -> list[object]:
    return [part for name, file in names.items() for part in (f"--{name}", folder / file)]


# --- The four uses ----------------------------------------------------------------------------------------------------


@each_rule
def test_scoring_counts_the_stay_that_breaks_a_rule(rule) -> None:
    for example, expected in ((rule.breaks, 1), (rule.passes, 0)):
        rates = rule_rates([example.coding], rule.example_table(), [example.facts])
        assert (rates[rule.name]["count"], rates[rule.name]["of"]) == (expected, 1)


def test_preparation_reports_or_repairs_the_stays_that_break_rules(examples, run_command) -> None:
    """Rules that answers cannot break are repaired in any case; the others are reported, or repaired with --repair."""
    for repair in ([], ["--repair"]):
        folder = examples / ("repaired" if repair else "reported")
        files = options(examples, text="text.csv", codes="codes.csv", cim10="cim10.txt", out=folder.name)
        code, output = run_command(prepare_icd10_data, *files, "--ratios", "1", "--several_dp", "first", *repair)
        assert code == 0, output
        reported = {(row["stay"], row["rule"]) for row in read_csv(folder / "rules.csv")}
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        moved = {
            code.rpartition("of stay ")[2] for found in report["codes"]["moved"].values() for code in found["examples"]
        }
        changed = {row["stay"] for row in read_csv(folder / "left_out.csv")} | moved
        for rule in RULES.values():
            assert ((f"{rule.name} breaks", rule.name) in reported) != (f"{rule.name} breaks" in changed), rule.name
            assert (f"{rule.name} passes", rule.name) not in reported and f"{rule.name} passes" not in changed
            assert not (repair and rule.severity == FORBIDDEN and report["rules"][rule.name]["count"])


def test_the_checker_names_the_stays_that_break_rules(examples, run_command) -> None:
    files = options(examples, cim10="cim10.txt", out="violations.csv")
    code, output = run_command(check_icd10, examples / "codes.csv", *files)
    assert code == 1
    found = {(row["stay"], row["severity"], row["rule"]) for row in read_csv(examples / "violations.csv")}
    for rule in RULES.values():
        assert (f"{rule.name} breaks", rule.severity, rule.name) in found
        assert (f"{rule.name} passes", rule.severity, rule.name) not in found
        assert f"{rule.title} ({rule.reference})" in output


# --- The checker ------------------------------------------------------------------------------------------------------

TABLE = "".join(f"{code}|0|N|0|X|Libellé\n" for code in ("E43", "E440", "I10", "J189", "O800", "Z511", "C509", "C61"))


@pytest.fixture
def check(run_command, tmp_path: Path):
    """Return a function that checks a table of codes and returns the exit code, the output and the violations."""

    def run(content: str, *arguments: object, table: str = TABLE):
        (tmp_path / "codes.csv").write_text(content, encoding="utf-8")
        (tmp_path / "cim10.txt").write_text(table, encoding="utf-8")
        files = options(tmp_path, cim10="cim10.txt", out="v.csv")
        code, output = run_command(check_icd10, tmp_path / "codes.csv", *files, *arguments)
        written = tmp_path / "v.csv"
        return code, output, [tuple(row.values()) for row in read_csv(written)] if written.exists() else None

    return run


def test_exit_code_is_zero_unless_a_forbidding_rule_is_broken(check, run_command, tmp_path: Path) -> None:
    code, output, found = check("stay;DP;DR;DAS1;DAS2\n1;Z511;;I10;\n2;J189;;;\n")
    assert code == 0 and found == [("1", "to check", "session_without_DR", "Z511")]
    assert "2 stays checked: 0 with a broken rule, 1 to check" in output
    code, output, found = check("stay;DP;DR;DAS1;DAS2\n1;E440;;E43;I10\n2;J189;;;\n")
    assert code == 1 and found == [("1", "forbidden", "excluded_pair", "E43 E440")]
    assert f"(rules 2026.1). See {tmp_path / 'v.csv'}" in output
    output = run_command(check_icd10, tmp_path / "codes.csv", "--cim10", tmp_path / "cim10.txt")[1]
    assert output.endswith("--out VIOLATIONS.csv names them\n")
    row = next(line for line in output.splitlines() if line.startswith("excluded_pair"))
    assert row.split()[1:4] == ["forbidden", "1", "1"]


def test_units_with_a_dp_each_are_checked_one_by_one(check) -> None:
    """The DP and the DR of the guide are those of a unit stay; a stay has the DP of one of its units."""
    header = "stay;unit;role;code\n"
    code, _, found = check(header + "1;A;DP;J189\n1;B;DP;I10\n1;B;DR;C509\n")
    assert code == 1 and found == [("1 unit B", "forbidden", "DR_without_Z", "C509")]
    code, _, found = check(header + "1;A;DP;J189\n1;B;DAS;I10\n")
    assert code == 0 and found == []
    code, _, found = check(header + "1;;DP;J189\n1;;DP;I10\n")
    assert code == 1 and found == [("1", "forbidden", "several_DP", "I10 J189")]


def test_tables_and_rules_of_years_are_chosen_by_discharge(check, tmp_path: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8").replace('years = "2009-"', 'years = "2009-2020"')
    (tmp_path / "old.toml").write_text(text, encoding="utf-8")
    content = "stay;DP;DAS1;sortie\n1;E440;E43;2019-05-01\n2;E440;E43;2021-05-01\n"
    code, _, found = check(content, "--rules", tmp_path / "old.toml", "--columns", "discharge=sortie")
    assert code == 1 and found == [("1", "forbidden", "excluded_pair", "E43 E440")]
    rules = RuleSet.from_file(tmp_path / "old.toml")
    assert not rules.in_year(None).rules and rules.in_year(2015).rules.keys() == RULES.keys()
    assert not rules.in_year("2008").rules


def test_stays_without_a_table_of_their_year_do_not_stop_the_others(check, tmp_path: Path) -> None:
    header = "stay;DP;DAS1;sortie\n"
    years = ("--cim10", *(f"{year}={tmp_path / 'cim10.txt'}" for year in (2024, 2025)), "--columns", "discharge=sortie")
    rows = "1;E440;E43;01/02/2062\n2;E440;E43;\n3;E440;E43;2023-12-31\n4;E440;E43;demain\n"
    code, output, found = check(header + rows, *years)
    assert code == 1 and found == [("1", "forbidden", "excluded_pair", "E43 E440")]
    assert "warning: 2 stays not checked, without a date of discharge" in output and "(e.g. 2)" in output
    assert "warning: 1 stay not checked, discharged before 2024-01-01" in output and "1 stay checked" in output
    code, output, _ = check(header + "2;E440;E43;\n", *years)
    assert code == 1 and "1 stay not checked, without a date of discharge" in output and "checked:" not in output


def test_sex_and_age_are_read_from_the_table(check) -> None:
    code, _, found = check("stay,sexe,age,DP\n1,H,40,O800\n2,F,40,O800\n3,F,70,O800\n")
    assert code == 0
    assert found == [("1", "to check", "wrong_sex", "O800"), ("3", "to check", "wrong_age", "O800")]


def test_a_table_that_cannot_be_checked_is_refused(check, tmp_path: Path) -> None:
    code, output, found = check("a;b\n1;2\n")
    assert code == 1 and found is None and output.count("\n") == 1 and "no column for stay" in output
    code, output, _ = check("stay;DP\n1;I10\n", "--rules", tmp_path / "none.toml")
    assert code == 1 and "none.toml: cannot be read" in output
    code, output, _ = check("stay;DP\n1;I10\n", "--out", tmp_path / "codes.csv")
    assert code == 1 and "is an output and also another file" in output


# --- A hospital's own rules -------------------------------------------------------------------------------------------

OWN = """
version = "ours 1"
[sets]
session = "Z491 Z510 Z511"
[rules.session_without_DR]
kind = "needs"
severity = "forbidden"
title = "sessions without a DR"
reference = "our handbook"
years = "2024-"
role = "DP"
codes = "@session"
needs = { role = "DR" }
breaks = "DP:Z511"
passes = "DP:Z511 DR:C509"
"""


def own_rules(tmp_path: Path, *replaced: tuple[str, str]) -> Path:
    text = OWN
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_own_rules_replace_those_of_the_guide(check, run_command, tmp_path: Path) -> None:
    path = own_rules(tmp_path)
    code, output, found = check("stay;DP;DAS1\n1;Z511;I10\n2;E440;E43\n", "--rules", path)
    assert code == 1 and found == [("1", "forbidden", "session_without_DR", "Z511")]
    assert "sessions without a DR (our handbook)" in output and "rules ours 1" in output
    (tmp_path / "gold.csv").write_text("id,role,code\n1,DP,Z511\n2,DP,E440\n2,DAS,E43\n", encoding="utf-8")
    files = options(
        tmp_path, gold="gold.csv", predictions="gold.csv", cim10="cim10.txt", json="s.json", rules="own.toml"
    )
    code, output = run_command(evaluate_icd10, *files)
    assert code == 0, output
    result = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert result["rates"]["session_without_DR"] == {"count": 1, "of": 1, "rate": 1.0} and result["to_check"] == {}
    assert "excluded_pair" not in result["rates"]
    assert result["rules"]["titles"] == {"session_without_DR": "sessions without a DR (our handbook)"}


def test_a_stay_that_no_code_can_repair_is_left_out(run_command, tmp_path: Path) -> None:
    path = own_rules(tmp_path)
    (tmp_path / "text.csv").write_text("stay,text\na,Une note.\nb,Une autre note.\n", encoding="utf-8")
    (tmp_path / "codes.csv").write_text("stay,role,code\na,DP,Z511\na,DAS,I10\nb,DP,J189\n", encoding="utf-8")
    (tmp_path / "cim10.txt").write_text(TABLE, encoding="utf-8")
    files = options(tmp_path, text="text.csv", codes="codes.csv", cim10="cim10.txt", out="data")
    code, output = run_command(prepare_icd10_data, *files, "--rules", path, "--ratios", "1", "--repair")
    assert code == 0, output
    left_out = [tuple(row.values())[:5] for row in read_csv(tmp_path / "data/left_out.csv")]
    reason = "breaks the rule session_without_DR (--repair)"
    assert left_out[0] == ("stay", reason, "a", "", "") and len(left_out) == 3
    assert "Stays read: 2. Kept: 1." in output


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (('kind = "needs"', 'kind = "wants"'), "rule session_without_DR, key kind: found 'wants'"),
        (('severity = "forbidden"', 'severity = "advice"'), 'found \'advice\', expected "forbidden" or "to check"'),
        (('title = "sessions without a DR"', ""), "key title: found nothing, expected a text"),
        (('reference =', 'refrence ='), "key reference: found nothing"),
        (('role = "DP"', 'role = "DP"\nroles = 1'), "key roles: found a key that is not known here, expected one of"),
        (('"2024-"', '"2024"'), "key years: found '2024', expected \"FIRST-\" or"),
        (('"2024-"', '"2024-2023"'), "key years: found '2024-2023'"),
        (('"@session"', '"@sessions"'), "key codes: found '@sessions', expected codes such as"),
        (('"Z491 Z510 Z511"', '"Z491 51"'), "key session: found 'Z491 51' (51 is neither a code nor a range)"),
        (('role = "DP"', 'role = "DAD"'), "key role: found 'DAD', expected \"DP\" or \"DR\" or \"DAS\""),
        (('{ role = "DR" }', '{ role = "XX" }'), "key needs.role: found 'XX'"),
        (('{ role = "DR" }', "{}"), "key needs.codes: found neither a role nor codes"),
        (('{ role = "DR" }', "3"), "key needs: found 3, expected a table"),
        (('breaks = "DP:Z511"', 'breaks = "Z511"'), "key breaks: found 'Z511', expected \"ROLE:CODE ...\""),
        (('breaks = "DP:Z511"', 'breaks = "DP:J189"'), "found 'DP:J189', expected a stay that breaks"),
        (('passes = "DP:Z511 DR:C509"', 'passes = "DP:J189"'), "key passes: found 'DP:J189', expected a stay to which"),
        (('passes = "DP:Z511 DR:C509"', ""), "key passes: found nothing"),
        (('version = "ours 1"', ""), "key version: found nothing"),
        (('version = "ours 1"', "version = "), "is not a valid TOML file: Invalid value (at line 2"),
        (("[rules.session_", "[rules]\nsession = 3\n[rules.session_"), "rule session: found 3, expected a table"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, replaced: tuple[str, str], message: str) -> None:
    path = own_rules(tmp_path, replaced)
    with pytest.raises(UserError) as error:
        RuleSet.from_file(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


KINDS = {
    "count": ('role = "DR"\nat_least = 1\nat_most = 1', "key at_least: found both or none of at_least and at_most"),
    "person": ('cases = [{ codes = "O" }]', "key cases 1.sex: found nothing, expected a sex"),
    "person ": ('cases = [{ sex = "M", codes = "O" }]', "key cases 1.codes: found 'O'"),
    "exclude": ('pairs = [["Z21"]]', "key pairs: found [['Z21']], expected a list of pairs"),
    "types": ('role = "DP"\ntypes = [7]', "key types: found [7], expected a list of types 0 to 4"),
    "distinct": ('role = "DP"\nothers = []', "key others: found [], expected a list of roles"),
}


def test_a_rules_file_of_notepad_is_read_and_a_deep_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('version = "1"\r\n[rules]\r\n', encoding="utf-8-sig", newline="")
    assert RuleSet.from_file(path).version == "1"
    path.write_text("x = " + "[" * 50_000)
    with pytest.raises(UserError, match=r"own\.toml is not a valid TOML file"):
        RuleSet.from_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_a_kind_are_checked(tmp_path: Path, kind: str) -> None:
    parameters, message = KINDS[kind]
    content = itertools.takewhile(lambda line: not line.startswith("role"), OWN.splitlines())
    text = "\n".join(content).replace('"needs"', f'"{kind.strip()}"')
    (tmp_path / "own.toml").write_text(
        f"{text}\n{parameters}\nbreaks = 'DP:I10'\npasses = 'DP:I10'\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        RuleSet.from_file(tmp_path / "own.toml")


def test_repair_keeps_what_comes_first() -> None:
    table = table_of_all()
    coding = [Diagnosis(role, code) for role, code in (("DP", "I639"), ("DAS", "I64"), ("DAS", "I10"), ("DAS", "I10"))]
    kept, removed = guide_rules().repaired(coding, table)
    assert [(item.role, item.code) for item in kept] == [("DP", "I639"), ("DAS", "I10")]
    assert [(item.diagnosis.code, item.rule) for item in removed] == [("I64", "excluded_pair"), ("I10", "repeated_DAS")]
    assert not any(guide_rules().rules[name].severity == FORBIDDEN for name in guide_rules().broken(kept, table))
    assert next(iter(guide_rules().check(Case.build([], table))))[0].name == "no_DP"
