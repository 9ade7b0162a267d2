"""Any hospital's tables: layouts, identifiers, statuses, documents, notes that are not text."""

import csv
import datetime
import json
import re
from pathlib import Path

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from benchmarks.prepare import write_stays
from model.errors import UserError
from utils import prepare_icd10_data
from utils.icd10.answers import parse_answer
from utils.icd10.cells import identifier, sortable_date
from utils.icd10.note_text import note_text, quoted_codes
from utils.icd10.roles import read_statuses
from utils.tables.jsonl import SkippedRowError

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "example/demo_cim10.tsv"
NOTES = ["stay_id,text", *(f"{stay},Note {stay}." for stay in ("a1", "b2", "c3"))]
CODES = ["stay_id,role,code", "a1,DP,I10", "b2,DP,J189", "b2,DAS,I10", "c3,DP,J189"]


@pytest.fixture
def prepare(run_command, tmp_path):
    """Prepare two tables, given as lines of csv or as files; return the exit code, the output and codes by stay."""

    def run(notes, codes, *options, table=TABLE):
        paths = []
        for name, content in (("notes.csv", notes), ("codes.csv", codes)):
            if not isinstance(content, Path):
                (tmp_path / name).write_text("\n".join(content) + "\n", encoding="utf-8")
                content = tmp_path / name
            paths.append(content)
        tables = [table] if isinstance(table, Path) else table
        arguments = ["--text", paths[0], "--codes", paths[1], "--out", tmp_path / "out", "--overwrite", *options]
        if "--ratios" not in options:
            arguments += ["--ratios", "1"]
        code, output = run_command(prepare_icd10_data, *arguments, "--cim10", *tables)
        return code, output, coded(tmp_path / "out")

    return run


def coded(out):
    """Return "DP:I10 DAS:J189" by stay; the DAS in alphabetical order, codes without roles as "None:I10"."""
    rows = [json.loads(line) for path in out.glob("*_instruct.jsonl") for line in path.open(encoding="utf-8")]
    return {
        row["id"]: " ".join(
            sorted(
                (f"{item.role}:{item.code}" for item in parse_answer(row["messages"][2]["content"])),
                key=lambda item: (("DP", "DR", "DA", "No").index(item[:2]), item),
            )
        )
        for row in rows
    }


def notes_of(out):
    rows = [json.loads(line) for path in out.glob("*_instruct.jsonl") for line in path.open(encoding="utf-8")]
    return {row["id"]: row["messages"][1]["content"].partition("suivant : ")[2] for row in rows}


# --- Layouts ----------------------------------------------------------------------------------------------------------

EXPORTS = re.findall(r"`(--text example/exports/[^`]+)`", (ROOT / "example/exports/README.md").read_text("utf-8"))


