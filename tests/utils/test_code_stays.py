"""The weekly worklist: every stay is coded once, whatever happens, and what reviewers decide is kept."""

import csv
import errno
import json
import os
import pathlib
import random
import re
import signal
import stat
import time

import pytest

from model.atomic import temporary_path
from model.errors import UserError
from tests.support.patience import wait_until
from utils import code_stays
from utils.engines.choice import EngineChoice
from utils.engines.engine import Reply
from utils.engines.marking import Marker
from utils.engines.prompts import Prompt
from utils.icd10.answers import build_answer, parse_answer
from utils.icd10.calibration import Calibration
from utils.icd10.codes import Cim10Table
from utils.icd10.decisions import COLUMNS
from utils.icd10.drift import coded_once
from utils.icd10.journal import CODED, EXPLAINED, Key, note_hash, open_journal
from utils.icd10.prompts import note_of, prompt_messages
from utils.icd10.review_items import Evidence
from utils.icd10.rules import guide_rules
from utils.tables.jsonl import read_lines, save
from utils.tables.read_table import read_table

TABLE = """I10|0|OOOO|0|HYPERTENSION|Hypertension essentielle (primitive)
I500|0|OOOO|0|INSUFFISANCE|Insuffisance cardiaque congestive
E119|0|OOOO|0|DIABETE|Diabète sucré de type 2, sans complication
"""
ANSWER = (
    "Codes CIM 10 retenus pour le résumé strandisé de sortie PMSI : diagnostic principal : Insuffisance cardiaque "
    "congestive (I500), diagnistic relié : aucun, diagnostic associé : Hypertension essentielle (primitive) (I10)"
)
SECRET = "=HYPERLINK(une phrase de la note)"  # a note that begins like a formula


class StandIn:
    """An engine with the same answer for every note, which records what it is asked."""

    def __init__(self, pause=0.0):
        self.asked, self.pause, self.answer = [], pause, ANSWER

    def answers(self, prompts):
        for prompt in prompts:
            time.sleep(self.pause)
            self.asked.append(prompt.id)
            yield prompt, Reply(self.answer, (), True)


