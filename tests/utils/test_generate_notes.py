"""Fictional notes: coded diagnoses are mentioned, other mentioned diagnoses are distractors, and seeds decide."""

import csv
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.data.args import DataArgs
from finetune.data.data_loader import build_data_loader
from model.errors import UserError
from utils import generate_notes
from utils.fictional_notes import phrases
from utils.fictional_notes.catalogue import bare, load_catalogue, wording_forms
from utils.fictional_notes.notes import write_notes
from utils.fictional_notes.scenarios import sample_stay
from utils.icd10.answers import build_answer, parse_answer
from utils.icd10.codes import ROLES, Cim10Entry, Cim10Table, category
from utils.icd10.prompts import instruct_row
from utils.icd10.rules import guide_rules

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "../shared/icd"
CATALOGUE = load_catalogue()
COMMON = CATALOGUE.common


def pattern_of(wording):
    """Return a whole-word pattern of a wording; measurements match any number, abbreviations are case-sensitive."""
    phrase = re.sub(r"\\\{[^}]*\\\}", r"[\\d,]+", re.escape(bare(wording)))
    abbreviation = bare(wording).isupper() and len(bare(wording)) <= 6
    return re.compile(rf"(?<!\w){phrase}(?!\w)", 0 if abbreviation else re.IGNORECASE)


def wordings_of(condition, subset="all"):
    lists = {"train": condition.written, "unseen": condition.unseen, "all": condition.written + condition.unseen}
    return lists[subset]


def patterns_of(subset):
    return [(code, pattern_of(wording)) for code, item in COMMON.items() for wording in wordings_of(item, subset)]


PATTERNS = patterns_of("all")
NEGATION = r"\bpas d|\babsence d|\baucun|n'est pas retenue|est écartée|ne retrouvent pas"
RESOLVED = r"sans séquelle|sans récidive|guéri en|épisode résolu"
RELATIVE = r"\b(père|mère|frère|sœur|oncle|tante|grand-père|grand-mère)\b"
DISTRACTOR = re.compile(f"{NEGATION}|{RESOLVED}|{RELATIVE}", re.IGNORECASE)


def mentions(text, patterns=PATTERNS):
    """Return the groups mentioned as the patient's own and as distractors, parsed clause by clause from the text."""
    own, distracting = set(), set()
    present = [(code, pattern) for code, pattern in patterns if pattern.search(text)]
    for clause in re.split(r"\n|\. |, |;", text):
        found = {COMMON[code].group for code, pattern in present if pattern.search(clause)}
        (distracting if DISTRACTOR.search(clause) else own).update(found)
    return own, distracting


def notes(count=150, seed=0, length="short", wordings="all", catalogue=CATALOGUE):
    return list(write_notes(count, seed, catalogue, length, wordings))


@pytest.mark.parametrize("length", ["short", "long"])
def test_every_code_is_stated_where_the_note_says(length):
    for note in notes(40, length=length):
        assert {each.code for each in note.statements} == {item.code for item in note.diagnoses}
        for code, start, end in note.statements:
            text = note.text[start:end]
            assert any(pattern.search(text) for wording, pattern in PATTERNS if wording == code), (code, text)


# --- The table of common codes ----------------------------------------------------------------------------------------


def test_common_codes_refer_to_each_other():
    for code, item in COMMON.items():
        assert {*item.associated, *item.sessions, *item.rule_out} <= set(COMMON), code
        assert {name for name, _, _ in item.measures} <= set(phrases.MEASURES), code
        assert item.kind in {"chronic", "bio", "event", "imaging"}, code
        assert item.age[0] < item.age[1] and item.stay[0] <= item.stay[1], code
        if item.dp:
            assert item.may_be("DP") and item.history and item.exam and item.tests and item.care, code
    assert 80 <= len(COMMON) <= 120


def test_wordings_are_numerous_and_the_simplest_comes_first():
    for code, item in COMMON.items():
        assert len(item.written) >= 3 and len(item.unseen) >= 2, code
        assert not set(item.written) & set(item.unseen), code
        assert all(wording.startswith(("un ", "une ", "des ")) for wording in wordings_of(item)), code
        assert "{" not in item.written[0] + item.unseen[0], code  # distractors have no measurements


