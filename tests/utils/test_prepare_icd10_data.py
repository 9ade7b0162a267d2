"""From notes and codes to training files: rules, sentences, splits, and the report of what is dropped."""

import csv
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from finetune.data.conversation import parse_conversation, pretrain_text
from model.errors import UserError
from utils import prepare_icd10_data
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.generate_notes import CODE_COLUMNS, TEXT_COLUMNS, save_notes, table_of
from utils.icd10.answers import Diagnosis, parse_answer
from utils.icd10.codes import Cim10Table, chapter
from utils.icd10.corpus import CodedStay, build_corpus
from utils.icd10.near_duplicates import MIN_SIMILARITY, find_near_duplicates, normalize_text, signature
from utils.icd10.prompts import SYSTEM_PROMPT
from utils.icd10.roles import UNIT_DP
from utils.icd10.rules import guide_rules
from utils.icd10.splits import SPLITS, split_stays
from utils.icd10.stays import CodeRow, Document, StayNotes
from utils.tables.splits import assign_splits

SHARED = Path(__file__).resolve().parents[2] / "../shared/icd"
CATALOGUE = load_catalogue()
TABLE = table_of(CATALOGUE)
TRAINING_FILES = {f"{split}_{kind}.jsonl" for split in SPLITS for kind in ("instruct", "text")}
NAMES = TRAINING_FILES | {"report.json", "left_out.csv", "rules.csv"}


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory):
    """A folder with text.csv, codes.csv and cim10.tsv of 120 fictional stays."""
    folder = tmp_path_factory.mktemp("warehouse")
    save_notes(write_notes(120, 0, CATALOGUE, "short"), folder, [0] * 120, TABLE)
    return folder


@pytest.fixture
def prepare(run_command):
    """Run the command in this process; return its exit code and output."""

    def run(out, text, codes, table, *options):
        arguments = ["--text", text, "--codes", codes, "--cim10", table, "--out", out, *options]
        return run_command(prepare_icd10_data, *arguments)

    return run


def tables_of(folder):
    return folder / "text.csv", folder / "codes.csv", folder / "cim10.tsv"