def test_each_of_six_exports_is_prepared_by_one_command_to_the_same_codes(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = []
    for number, options in enumerate(EXPORTS):
        out = tmp_path / str(number)
        command = [*options.split(), "--cim10", TABLE, "--out", out]
        code, output = run_command(prepare_icd10_data, *command)
        assert code == 0 and "Stays read: 20. Kept: 20." in output, output
        found.append(coded(out))
    assert len(found) == 6 and len(found[0]) == 20
    assert all(codes == found[0] for codes in found)


@pytest.mark.parametrize(
    ("codes", "options"),
    [
        (["NDA;DP;DR;DAS1;DAS2", "a1;I10;;;", "b2;J18.9;;I10;", "c3;J189;;;"], []),
        (["nda\tcode\ttype", "a1\tI10\tDP", "b2\tJ189\tDP", "b2\tI10\tDAS", "c3\tJ189\tDP"], []),
        (["sep=;", "NDA;diags;st", "a1;I10;DP", "b2;J189;DP", "b2;I10;DAS", "c3;J189;DP"], ["code=diags,role=st"]),
        (["x|p|r|s1|s2", "a1|I10|||", "b2|J189||I10|", "c3|J189|||"], ["codes.stay=x,dp=p,dr=r,das=s*"]),
        (["visit_occurrence_id,tval_char,concept_cd", "a1,DP,CIM10:I10", "b2,DP,CIM10:J18.9", "b2,DAS,CIM10:I10",
          "c3,DP,CIM10:J189"], []),
        (["nda;type;code;DP;DR;DAS_01", "a1;HC;28Z;I10;;", "b2;HC;04M;J189;;I10", "c3;HC;04M;J189;;"], []),
        (["nda;rum;DP;DP_RSS;DAS", "a1;1;I10;I10;", "b2;1;I10;J189;", "b2;2;J189;J189;", "c3;1;J189;J189;"], []),
        (["RSS;DGN_PAL;DGN_REL;DAS", "a1;I10;;", "b2;J189;;I10 I10", "c3;J189;;"], []),
    ],
)  # fmt: skip
def test_layouts_of_codes(codes, options, prepare):
    options = ["--columns", ",".join(options)] if options else []
    code, output, found = prepare(NOTES, codes, *options)
    assert code == 0, output
    assert found == {"a1": "DP:I10", "b2": "DP:J189 DAS:I10", "c3": "DP:J189"}


def test_mapping_file_names_columns_and_roles(prepare, tmp_path):
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("stay: n\nnotes: {text: [lettre]}\ncodes: {code: d, role: t}\nroles: {X: DAS, Y: ignore}\n")
    codes = ["n,t,d", "a1,DP,I10", "a1,X,J189", "a1,Y,Z511"]
    code, output, found = prepare(["n,lettre", "a1,Note."], codes, "--columns", mapping)
    assert code == 0 and found == {"a1": "DP:I10 DAS:J189"}, output
    assert "with a status that is left out (--roles): 1" in output


@pytest.mark.parametrize(
    ("notes", "codes", "columns", "message"),
    [
        (["stay_id,txet", "a1,N"], CODES, None, "no column for text; found 'stay_id', 'txet'. Is it 'txet'?"),
        (NOTES, ["stay_id,role,diagnose", "a1,DP,I10"], None, "no column for code; found"),
        (NOTES, CODES, "stay=sejuor", "no column 'sejuor' for stay in"),
        (NOTES, CODES, "codes.code=cod", "no column 'cod' for code; found 'stay_id', 'role', 'code'. Is it 'code'?"),
        (NOTES, CODES, "stya=nda", "did you mean stay?"),
        (NOTES, CODES, "none.yaml", "none.yaml: No such file"),
        (["stay_id,text"], CODES, None, "has no rows"),
    ],
)
def test_columns_that_are_not_found_are_named_before_anything_is_written(notes, codes, columns, message, prepare):
    code, output, found = prepare(notes, codes, *(["--columns", columns] if columns else []))
    assert code == 1 and message in output and not found, output
    assert output.count("Traceback") == 0


# --- Identifiers ------------------------------------------------------------------------------------------------------


def test_identifiers_are_texts():
    values = ["000121", " 121 ", 121, 121.0, "121.0", "12E5", 2**60]
    assert [identifier(value) for value in values] == ["000121", "121", "121", "121", "121.0", "12E5", str(2**60)]
    for lost in ("1.23457E+14", "1,2e+05", float(2**60)):
        with pytest.raises(SkippedRowError, match="lost digits"):
            identifier(lost)
    for missing in (None, float("nan"), "", " NULL"):
        with pytest.raises(SkippedRowError, match="without an identifier"):
            identifier(missing)


@pytest.mark.parametrize("other", ["0a1", "A1", "a-1", "a1.0"])
def test_stays_that_are_named_in_two_ways_are_refused(other, prepare):
    codes = [line.replace("a1,", f"{other},") for line in CODES]
    code, output, found = prepare(NOTES, codes)
    assert code == 1 and not found
    assert re.search(r"error: 1 stay of \S*notes.csv and \S*codes.csv with two names", output)
    assert f"'a1' and '{other}'" in output


def test_stays_that_differ_in_zeros_and_are_complete_stay_apart(prepare):
    code, output, found = prepare([*NOTES, "0a1,Autre note."], [*CODES, "0a1,DP,J189"])
    assert code == 0 and found["a1"] == "DP:I10" and found["0a1"] == "DP:J189", output
    assert (
        "1 identifier has other spellings that differ only in zeros, case or separators; they are kept apart: "
        in output
    )


def test_scientific_notation_is_refused_with_an_example(prepare, tmp_path):
    code, output, _ = prepare(["stay_id,text", "2.60001E+11,Note.", "a1,Note."], CODES)
    assert code == 1 and "1 row has an identifier in scientific notation, which has lost digits (e.g. line 2" in output
    book = openpyxl.Workbook()
    for row in (["stay_id", "role", "code"], [1234567890123456789, "DP", "I10"], ["a1", "DP", "I10"]):
        book.active.append(row)
    book.save(tmp_path / "codes.xlsx")
    code, output, _ = prepare(NOTES, tmp_path / "codes.xlsx")
    assert code == 1 and "lost digits" in output


def test_identifiers_of_parquet_floats_match_integers(prepare, tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"stay_id": [26000101.0, None], "role": ["DP", "DP"], "code": ["I10", "I10"]}),
        tmp_path / "codes.parquet",
    )
    code, output, found = prepare(["stay_id,text", "26000101,Note."], tmp_path / "codes.parquet")
    assert code == 0 and found == {"26000101": "DP:I10"} and "without an identifier of the stay: 1" in output