def test_wordings_are_unambiguous():
    """No wording occurs in the wording of another disease or in a sentence that goes with a disease."""
    for code, item in COMMON.items():
        sentences = (*item.complaints, *item.history, *item.exam, *item.tests, *item.care, *item.managed, *item.drugs)
        for other, pattern in PATTERNS:
            assert not any(pattern.search(sentence) for sentence in sentences), (code, other)
            if COMMON[other].group != item.group:
                written = (re.sub(r"\{\w+\}", "9", wording) for wording in wordings_of(item))
                assert not any(pattern.search(wording) for wording in written), (code, other)


def test_french_forms_of_a_wording():
    assert wording_forms("une HTA") == {"nu": "HTA", "un": "une HTA", "d_un": "d'une HTA", "de": "d'HTA"}
    assert wording_forms("des métastases")["d_un"] == "de métastases"
    assert wording_forms("un œdème")["de"] == "d'œdème"
    assert wording_forms("une hernie")["de"] == "de hernie"
    assert wording_forms("choléra")["un"] == "choléra"


# --- Stays ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stays():
    rng = random.Random(0)
    return [sample_stay(rng, CATALOGUE) for _ in range(4000)]


def test_stays_are_plausible(stays):
    for stay in stays:
        assert all(stay.sex in item.sex for item in stay.conditions)
        assert all(item.age[0] <= stay.age <= item.age[1] for item in stay.conditions)
        groups = [item.group for item in stay.conditions]
        assert len(set(groups)) == len(groups)
        assert len(stay.das) <= 7 and stay.days >= stay.dp.stay[0]
        for diagnosis in stay.diagnoses():
            assert COMMON[diagnosis.code].may_be(diagnosis.role)
    women = {item.code for stay in stays for item in stay.conditions if stay.sex == "F"}
    men = {item.code for stay in stays for item in stay.conditions if stay.sex == "M"}
    assert not women & {"C61", "N40"} and "C504" not in men


def test_disease_is_the_related_diagnosis_of_its_sessions(stays):
    sessions = {code for item in COMMON.values() for code in item.sessions}
    assert {"Z511", "Z5101"} <= sessions
    for stay in stays:
        assert (stay.dp.code in sessions) == (stay.dr is not None)
        assert stay.dr is None or stay.dp.code in stay.dr.sessions
    cancers = [stay for stay in stays if any(item.code.startswith("C") for item in stay.reasons)]
    assert 0.3 < sum(stay.dr is None for stay in cancers) / len(cancers) < 0.6


def test_frequency_severity_and_coverage(stays):
    counts = [len(stay.das) for stay in stays]
    assert set(counts) == set(range(8)) and 2 < statistics.mean(counts) < 4
    coded = {item.code for stay in stays for item in stay.conditions}
    assert coded == set(COMMON)
    frequent = sum(stay.dp.code == "J189" for stay in stays)
    assert frequent > 3 * sum(stay.dp.code == "R296" for stay in stays)
    ill = [stay for stay in stays if stay.dp.code == "J189"]
    acute = {stay: sum(item.kind != "chronic" for item in stay.das) for stay in ill}
    light = [stay.days for stay in ill if acute[stay] == 0]
    severe = [stay.days for stay in ill if acute[stay] >= 3]
    assert statistics.mean(severe) > statistics.mean(light) + 1


# --- Notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wordings", ["train", "unseen", "all"])
@pytest.mark.parametrize(("length", "count"), [("short", 150), ("long", 40)])
def test_coded_diagnoses_are_mentioned_and_all_others_are_distractors(length, count, wordings):
    allowed = patterns_of(wordings)
    found = 0
    for note in notes(count, seed=3, length=length, wordings=wordings):
        coded = {COMMON[diagnosis.code].group for diagnosis in note.diagnoses}
        own, distracting = mentions(note.text)
        assert own == coded, note.text
        assert not distracting & coded, note.text
        assert mentions(note.text, allowed) == (own, distracting), note.text  # in the wordings of this subset
        for diagnosis in note.diagnoses:
            assert any(pattern.search(note.text) for code, pattern in allowed if code == diagnosis.code), note.text
        found += len(distracting)
    assert found > count


