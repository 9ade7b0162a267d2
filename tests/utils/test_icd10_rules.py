"""Each coding rule, broken and followed; sex and age from tables; what reports show of them."""

import csv
import json

import pytest

from utils import evaluate_icd10, prepare_icd10_data
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.metrics import rule_rates
from utils.icd10.people import People, age_at, parse_age, parse_sex
from utils.icd10.rule_kinds import Case
from utils.icd10.rules import guide_rules

LABELS = {"G632": "Polynévrite diabétique (E10-E14 avec le quatrième chiffre .4)", "F001": "Démence (G30.1)"}
CODES = (
    "A09 B200 C169 C169+0 C509 C61 E1140 E1148 E1190 E1198 E440 E43 F001 F03 G01 G301 G400 G632 I10 I489 I5010 I64 "
    "I639 J181 K358 N40 O800 P220 R05 R060 R568 S7200 T814 W019 Z038 Z21 Z380 Z511"
)
TABLE = Cim10Table(Cim10Entry(code, 0, LABELS.get(code, code)) for code in CODES.split())
RULES = guide_rules().rules
WITHOUT_CHAPTER_XX = Cim10Table(entry for entry in TABLE if entry.code != "W019")


def coding(text):
    """ "DP:J189 DAS:I10" as diagnoses; "?" is an unknown role."""
    pairs = (item.split(":") for item in text.split())
    return [Diagnosis(None if role == "?" else role, code) for role, code in pairs]


def broken(text, table=TABLE, **facts):
    """Return the names of the rules that a stay breaks."""
    rates = rule_rates([coding(text)], table, [facts])
    found = [name for name in RULES if rates[name]["count"]]
    assert all(rates[name]["of"] == 1 for name in found)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DP:I5010 DR:I489", ["DR_without_Z"]),
        ("DP:Z038 DR:I489", ["DR_without_Z"]),
        ("DP:Z511 DR:C509", []),
        ("DP:Z511", ["session_without_DR"]),
        ("DP:Z511 DAS:C509", ["session_without_DR"]),
        ("DP:C509 DR:C509", ["DR_without_Z", "DR_is_DP"]),
        ("DP:J181 DAS:J181", ["DAS_is_DP_or_DR"]),
        ("DP:Z511 DR:C509 DAS:C509", ["DAS_is_DP_or_DR"]),
        ("DP:J181 DAS:I10 DAS:I10", ["repeated_DAS"]),
        ("DP:J181 DAS:C169 DAS:C169+0", ["parent_and_child"]),
        ("DP:J181 DAS:C169+0", []),
        ("DP:B200 DAS:Z21", ["excluded_pair"]),
        ("DP:J181 DAS:Z21", []),
        ("DP:I64 DAS:I639", ["excluded_pair"]),
        ("DP:E440 DAS:E43", ["excluded_pair"]),
        ("DP:J181 DAS:E1140 DAS:E1198", ["excluded_pair"]),  # with insulin and without
        ("DP:J181 DAS:E1140 DAS:E1190", []),
        ("DP:J181 DAS:E1148 DAS:E1198", []),
        # Dagger and asterisk: the label of the table names the cause, or it can be any disease.
        ("DP:J181 DAS:G632", ["asterisk_without_dagger"]),
        ("DP:J181 DAS:G632 DAS:E1148", []),
        ("DP:I10 DAS:F001", ["asterisk_without_dagger"]),
        ("DP:G301 DAS:F001", []),
        ("DP:J181 DAS:G01", []),
        ("DP:Z511 DR:C509 DAS:G632", ["asterisk_without_dagger"]),
        ("DP:G01", ["asterisk_without_dagger", "asterisk_as_DP"]),
        ("DP:G632 DAS:E1148", ["asterisk_as_DP"]),
        # Sexes and ages that do not go together.
        ("DP:O800 DAS:C61", ["contradiction"]),
        ("DP:J181 DAS:F03 DAS:P220", ["contradiction"]),
        ("DP:O800 DAS:Z380", ["contradiction"]),
        ("DP:P220 DAS:Z380", []),
        # Cause and effect.
        ("DP:S7200", ["injury_without_cause"]),
        ("DP:S7200 DAS:W019", []),
        ("DP:J181 DAS:T814", []),  # a complication of care
        ("DP:I5010 DAS:R060", ["symptom_with_cause"]),
        ("DP:R568 DAS:G400", ["symptom_with_cause"]),
        ("DP:I10 DAS:R060", []),
        ("DP:I5010 DAS:R05", []),
        # Malformed codes are not in the table, and break no other rule.
        ("DP:I5010 DAS:C61X DAS:O9Z DAS:PP", ["unknown_code"]),
        ("DP:I5010 DAS:I10", []),
        ("?:I10", ["no_DP"]),
        ("", ["no_DP"]),
    ],
)
def test_each_rule_is_counted(text, expected):
    assert broken(text) == expected