def test_stay_of_two_patients_is_left_out(prepare):
    notes = ["stay_id,text,ipp", "a1,Note.,P1", "a1,Suite.,P2", "b2,Autre.,P1", "c3,Encore.,"]
    code, output, found = prepare(notes, CODES)
    assert code == 0 and set(found) == {"b2", "c3"}
    assert "with documents or codes of two patients: 1 (e.g. a1)" in output and "(a1: P1 and P2)" in output


# --- Statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "role"),
    [("dp ", "DP"), ("Diagnostic principal", "DP"), ("Diagnostic relié", "DR"), ("DR1", "DR"), ("DA", "DAS"),
     ("D.A.S.", "DAS"), ("DAS 2", "DAS"), ("DAS12", "DAS"), ("Diagnostics associés significatifs", "DAS"),
     ("DAD", "DAD"), ("DPUM", "DP of a unit"), ("Secondary diagnosis", "DAS")],
)  # fmt: skip
def test_known_statuses(status, role):
    assert read_statuses({status: 1}, {}, False) == {status: role}


def test_a_note_in_the_column_of_the_status_is_not_quoted():
    note = "Patiente de 80 ans adressée par son médecin traitant pour chute."
    with pytest.raises(UserError, match=r"A code's status has 64 characters.*--columns role=COLUMN") as found:
        read_statuses({note: 1, "CMA": 2}, {}, False)
    assert "Patiente" not in str(found.value)
    with pytest.raises(UserError, match=r"'Diagnostic associé très significatif' .* --roles Diagnostic associé très"):
        read_statuses({"Diagnostic associé très significatif": 1}, {}, False)


def test_unknown_statuses_stop_with_counts_and_are_mapped_by_the_user(prepare):
    codes = [*CODES, "a1,CMA,J189", "b2,CMA,Z511", "c3,,I10", "c3,DA,I10"]
    code, output, found = prepare(NOTES, codes)
    assert code == 1 and not found
    assert "3 codes have a status whose role is not known: 'CMA' (2), '(blank)' (1)" in output and "--roles" in output
    code, output, found = prepare(NOTES, [line for line in codes if ",," not in line], "--roles", "cma=das,DA=ignore")
    assert code == 0 and found["a1"] == "DP:I10 DAS:J189" and found["c3"] == "DP:J189", output


