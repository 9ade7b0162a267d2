"""The CIM-10 table: accepted and rejected files, hierarchy, allowed roles."""

import csv
from pathlib import Path

import openpyxl
import pytest

from model.errors import UserError
from utils.icd10.codes import ROLES, Cim10Table, category, chapter, normalize_code, split_codes
from utils.icd10.rules import guide_rules

ROWS = [
    ("B24", "3", "NNNN", "3", "VIH", "Immunodéficience humaine virale [VIH], sans précision"),
    ("B24+0", "0", "NOOO", "0", "VIH ASYMPTOMATIQUE", "Infection par le VIH, asymptomatique"),
    ("C18", "3", "NNNN", "3", "T. COLON", "Tumeur maligne du côlon"),
    ("C189", "0", "NOOO", "0", "T. COLON SAI", "Tumeur maligne du côlon, sans précision"),
    ("C189+0", "0", "NOOO", "0", "LYNCH", "Syndrome de Lynch"),
    ("E11", "3", "NNNN", "3", "DT2", "Diabète sucré de type 2"),
    ("E119", "3", "NNNN", "3", "DT2 SANS COMPL.", "Diabète sucré de type 2, sans complication"),
    ("E1198", "0", "NOOO", "0", "DT2 NON INSULINO", "Diabète sucré de type 2 non insulinotraité, sans complication"),
    ("I10", "0", "NOOO", "0", "HTA", "Hypertension essentielle (primitive)"),
    ("I693", "4", "NOOO", "4", "SEQ. AVC", "Séquelles d'infarctus cérébral"),
    ("R69", "1", "NNNO", "1", "MORBIDITE SAI", "Causes inconnues et non précisées de morbidité"),
    ("Y95", "2", "NNNO", "2", "NOSOCOMIAL", "Facteurs nosocomiaux"),
]
LINES = ["\t".join((row[0].ljust(6), *row[1:])) for row in ROWS]
SHARED_TABLE = Path(__file__).resolve().parents[2] / "../shared/icd/cim_10_atih_2019.tsv"