@pytest.mark.parametrize(
    ("text", "facts", "expected"),
    [
        ("DP:O800", {"sex": "M"}, ["wrong_sex"]),
        ("DP:O800", {"sex": "Homme"}, ["wrong_sex"]),
        ("DP:O800", {"sex": "F"}, []),
        ("DP:C61", {"sex": "F"}, ["wrong_sex"]),
        ("DP:C61", {"sex": "1"}, []),
        ("DP:C509", {"sex": "M"}, []),  # men have breast cancer, too
        ("DP:C61", {"sex": "unknown"}, []),
        ("DP:P220", {"age": "18"}, ["wrong_age"]),
        ("DP:P220", {"age": "17"}, []),
        ("DP:P220", {"age": "3 jours"}, []),
        ("DP:F03", {"age": "14"}, ["wrong_age"]),
        ("DP:F03", {"age": "80"}, []),
        ("DP:O800", {"age": "8"}, ["wrong_age"]),
        ("DP:O800", {"age": "66"}, ["wrong_age"]),
        ("DP:O800", {"age": "13"}, []),
        ("DP:N40", {"sex": "F", "age": "10"}, ["wrong_sex", "wrong_age"]),
    ],
)
def test_sex_and_age_are_compared_with_the_codes(text, facts, expected):
    assert broken(text, **facts) == expected


def test_a_rule_is_out_of_the_stays_to_which_it_applies():
    stays = [coding(text) for text in ("DP:O800", "DP:C61", "DP:S7200", "DP:Z511 DR:C509")]
    rates = rule_rates(stays, TABLE, [{"sex": "M"}, {"sex": "M", "age": "70"}, {}, {}])
    assert {name: (rates[name]["count"], rates[name]["of"]) for name in ("wrong_sex", "wrong_age")} == {
        "wrong_sex": (1, 2),
        "wrong_age": (0, 1),
    }
    assert (rates["session_without_DR"]["count"], rates["session_without_DR"]["of"]) == (0, 1)
    assert rates["injury_without_cause"]["of"] == 1
    # ATIH's table without chapter XX has no code that could be missing.
    assert rule_rates(stays, WITHOUT_CHAPTER_XX)["injury_without_cause"]["of"] == 0


def test_rules_name_the_codes_that_break_them():
    case = Case.build(coding("DP:E1140 DAS:E1198 DAS:C169 DAS:C169+0 DAS:I10"), TABLE)
    assert RULES["excluded_pair"].condition.check(case) == ["E1140", "E1198"]
    assert RULES["parent_and_child"].condition.check(case) == ["C169", "C169+0"]
    assert RULES["wrong_sex"].condition.check(case) is None


# --- Sex and age ------------------------------------------------------------------------------------------------------


def test_sexes_and_ages_are_read_in_their_usual_spellings():
    assert [parse_sex(text) for text in ("M", "h", "Homme", "1", "8507", "MALE")] == ["M"] * 6
    assert [parse_sex(text) for text in ("F", "femme", "Féminin", "2", "8532")] == ["F"] * 5
    assert [parse_sex(text) for text in ("", "I", "3", "?")] == [None] * 4
    assert [parse_age(text) for text in ("67", "67.0", "67,5", "67 ans", "0", "18 mois", "3 j", "2 semaines")] == (
        [67, 67, 67, 67, 0, 1, 0, 0]
    )
    assert [parse_age(text) for text in ("", "-1", "131", "vieux", "1957")] == [None] * 5
    assert age_at("1957-03-02", "2024-03-01T10:00:00") == 66 and age_at("1957-03-02", "2024-03-02") == 67
    assert age_at("2025-01-01", "2024-01-01") is None


def test_a_person_is_read_from_rows_that_agree():
    people = People()
    people.add("a", {"sex": "H", "age": "45"})
    people.add("a", {"age": "44"})
    people.add("b", {"birth": "02/03/1957"})
    people.add("c", {"sex": "H", "age": "1"})
    people.add("c", {"sex": "F"})
    people.add("d", {"sex": "X"})
    people.add("d", {"birth": "02/03/57"})
    assert people.facts("a", None) == {"sex": "M", "age": 44}
    assert people.facts("b", "2024-03-01") == {"age": 66} and people.facts("b", None) == {}
    assert people.facts("c", None) == people.facts("d", None) == people.facts("e", None) == {}
    assert people.warnings() == [
        "2 values of sex, age or birth are not understood (sex 'X', birth '02/03/57'): expected M or F, years, a date",
        "1 stay has two sexes or dates of birth; none is used (e.g. c)",
        "1 stay has a date of birth but no date of discharge, so that the age is not known (e.g. b): name a column, "
        "--columns discharge=COLUMN or age=COLUMN",
    ]


def test_a_note_in_the_column_of_the_age_is_not_quoted():
    people = People()
    people.add("a", {"age": "Patiente de 80 ans adressée pour chute."})
    assert "(age of 39 characters)" in people.warnings()[0]


# --- Reports ----------------------------------------------------------------------------------------------------------