def test_numbers_are_roles_only_where_they_cannot_be_ranks(prepare):
    notes, ranks = NOTES[:2], ["a1,1,J189", "a1,2,I10", "a1,3,E1198"]
    code, output, _ = prepare(notes, [CODES[0], *ranks])
    assert code == 1 and "status whose role is not known" in output
    code, output, found = prepare(notes, [CODES[0], *ranks, "a1,3,N390"], "--roles", "1=DP,2=DAS,3=DAS")
    assert code == 0 and found["a1"].startswith("DP:J189 DAS:"), output
    code, output, found = prepare(notes, [CODES[0], "a1,1,J189", "a1,3,I10", "a1,3,E1198"])
    assert code == 0 and found == {"a1": "DP:J189 DAS:E1198 DAS:I10"}, output


# --- Documents and notes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2026-01-05", "2026-01-05"), ("05/01/2026", "2026-01-05"), ("5.1.2026 8h30", "2026-01-05T08:30:00"),
     ("20260105", "2026-01-05"), (20260105.0, "2026-01-05"), ("2026-01-05T08:30:00.000Z", "2026-01-05T08:30:00"),
     (datetime.datetime(2026, 1, 5, 8, 30), "2026-01-05T08:30:00"), (datetime.date(2026, 1, 5), "2026-01-05"),
     ("31/02/2026", ""), ("hier", ""), (None, "")],
)  # fmt: skip
def test_dates(value, expected):
    assert sortable_date(value) == expected


def test_documents_are_in_the_order_of_their_dates_under_their_kinds(prepare, tmp_path):
    notes = [
        "nda,texte,date_doc,type_doc",
        "a1,Sortie.,12/01/2026,CRH",
        "a1,Sans date.,,",
        "a1,Arrivée.,03/01/2026,OBS",
    ]
    code, output, _ = prepare([*notes, "a1,Sortie.,12/01/2026,CRH"], CODES)
    assert code == 0 and notes_of(tmp_path / "out")["a1"] == "## OBS\n\nArrivée.\n\n## CRH\n\nSortie.\n\nSans date."
    assert "1 stay has documents without a date" in output


@pytest.mark.parametrize("value", [None, "", "  \n", "NULL", "nan", float("nan"), "N/A", "\\N", "--- ...", "\ufeff"])
def test_blank_notes(value):
    with pytest.raises(SkippedRowError, match="blank, NULL or nan"):
        note_text(value)


RTF = r"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Arial;}}\f0 D\'e9compensation \b cardiaque\b0 .\par Toux."
RTF += r"{\pict\pngblip 8950}}"


@pytest.mark.parametrize(
    ("value", "text", "form"),
    [
        (RTF, "Décompensation cardiaque.\nToux.", "RTF"),
        ("<html><head><title>x</title></head><body><p>Pneumopathie&nbsp;franche</p></body></html>",
         "Pneumopathie franche", "HTML"),
        ("<div>TA <b>12/8</b><br>pouls <60 et >40</div>", "TA 12/8\npouls <60 et >40", "HTML"),
        ("<?xml version='1.0'?><ClinicalDocument><text>Toux.</text></ClinicalDocument>", "Toux.", "HTML"),
        ("&lt;p&gt;Toux&lt;/p&gt;", "Toux", "HTML"),
        ("Fi&egrave;vre &agrave; 39&deg;", "Fièvre à 39°", "HTML"),
        # Not markup.
        ("CRP <5 et GB >10 000 ; p<0,05 ; a & b", "CRP <5 et GB >10 000 ; p<0,05 ; a & b", None),
        (" Nan, pas de fièvre.\r\n", "Nan, pas de fièvre.", None),
        ("**Motif** : {douleur}", "**Motif** : {douleur}", None),
    ],
)  # fmt: skip
def test_notes_are_converted_to_text(value, text, form):
    assert note_text(value) == (text, form)


@pytest.mark.parametrize("value", ["%PDF-1.4 ...", "JVBERi0xLjQK" * 40, r"{\rtf1}", "<p>  </p>"])
def test_notes_that_are_not_text_are_refused(value):
    with pytest.raises(SkippedRowError):
        note_text(value)


