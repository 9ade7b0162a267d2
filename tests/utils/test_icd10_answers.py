"""Answers: the documented sentence, its parser, and the layouts that models write instead."""

import csv
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.fictional_notes.catalogue import load_catalogue
from utils.icd10 import prompts
from utils.icd10.answers import Diagnosis, build_answer, code_list, list_codes, parse_answer
from utils.icd10.codes import ROLES, Cim10Table, split_codes
from utils.icd10.predictions import read_predictions
from utils.icd10.rules import guide_rules

SHARED = Path(__file__).resolve().parents[2] / "../shared"
COMMON = load_catalogue().common

DP = Diagnosis("DP", "Z511", "Séance de chimiothérapie pour tumeur")
DR = Diagnosis("DR", "C187", "Tumeur maligne du côlon sigmoïde")
DAS = [
    Diagnosis("DAS", "I10", "Hypertension essentielle (primitive)"),
    Diagnosis("DAS", "E8768", "Hypokaliémies, autres et sans précision"),
]


def test_answer_is_the_documented_sentence():
    assert build_answer([DP, DR, *DAS]) == (
        "Codes CIM 10 retenus pour le résumé strandisé de sortie PMSI : "
        "diagnostic principal : Séance de chimiothérapie pour tumeur (Z511), "
        "diagnistic relié : Tumeur maligne du côlon sigmoïde (C187), "
        "diagnostic associé : Hypertension essentielle (primitive) (I10), "
        "Hypokaliémies, autres et sans précision (E8768)"
    )
    assert build_answer([DAS[0]._replace(role="DP")]).endswith(
        "Hypertension essentielle (primitive) (I10), diagnistic relié : aucun, diagnostic associé : aucun"
    )


@pytest.mark.parametrize("diagnoses", [[], [DR, *DAS], [DP, DP._replace(code="Z5101")], [DP, DR, DR]])
def test_answer_needs_one_main_and_at_most_one_related_diagnosis(diagnoses):
    with pytest.raises(ValueError, match="one DP and at most one DR"):
        build_answer(diagnoses)


def test_rows_contain_the_three_messages_or_the_pretraining_text():
    row = prompts.instruct_row("Note {1}.", "Réponse", "n1")
    assert list(row) == ["id", "messages"]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][:2] == prompts.prompt_messages("Note {1}.")
    assert row["messages"][1]["content"].endswith("du compte rendu d'hospitalisation suivant : Note {1}.")
    assert list(prompts.instruct_row("Note.", "Réponse")) == ["messages"]
    codes = list_codes([DP, DAS[0]])
    assert prompts.pretrain_row("Une note\n", codes) == {
        "text": "Une note. ICD-10 codes : Séance de chimiothérapie pour tumeur (Z511), "
        "Hypertension essentielle (primitive) (I10)"
    }
    assert prompts.pretrain_row("Une note.", codes)["text"].startswith("Une note. ICD-10 codes : ")


@pytest.mark.skipif(not (SHARED / "seeds/000.md").exists(), reason="the original documentation is not available")
def test_prompts_are_word_for_word_those_of_the_documentation():
    document = (SHARED / "seeds/000.md").read_text(encoding="utf-8")
    row = prompts.instruct_row(
        "texte du compte rendu n°1",
        prompts.ANSWER.format(
            DP="définition du code (code)", DR=prompts.NOTHING, DAS="définition diagnostic 1 (code 1),..."
        ),
    )
    for message in row["messages"]:
        assert f'"content": "{message["content"]}"' in document


# --- Parser -----------------------------------------------------------------------------------------------------------


@st.composite
def stays(draw):
    codes = draw(st.lists(st.sampled_from(sorted(COMMON)), min_size=1, max_size=9, unique=True))
    roles = ["DP", *(["DR"] if len(codes) > 1 and draw(st.booleans()) else [])]
    roles += ["DAS"] * (len(codes) - len(roles))
    return [Diagnosis(role, code, COMMON[code].label) for role, code in zip(roles, codes)]


