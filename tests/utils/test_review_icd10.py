"""Second reading: what is a disagreement, in which order they come, and what becomes of decisions about them."""

import csv
import json

import pytest

from utils import review_icd10
from utils.icd10.answers import Diagnosis, build_answer, parse_answer
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.decisions import COLUMNS
from utils.icd10.journal import note_hash
from utils.icd10.predictions import NOTHING_MORE, Prediction
from utils.icd10.prompts import prompt_messages
from utils.icd10.second_reading import SecondReader, agreed
from utils.tables.read_table import read_table

CODES = ("I10", "I500", "I501", "E119", "E112", "J90", "Z511", "C349", "=1")
TABLE = Cim10Table([Cim10Entry(code, 0, f"Maladie {code}") for code in CODES[:-1]])


def coding(text, **confidence):
    """Return a prediction of `DP I10 DAS J90 E119`, and the confidence of codes."""
    diagnoses, role = [], None
    for word in text.split():
        role = word if word in ("DP", "DR", "DAS") else role
        diagnoses += [] if word == role else [Diagnosis(role, word)]
    return Prediction(diagnoses, confidence=confidence)


@pytest.mark.parametrize(
    ("coded", "predicted", "corrections"),
    [
        ("DP I10 DAS J90", "DP I10 DAS J90", []),
        ("DP I10", "DP I500", ["DP I10 I500"]),
        ("DP I10", "DAS I10", []),  # the model names no DP: it says nothing about the coder's
        ("DP Z511 DR C349", "DP Z511", ["DR C349 -"]),
        ("DP Z511", "DP Z511 DR C349", ["DR - C349"]),
        ("DP I10 DAS J90", "DP I10 DAS E119", ["DAS - E119", "DAS J90 -"]),
        ("DP I10 DAS E119", "DP I10 DAS E112", ["DAS E119 E112"]),  # of one category
        ("DP I10 DAS J90", "DP J90 DAS I10", ["DP I10 J90", "DAS - I10"]),  # exchanged
        ("DP I10", "J90 I10", ["DAS - J90"]),  # an answer without roles
    ],
)
def test_disagreements(coded, predicted, corrections):
    items = SecondReader({}, TABLE).disagreements(coding(coded), coding(predicted))
    assert [f"{item.role} {item.coded or '-'} {item.proposed or '-'}" for item in items] == corrections
    assert all(item.label == f"Maladie {item.proposed or item.coded}" for item in items)


def test_order_is_confidence_times_effect():
    coded = coding("DP I10 DAS J90 E119")
    predicted = coding("DP I500 DAS C349 Z511", I500=0.5, C349=0.9, Z511=0.99, **{NOTHING_MORE: 0.6})
    items = SecondReader({"C349": 4, "J90": 3}, TABLE).disagreements(coded, predicted)
    found = [(item.role, item.coded, item.proposed, item.confidence, item.effect) for item in items]
    assert found == [
        ("DP", "I10", "I500", 0.5, 10.0),  # 5.0
        ("DAS", "", "C349", 0.9, 4.0),  # 3.6
        ("DAS", "J90", "", 0.6, 3.0),  # 1.8: it is removed if there is nothing more to code
        ("DAS", "", "Z511", 0.99, 1.0),
        ("DAS", "E119", "", 0.6, 1.0),
    ]
    assert agreed(coded, items) == ()