def test_a_bad_document_leaves_the_others_of_its_stay(prepare, tmp_path):
    notes = ["stay_id,text", "a1,NULL", "a1,Toux.", "b2,nan", "c3,<p>Fièvre</p>"]
    code, output, found = prepare(notes, CODES)
    assert code == 0 and set(found) == {"a1", "c3"} and notes_of(tmp_path / "out")["a1"] == "Toux."
    for words in ("without text: 1 (e.g. b2)", "blank, NULL or nan: 2", "Documents converted from HTML to text: 1."):
        assert words in output
    with (tmp_path / "out/left_out.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["what"], row["stay"], row["reason"]) for row in csv.DictReader(file)]
    assert rows[:3] == [
        ("document", "a1", "blank, NULL or nan"),
        ("document", "b2", "blank, NULL or nan"),
        ("stay", "b2", "without text"),
    ]


def test_notes_that_quote_their_codes_are_counted_and_dropped_by_choice(prepare):
    assert quoted_codes("DP i50.10, vitamine B12, Z51.1", {"I5010", "I10", "B12", "Z511X"}) == {"I5010", "B12"}
    notes = ["stay_id,text", "a1,HTA. Codage : I10", "b2,Note. J18.9", "c3,Vitamine B12, HTA."]
    code, output, found = prepare([*notes[:3], 'c3,"Vitamine B12, HTA."'], CODES)
    assert code == 0 and len(found) == 3 and "warning: 2 notes quote codes of the stay (a1, b2)" in output
    code, output, found = prepare([*notes[:3], 'c3,"Vitamine B12, HTA."'], CODES, "--leaks", "drop")
    assert code == 0 and set(found) == {"c3"} and "whose note quotes its codes: 2" in output


# --- Tables and formats -----------------------------------------------------------------------------------------------


def test_each_stay_is_coded_with_the_table_of_its_year(prepare, tmp_path):
    lines = {"2018": "B59|0|N|0|P|Pneumocystose\nI10|0|N|0|H|HTA\n", "2019": "I10|0|N|0|H|HTA nouvelle\n"}
    for year, content in lines.items():
        (tmp_path / year).write_text(content + "B59|3|N|3|P|*** SU19 *** Pneumocystose\n" * (year == "2019"))
    tables = [f"2018={tmp_path / '2018'}", f"2019-03-01={tmp_path / '2019'}"]
    notes = ["stay_id,text,date_sortie", "a1,N.,28/02/2019", "b2,M.,01/03/2019", "c3,O.,2017-05-01", "d4,P.,"]
    codes = [
        CODES[0],
        *(
            f"{stay},{role},{code}"
            for stay in ("a1", "b2", "c3", "d4")
            for role, code in (("DP", "I10"), ("DAS", "B59"))
        ),
    ]
    code, output, found = prepare(notes, codes, table=tables)
    assert code == 0 and found == {"a1": "DP:I10 DAS:B59", "b2": "DP:I10"}, output
    for words in ("closed in 2019", "discharged before 2018-01-01", "without a date of discharge"):
        assert f"{words}" in output
    code, output, _ = prepare(notes, codes, table=[TABLE, TABLE])
    assert code == 1 and "expected one table, or several with their years" in output


def test_codes_that_were_closed_after_a_stay_are_valid_for_it(prepare, tmp_path):
    table = tmp_path / "table.txt"
    table.write_text("I10|0|N|0|H|HTA\nB59|3|N|3|P|*** SU19 *** Pneumocystose\n")
    notes = ["stay_id,text,date_sortie", "a1,N.,31/12/2018", "b2,M.,01/01/2019", "c3,O.,"]
    codes = [CODES[0], *(f"{stay},{role}" for stay in ("a1", "b2", "c3") for role in ("DP,B59", "DAS,I10"))]
    code, output, found = prepare(notes, codes, table=table)
    assert code == 0 and found == {"a1": "DP:B59 DAS:I10"}, output
    assert "closed in 2019 (valid for stays discharged before: --columns discharge=COLUMN): 2" in output
    written = (tmp_path / "out/train_instruct.jsonl").read_text(encoding="utf-8")
    assert "Pneumocystose (B59)" in written and "SU19" not in written


def test_answers_as_bare_lists(prepare, tmp_path):
    code, output, _ = prepare(NOTES, CODES, "--format", "list")
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "out/train_instruct.jsonl").open(encoding="utf-8")]
    assert [row["messages"][2]["content"] for row in rows] == ["[I10]", "[J189, I10]", "[J189]"]