@given(stays())
def test_parser_inverts_the_builder(stay):
    assert parse_answer(build_answer(stay)) == stay


@given(stays(), st.randoms())
def test_case_dots_and_layout_are_ignored(stay, random):
    def written(code):
        code = code if len(code) == 3 or random.random() < 0.5 else f"{code[:3]}.{code[3:]}"
        return code.lower() if random.random() < 0.5 else code

    names = {"DP": "Diagnostic principal", "DR": "Diagnostic relié", "DAS": "Diagnostics associés"}
    blocks = []
    for role in ROLES:
        items = [f"- {item.label} ({written(item.code)})" for item in stay if item.role == role]
        blocks.append(f"**{names[role]}** :\n" + ("\n".join(items) or "Aucun."))
    assert roles_and_codes("\n\n".join(blocks)) == [(item.role, item.code) for item in stay]


@pytest.mark.skipif(not (SHARED / "icd").exists(), reason="the ATIH table is not available")
def test_every_label_of_the_atih_table_is_parsed():
    table = Cim10Table.from_file(SHARED / "icd/cim_10_atih_2019.tsv")
    usable = [entry for entry in table if guide_rules().allows("DAS", entry)]
    for start in range(0, len(usable), 12):
        chunk = usable[start : start + 12]
        stay = [DP, DR, *(Diagnosis("DAS", entry.code, entry.label) for entry in chunk)]
        stay = [item for index, item in enumerate(stay) if item.code not in {other.code for other in stay[:index]}]
        assert parse_answer(build_answer(stay)) == stay


# --- Other layouts ----------------------------------------------------------------------------------------------------


def roles_and_codes(text):
    return [(item.role, item.code) for item in parse_answer(text)]