def write_table(folder: Path, lines: list[str], encoding: str = "utf-8") -> Path:
    path = folder / "table.txt"
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Cim10Table:
    return Cim10Table.from_file(write_table(tmp_path, LINES))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("separator", ["|", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_encodings_separators_and_line_ends_are_equivalent(tmp_path, table, encoding, separator, ending):
    text = ending.join(line.replace("\t", separator) for line in LINES) + ending
    path = tmp_path / "other.txt"
    path.write_bytes(text.encode(encoding))
    assert list(Cim10Table.from_file(path)) == list(table)


@pytest.mark.parametrize(
    "header",
    [
        "icd_code;aut_mco;pos;aut_ssr;icd_code_description_short;icd_code_description",
        "Code,Type MCO/HAD,SSR,PSY,Libellé court,Libellé long",
        None,
    ],
)
def test_csv_and_xlsx_of_the_table_are_equivalent(tmp_path, table, header):
    separator = ";" if header and ";" in header else ","
    rows = [*([header.split(separator)] if header else []), *ROWS]
    with (tmp_path / "table.csv").open("w", encoding="cp1252", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append([int(cell) if cell.isdecimal() else cell for cell in row])
    book.save(tmp_path / "table.xlsx")
    for name in ("table.csv", "table.xlsx"):
        assert list(Cim10Table.from_file(tmp_path / name)) == list(table), name


def test_columns_of_a_table_can_be_fewer_and_in_another_order(tmp_path, table):
    path = write_table(tmp_path, ["libelle;code;aut_mco", *(f'"{row[5]}";{row[0]};{row[1]}' for row in ROWS)])
    assert [(entry.code, entry.type, entry.label) for entry in Cim10Table.from_file(path)] == [
        (entry.code, entry.type, entry.label) for entry in table
    ]


@pytest.mark.parametrize(
    ("cell", "codes"),
    [
        ("i5010\u00a0", "I5010"),
        ("C16.9+0", "C169+0"),
        ("B24.+0", "B24+0"),
        ("O04.-0.9", "O0490"),
        ("M62.8-01", "M62810"),
        ("CIM10:I50.10", "I5010"),
        ("Ｉ５０１０", "I5010"),
        ("І5010", "I5010"),  # Cyrillic
        ("'I5010',", "I5010"),
        ("I5010 Insuffisance ventriculaire, sans précision", "I5010"),
        ("Insuffisance (I50.1) de l'adulte (I5010)", "I5010"),
        ("E11.4† G63.2*", "E114 G632"),
        ("I489 I10", "I489 I10"),
        ("E11.98;I10", "E1198 I10"),
        ("I489,I10|J181", "I489 I10 J181"),
        ("I489 Fibrillation, sans précision; I10 HTA", "I489 I10"),
        # Malformed codes stay malformed.
        ("E11X", "E11X"),
        ("I50.1 0", "I5010"),
        ("M6281000", "M6281000"),
        ("I1O", "I1O"),
        ("ABC", "ABC"),
        (" ", ""),
    ],
)
def test_cells_are_split_into_codes(cell, codes):
    assert split_codes(cell) == codes.split()


def test_lookup_normalizes_codes(table):
    assert len(table) == len(ROWS)
    assert table.label(" e11.98 ") == "Diabète sucré de type 2 non insulinotraité, sans complication"
    assert "c18.9+0" in table and "C18.9" in table
    assert "I11" not in table and table.get("I11") is None and table.label("I11") is None
    entry = table.get("i10")
    assert (entry.code, entry.type, entry.short_label) == ("I10", 0, "HTA")


def test_normalized_codes_keep_extensions_and_lose_marks():
    assert [normalize_code(code) for code in ("i50.1", " I 10 ", "C18.9+0", "G01*", "A17.0+", "a17.0†")] == [
        "I501",
        "I10",
        "C189+0",
        "G01",
        "A170",
        "A170",
    ]
    assert category("e11.98") == "E11"


def test_parents_and_children_follow_the_table(table):
    assert table.parent("C18.9+0") == "C189"
    assert table.ancestors("C189+0") == ["C189", "C18"]
    assert table.ancestors("E1198") == ["E119", "E11"]
    assert table.parent("B24+0") == "B24"  # the + alone is not a level
    assert table.parent("I10") is None
    assert table.children("c18") == ("C189",) and table.children("C189") == ("C189+0",) and table.children("I10") == ()


def test_types_restrict_roles(table):
    expected = {"0": "DP DR DAS", "1": "DAS", "2": "DAS", "3": "", "4": "DR DAS"}
    for row in ROWS:
        allowed = [role for role in ROLES if guide_rules().allows(role, table.get(row[0]))]
        assert allowed == expected[row[1]].split(), row[0]
    assert not any(guide_rules().allows(role, table.get("I11")) for role in ROLES)  # unknown


@pytest.mark.parametrize(
    ("code", "numeral"),
    # The first and last categories of the chapters, and the gaps between them.
    [
        ("A00", "I"),
        ("B99", "I"),
        ("C00", "II"),
        ("D48", "II"),
        ("D49", None),
        ("D50", "III"),
        ("D89.9", "III"),
        ("E00", "IV"),
        ("E90", "IV"),
        ("F03+00", "V"),
        ("G99", "VI"),
        ("H59", "VII"),
        ("H60", "VIII"),
        ("I10", "IX"),
        ("J189", "X"),
        ("K93", "XI"),
        ("K94", None),
        ("L03", "XII"),
        ("M1099", "XIII"),
        ("N10", "XIV"),
        ("O80", "XV"),
        ("P96", "XVI"),
        ("Q99", "XVII"),
        ("R55", "XVIII"),
        ("S7200", "XIX"),
        ("T98", "XIX"),
        ("V01", "XX"),
        ("Y98", "XX"),
        ("Z511", "XXI"),
        ("U071", "XXII"),
    ],
)
def test_chapters_are_ranges_of_categories(code, numeral):
    assert chapter(code) == numeral


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], ["is empty"]),
        (["", "  "], ["is empty"]),
        (["code;label"], ["line 1", "2 column", "expected 6"]),
        ([LINES[0], "I10|0|NOOO|0|HTA"], ["line 2", "5 column"]),
        (["codes|a|b|c|d|e", LINES[0]], ["line 1", "'codes'", "header"]),
        ([LINES[0], "", "I10|9|NOOO|0|HTA|Hypertension"], ["line 3", "'9'", "0, 1, 2, 3 or 4"]),
        ([LINES[0], "I10||NOOO|0|HTA|Hypertension"], ["line 2", "type MCO/HAD of I10"]),
        ([LINES[0], "I10|0|NOOO|0|HTA| "], ["line 2", "no long label"]),
        ([*LINES, "i10|0|NOOO|0|HTA|Hypertension"], [f"line {len(LINES) + 1}", "duplicate code I10"]),
    ],
)
def test_invalid_tables_are_reported_by_line(tmp_path, lines, found):
    path = write_table(tmp_path, lines)
    with pytest.raises(UserError) as error:
        Cim10Table.from_file(path)
    for part in (str(path), *found):
        assert part in str(error.value)


def test_missing_file_folder_and_binary_file_are_user_errors(tmp_path):
    binary = tmp_path / "table.xlsx"
    binary.write_bytes(bytes(range(256)) * 8)
    for path in (tmp_path / "none.txt", tmp_path, binary):
        with pytest.raises(UserError, match=str(path)):
            Cim10Table.from_file(path)


@pytest.mark.skipif(not SHARED_TABLE.exists(), reason="the ATIH table is not available")
def test_atih_table_of_2019():
    table = Cim10Table.from_file(SHARED_TABLE)
    types = [entry.type for entry in table]
    # 13,328 / 440 / 1 / 1,906 / 76 codes of types 0 to 4.
    assert [types.count(kind) for kind in range(5)] == [13328, 440, 1, 1906, 76]
    assert all(chapter(entry.code) for entry in table)
    assert all(table.ancestors(entry.code)[-1] == category(entry.code) for entry in table if len(entry.code) > 3)
    assert sum(len(table.children(entry.code)) for entry in table) == sum(len(entry.code) > 3 for entry in table)
    assert sum(guide_rules().allows("DP", entry) for entry in table) == types.count(0)