def test_notes_that_quote_long_labels_are_counted(prepare, tmp_path):
    table = tmp_path / "table.txt"
    table.write_text("I10|0|N|0|H|Hypertension essentielle primitive non compliquée du sujet âgé\nJ189|0|N|0|P|Toux\n")
    notes = [
        "stay_id,text",
        "a1,HYPERTENSION essentielle primitive non compliquée du sujet âgé.",
        "b2,Toux.",
        "c3,HTA.",
    ]
    code, output, found = prepare(notes, CODES, table=table)
    assert code == 0 and len(found) == 3 and "warning: 1 note quotes a long label of the stay's codes" in output, output


def test_rows_name_the_patient_the_year_and_the_number_of_documents(prepare, tmp_path):
    notes = [
        "stay_id,text,ipp,date_sortie",
        "a1,Note.,007,05/01/2025",
        "b2,Autre.,007,",
        "c3,Encore.,,",
        "a1,Suite.,007,",
    ]
    assert prepare(notes, CODES)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out/train_instruct.jsonl").open(encoding="utf-8")]
    facts = [{name: row.get(name) for name in ("patient", "year", "documents")} for row in rows]
    assert facts == [
        {"patient": "007", "year": "2025", "documents": 2},
        {"patient": "007", "year": None, "documents": 1},
        {"patient": None, "year": None, "documents": 1},
    ]


def test_stays_of_the_benchmark_are_prepared(prepare, tmp_path):
    files = write_stays(6, tmp_path / "stays")
    code, output, found = prepare(files["text"], files["codes"], table=files["cim10"])
    assert code == 0 and "train: 6 stays of 3 patients" in output and len(found) == 6, output


@pytest.mark.parametrize("encoding", ["klingon", "base64", "idna"])
def test_unknown_encodings_are_refused(encoding, prepare):
    code, output, _ = prepare(NOTES, CODES, "--encoding", encoding)
    assert code == 1 and f"Unknown encoding '{encoding}'" in output


def test_a_table_of_bytes_is_refused(prepare, tmp_path):
    (tmp_path / "table.txt").write_bytes(bytes(range(256)) * 20)
    code, output, _ = prepare(NOTES, CODES, table=tmp_path / "table.txt")
    assert code == 1 and "table.txt: cannot read the CIM-10 table" in output


def test_a_workbook_with_two_sheets_is_refused(prepare, tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["stay_id", "text"])
    book.create_sheet("Autre").append(["x"])
    book.save(tmp_path / "notes.xlsx")
    with pytest.raises(UserError, match="has 2 sheets with content"):
        list(
            prepare_icd10_data.recognize(
                tmp_path / "notes.xlsx", "notes", prepare_icd10_data.read_mapping(None), "auto"
            )
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("45292", "2024-01-01"), ("45292.5", "2024-01-01"), ("03/01/24", "2024-01-03"), ("31/02/24", ""), ("12345", "")],
)
def test_dates_of_spreadsheets_are_read(text, expected):
    assert sortable_date(text) == expected


def test_cells_that_say_there_is_no_code_are_blank(prepare):
    codes = ["stay_id;DP;DR;DAS1", "a1;I10;-;néant", "b2;J189;NULL;aucun", "c3;J189;/;I10"]
    code, output, found = prepare(NOTES, codes)
    assert code == 0 and found == {"a1": "DP:I10", "b2": "DP:J189", "c3": "DP:J189 DAS:I10"}
    assert "dropped" not in output and "kept as DAS" not in output