IRREGULAR = [
    # No role at all.
    ("", ""),
    ("Aucun code ne peut être retenu.", ""),
    ("HTA (I10) - BPCO (J44.9) / asthme (J45.9) et diabète (E11.98)", "?:I10 ?:J449 ?:J459 ?:E1198"),
    ("I10, E11.98 ; j18.9", "?:I10 ?:E1198 ?:J189"),
    ("Les codes sont I10 et E119.", "?:I10 ?:E119"),
    # The documented layout, altered.
    ("diagnostic principal : HTA (I10), diagnistic relié : aucun, diagnostic associé : aucun", "DP:I10"),
    ("diagnostic principal : HTA (i10), diagnostic associé : BPCO (j44.9), asthme (J459)", "DP:I10 DAS:J449 DAS:J459"),
    ("Codes CIM 10 retenus pour le résumé strandisé de sortie PMSI : diagnostic principal : HTA (I10", "DP:I10"),
    ("diagnostic principal : aucun, diagnistic relié : aucun, diagnostic associé : HTA (I10)", "DAS:I10"),
    ("diagnostic associé : HTA (I10), diagnistic relié : cancer (C61), diagnostic principal : chimiothérapie (Z511)",
     "DAS:I10 DR:C61 DP:Z511"),
    # Parentheses, brackets and codes inside labels.
    ("diagnostic principal : Démence de la maladie d'Alzheimer, à début précoce (G30.0) (F000)", "DP:F000"),
    ("diagnostic principal : Méningite tuberculeuse (G01*) (A17.0), diagnostic associé : aucun", "DP:A170"),
    ("diagnostic principal : Polynévrite au cours de maladies tumorales (C00-D48) (G631)", "DP:G631"),
    ("diagnostic associé : Anémie par carence en vitamine B12, sans précision (D519), Hirsutisme (L680)",
     "DAS:D519 DAS:L680"),
    ("diagnostic associé : Trouble endocrinien (E00.1, E03.-) (G13.2), Obésité [IMC > 30] (E66.94)",
     "DAS:G132 DAS:E6694"),
    ("diagnostic principal : I50.19 Insuffisance ventriculaire gauche (FEVG non précisée (inconnue))", "DP:I5019"),
    # Repeated codes count once, with their highest role.
    ("DP : HTA (I10). DAS : HTA (I10), hypertension (I10), BPCO (J449)", "DP:I10 DAS:J449"),
    ("Diagnostics associés : diabète (E11.98), HTA (I10)\nDiagnostic principal : HTA (I10)", "DAS:E1198 DP:I10"),
    # Other layouts.
    ("DP : I10\nDR : aucun\nDAS : E1198, J44.9", "DP:I10 DAS:E1198 DAS:J449"),
    ("DP=z511 DR=c61 DAS=i10;e039", "DP:Z511 DR:C61 DAS:I10 DAS:E039"),
    ("DP Z511\nDR C18.7\nDAS D64.9", "DP:Z511 DR:C187 DAS:D649"),
    ("**Diagnostic principal** : Embolie pulmonaire (I26.9)\n\n**Diagnostics associés** :\n* HTA (I10)\n* TVP (I80.2)",
     "DP:I269 DAS:I10 DAS:I802"),
    ("Diagnostic principal (DP) : J18.9 - Pneumopathie\nDiagnostics associés significatifs (DAS) :\n"
     "1. J96.00 - Insuffisance respiratoire aiguë\n2. E86 - Hypovolémie", "DP:J189 DAS:J9600 DAS:E86"),
    ("Principal : Sepsis (A41.9)\nRelié : aucun\nAssociés : IRA (N17.9), dénutrition (E43)",
     "DP:A419 DAS:N179 DAS:E43"),
    ("| DP | I63.9 |\n| DAS | I10 |", "?:I639 ?:I10"),
    ("diagnostic principal : Syndrome de Lynch [C18.9+0], diagnostic associé : Démence [code F03+00]",
     "DP:C189+0 DAS:F03+00"),
    # Free text.
    ("Le diagnostic principal est une embolie pulmonaire (code I26.9) ; comme diagnostics associés on retient "
     "une hypertension (I10) et un diabète (CIM-10 : E11.98). Le patient est sorti à J10.",
     "DP:I269 DAS:I10 DAS:E1198"),
    ("Je retiens en diagnostic principal I21.40, sans diagnostic relié, et en diagnostic associé I10.",
     "DP:I2140 DAS:I10"),
    ("Vous êtes un modèle spécialisé CIM-10 (PMSI, 2024) : T2N1M0, CA 19-9, L5-S1, H1N1, 10/12/2024.", ""),
    ("diagnostic principal : Xylophagie (Q77.77), diagnostic associé : (I10), (), (aucun), (E119",
     "DP:Q7777 DAS:I10 DAS:E119"),
]  # fmt: skip