@pytest.fixture
def week(tmp_path, monkeypatch, run_command):
    """Return a function that codes an export, given as notes by stay; the engine is its attribute."""
    engine = StandIn()
    monkeypatch.setattr(EngineChoice, "open", lambda choice: engine)
    (tmp_path / "cim10.txt").write_text(TABLE, encoding="utf-8")

    def code(notes, *options):
        with (tmp_path / "export.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("NDA", "CR"), *notes.items()])
        server = ("--engine", "server", "--server", "http://127.0.0.1:9/v1", "--model", "m")
        files = ("--stays", tmp_path / "export.csv", "--out", tmp_path / "list", "--cim10", tmp_path / "cim10.txt")
        return run_command(code_stays, *files, *server, *options)

    code.engine = engine
    return code


def events(folder):
    return [json.loads(line) for _, line in read_lines(folder / "journal.jsonl")]


def decisions(path, *rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def test_only_new_and_changed_notes_are_coded(week, tmp_path):
    assert week({"s1": "Dyspnée.", "s2": "Toux."})[0] == 0
    code, output = week({"s1": "Dyspnée.", "s2": "Toux, fièvre.", "s3": "Chute."})
    assert code == 0 and "2 stays coded now, 1 before; 3 to review" in output
    assert week.engine.asked == ["s1", "s2", "s2", "s3"]
    assert "0 stays coded now, 3 before" in week({"s1": "Dyspnée.", "s2": "Toux, fièvre.", "s3": "Chute."})[1]
    journal = events(tmp_path / "list")
    assert [(row["event"], row["stay"], row["note"]) for row in journal] == [
        ("coded", "s1", note_hash("Dyspnée.")),
        ("coded", "s2", note_hash("Toux.")),
        ("coded", "s2", note_hash("Toux, fièvre.")),
        ("coded", "s3", note_hash("Chute.")),
    ]
    first = journal[0]
    assert first["codes"] == [item._asdict() for item in parse_answer(ANSWER)] and first["time"][:2] == "20"
    assert (
        first["versions"]["model"] == "m"
        and first["versions"]["cim10"]
        and first["versions"]["rules"]
        and first["versions"]["calibrated"] is False
    )
    rows = [row for _, row in read_table(tmp_path / "list/worklist.csv")]
    assert [(row["stay"], row["role"], row["code"]) for row in rows][:2] == [("s1", "DP", "I500"), ("s1", "DAS", "I10")]
    assert len(rows) == 6


def test_proposals_of_another_table_are_kept_and_counted(week, tmp_path):
    assert "coded before with another" not in week({"s1": "Dyspnée.", "s2": "Toux."})[1]
    with (tmp_path / "cim10.txt").open("a", encoding="utf-8") as file:
        file.write("R05|0|OOOO|0|TOUX|Toux\n")
    code, output = week({"s2": "Toux.", "s3": "Chute."})
    assert code == 0 and "1 stay to review: coded before with another model, CIM-10 table or rules file" in output
    assert week.engine.asked == ["s1", "s2", "s3"]


def test_files_are_the_owners_and_text_stays_in_the_folder(week, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()} | {"export.csv", "list"}
    code, output = week({"=s1": SECRET, "s2": "", "s3": "</script><b>&"})
    assert code == 1 and "blank, NULL or nan: 1" in output and SECRET not in output
    assert {path.name for path in tmp_path.iterdir()} == before
    files = list((tmp_path / "list").iterdir())
    assert {path.name for path in files} == {"journal.jsonl", "worklist.csv", "review.html", "worklist.left_out.csv"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert SECRET not in (tmp_path / "list/journal.jsonl").read_text(encoding="utf-8")
    with (tmp_path / "list/worklist.csv").open(encoding="utf-8", newline="") as file:
        assert {row["stay"] for row in csv.DictReader(file)} == {"'=s1", "s3"}
    assert "</script><b>" not in (tmp_path / "list/review.html").read_text(encoding="utf-8")


def test_rules_of_sex_and_age_read_the_columns_of_the_export(week, tmp_path):
    (tmp_path / "cim10.txt").write_text(TABLE + "N40|0|OOOO|0|PROSTATE|Hyperplasie de la prostate\n", encoding="utf-8")
    week.engine.answer = ANSWER.replace(
        "Hypertension essentielle (primitive) (I10)", "Hyperplasie de la prostate (N40)"
    )
    rows = [
        ("NDA", "SEXE", "DDN", "DATE_SORTIE", "CR"),
        ("s1", "2", "15/03/1950", "20/11/2026", "Dyspnée."),
        ("s2", "1", "15/03/1950", "20/11/2026", "Toux."),
        ("s3", "1", "15/03/2020", "46346", "Chute."),  # as Excel stores a date
        ("", "1", "15/03/1950", "20/11/2026", "Un document sans séjour."),
    ]
    text = "".join(";".join(row) + "\r\n" for row in rows)
    (tmp_path / "week.csv").write_bytes(text.encode("cp1252"))
    code, output = week({}, "--stays", tmp_path / "week.csv")
    assert code == 1 and "stay: NDA; text: CR; discharge: DATE_SORTIE; sex: SEXE; birth: DDN" in output
    assert "1 row was not used" in output and "without an identifier of the stay: 1" in output
    found = {row["stay"]: row.get("rules") for row in events(tmp_path / "list")}
    assert found == {"s1": ["wrong_sex"], "s2": None, "s3": ["wrong_age"]}
    rules = {row["stay"]: row["rules"] for _, row in read_table(tmp_path / "list/worklist.csv")}
    assert rules == {"s1": "wrong_sex", "s2": "", "s3": "wrong_age"}
    page = (tmp_path / "list/review.html").read_text(encoding="utf-8")
    assert "wrong_sex: stays with a code of the other sex" in page, "a reviewer does not know the rules by name"


def test_an_export_without_a_column_of_the_stay_is_refused(week, tmp_path):
    (tmp_path / "week.csv").write_text("NUMERO_X;CR\r\n1;Dyspnée.\r\n", encoding="utf-8")
    code, output = week({}, "--stays", tmp_path / "week.csv")
    assert code == 1 and "no column for stay; found 'NUMERO_X', 'CR'" in output and "--columns stay=COLUMN" in output
    assert not (tmp_path / "list").exists()
    assert week({}, "--stays", tmp_path / "week.csv", "--columns", "stay=NUMERO_X")[0] == 0
    rows = [{"messages": prompt_messages("Dyspnée.")}, {"id": "s2", "messages": prompt_messages("Toux.")}]
    (tmp_path / "week.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, output = week({}, "--stays", tmp_path / "week.jsonl")
    assert code == 1 and "without an identifier of the stay: 1" in output
    assert [row["stay"] for row in events(tmp_path / "list")] == ["1", "s2"]


def test_reviews_are_kept_and_become_rows_to_train_on(week, tmp_path):
    notes = {"s1": "Dyspnée.", "s2": "Toux."}
    week(notes)
    one, two = note_hash("Dyspnée."), note_hash("Toux.")
    file = decisions(
        tmp_path / "decisions.csv",
        ("s1", one, "DP", "", "I500", "accepted", "I500", "AB", "2026-11-28T10:00:00Z"),
        ("s1", one, "DAS", "", "I10", "replaced", "E11.9", "AB", "2026-11-28T10:00:00Z"),
        ("s2", two, "DP", "", "I500", "refused", "", "AB", "2026-11-28T10:01:00Z"),
        ("s2", two, "DAS", "", "I10", "accepted", "I10", "AB", "2026-11-28T10:01:00Z"),
    )
    code, output = week(notes, "--decisions", file)
    assert code == 0 and "2 new reviews of 2 stays:" in output
    assert "  DP   1 accepted, 1 refused, 0 replaced, 0 added (50.0% of the proposals accepted)" in output.splitlines()
    assert "left out of it: s2: without a usable DP\n" in output and "; 0 to review" in output
    review = events(tmp_path / "list")[2]
    assert (review["event"], review["stay"], review["reviewer"]) == ("reviewed", "s1", "AB")
    assert review["codes"][1]["final"] == "E119"
    (row,) = (row for _, row in read_table(tmp_path / "list/corrections.jsonl"))
    table = Cim10Table.from_file(tmp_path / "cim10.txt")
    codes = [item._replace(label=table.label(item.code)) for item in parse_answer("DP I500. DAS E119")]
    assert row["messages"] == [*prompt_messages("Dyspnée."), {"role": "assistant", "content": build_answer(codes)}]
    assert "0 new reviews" in week(notes, "--decisions", file)[1] and len(events(tmp_path / "list")) == 4
    # A note that changes is to be coded and reviewed again; the row to train on stays.
    assert "1 stay coded now, 1 before; 1 to review" in week(notes | {"s1": "Dyspnée, œdèmes."})[1]
    assert len(list(read_table(tmp_path / "list/corrections.jsonl"))) == 1


def test_no_hash_of_a_note_is_a_number():
    """A spreadsheet would change 12345678901234e5, and the decisions that it saves would be of no note."""
    assert all(note_hash(str(number)).isalpha() for number in range(100))
    assert len({note_hash(str(number)) for number in range(100)}) == 100


def test_evidence_is_kept_by_its_place_and_shown_as_text(tmp_path):
    text = "Dyspnée. Pas de fièvre."
    key, prompt = Key("s1", note_hash(text)), Prompt("s1", {"messages": prompt_messages(text)})
    codes = [item._asdict() for item in parse_answer(ANSWER)]
    sentence = {"start": 9, "end": 23, "document": "CRH", "date": "", "drop": 1.5, "marks": ["negation"]}
    with open_journal(tmp_path / "journal.jsonl") as journal:
        journal.append(CODED, key, {"codes": codes, "rules": ["a_rule"]})
        assert [item.evidence for item in code_stays.to_review({key: prompt}, journal)[0].items] == [(), ()]
        journal.append(EXPLAINED, key, {"codes": [{"code": "I10", "evidence": [sentence]}]})
        stays = code_stays.to_review({key: prompt}, journal)
    assert [item.evidence for item in stays[0].items] == [(), (Evidence("Pas de fièvre.", "CRH, negation"),)]
    assert code_stays.worklist_csv(stays).splitlines()[2].endswith(",Pas de fièvre.")
    assert stays[0].broken == ("a_rule",) and ",a_rule,DAS,I10," in code_stays.worklist_csv(stays)
    assert "fièvre" not in (tmp_path / "journal.jsonl").read_text(encoding="utf-8")


def test_stays_are_marked_by_the_present_calibration_and_share(tmp_path):
    """A worklist with --auto 0.98 shows no decision of an earlier call with --auto 0.5."""
    key, prompt = Key("s1", note_hash("Toux.")), Prompt("s1", {"messages": prompt_messages("Toux.")})
    codes = [item._asdict() | {"probability": 0.9} for item in parse_answer(ANSWER)]
    calibration = Calibration("platt", {"DP": {"slope": 0, "intercept": 1}}, [(0.9, True)] * 30, {})
    versions = {"run": "r", "calibrated": True}
    with open_journal(tmp_path / "journal.jsonl") as journal:
        journal.append(CODED, key, {"versions": versions | {"calibrated": False}} | Marker().mark({"codes": codes}))

        def marks(marker, **more):
            code_stays.mark_again(marker, [key], journal, versions | more)
            (stay,) = code_stays.to_review({key: prompt}, journal)
            drift = coded_once(journal)[0]
            assert (drift.marked or "", drift.confidence) == (stay.decision, stay.items[0].confidence)
            return stay.decision, stay.items[0].confidence

        sure = 0.731059
        assert marks(Marker(calibration, calibration.auto_rule(0.5))) == ("auto", sure)
        assert marks(Marker(calibration, calibration.auto_rule(0.9)), run="another model") == ("auto", sure)
        assert marks(Marker(calibration, calibration.auto_rule(0.9))) == ("to_review", sure)
        assert marks(Marker(calibration, calibration.auto_rule(0.9))) == ("to_review", sure)
        assert marks(Marker()) == ("", 0.9)
    assert [row["event"] for _, row in read_table(tmp_path / "journal.jsonl")] == ["coded", *["marked"] * 3]
    with open_journal(tmp_path / "journal.jsonl") as journal:
        assert code_stays.to_review({key: prompt}, journal)[0].decision == ""


def test_the_drift_page_compares_with_training(week, tmp_path):
    answer = build_answer(parse_answer("DP I10 : a (I10). DAS : b (E119)"))
    row = {"id": "t", "messages": [*prompt_messages("x"), {"role": "assistant", "content": answer}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert week({f"s{number}": f"Note {number}." for number in range(9)}, "--train", tmp_path / "train.jsonl")[0] == 0
    page = tmp_path / "list/drift.html"
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.read_text(encoding="utf-8"))
    assert cells[:3] == ["training", "1", "2.0"] and cells[9:11] == ["9", "2.0"]
    assert cells[14] == "50.0%"  # I500 is unknown to training
    code, output = week({"s1": "Note 1."}, "--train", tmp_path / "nothing.jsonl")
    assert code == 1 and "nothing.jsonl does not exist" in output


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("DP", "", "I500", "maybe", "I500"), "line 2: decision 'maybe'; expected accepted, refused, replaced, added."),
        (("DQ", "", "I500", "refused", ""), "line 2: role 'DQ'; expected DP, DR, DAS or nothing."),
        (("DP", "", "I500", "accepted", "I10"), "line 2: accepted, with final code 'I10'; expected 'I500'."),
        (("DP", "", "I500", "replaced", ""), "line 2: replaced, with final code ''; expected 'a code'."),
        (
            ("DP", "", "I500", "replaced", "I501"),
            "line 2: replaced, with final code 'I501', which is not in the CIM-10",
        ),
        (
            ("DP", "", "I500", "accepted", "I500"),
            "found decisions on DP I500; expected one on each of DAS I10, DP I500.",
        ),
        (("DP", "I10", "I500", "accepted", "I500"), "found decisions on DP I10 I500; expected one on each of DAS I10"),
    ],
)
def test_wrong_decisions_change_nothing(cells, message, week, tmp_path):
    week({"s1": "Dyspnée."})
    before = (tmp_path / "list/journal.jsonl").read_bytes()
    file = decisions(tmp_path / "d.csv", ("s1", note_hash("Dyspnée."), *cells, "", ""))
    code, output = week({"s1": "Dyspnée."}, "--decisions", file)
    assert code == 1 and message in output and "Traceback" not in output
    assert (tmp_path / "list/journal.jsonl").read_bytes() == before


def accepted(stay, text, dp, when):
    """Return the lines of a review: the DP is `dp`, and the DAS is accepted."""
    judged = ("accepted", "I500") if dp == "I500" else ("replaced", dp)
    key = (stay, note_hash(text))
    return [(*key, "DP", "", "I500", *judged, "AB", when), (*key, "DAS", "", "I10", "accepted", "I10", "AB", when)]


def main_diagnosis(path):
    ((_, row),) = read_table(path)
    return parse_answer(row["messages"][-1]["content"])[0].code


def test_a_code_is_decided_once(week, tmp_path):
    week({"s1": "Dyspnée."})
    file = decisions(tmp_path / "d.csv", *accepted("s1", "Dyspnée.", "I500", "") * 2)
    code, output = week({"s1": "Dyspnée."}, "--decisions", file)
    assert code == 1 and "line 4: a code that is decided twice; give each file of a page as it" in output


def test_the_latest_review_counts_whatever_the_order_of_the_files(week, tmp_path):
    """Browsers name a second download `decisions (1).csv`, which comes before `decisions.csv`."""
    week({"s1": "Dyspnée."})
    old = decisions(tmp_path / "decisions.csv", *accepted("s1", "Dyspnée.", "I500", "2026-11-27T10:00:00Z"))
    new = decisions(tmp_path / "decisions (1).csv", *accepted("s1", "Dyspnée.", "E119", "2026-11-28T09:00:00Z"))
    assert "1 new review of 1 stay:" in week({"s1": "Dyspnée."}, "--decisions", new, old)[1]
    assert main_diagnosis(tmp_path / "list/corrections.jsonl") == "E119"
    output = week({"s1": "Dyspnée."}, "--decisions", old)[1]
    assert "0 new reviews of 0 stays:" in output
    assert "warning: 1 review not taken: journal.jsonl has a later one of the same note" in output
    assert [row["event"] for row in events(tmp_path / "list")] == ["coded", "reviewed"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_codes_are_those_of_the_note_that_was_reviewed(order, week, tmp_path):
    week({"s1": "Dyspnée."})
    week({"s1": "Toux."})
    files = [
        decisions(tmp_path / "1.csv", *accepted("s1", "Dyspnée.", "E119", "2026-11-28T10:00:00Z")),
        decisions(tmp_path / "2.csv", *accepted("s1", "Toux.", "I500", "2026-11-27T10:00:00Z")),
    ]
    code, output = week({"s1": "Toux."}, "--decisions", *(files[place] for place in order))
    assert code == 0 and "2 new reviews of 2 stays:" in output
    assert main_diagnosis(tmp_path / "list/corrections.jsonl") == "I500"


def test_decisions_of_another_folder_are_refused(week, tmp_path):
    week({"s1": "Dyspnée."})
    file = decisions(tmp_path / "d.csv", ("s9", "0" * 16, "DP", "", "I500", "accepted", "I500", "", ""))
    code, output = week({"s1": "Dyspnée."}, "--decisions", file)
    assert code == 1 and "stay 's9'" in output and "give the decisions of this folder's page" in output
    assert "A spreadsheet that saves them changes identifiers" in output


def test_what_is_expected_of_marked_stays_is_printed(week, tmp_path):
    week({"s1": "Dyspnée."})
    versions = events(tmp_path / "list")[0]["versions"]
    conditions = {"cim10": versions["cim10"], "rules": versions["rules"], "sampling": None}
    of_dp = {"DP": {"slope": 1.0, "intercept": 0.0, "codes": 30, "correct": 30}}
    calibration = Calibration("platt", of_dp, [(0.9, True)] * 30, conditions)
    (tmp_path / "c.json").write_text(calibration.to_json(), encoding="utf-8")
    options = ("--auto", "0.8", "--calibration", tmp_path / "c.json")
    for _ in range(2):
        assert "auto: 0 of 2 stays\n" in week({"s1": "Dyspnée.", "s2": "Toux."}, *options)[1]
    notes = [("s1", "Dyspnée."), ("s2", "Toux.")]
    file = decisions(tmp_path / "d.csv", *(line for note in notes for line in accepted(*note, "I500", "")))
    assert "auto:" not in week(dict(notes), *options, "--decisions", file)[1], "nothing is to be reviewed"


@pytest.mark.parametrize("share", ["0", "1", "98"])
def test_a_share_out_of_range_is_refused(share, week, tmp_path):
    code, output = week({"s1": "Dyspnée."}, "--auto", share)
    assert code == 1 and "--auto must be above 0 and below 1, such as 0.98" in output and not week.engine.asked
    assert not (tmp_path / "list").exists()


def test_a_folder_with_other_files_is_refused(week, tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list/worklist.csv").write_text("mine")
    code, output = week({"s1": "Dyspnée."})
    assert code == 1 and "has worklist.csv but no journal.jsonl" in output and not week.engine.asked
    (tmp_path / "list/worklist.csv").rename(tmp_path / "list/journal.jsonl")
    code, output = week({"s1": "Dyspnée."})
    assert code == 1 and "line 1: expected an event of utils.code_stays" in output
    assert (tmp_path / "list/journal.jsonl").read_text() == "mine"


def test_a_torn_line_is_dropped_and_whole_ones_are_kept(week, tmp_path):
    week({"s1": "Dyspnée.", "s2": "Toux."})
    path = tmp_path / "list/journal.jsonl"
    whole = path.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    for kept in (5, len(first) - 2, len(first) + 12, len(whole) - 2):
        path.write_bytes(whole[:kept])
        week.engine.asked.clear()
        assert week({"s1": "Dyspnée.", "s2": "Toux."})[0] == 0
        assert week.engine.asked == (["s1", "s2"] if kept < len(first) else ["s2"])
        assert [row["stay"] for row in events(tmp_path / "list")] == ["s1", "s2"]
        assert path.read_bytes().startswith(first) or kept < len(first)


def test_a_whole_last_line_is_kept_without_its_line_end(week, tmp_path):
    week({"s1": "Dyspnée.", "s2": "Toux."})
    path = tmp_path / "list/journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert "0 stays coded now, 2 before" in week({"s1": "Dyspnée.", "s2": "Toux."})[1]
    assert path.read_bytes() == content


PLACE = {"start": 0, "end": 1, "document": "", "date": "", "drop": 1.0, "marks": []}


def edited(event, /, **parts):
    """Return an event of the journal with other parts; `code` has those of its first code."""
    codes = [event["codes"][0] | parts.pop("code", {}), *event["codes"][1:]]
    return event | {"codes": codes} | parts


@pytest.mark.parametrize(
    "parts",
    [
        {"note": []},
        {"note": 5},
        {"time": "yesterday"},
        {"codes": [3]},
        {"code": {"role": "DQ"}},
        {"code": {"code": 5}},
        {"code": {"label": None}},
        {"code": {"confidence": "high"}},
        {"code": {"probability": 7}},
        {"rules": 3},
        {"rules": [3]},
        {"decision": ["auto"]},
        {"event": "reviewed"},  # without decisions
        {"event": "explained"},
        {"event": "explained", "codes": [{"code": "I10", "evidence": [{"start": 0}]}]},
        {"event": "explained", "codes": [{"code": "I10", "evidence": [PLACE | {"start": 2}]}]},
        {"event": "explained", "codes": [{"code": "I10", "evidence": [PLACE | {"start": 0.5}]}]},
        {"event": "forgotten"},
    ],
)
def test_an_edited_event_is_named(parts, week, tmp_path):
    week({"s1": "Dyspnée."})
    path = tmp_path / "list/journal.jsonl"
    (event,) = events(tmp_path / "list")
    path.write_text("\n" + json.dumps(edited(event, **parts)) + "\n", encoding="utf-8")
    before = path.read_bytes()
    code, output = week({"s1": "Dyspnée."})
    assert code == 1 and "journal.jsonl, line 2: expected an event of utils.code_stays; restore" in output, output
    assert path.read_bytes() == before


def test_a_full_disk_is_named(week, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    code, output = week({"s1": "Dyspnée."})
    assert code == 1 and f"error: {tmp_path}/list/journal.jsonl: No space left on device." in output
    monkeypatch.undo()
    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(UserError, match=r"/a\.csv: No space left on device"):
        save({tmp_path / "a.csv": "text"})


def test_what_a_killed_process_left_of_notes_is_removed(week, tmp_path):
    folder = tmp_path / "list"
    folder.mkdir()
    left = folder / ".review.html.1.tmp"  # named as by model.atomic
    assert temporary_path(folder / "review.html").name == left.name.replace("1", str(os.getpid()))
    others = [folder / ".review.html.mine.tmp", folder / ".mine.csv.12.tmp"]
    for path in (left, *others):
        path.write_text("Dyspnée.")
    assert week({"s1": "Dyspnée."})[0] == 0
    assert not left.exists() and all(path.exists() for path in others)


def test_a_journal_is_used_by_one_process(tmp_path):
    path = tmp_path / "journal.jsonl"
    with open_journal(path), pytest.raises(UserError, match="in use by another process"), open_journal(path):
        pass


def test_stays_are_coded_once_although_the_process_is_killed_ten_times(tmp_path, monkeypatch):
    monkeypatch.setattr(EngineChoice, "open", lambda choice: StandIn(pause=0.002))
    prompts = [Prompt(f"s{number}", {"messages": prompt_messages(f"Note {number}.")}) for number in range(150)]
    export = {Key(prompt.id, note_hash(note_of(prompt.messages))): prompt for prompt in prompts}
    path = tmp_path / "journal.jsonl"
    choice = EngineChoice.__new__(EngineChoice)
    monkeypatch.setattr(EngineChoice, "model", "stand-in")
    choice.table, choice.rules = None, guide_rules()

    def code():
        with open_journal(path) as journal:
            code_stays.code_new(choice, Marker(), export, journal, {})
            return len(journal.events)

    chance, sizes = random.Random(0), [0]
    for _ in range(10):
        child = os.fork()
        if not child:
            code()
            os._exit(0)
        goal = sizes[-1] + chance.randrange(100, 3000)
        wait_until(lambda goal=goal: path.exists() and path.stat().st_size >= goal, "nothing was coded")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = path.read_bytes()
        sizes.append(len(content))
        if chance.random() < 0.5:  # as a full disk or a power failure leaves it
            path.write_bytes(content[: -chance.randrange(1, 100)])
            sizes[-1] = path.stat().st_size
    assert code() == 150 and code() == 150
    assert sorted(row["stay"] for row in events(tmp_path)) == sorted(prompt.id for prompt in prompts)