def test_all_kinds_of_distractors_occur():
    text = "\n".join(note.text for note in notes(200, length="long"))
    for cue in (NEGATION, RESOLVED, RELATIVE):
        assert len(re.findall(cue, text, re.IGNORECASE)) > 50


def test_no_sentence_of_a_long_note_gives_all_codes():
    given = total = 0
    for note in notes(100, length="long"):
        if len(note.diagnoses) < 4:
            continue
        coded = {COMMON[diagnosis.code].group for diagnosis in note.diagnoses}
        total += 1
        given += any(coded <= mentions(line)[0] for line in re.split(r"\n|\. ", note.text))
    assert total > 20 and given == 0


def test_notes_have_no_template_leftovers_or_french_errors():
    for note in notes(200) + notes(100, length="long"):
        assert "{" not in note.text and "}" not in note.text
        assert "  " not in note.text and ".." not in note.text and " ." not in note.text
        assert not re.search(r"\b(de|d'une|d'un|le|la) (un|une|des)\b", note.text)
        assert not re.search(r"\bde [aeiouyéèêœ]", note.text), re.search(r"\bde [aeiouyéèêœ].*", note.text)
        assert not re.search(r"(^|[.:] |\n- )[a-zé]\w+ [^.:\n]*\. [a-zé]", note.text)


def test_measurements_are_consistent():
    """A potassium of 2,8 in a sentence is 2,8 in the blood test, and abnormal only if it is coded."""
    for note in notes(300, length="long"):
        low = any(diagnosis.code == "E8768" for diagnosis in note.diagnoses)
        high = any(diagnosis.code == "E8758" for diagnosis in note.diagnoses)
        values = re.findall(r"(?:kaliémie|K\+|potassium)(?: bas| haut| basse| élevée)?(?: à)? (\d,\d)", note.text)
        figures = {float(value.replace(",", ".")) for value in values}
        assert len(figures) <= 1, note.text
        assert all((figure < 3.5) == low and (figure > 5.2) == high for figure in figures), note.text


def test_answers_of_all_notes_are_parsed():
    for note in notes(400) + notes(100, length="long"):
        assert parse_answer(build_answer(note.diagnoses)) == list(note.diagnoses)


def test_associated_diagnoses_are_in_the_order_of_the_note():
    for note in notes(150):
        firsts = [
            min(match.start() for code, p in PATTERNS if code == item.code and (match := p.search(note.text)))
            for item in note.diagnoses
            if item.role == "DAS"
        ]
        assert firsts == sorted(firsts), note.text


def test_wordings_change_the_text_but_not_the_stay():
    seen, unseen = notes(60, wordings="train"), notes(60, wordings="unseen")
    for one, other in zip(seen, unseen):
        assert sorted(one.diagnoses, key=str) == sorted(other.diagnoses, key=str)
        assert one.text != other.text and one.id != other.id


def test_notes_depend_on_the_seed_and_not_on_the_count():
    assert notes(20) == notes(40)[:20]
    assert not {note.text for note in notes(50, seed=1)} & {note.text for note in notes(50, seed=2)}
    many = notes(1500)
    assert len({note.id for note in many}) == len({note.text for note in many}) == 1500
    assert all(re.fullmatch(r"[0-9a-f]{40}", note.id) for note in many[:10])