@pytest.fixture
def second_reading(tmp_path, run_command):
    """Return a function that compares three stays; the second has a hostile coder."""
    table = "".join(f"{entry.code}|0|OOOO|0|M|{entry.label}\n" for entry in TABLE)
    (tmp_path / "cim10.txt").write_text(table, encoding="utf-8")
    (tmp_path / "notes.csv").write_text("stay,text\ns1,Dyspnée.\ns2,Toux.\ns3,Chute.\n", encoding="utf-8")
    rows = ["RSS;DP;DAS1;DAS2;date_sortie;codeur;service", "s1;I10;J90;E119;03/11/2026;AB;cardio"]
    rows += ["s2;I10;;;04/12/2026;=cmd();cardio", "s3;I10;;;05/12/2026;AB;chirurgie"]
    (tmp_path / "rss.csv").write_text("\n".join(rows), encoding="utf-8")
    answers = {"s1": ("I500", 0.8), "s2": ("J90", 0.9), "s3": ("I10", 0.99)}
    with (tmp_path / "p.jsonl").open("w", encoding="utf-8") as file:
        for stay, (dp, chance) in answers.items():
            evidence = [{"sentence": "Une phrase.", "document": "CRH", "date": "", "marks": ["family"]}]
            codes = [{"role": "DP", "code": dp, "label": "", "confidence": chance, "evidence": evidence}]
            codes += [{"role": "DAS", "code": "J90", "label": ""}] if stay == "s1" else []
            file.write(json.dumps({"id": stay, "codes": codes, NOTHING_MORE: {"confidence": 0.7}}) + "\n")

    def run(*options):
        files = ("--coded", tmp_path / "rss.csv", "--predictions", tmp_path / "p.jsonl", "--out", tmp_path / "out")
        return run_command(
            review_icd10, *files, "--notes", tmp_path / "notes.csv", "--cim10", tmp_path / "cim10.txt", *options
        )

    return run


def test_csv_and_counts(second_reading, tmp_path):
    code, output = second_reading()
    assert code == 0 and "3 stays compared, 2 with a disagreement" in output
    assert "  DP 2, DR 0, DAS 1" in output.splitlines()
    with (tmp_path / "out/disagreements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stay"], row["role"], row["coded"], row["proposed"], row["score"]) for row in rows] == [
        ("s2", "DP", "I10", "J90", "9.0"),
        ("s1", "DP", "I10", "I500", "8.0"),
        ("s1", "DAS", "E119", "", "0.7"),
    ]
    assert rows[0]["month"] == "2026-12" and rows[0]["specialty"] == "cardio"
    assert rows[0]["coder"] == "'=cmd()"  # no formula in a spreadsheet
    page = (tmp_path / "out/review.html").read_text(encoding="utf-8")
    for text in (
        '{"about": "CRH, family", "text": "Une phrase."}',
        "By coder",
        "By month",
        "By specialty",
        "chirurgie",
    ):
        assert text in page
    code, output = second_reading("--by", "service")
    assert "By service" in (tmp_path / "out/review.html").read_text(encoding="utf-8")
    code, output = second_reading("--by", "ward")
    assert code == 1 and "--by: no column ward" in output


def test_complications_order_das(second_reading, tmp_path):
    (tmp_path / "cma.csv").write_text("code,niveau\nE11.9,4\n")
    assert second_reading("--complications", tmp_path / "cma.csv")[0] == 0
    rows = [row for _, row in read_table(tmp_path / "out/disagreements.csv")]
    assert [(row["coded"], row["effect"]) for row in rows][2] == ("E119", "4.0")
    (tmp_path / "cma.csv").write_text("code,niveau\nE11.9,9\n")
    code, output = second_reading("--complications", tmp_path / "cma.csv")
    assert code == 1 and "row 2: level '9'; expected 1, 2, 3 or 4." in output