NOTES = [
    "stay,text,sortie,sexe,date_naissance",
    *("a,Une note.,2024-05-01,H,1990-01-01", "b,Une autre.,2024-05-01,F,1950-01-01", "c,Note.,2024-05-01,F,2000-01-01"),
]
ROWS = ["stay,role,code", "a,DP,O800", "b,DP,C61", "b,DAS,P220", "c,DP,I5010", "c,DAS,R060"]


@pytest.fixture
def prepared(run_command, tmp_path):
    """Prepare three stays, of which two break rules; return the output and the folder."""
    for name, lines in (("notes.csv", NOTES), ("codes.csv", ROWS)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [f"{entry.code}|{entry.type}|N|0|X|{entry.label}\n" for entry in TABLE]
    (tmp_path / "cim10.txt").write_text("".join(lines), encoding="utf-8")
    files = {"text": "notes.csv", "codes": "codes.csv", "cim10": "cim10.txt", "out": "data"}
    arguments = [part for option, name in files.items() for part in (f"--{option}", tmp_path / name)]
    code, output = run_command(prepare_icd10_data, *arguments, "--ratios", "1")
    assert code == 0, output
    return output, tmp_path


def test_preparation_counts_and_names_the_stays(prepared):
    output, folder = prepared
    assert "sex: sexe; birth: date_naissance" in output
    report = json.loads((folder / "data/report.json").read_text(encoding="utf-8"))
    rules = {name: (rule["count"], rule["of"], rule["examples"]) for name, rule in report["rules"].items()}
    assert rules["wrong_sex"] == (2, 3, ["a", "b"])
    assert rules["wrong_age"] == (1, 3, ["b"])
    assert rules["symptom_with_cause"] == (1, 1, ["c"])
    assert report["rules_version"] == guide_rules().version
    with (folder / "data/rules.csv").open(encoding="utf-8", newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [
            ("a", "to check", "wrong_sex", "O800"),
            ("b", "to check", "wrong_sex", "C61"),
            ("b", "to check", "wrong_age", "P220"),
            ("c", "to check", "symptom_with_cause", "I5010 R060"),
        ]
    assert "Broken coding rules" not in output
    assert output.index("To check (not forbidden)") < output.index("a code of the other sex")
    rows = [json.loads(line) for line in (folder / "data/train_instruct.jsonl").open(encoding="utf-8")]
    assert [(row["sex"], row["age"]) for row in rows] == [("M", 34), ("F", 74), ("F", 24)]


def test_evaluation_shows_rules_of_predictions_and_gold(prepared, run_command):
    folder = prepared[1]
    predictions = [{"id": "a", "codes": ["C61"]}, {"id": "b", "codes": ["C61", "P220"]}, {"id": "c", "codes": []}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions), encoding="utf-8")
    files = {"gold": "data/train_instruct.jsonl", "predictions": "p.jsonl", "cim10": "cim10.txt"}
    outputs = {"json": "s.json", "html": "s.html", "csv": "s.csv"}
    arguments = [part for option, name in (files | outputs).items() for part in (f"--{option}", folder / name)]
    code, output = run_command(evaluate_icd10, *arguments)
    assert code == 0, output
    result = json.loads((folder / "s.json").read_text(encoding="utf-8"))
    assert result["to_check"]["wrong_sex"] == {"count": 1, "of": 2, "rate": 0.5}
    assert result["gold_to_check"]["wrong_sex"] == {"count": 2, "of": 3, "rate": 2 / 3}
    assert result["rates"]["no_DP"]["count"] == 3 and "no_DP" not in result["to_check"]
    assert "a code of the other sex (ours, after volume 2): 1 of 2, in gold 2 of 3" in output
    assert output.index("Broken coding rules:") < output.index("To check (not forbidden):")
    with (folder / "s.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["id"]: line for line in csv.DictReader(file)}
    assert lines["a"]["gold_rules"] == "wrong_sex" and lines["a"]["rules"] == "no_DP"
    assert lines["b"]["rules"] == "no_DP wrong_sex wrong_age" and lines["c"]["gold_rules"] == "symptom_with_cause"
    page = (folder / "s.html").read_text(encoding="utf-8")
    assert "Broken coding rules" in page and "To check (not forbidden)" in page and "2 of 3" in page
    assert guide_rules().version in page


def test_tables_of_gold_have_sex_and_age(run_command, tmp_path):
    (tmp_path / "gold.csv").write_text("NDA;SEXE;AGE;DP;DAS1\n1;1;40;O800;\n2;2;40;O800;\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text("id,role,code\n1,DP,O800\n2,DP,O800\n", encoding="utf-8")
    (tmp_path / "t.txt").write_text("O800|0|N|0|X|Accouchement\n", encoding="utf-8")
    files = {"gold": "gold.csv", "predictions": "p.csv", "cim10": "t.txt", "json": "s.json"}
    arguments = [part for option, name in files.items() for part in (f"--{option}", tmp_path / name)]
    code, output = run_command(evaluate_icd10, *arguments)
    assert code == 0, output
    result = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert result["to_check"]["wrong_sex"] == {"count": 1, "of": 2, "rate": 0.5}
    assert result["to_check"]["wrong_age"]["of"] == 2