def test_notes_depend_neither_on_the_hash_seed_nor_on_heavy_imports():
    script = (
        "import sys\nfrom utils.fictional_notes.catalogue import load_catalogue\n"
        "from utils.fictional_notes.notes import write_notes\n"
        "print([note for length in ('short', 'long') for note in write_notes(20, 5, load_catalogue(), length)])\n"
        "assert not {'torch', 'numpy', 'mistral_common'} & set(sys.modules), 'heavy import'"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count(b"FictionalNote") == 40


def test_lengths_are_in_the_documented_ranges():
    tokenizer = MistralTokenizer.v3().instruct_tokenizer.tokenizer
    for length, low, high in (("short", 70, 150), ("long", 600, 1500)):
        sizes = sorted(len(tokenizer.encode(note.text, bos=False, eos=False)) for note in notes(150, length=length))
        assert low <= statistics.median(sizes) <= high
        assert sizes[7] >= low * 0.6 and sizes[-7] <= high * 1.4


# --- From a table -----------------------------------------------------------------------------------------------------

SMALL_TABLE = Cim10Table(
    [
        Cim10Entry("I10", 0, "Hypertension de la table"),
        Cim10Entry("J189", 1, "Pneumopathie que la table interdit comme DP"),
        Cim10Entry("S7200", 0, "Fracture du col"),
        Cim10Entry("D62", 3, "Fermé"),
        Cim10Entry("A000", 0, "Choléra à Vibrio cholerae (01), sans précision"),
        Cim10Entry("C530", 0, "Tumeur maligne de l'endocol"),
        Cim10Entry("A009", 0, "Autres choléras"),
        Cim10Entry("P070", 0, "Poids extrêmement faible à la naissance"),
        Cim10Entry("I158", 0, "Une HTA secondaire"),
    ]
)


def test_table_provides_labels_types_and_additional_main_diagnoses():
    catalogue = load_catalogue(SMALL_TABLE)
    assert set(catalogue.common) == {"I10", "J189", "S7200"}
    assert catalogue.common["I10"].label == "Hypertension de la table"
    # Excluded: vague labels, newborns, labels that contain a common wording.
    assert {item.code: item.sex for item in catalogue.others} == {"A000": "FM", "C530": "F"}
    written = notes(200, catalogue=catalogue)
    mains = {note.diagnoses[0].code for note in written}
    assert mains == {"S7200", "A000", "C530"}
    assert {diagnosis.code for note in written for diagnosis in note.diagnoses} <= {*mains, "I10", "J189"}
    cholera = next(note for note in written if note.diagnoses[0].code == "A000")
    assert re.search("choléra à Vibrio cholerae", cholera.text, re.IGNORECASE)
    assert cholera.diagnoses[0].label == "Choléra à Vibrio cholerae (01), sans précision"


def test_table_without_a_common_main_diagnosis_is_rejected():
    with pytest.raises(UserError, match="none of the common main diagnoses"):
        load_catalogue(Cim10Table([Cim10Entry("I10", 0, "Hypertension"), Cim10Entry("J189", 3, "Fermé")]))


@pytest.mark.skipif(not SHARED.exists(), reason="the ATIH table is not available")
def test_complete_table_of_atih():
    table = Cim10Table.from_file(SHARED / "cim_10_atih_2019.tsv")
    for code, item in COMMON.items():
        assert table.get(code).type == item.type, code
    catalogue = load_catalogue(table)
    assert set(catalogue.common) == set(COMMON) and len(catalogue.others) > 1000
    written = notes(600, catalogue=catalogue)
    others = {item.code for item in catalogue.others}
    assert 100 < sum(not others.isdisjoint(item.code for item in note.diagnoses[:2]) for note in written) < 260
    for note in written:
        assert parse_answer(build_answer(note.diagnoses)) == list(note.diagnoses)
        for diagnosis in note.diagnoses:
            assert guide_rules().allows(diagnosis.role, table.get(diagnosis.code))
            assert diagnosis.label == table.label(diagnosis.code)


# --- The command ------------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate_notes", *map(str, arguments)])
    generate_notes.main()


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_contain_the_same_stays(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path / "data", "--n", 60, "--seed", 4, "--split", "0.8,0.2")
    out = tmp_path / "data"
    assert sorted(path.name for path in out.iterdir()) == [
        "cim10.tsv",
        "codes.csv",
        "eval_instruct.jsonl",
        "notes_instruct.jsonl",
        "text.csv",
        "train_instruct.jsonl",
    ]
    written = notes(60, seed=4, length="long")
    texts, codes = read_csv(out / "text.csv"), read_csv(out / "codes.csv")
    assert texts == [{"visit_occurence_id": note.id, "text": note.text} for note in written]
    assert [tuple(row.values()) for row in codes] == [(note.id, *item) for note in written for item in note.diagnoses]
    rows = read_jsonl(out / "notes_instruct.jsonl")
    assert rows == [instruct_row(note.text, build_answer(note.diagnoses), note.id) for note in written]
    train, held_out = read_jsonl(out / "train_instruct.jsonl"), read_jsonl(out / "eval_instruct.jsonl")
    assert (len(train), len(held_out)) == (48, 12)
    assert sorted(train + held_out, key=rows.index) == rows


def test_trainer_reads_the_rows_and_trains_on_the_answers(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path, "--n", 10, "--length", "short")
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    args = DataArgs(eval_instruct_data=str(tmp_path / "eval_instruct.jsonl"))
    (batch,) = build_data_loader(tokenizer, args, 1, 1024, None, 0, 1, is_eval=True)
    trained = [int(token) for token, kept in zip(batch.y, batch.y_mask) if kept]
    answer = read_jsonl(tmp_path / "eval_instruct.jsonl")[0]["messages"][-1]["content"]
    assert tokenizer.tokenizer.decode(trained) == answer


def test_written_table_contains_the_codes_and_their_categories(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path, "--n", 30)
    table = Cim10Table.from_file(tmp_path / "cim10.tsv")
    for row in read_csv(tmp_path / "codes.csv"):
        assert guide_rules().allows(row["condition_status_source_value"], table.get(row["concept_code"]))
        assert table.label(row["concept_code"]) == row["concept_name"]
    assert all(category(entry.code) in table for entry in table)
    assert not any(guide_rules().allows(role, table.get("E11")) for role in ROLES)


@pytest.mark.skipif(not SHARED.exists(), reason="the original notes are not available")
def test_columns_and_ids_are_like_those_of_the_original_files(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path, "--n", 20, "--cim10", SHARED / "cim_10_atih_2019.tsv")
    for name in ("text.csv", "codes.csv"):
        ours, theirs = read_csv(tmp_path / name), read_csv(SHARED / name)
        assert list(ours[0]) == list(theirs[0])
        assert {len(row["visit_occurence_id"]) for row in ours} == {len(row["visit_occurence_id"]) for row in theirs}
    assert not (tmp_path / "cim10.tsv").exists()  # given by the user


def test_files_are_byte_identical_for_a_seed(monkeypatch, tmp_path):
    for name in ("a", "b"):
        run(monkeypatch, "--out", tmp_path / name, "--n", 40, "--length", "short", "--wordings", "unseen")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_files_are_replaced_only_with_overwrite(monkeypatch, tmp_path):
    (tmp_path / "text.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.csv already exist.*--overwrite"):
        run(monkeypatch, "--out", tmp_path, "--n", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["text.csv"]
    run(monkeypatch, "--out", tmp_path, "--n", 10, "--split", "0.6,0.2,0.2", "--overwrite")
    assert (tmp_path / "test_instruct.jsonl").exists()
    run(monkeypatch, "--out", tmp_path, "--n", 10, "--overwrite")
    assert not (tmp_path / "test_instruct.jsonl").exists()  # its notes may now be in train


def test_failure_writes_nothing(monkeypatch, tmp_path):
    def failing(*arguments):
        yield from notes(2)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(generate_notes, "write_notes", failing)
    with pytest.raises(RuntimeError):
        run(monkeypatch, "--out", tmp_path, "--n", 10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--n", "0"], "expected at least 1 note"),
        (["--n", "5", "--split", "0.5,0.2"], "sum to 1"),
        (["--n", "1"], "eval split would have no row"),
        (["--n", "5", "--cim10", "none.txt"], "none.txt: cannot read the CIM-10 table"),
    ],
)
def test_invalid_arguments_are_reported(monkeypatch, tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        run(monkeypatch, "--out", tmp_path / "data", *arguments)
    assert not (tmp_path / "data").exists()