def test_decisions_are_counted_and_become_rows_to_train_on(second_reading, tmp_path):
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerow(("s1", note_hash("Dyspnée."), "DP", "I10", "I500", "accepted", "I500", "AB", "t"))
        writer.writerow(("s1", note_hash("Dyspnée."), "DAS", "E119", "", "replaced", "E112", "AB", "t"))
        writer.writerow(("s2", note_hash("Another note."), "DP", "I10", "J90", "refused", "I10", "AB", "t"))
    code, output = second_reading("--decisions", tmp_path / "d.csv")
    assert code == 0 and "Decisions on 2 stays, 1 correction accepted:" in output
    assert "  DP   1 accepted, 1 refused, 0 replaced, 0 added (50.0% of the proposals accepted)" in output.splitlines()
    assert "1 row to train on, 1 in all" in output and "s2: no note, or not the one that was reviewed" in output
    (row,) = (row for _, row in read_table(tmp_path / "out/corrections.jsonl"))
    expected = parse_answer("DP I500. DAS J90, E112")
    codes = [item._replace(label=TABLE.label(item.code)) for item in expected]
    answered = parse_answer(row["messages"][-1]["content"])
    assert row["id"] == "s1" and row["messages"][:-1] == prompt_messages("Dyspnée.")
    assert sorted(answered) == sorted(codes) and build_answer(answered) == row["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("stay", "coded", "message"),
    [
        ("s9", "I10", "stay 's9' is not in "),
        ("s1", "Z511", "stay 's1' has no DP Z511 in "),  # coded again since the page was written
    ],
)
def test_decisions_on_other_codes_are_refused(stay, coded, message, second_reading, tmp_path):
    row = (stay, note_hash("Dyspnée."), "DP", coded, "I500", "accepted", "I500", "AB", "t")
    (tmp_path / "d.csv").write_text("\n".join(map(",".join, (COLUMNS, row))), encoding="utf-8")
    code, output = second_reading("--decisions", tmp_path / "d.csv")
    assert code == 1 and message in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("notes", [("Dyspnée.", "An earlier note."), ("An earlier note.", "Dyspnée.")])
def test_codes_are_those_of_the_note_that_was_reviewed(notes, second_reading, tmp_path):
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [("s1", note_hash(note), "DP", "I10", "I500", "accepted", "I500", "AB", "") for note in notes]
        rows = [row if row[1] == note_hash("Dyspnée.") else (*row[:5], "refused", "I10", *row[7:]) for row in rows]
        csv.writer(file).writerows((COLUMNS, *rows))
    assert second_reading("--decisions", tmp_path / "d.csv")[0] == 0
    (row,) = (row for _, row in read_table(tmp_path / "out/corrections.jsonl"))
    assert parse_answer(row["messages"][-1]["content"])[0].code == "I500"


@pytest.mark.parametrize("evidence", [3, [{"document": "CRH"}], ["Une phrase."], [{"sentence": "x", "marks": 3}]])
def test_evidence_of_another_tool_is_refused(evidence, second_reading, tmp_path):
    row = {"id": "s1", "codes": [{"role": "DP", "code": "I500", "evidence": evidence}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    code, output = second_reading()
    assert code == 1 and "p.jsonl, line 1: `evidence` that is not a list of sentences" in output


def test_a_worklist_is_not_overwritten(second_reading, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/journal.jsonl").touch()
    code, output = second_reading()
    assert code == 1 and "is a worklist of utils.code_stays" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.jsonl"]


def test_reviewed_stays_leave_the_page_unless_their_note_changed(second_reading, tmp_path):
    def page():
        return (tmp_path / "out/review.html").read_text(encoding="utf-8")

    assert second_reading()[0] == 0 and '"s1"' in page() and '"s2"' in page()
    lines = [("s1", note_hash("Dyspnée."), "DP", "I10", "I500", "accepted", "I500", "AB", "t")]
    lines += [("s2", note_hash("Another note."), "DP", "I10", "J90", "refused", "I10", "AB", "t")]
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    assert second_reading("--decisions", tmp_path / "d.csv")[0] == 0
    assert '"s1"' not in page() and '"s2"' in page() and "2 with a disagreement, 1 of them reviewed" in page()
    assert "s1," in (tmp_path / "out/disagreements.csv").read_text(encoding="utf-8")


def test_a_list_of_complications_without_levels_is_named(second_reading, tmp_path):
    (tmp_path / "cma.csv").write_text("code;severite_x\nJ90;4\n", encoding="utf-8")
    code, output = second_reading("--complications", tmp_path / "cma.csv")
    assert code == 0 and "cma.csv has no column of levels" in output and "Found code, severite_x." in output


def test_decisions_need_notes(tmp_path, run_command):
    files = ("--coded", tmp_path / "c", "--predictions", tmp_path / "p", "--out", tmp_path / "o")
    code, output = run_command(review_icd10, *files, "--decisions", tmp_path / "d.csv")
    assert code == 1 and "--decisions needs --notes and --cim10" in output