MALFORMED = [
    ("diagnostic principal : Diabète (E11X), diagnistic relié : aucun, diagnostic associé : Covid (U071A), "
     "suite (M6281000), HTA (I1O), autre (E1), fracture (S72001A), syndrome (ABC)",
     "DP:E11X DAS:U071A DAS:M6281000 DAS:I1O DAS:E1 DAS:S72001A DAS:ABC"),
    ("DP : E11X\nDAS : E1198, J44X9, I10", "DP:E11X DAS:E1198 DAS:J44X9 DAS:I10"),
    ("Diagnostic principal : E11X : Diabète\nDiagnostics associés :\n- J44X9 BPCO\n- I10 HTA",
     "DP:E11X DAS:J44X9 DAS:I10"),
    ("DP Z511X\nDAS D64.9", "DP:Z511X DAS:D649"),
    ("I10X, E119", "?:I10X ?:E119"),
    ("HTA (I10), Diabète (E11X), scanner (IRM).", "?:I10 ?:E11X"),
    ("diagnostic principal : Cancer (CIM-10 : E11X), diagnostic associé : HTA (code I10Z)", "DP:E11X DAS:I10Z"),
    ("**DP** : Diabète [E11X]\nDAS : HTA [I10]", "DP:E11X DAS:I10"),
    ("DP=z511x DR=c61 DAS=i10;e039b", "DP:Z511X DR:C61 DAS:I10 DAS:E039B"),
    ("- e11x : diabète\n- i10 : HTA", "?:E11X ?:I10"),
    ("DP : Pneumopathie J18.9X\nDAS : HTA I10", "DP:J189X DAS:I10"),
    ("diagnostic principal : HTA (I10 ; E119), diagnostic associé : Fièvre (A01, B02) (C03)", "DP:I10 DP:E119 DAS:C03"),
    # Longer than a valid code, never cut to one.
    ("diagnostic principal : HTA (I10X", "DP:I10X"),
    ("DP : I10,9\nDAS : Pneumopathie (J18,9)", "DP:I10,9 DAS:J18,9"),
    ("DP : I10-I15", "DP:I10-I15"),
    ("- I5010.5 HTA", "?:I50105"),
    # Spellings of valid codes.
    ("diagnostic principal : Polynévrite (G63.2*), diagnostic associé : Diabète (E11.4†), HTA (I 10)",
     "DP:G632 DAS:E114 DAS:I10"),
    # Not codes: abbreviations inside a label, stages without a code's place.
    ("diagnostic principal : Maladie due au virus (VIH), avec symptômes (B20), "
     "diagnostic associé : Cancer, pT2N0 (C509)",
     "DP:B20 DAS:C509"),
    ("diagnostic principal : Grippe (H1N1) (J09)", "DP:J09"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MALFORMED)
def test_malformed_codes_are_kept_and_never_shortened(text, expected):
    assert [f"{role or '?'}:{code}" for role, code in roles_and_codes(text)] == expected.split()


LISTS = [
    ("[C509, I10]", "?:C509 ?:I10"),
    ("[I5010,I10,I489]", "?:I5010 ?:I10 ?:I489"),
    (" ['c50.9' ; \"I10\", E11X].", "?:C509 ?:I10 ?:E11X"),
    ("[C509, I10", "?:C509 ?:I10"),
    ("Codes : [C50.9]", "?:C509"),
    ("DP : [I5010], DR : [], DAS : [I10, E11X]", "DP:I5010 DAS:I10 DAS:E11X"),
    ("[]", ""),
    ("[aucun]", ""),
    ("Obésité [IMC > 30, E669] (E66.94)", "?:E6694"),
]


@pytest.mark.parametrize(("text", "expected"), LISTS)
def test_bare_lists_are_read(text, expected):
    assert [f"{role or '?'}:{code}" for role, code in roles_and_codes(text)] == expected.split()


@given(stays())
def test_bare_list_is_read_back(stay):
    assert parse_answer(code_list(stay)) == [Diagnosis(None, item.code) for item in stay]


# --- One parser for answers and tables --------------------------------------------------------------------------------

NBSP, SOFT_HYPHEN, ZERO_WIDTH = "\N{NO-BREAK SPACE}", "\N{SOFT HYPHEN}", "\N{ZERO WIDTH SPACE}"
CYRILLIC = str.maketrans("CEI", "СЕІ")
FULL_WIDTH = {ordinal: ordinal + 0xFEE0 for ordinal in range(0x21, 0x7F)}


def dotted(code: str) -> str:
    return f"{code[:3]}.{code[3:]}" if len(code) > 3 else code


SPELLINGS: list[Callable[[str], str]] = [
    str,
    dotted,
    lambda code: dotted(code).lower(),
    lambda code: f" {code}{NBSP}",
    lambda code: f"'{code}'",
    lambda code: f'"{dotted(code)}"',
    lambda code: f"«{NBSP}{code}{NBSP}»",
    lambda code: f"CIM10:{dotted(code)}",
    lambda code: f"CIM-10 FR : {code}",
    lambda code: f"ICD-10 : {code}",
    lambda code: f"code {code}",
    lambda code: f"{dotted(code)}*",
    lambda code: f"{dotted(code)}†",
    lambda code: f"{code} †",
    lambda code: f"{code}+" if "+" not in code else code,
    lambda code: f"{code[0]} {code[1:]}",
    lambda code: f"{dotted(code)[:5]} {code[4:]}" if code[4:].isdecimal() else code,
    lambda code: dotted(code).replace("+", " + "),
    lambda code: code.translate(FULL_WIDTH),
    lambda code: dotted(code).translate(FULL_WIDTH),
    lambda code: code.translate(CYRILLIC),
    lambda code: f"{code[:3]}{SOFT_HYPHEN}{code[3:]}{ZERO_WIDTH}",
    lambda code: f"({code})",
    lambda code: f"[{dotted(code)}]",
    lambda code: f"{code},",
]  # fmt: skip
LABELED = [
    "{} Hypertension",
    "{} - Hypertension",
    "{} : Hypertension, sans précision",
    "{}-Hypertension",
    "{}=Hypertension",
    "Hypertension ({})",
    "Hypertension artérielle {}",
]
LAYOUTS = {  # of an answer: where the spelling is, next to another code
    "sentence": "diagnostic principal : Une maladie ({}), diagnistic relié : aucun, diagnostic associé : BPCO (J449)",
    "brackets": "DP : Une maladie [{}]\nDAS : BPCO [J449]",
    "lines": "DP : {}\nDAS : J449",
    "without roles": "{}, J449",
    "items": "- {}\n- J449",
    "list": "[{}, J449]",
}
SPELLED_CODES = sorted({"I10", "I5010", "C509", "E1198", "C189+0", "F03+00", "B24+0", *list(COMMON)[::30]} - {"J449"})
MALFORMED_ENDS = ["X", ".X", " X", "9999", "-I15", ".-", "O1", "+123"]


def misread(spelled: str, code: str, layouts: Collection[str] = LAYOUTS) -> dict[str, list[str]]:
    """Return what each route reads, where it is not the code."""
    found = {name: [item.code for item in parse_answer(LAYOUTS[name].format(spelled))] for name in layouts}
    found |= {"cell": [*split_codes(spelled), "J449"]}
    return {f"{spelled!r} in {name}": codes for name, codes in found.items() if codes != [code, "J449"]}


@pytest.mark.parametrize("code", SPELLED_CODES)
def test_spellings_are_the_same_code_in_answers_and_cells(code):
    wrong: dict[str, list[str]] = {}
    for spelling in SPELLINGS:
        wrong |= misread(spelling(code), code)
    for labeled in LABELED:
        wrong |= misread(labeled.format(dotted(code)), code, ("lines", "items"))
    assert not wrong


@pytest.mark.parametrize("code", [code for code in SPELLED_CODES if "+" not in code])
def test_malformed_codes_are_the_same_in_answers_and_cells(code):
    wrong: dict[str, list[str]] = {}
    for end in MALFORMED_ENDS:
        malformed = f"{code}{end}".replace(".", "").replace(" ", "")
        wrong |= misread(f"{code}{end}", malformed) | misread(f"{dotted(code)}{end}".lower(), malformed)
    assert not wrong


def test_spellings_are_the_same_code_in_a_table_of_predictions(tmp_path):
    spelled = [spelling("C189+0") for spelling in SPELLINGS] + [label.format("C18.9+0") for label in LABELED]
    with (tmp_path / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "role", "code"), *((f"s{n}", "DP", text) for n, text in enumerate(spelled))])
    found = read_predictions(tmp_path / "predictions.csv")
    assert [[item.code for item in found[f"s{n}"].diagnoses] for n in range(len(spelled))] == [["C189+0"]] * len(found)


@pytest.mark.parametrize(("text", "expected"), IRREGULAR)
def test_irregular_answers(text, expected):
    found = [f"{role or '?'}:{code}" for role, code in roles_and_codes(text)]
    assert found == expected.split()


def test_thirty_distinct_irregular_answers():
    assert len({text for text, _ in IRREGULAR}) == 30


@given(st.text())
def test_any_text_is_parsed_without_error(text):
    for item in parse_answer(text):
        assert item.role in (*ROLES, None) and item.code