def write_csv(path, columns, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows(out):
    return [row for path in sorted(out.glob("*_instruct.jsonl")) for row in read_jsonl(path)]


def splits_of(out):
    return {row["id"]: split for split in SPLITS for row in read_jsonl(out / f"{split}_instruct.jsonl")}


def check_files(out, source, table):
    """Check that every stay of the source is there once, in the documented layout, and that its answer is parsed."""
    texts = {row["visit_occurence_id"]: row["text"] for row in read_csv(source / "text.csv")}
    codes = defaultdict(set)
    for row in read_csv(source / "codes.csv"):
        codes[row["visit_occurence_id"]].add((row["condition_status_source_value"], row["concept_code"]))
    pairs = Counter(
        (main, code)
        for stay in codes.values()
        for role, code in stay
        for other, main in stay
        if (role, other) == ("DAS", "DP")
    )
    assert {path.name for path in out.iterdir()} == NAMES
    found = []
    for split in SPLITS:
        rows, plain = (read_jsonl(out / f"{split}_{kind}.jsonl") for kind in ("instruct", "text"))
        for row, pretrain in zip(rows, plain, strict=True):
            found.append(row["id"])
            system, user, answer = parse_conversation(row).messages
            note = texts[row["id"]].strip()
            assert system.content == SYSTEM_PROMPT and user.content.endswith(f"d'hospitalisation suivant : {note}")
            diagnoses = parse_answer(answer.content)
            assert {(item.role, item.code) for item in diagnoses} == codes[row["id"]]
            assert all(item.label == table.label(item.code) for item in diagnoses)
            assert [item.role for item in diagnoses] == sorted(
                (item.role for item in diagnoses), key=("DP", "DR", "DAS").index
            )
            frequencies = [pairs[diagnoses[0].code, item.code] for item in diagnoses if item.role == "DAS"]
            assert frequencies == sorted(frequencies, reverse=True)
            listed = ", ".join(f"{item.label} ({item.code})" for item in diagnoses)
            ended = note if note[-1] in ".!?" else f"{note}."
            assert pretrain_text(pretrain) == f"{ended} ICD-10 codes : {listed}"
    assert sorted(found) == sorted(texts)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["stays"] == {"read": len(texts), "kept": len(texts), "dropped": {}}
    assert report["codes"]["kept"] == sum(map(len, codes.values()))
    return report


def test_generated_notes_are_converted(warehouse, prepare, tmp_path):
    code, output = prepare(tmp_path / "out", *tables_of(warehouse))
    assert code == 0 and "Stays read: 120. Kept: 120." in output
    report = check_files(tmp_path / "out", warehouse, TABLE)
    assert [split["stays"] for split in report["splits"].values()] == [96, 12, 12]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the original 200 stays are not available")
def test_all_200_original_stays_are_converted(prepare, tmp_path):
    table = SHARED / "cim_10_atih_2019.tsv"
    code, _ = prepare(tmp_path / "out", SHARED / "text.csv", SHARED / "codes.csv", table)
    assert code == 0
    report = check_files(tmp_path / "out", SHARED, Cim10Table.from_file(table))
    roles = Counter()
    for split in report["splits"].values():
        roles.update(split["codes"])
    assert roles == {"DP": 200, "DR": 45, "DAS": 657}
    assert [split["stays"] for split in report["splits"].values()] == [160, 20, 20]
    assert report["duplicates"]["near_identical_across_splits"] == 0


# --- Rules ------------------------------------------------------------------------------------------------------------

MINI_LINES = "I10|0|Hypertension\nJ189|0|Pneumonie\nJ18|3|Pneumonies\nE1198|0|Diabète\nC187|0|Tumeur du côlon\n" + (
    "C509|0|Tumeur du sein\nZ511|0|Séance de chimiothérapie\nZ370|1|Naissance\nF03+00|4|Démence\nE43|0|Dénutrition\n"
)


@pytest.fixture
def mini_table(tmp_path):
    path = tmp_path / "mini.txt"
    lines = (line.split("|") for line in MINI_LINES.splitlines())
    path.write_text("".join(f"{code:<6}|{kind}|NOOO|{kind}|X|{label}\n" for code, kind, label in lines), "utf-8")
    return path


def corpus_of(table, unit=None, **codes):
    """Build stays s1=..., s2=... from "DP:I10 DAS:E43" or, with units and flags, "DP:I10:2:oui"; each has a note."""
    rows = {stay: [CodeRow(*item.split(":")) for item in text.split()] for stay, text in codes.items()}
    rows = {
        stay: [row._replace(role=UNIT_DP) if row.role == "DPUM" else row for row in found]
        for stay, found in rows.items()
    }
    notes = StayNotes()
    for stay in codes:
        notes.add(Document(stay, f"Note {stay}"))
    found = Cim10Table.from_file(table)
    return build_corpus(notes, rows, lambda stay: found, unit)


def left_out_codes(corpus):
    """Return the codes left out as "DP I10 of a", by reason."""
    found = defaultdict(list)
    for item in corpus.left_out:
        if item.what == "code":
            found[item.reason].append(f"{item.role} {item.code} of {item.stay}")
    return found


def coded(corpus):
    return {stay.id: " ".join(f"{item.role}:{item.code}" for item in stay.diagnoses) for stay in corpus.stays}


@pytest.mark.parametrize(
    ("unit", "codes", "expected"),
    [
        # The unit, by number where units have one.
        ("first", "DP:J189 DP:I10 DAS:E43", "DP:J189 DAS:E43 DAS:I10"),
        ("last", "DP:J189 DP:I10 DAS:E43", "DP:I10 DAS:E43 DAS:J189"),
        ("first", "DP:J189:10 DP:I10:9", "DP:I10 DAS:J189"),
        # What the table says: a flag, the code of the stay's DP, the role.
        (None, "DP:J189:1:non DP:I10:2:oui DAS:E43:1", "DP:I10 DAS:E43 DAS:J189"),
        (None, "DP:J189:1:i10 DP:I10:2:i10", "DP:I10 DAS:J189"),
        (None, "DPUM:J189 DPUM:I10 DP:I10", "DP:I10 DAS:J189"),
        # Nothing to decide.
        (None, "DP:J189:1 DP:J189:2 DAS:I10", "DP:J189 DAS:I10"),
        (None, "DPUM:J189 DAS:I10", "DP:J189 DAS:I10"),
        # The DR of the DP's unit; those of others become DAS.
        ("last", "DP:J189:1 DR:C509:1 DP:Z511:2 DR:C187:2", "DP:Z511 DR:C187 DAS:C509 DAS:J189"),
        (None, "DP:Z511 DR:C187 DR:Z511", "DP:Z511 DR:C187"),
    ],
)
def test_main_diagnosis_of_several_units_is_the_one_that_is_named(unit, codes, expected, mini_table):
    corpus = corpus_of(mini_table, unit, a=codes)
    assert coded(corpus) == {"a": expected}


def test_main_diagnosis_that_nothing_names_stops_with_examples(mini_table):
    codes = {"a": "DP:J189:1 DP:I10:2", "b": "DP:Z511", "c": "DP:Z511 DR:C187 DR:C509", "d": "DP:I10 DP:E43"}
    with pytest.raises(
        UserError, match=r"3 stays have several DP or DR.*a: DP J189 and DP I10; c: DR C187 and DR C509"
    ):
        corpus_of(mini_table, d2="DP:J189", **codes)


def test_related_diagnosis_is_moved_where_the_guide_allows_none(mini_table):
    corpus = corpus_of(mini_table, a="DP:J189 DR:I10", b="DP:Z511 DR:C187")
    assert coded(corpus) == {"a": "DP:J189 DAS:I10", "b": "DP:Z511 DR:C187"}
    assert list(corpus.moved.values()) == [["DR I10 of stay a"]]
    may_have_dr = guide_rules().may_have_dr
    assert may_have_dr("Z511") and not any(map(may_have_dr, ("I10", "Z380", "Z039", "Z870", "Z209")))


def test_associated_diagnoses_are_distinct_from_dp_and_dr_and_sorted_by_frequency_with_the_dp(mini_table):
    corpus = corpus_of(
        mini_table,
        a="DP:J189 DAS:E43 DAS:I10 DAS:E1198 DAS:J189 DAS:I10",
        b="DP:J189 DAS:I10 DAS:E1198",
        c="DP:J189 DAS:I10",
        d="DP:Z511 DR:C187 DAS:C187 DAS:E43 DAS:I10",
        e="DP:Z511 DAS:E43",
        f="DP:C509 DAS:E1198 DAS:E43 DAS:I10",  # ties with C509: overall frequency, then alphabet
    )
    assert coded(corpus) == {
        "a": "DP:J189 DAS:I10 DAS:E1198 DAS:E43",
        "b": "DP:J189 DAS:I10 DAS:E1198",
        "c": "DP:J189 DAS:I10",
        "d": "DP:Z511 DR:C187 DAS:E43 DAS:I10",
        "e": "DP:Z511 DAS:E43",
        "f": "DP:C509 DAS:I10 DAS:E43 DAS:E1198",
    }
    assert left_out_codes(corpus) == {
        "duplicate DAS": ["DAS I10 of a"],
        "also its DP or DR": ["DAS J189 of a", "DAS C187 of d"],
    }


def test_codes_are_labeled_by_the_table(mini_table):
    corpus = corpus_of(mini_table, a="DP:Z511 DAS:E1198 DR:F03+00")
    (stay,) = corpus.stays
    assert stay.diagnoses == [
        Diagnosis("DP", "Z511", "Séance de chimiothérapie"),
        Diagnosis("DR", "F03+00", "Démence"),
        Diagnosis("DAS", "E1198", "Diabète"),
    ]


def test_every_stay_and_code_is_kept_or_dropped_for_one_reason(mini_table, prepare, tmp_path):
    text = write_csv(
        tmp_path / "text.csv",
        ("visit_occurence_id", "text"),
        [("kept", "Une note."), ("kept", "Une autre."), ("kept", "Une note."), ("blank", " \n"), ("uncoded", "Note.")]
        + [("forbidden", "Note."), ("das", "Note."), ("", "Note."), ("short",)],
    )
    codes = write_csv(
        tmp_path / "codes.csv",
        ("visit_occurence_id", "condition_status_source_value", "concept_code"),
        [("kept", "DP", "J189"), ("kept", "DAS", "X999"), ("kept", "DAS", "J18"), ("kept", "DR", "Z370")]
        + [("kept", "DAS", "Z370"), ("kept", "DAD", "I10"), ("kept", "DAS", "")]
        + [("blank", "DP", "I10"), ("textless", "DP", "I10"), ("textless", "DAS", "E43")]
        + [("forbidden", "DP", "F03+00"), ("forbidden", "DAS", "I10"), ("das", "DAS", "I10")],
    )
    code, output = prepare(tmp_path / "out", text, codes, mini_table, "--ratios", "1")
    assert code == 0
    (row,) = read_jsonl(tmp_path / "out/train_instruct.jsonl")
    assert row["messages"][1]["content"].endswith("suivant : Une note.\n\nUne autre.")
    assert row["messages"][2]["content"].endswith(
        "diagnostic principal : Pneumonie (J189), diagnistic relié : aucun, diagnostic associé : Naissance (Z370)"
    )
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["codes"]["moved"] == {
        "DR beside a DP that takes none (guide MCO), kept as DAS": {"count": 1, "examples": ["DR Z370 of stay kept"]}
    }
    named = [(row["what"], row["reason"]) for row in read_csv(tmp_path / "out/left_out.csv")]
    for what, found in (("stay", report["stays"]["dropped"]), ("code", report["codes"]["dropped"])):
        listed = Counter(reason for kind, reason in named if kind == what)
        assert listed == {reason: len(item) if what == "stay" else item["count"] for reason, item in found.items()}
    assert report["stays"] == {
        "read": 6,
        "kept": 1,
        "dropped": {
            "without text": ["blank", "textless"],
            "without codes": ["uncoded"],
            "without a usable DP": ["forbidden", "das"],
        },
    }
    counts = {reason: found["count"] for reason, found in report["codes"]["dropped"].items()}
    assert counts == {
        "not in the CIM-10 table": 1,
        "a category with children or a closed code": 1,
        "duplicate DAS": 1,
        "forbidden as DP": 1,
        "DAD, a documentary diagnosis (--roles DAD=DAS keeps it)": 1,
        "of a dropped stay": 5,
    }
    assert report["codes"]["read"] == 12 == report["codes"]["kept"] + sum(counts.values())
    assert {reason: found["count"] for reason, found in report["unreadable_rows"].items()} == {
        "blank, NULL or nan": 1,
        "without an identifier of the stay": 1,
        "without a code": 1,
        "number of fields differs from the header": 1,
    }
    for words in (
        "Stays read: 6. Kept: 1.",
        "without text: 2",
        "forbidden as DP: 1 (e.g. DP F03+00 of stay forbidden)",
    ):
        assert words in output


# --- Splits -----------------------------------------------------------------------------------------------------------


def stays_of(chapters):
    return [CodedStay(str(number), [Diagnosis("DP", code)]) for number, code in enumerate(chapters)]


def texts_of(stays):
    return [f"note {stay.id}" for stay in stays]


@pytest.mark.parametrize("seed", range(4))
def test_splits_are_stratified_by_chapter(seed):
    codes = ["I10"] * 120 + ["C509"] * 53 + ["J189"] * 26 + ["E43"]
    random.Random(seed).shuffle(codes)
    stays = stays_of(codes)
    splits = split_stays(stays, {}, texts_of(stays), (0.8, 0.1, 0.1), seed)
    assert [splits.count(split) for split in range(3)] == [160, 20, 20]
    for code, count in Counter(codes).items():
        within = Counter(split for split, other in zip(splits, codes) if other == code)
        for split, fraction in enumerate((0.8, 0.1, 0.1)):
            assert abs(within[split] - fraction * count) < 2, (code, split)
    assert splits[codes.index("E43")] == 0  # the only stay of a chapter is in train


def test_order_within_strata_is_seeded():
    strata = [number % 2 for number in range(40)]
    chosen = {seed: bytes(assign_splits([1] * 40, (0.8, 0.2), seed, strata)) for seed in range(20)}
    assert len(set(chosen.values())) > 15
    assert all(splits[parity::2].count(1) == 4 for splits in chosen.values() for parity in (0, 1))


def test_splits_are_seeded(warehouse, prepare, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert prepare(tmp_path / name, *tables_of(warehouse), "--seed", seed)[0] == 0
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert contents[0] == contents[1]
    assert splits_of(tmp_path / "a") != splits_of(tmp_path / "c")


def test_a_patient_and_a_text_are_in_one_split(warehouse, prepare, tmp_path):
    rng = random.Random(0)
    rows = read_csv(warehouse / "text.csv")
    for number, row in enumerate(rows):
        row["patient"] = "" if number % 10 == 0 else f"p{rng.randrange(40)}"
    # The same text for two patients.
    rows[0]["text"] = rows[1]["text"].upper().replace(",", " ,  ")
    text = write_csv(tmp_path / "text.csv", list(rows[0]), [row.values() for row in rows])
    patients = {row["visit_occurence_id"]: row["patient"] for row in rows if row["patient"]}
    _, codes, table = tables_of(warehouse)
    for seed in range(3):
        out = tmp_path / f"out{seed}"
        code, output = prepare(out, text, codes, table, "--patient", "patient", "--seed", seed)
        assert code == 0 and "the same text as another stay (kept in the same split): 2." in output
        assert "do not name patients" not in output
        splits = splits_of(out)
        splits_by_patient = defaultdict(set)
        for stay, patient in patients.items():
            splits_by_patient[patient].add(splits[stay])
        assert all(len(found) == 1 for found in splits_by_patient.values())
        assert splits[rows[0]["visit_occurence_id"]] == splits[rows[1]["visit_occurence_id"]]
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        alone = sum(not row["patient"] for row in rows)
        assert sum(split["patients"] for split in report["splits"].values()) == len(set(patients.values())) + alone


def jaccard(first, second, length=3):
    def runs(text):
        words = text.split()
        return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}

    return len(runs(first) & runs(second)) / len(runs(first) | runs(second))


def test_near_duplicates_match_a_comparison_of_all_pairs():
    rng = random.Random(0)
    notes = [normalize_text(note.text) for note in write_notes(60, 1, CATALOGUE, "long")]
    texts, splits = list(notes), [0] * len(notes)
    for note in notes:
        words = note.split()
        for position in rng.sample(range(len(words)), rng.randrange(len(words) // 6)):
            words[position] = f"autre{rng.randrange(1000)}"
        texts.append(" ".join(words))
        splits.append(1)
    signatures = np.stack([signature(text) for text in texts])
    found = {item.note: item for item in find_near_duplicates(signatures, texts, splits)}
    expected = {}
    for number in range(60, 120):
        similarity = max(jaccard(texts[number], texts[other]) for other in range(60))
        if abs(similarity - MIN_SIMILARITY) > 0.02:
            assert (number in found) == (similarity > MIN_SIMILARITY), (number, similarity)
        expected[number] = similarity
    assert 5 < len(found) < 55
    assert all(item.other == number - 60 for number, item in found.items())
    assert all(item.similarity == pytest.approx(expected[number]) for number, item in found.items())


def test_near_duplicate_in_another_split_is_reported(warehouse, prepare, tmp_path):
    rows = read_csv(warehouse / "text.csv")
    source = {row["visit_occurence_id"]: row["text"] for row in rows}
    _, codes, table = tables_of(warehouse)
    assert prepare(tmp_path / "before", *tables_of(warehouse))[0] == 0
    splits = splits_of(tmp_path / "before")
    trained = next(stay for stay, split in splits.items() if split == "train")
    tested = next(stay for stay, split in splits.items() if split == "test")
    source[tested] = source[trained] + " Signé le 3 mars."
    text = write_csv(tmp_path / "text.csv", TEXT_COLUMNS, source.items())
    code, output = prepare(tmp_path / "after", text, codes, table)
    assert code == 0 and "warning: near-duplicates of stays in another split: 1 " in output
    assert "warning: the tables do not name patients" in output
    duplicates = json.loads((tmp_path / "after/report.json").read_text(encoding="utf-8"))["duplicates"]
    (example,) = duplicates["examples"]
    assert (example["test"], example["train"]) == (tested, trained) and example["similarity"] > MIN_SIMILARITY
    assert duplicates["stays_with_the_text_of_another"] == 0


def test_normalized_text_contains_only_words():
    assert normalize_text("Œdème : **HTA**,\n l'État-civil  (é) 12,5") == normalize_text(
        "ŒDEME hta L ETAT CIVIL e 12 5"
    )
    assert normalize_text("Sans HTA") != normalize_text("Avec HTA")


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("I10;Hypertension\n", "line 1: found 2 column(s)"),
        ("A00|0|NOOO|0|X|Choléra\n", "No stay of"),
        ("", "is empty; expected ATIH"),
    ],
)
def test_invalid_table_is_an_error_and_nothing_is_written(content, expected, warehouse, prepare, tmp_path):
    table = tmp_path / "table.txt"
    table.write_text(content, encoding="utf-8")
    text, codes, _ = tables_of(warehouse)
    code, message = prepare(tmp_path / "out", text, codes, table)
    *_, last = message.splitlines()
    assert code == 1 and last.startswith("error: ") and expected in last
    assert not (tmp_path / "out").exists()


def test_invalid_arguments_are_reported(warehouse, prepare, tmp_path):
    text, codes, table = tables_of(warehouse)
    out = tmp_path / "out"
    for arguments, expected in (
        ((codes, text, table), "no column for text; found 'visit_occurence_id', 'condition_status_source_value'"),
        ((text, codes, table, "--patient", "ipp"), "no column 'ipp'"),
        ((text, codes, table, "--ratios", "0.8,0.1"), "--ratios '0.8,0.1': expected the shares"),
        ((tmp_path / "no.csv", codes, table), "no.csv does not exist"),
        ((text, codes, tmp_path / "no.tsv"), "cannot read the CIM-10 table"),
        ((write_csv(tmp_path / "empty.csv", TEXT_COLUMNS, []), codes, table), "empty.csv has no rows"),
    ):
        code, message = prepare(out, *arguments)
        assert code == 1 and message.startswith("error: ") and expected in message, message
        assert not out.exists()


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig", "utf-16", "cp850", "mac_roman"])
def test_the_encoding_of_each_file_is_decided_by_its_bytes(encoding, mini_table, prepare, tmp_path):
    rows = ["visit_occurence_id;text"] + [f"s{number};Dyspnée à l'effort n°{number}, sœur" for number in range(10)]
    rows = [row.replace("œ", "oe") if encoding == "cp850" else row for row in rows]
    text = tmp_path / "text.csv"
    text.write_bytes("\r\n".join(rows).encode(encoding))
    codes = write_csv(
        tmp_path / "codes.csv", CODE_COLUMNS, [(f"s{number}", "DP", "I10", "élevée") for number in range(10)]
    )
    code, output = prepare(tmp_path / "out", text, codes, mini_table)
    assert code == 0, output
    notes = {row["id"]: row["messages"][1]["content"].partition("suivant : ")[2] for row in all_rows(tmp_path / "out")}
    assert notes == dict(row.split(";") for row in rows[1:])
    if encoding == "utf-16":
        return
    # An option holds for both files: the one that is valid UTF-8 is read as such.
    code, _ = prepare(tmp_path / "again", text, codes, mini_table, "--encoding", encoding)
    assert code == 0 and all_rows(tmp_path / "again") == all_rows(tmp_path / "out")


def test_file_of_two_encodings_is_refused(mini_table, prepare, tmp_path):
    text = tmp_path / "text.csv"
    text.write_bytes("visit_occurence_id,text\ns1,Dyspnée\n".encode() + "s2,Évolution\n".encode("cp1252"))
    codes = write_csv(tmp_path / "codes.csv", CODE_COLUMNS[:3], [("s1", "DP", "I10"), ("s2", "DP", "I10")])
    code, message = prepare(tmp_path / "out", text, codes, mini_table, "--ratios", "1")
    assert code == 1 and "mixes UTF-8 (as in line 2) and another encoding" in message
    assert not (tmp_path / "out").exists()


def test_too_few_stays_for_the_splits_are_refused(mini_table, prepare, tmp_path):
    text = write_csv(tmp_path / "text.csv", TEXT_COLUMNS, [(f"s{number}", f"Note {number}") for number in range(5)])
    codes = write_csv(tmp_path / "few.csv", CODE_COLUMNS[:3], [(f"s{number}", "DP", "I10") for number in range(5)])
    code, message = prepare(tmp_path / "few", text, codes, mini_table)
    assert code == 1 and "val split would be empty: 5 stays" in message and not (tmp_path / "few").exists()


def test_overwrite_replaces_files_and_removes_stale_splits(warehouse, prepare, tmp_path):
    out = tmp_path / "out"
    assert prepare(out, *tables_of(warehouse))[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, message = prepare(out, *tables_of(warehouse), "--seed", 1)
    assert code == 1 and "--overwrite" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert prepare(out, *tables_of(warehouse), "--ratios", "0.9,0.1", "--overwrite")[0] == 0
    assert {path.name for path in out.iterdir()} == {name for name in NAMES if not name.startswith("test")}


def test_report_counts_the_chapters_of_the_main_diagnoses(warehouse, prepare, tmp_path):
    assert prepare(tmp_path / "out", *tables_of(warehouse))[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    mains = [row for row in read_csv(warehouse / "codes.csv") if row["condition_status_source_value"] == "DP"]
    total = sum((Counter(split["chapters_of_dp"]) for split in report["splits"].values()), Counter())
    assert total == Counter(chapter(row["concept_code"]) for row in mains)
