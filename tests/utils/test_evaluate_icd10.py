"""Scores of prediction files: matching by id, counts, outputs, invalid files."""

import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from utils import evaluate_icd10, prepare_icd10_data
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.generate_notes import save_notes, table_of
from utils.icd10.answers import Diagnosis, build_answer, parse_answer
from utils.icd10.codes import CHAPTER_NAMES, chapter
from utils.icd10.predictions import Prediction
from utils.icd10.prompts import instruct_row
from utils.reports.charts import Bar, BarGroup, bar_chart

SHARED = Path(__file__).resolve().parents[2] / "../shared/icd"
CATALOGUE = load_catalogue()
NOTES = list(write_notes(40, 0, CATALOGUE, "short"))
ROWS = [instruct_row(note.text, build_answer(note.diagnoses), note.id) for note in NOTES]
ANSWERS = [{"id": note.id, "answer": build_answer(note.diagnoses)} for note in NOTES]


@pytest.fixture
def evaluate(run_command, tmp_path):
    """Run the command in this process; return its exit code, output and scores."""

    def run(gold, predictions, *options, out=tmp_path / "out.json"):
        arguments = ["--gold", gold, "--predictions", predictions, "--json", out, *options]
        code, output = run_command(evaluate_icd10, *arguments)
        return code, output, json.loads(out.read_text(encoding="utf-8")) if code == 0 else None

    return run


@pytest.fixture
def gold(jsonl):
    return jsonl("gold.jsonl", ROWS)


def answer_of(*codes):
    return build_answer([Diagnosis(role, code, "x") for role, code in codes])


def test_scores_and_keys_of_the_json_file(jsonl, evaluate):
    gold = jsonl("g.jsonl", [
        instruct_row("Note a", answer_of(("DP", "J189"), ("DAS", "I10"), ("DAS", "E1198")), "a"),
        instruct_row("Note b", answer_of(("DP", "I10")), "b"),
    ])  # fmt: skip
    predictions = jsonl("p.jsonl", [
        {"id": "b", "answer": answer_of(("DP", "I10"), ("DAS", "J440"))},
        {"id": "a", "answer": answer_of(("DP", "J189"), ("DAS", "E1190"))},
    ])  # fmt: skip
    code, output, result = evaluate(gold, predictions)
    assert code == 0
    assert result["exact"]["micro"] == pytest.approx({"precision": 2 / 4, "recall": 2 / 4, "f1": 1 / 2})
    assert result["category"]["micro"] == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4})
    # J189 1 1 1; I10 1 1/2 2/3; E1198, E1190, J440 0.
    assert result["exact"]["macro"] == pytest.approx({"precision": 2 / 5, "recall": 1.5 / 5, "f1": (5 / 3) / 5})
    assert result["exact"]["exact_match"] == 0
    assert result["exact"]["by_role"]["DP"]["micro"]["f1"] == 1
    for level in ("exact", "category"):
        assert {"micro", "macro", "exact_match", "intervals", "by_role", "by_chapter", "by_frequency"} <= set(
            result[level]
        )
        assert all(len(bounds) == 2 for of in ("micro", "macro") for bounds in result[level]["intervals"][of].values())
    assert result["rates"] == {} and result["counts"]["notes"] == 2
    assert re.search(r"micro precision +0\.500 \[.*\] +0\.750 \[", output)


def test_headline_comes_first_and_says_over_what_it_is_resampled(jsonl, evaluate, tmp_path):
    """Every DP is wrong: exchanged with a DAS or the DR."""
    rows = [("a", "DP:I5010 DAS:I10 DAS:I489", "p1"), ("b", "DP:J181 DAS:E1198", "p1"), ("c", "DP:Z511 DR:C509", "p2")]
    swapped = {"a": "DP:I10 DAS:I5010 DAS:I489", "b": "DP:E1198 DAS:J181", "c": "DP:C509 DR:Z511"}

    def codes(text):
        return [dict(zip(("role", "code"), item.split(":"))) for item in text.split()]

    gold = jsonl("g.jsonl", [{"id": stay, "codes": codes(text), "patient": patient} for stay, text, patient in rows])
    given = jsonl("p.jsonl", [{"id": stay, "codes": codes(text)} for stay, text in swapped.items()])
    _, output, result = evaluate(gold, given, "--csv", tmp_path / "notes.csv", "--html", tmp_path / "r.html")
    scores = {name: found["score"] for name, found in result["headline"].items()}
    assert scores == pytest.approx({
        "dp_accuracy": 0, "dp_category_accuracy": 0, "role_micro_f1": 1 / 7, "role_exact_match": 0, "dr_f1": 0,
        "das_f1": 1 / 3, "micro_f1": 1, "exact_match": 1,
    })  # fmt: skip
    assert result["exact"]["role_aware"]["micro"]["f1"] == pytest.approx(1 / 7)
    lines = output.splitlines()
    assert lines[0] == "95 % intervals in brackets, bootstrap over 2 patients of 3 stays"
    for name, value in (("DP accuracy", "0.000"), ("role-aware micro F1", "0.143"), ("role-aware exact match", "0.000"),
                        ("DR micro F1", "0.000"), ("DAS micro F1", "0.333"), ("micro F1", "1.000")):  # fmt: skip
        assert any(line.startswith(f"{name} ") and f" {value} [" in line for line in lines), name
    assert next(n for n, line in enumerate(lines) if "DP acc" in line) < lines.index("roles ignored:")
    with (tmp_path / "notes.csv").open(encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file))
    assert (float(first["dp_correct"]), float(first["role_exact_match"]), float(first["exact_match"])) == (0, 0, 1)
    assert float(first["role_f1"]) == pytest.approx(1 / 3, abs=1e-4) and first["dr_f1"] == ""
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "role-aware exact match" in page and "bootstrap over 2 patients" in page and "DP accuracy" in page


def test_gold_without_roles_has_no_role_aware_scores(jsonl, evaluate):
    gold = jsonl("g.jsonl", [{"id": "a", "codes": ["I10"]}])
    _, output, result = evaluate(gold, jsonl("p.jsonl", [{"id": "a", "answer": "DP : I10"}]))
    assert result["headline"]["dp_accuracy"] == {"score": None, "interval": None}
    assert result["headline"]["micro_f1"]["score"] == 1
    assert "role-aware" not in output and "gold codes without a role: 1" in output


# ---- csv, edited codes, ids


def write_csv(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def test_tables_of_codes_are_gold_and_predictions(evaluate, tmp_path):
    """The csv of predict_icd10, and one of coders with a hospital's columns; ids stay text."""
    gold = write_csv(
        tmp_path / "gold.csv",
        "visit_occurence_id;condition_status_source_value;concept_code\n"
        "001;DP;I50.10\n001;DAS;i10\n002;DP;J181\n003;DP;Z511\n003;DR;C509\n",
    )
    predictions = write_csv(
        tmp_path / "p.csv", 'id,role,code,label\n001,DP,I5010,x\n001,DAS,I10,"HTA, x"\n003,DP,E11X,x\n003,,C509,x\n'
    )
    code, output, result = evaluate(gold, predictions)
    assert code == 0, output
    exact = result["exact"]
    assert (exact["gold"], exact["predicted"], exact["correct"]) == (5, 4, 3)
    assert result["headline"]["dp_accuracy"]["score"] == pytest.approx(1 / 3)
    assert result["counts"]["missing_ids"] == ["002"] and "without a prediction: 002" in output
    assert result["counts"]["codes_without_role"] == 1
    assert evaluate(gold, gold)[2]["headline"]["role_exact_match"]["score"] == 1


def test_a_table_may_contain_answers_and_stays_without_codes(jsonl, evaluate, tmp_path):
    gold = jsonl("g.jsonl", [{"id": stay, "codes": ["I10"]} for stay in "ab"])
    answers = write_csv(tmp_path / "a.csv", 'id,answer\na,"DP : I10, DAS : E11X"\nb,\n')
    counts = evaluate(gold, answers)[2]["counts"]
    assert (counts["missing_predictions"], counts["answers_without_code"]) == (0, 1)
    codes = write_csv(tmp_path / "c.csv", "id,role,code\na,DP,I10\nb,,\n")
    counts = evaluate(gold, codes)[2]["counts"]
    assert (counts["missing_predictions"], counts["answers_without_code"]) == (0, 1)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("NDA;DP;DR;DAS1;DAS2\n01;I50.10;;I10;E1198\n02;Z511;C509;;\n", ()),
        ("id,role,code\n01,Diagnostic principal,CIM10:I5010\n01,DA,I10 E1198\n02,DP,Z51.1 séance\n02,DR1,c509\n", ()),
        ("sejour,kind,diag,patient\n01,P,I5010,x\n01,2,I10\u202f,x\n01,2,E1198,x\n02,P,Z511,y\n02,R,C509,y\n",
         ("--columns", "stay=sejour,role=kind,code=diag", "--roles", "2=DAS")),
    ],
)  # fmt: skip
def test_layouts_of_hospital_tables_are_read(jsonl, evaluate, tmp_path, text, options):
    answers = {"01": (("DP", "I5010"), ("DAS", "I10"), ("DAS", "E1198")), "02": (("DP", "Z511"), ("DR", "C509"))}
    given = jsonl("p.jsonl", [{"id": stay, "answer": answer_of(*codes)} for stay, codes in answers.items()])
    code, output, result = evaluate(write_csv(tmp_path / "gold.csv", text), given, *options)
    assert code == 0, output
    assert result["headline"]["role_exact_match"]["score"] == 1 and result["exact"]["gold"] == 5
    assert result["counts"]["patients"] == (2 if "patient" in text else None)


def test_statuses_of_jsonl_are_read(jsonl, evaluate):
    gold = jsonl("g.jsonl", [{"id": "a", "codes": [{"role": "DP", "code": "I10"}, {"role": "DAS", "code": "E119"}]}])
    codes = [{"role": "Diagnostic principal", "code": "I10"}, {"role": "DA", "code": "E11.9"}]
    result = evaluate(gold, jsonl("p.jsonl", [{"id": "a", "codes": codes}]))[2]
    assert result["headline"]["role_exact_match"]["score"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("number,role,code\na,DP,I10\n", "p.csv: no column for stay; found 'number', 'role', 'code'"),
        ("id,role\na,DP\n", "p.csv: no column for code; found 'id', 'role'"),
        (
            "id,role,code\na,chief,I10\n",
            "a status whose role is not known: 'chief' (1). Give the role of each: --roles",
        ),
        ("id,role,code\na,DP,I10\n,DP,I10\n", "line 3: without an identifier of the stay"),
        ("id,role,code\n1.2E+05,DP,I10\n", "an identifier in scientific notation, which has lost digits"),
        ("id,role,code\na,DP UM,I10\n", "stay 'a' has main diagnoses of units"),
        ("id,answer\na,I10\na,I10\n", "line 3: duplicate id 'a'"),
        ("id,role,code\n", "p.csv is empty"),
    ],
)
def test_invalid_tables_are_reported(jsonl, evaluate, tmp_path, text, expected):
    gold = jsonl("g.jsonl", [{"id": "a", "codes": ["I10"]}])
    code, message, _ = evaluate(gold, write_csv(tmp_path / "p.csv", text))
    assert code == 1 and expected in message, message


def test_edited_codes_of_a_table_take_precedence_over_its_answers(jsonl, evaluate, tmp_path):
    gold = jsonl("g.jsonl", [{"id": "a", "codes": [{"role": "DP", "code": "I10"}]}])
    table = tmp_path / "p.csv"
    table.write_text("ID,answer,role,code\na,DP : Pneumonie (J189),DP,I10\u200b\n", encoding="utf-8")
    assert evaluate(gold, table)[2]["headline"]["dp_accuracy"]["score"] == 1
    table.write_text("id,answer,codes\na,DP : Pneumonie (J189),I10\n", encoding="utf-8")
    assert "columns `answer` and `codes`" in evaluate(gold, table)[1]
    table.write_text("id,role,code\na,DP,I10\n", encoding="utf-8")
    assert "no column 'NDA' for stay in" in evaluate(gold, table, "--columns", "stay=NDA")[1]


def test_edited_codes_take_precedence_over_the_answer(jsonl, evaluate):
    gold = jsonl("g.jsonl", [{"id": stay, "codes": [{"role": "DP", "code": "I10"}]} for stay in "abc"])
    wrong = "diagnostic principal : Douleur (R074)"
    rows = [
        {"id": "a", "answer": wrong, "codes": [{"role": "DP", "code": "I10", "label": "HTA"}]},
        {"id": "b", "answer": wrong, "codes": []},
        {"id": "c", "answer": wrong + ", Douleur (R074)", "codes": [{"role": "DP", "code": "R074"}]},
    ]
    _, output, result = evaluate(gold, jsonl("p.jsonl", rows))
    assert result["exact"]["correct"] == 1 and result["exact"]["predicted"] == 2
    assert result["counts"]["edited_predictions"] == 2 and result["counts"]["repeated_codes"] == 1
    assert "predictions whose codes differ from their answer (the codes are scored): 2" in output


@pytest.mark.parametrize("kind", ["answer", "codes"])
def test_malformed_codes_count_as_predicted(jsonl, evaluate, kind):
    gold = jsonl("g.jsonl", [{"id": "a", "codes": ["I10", "E119"]}])
    given = ["I10", "E119", "E11X", "U071A", "M6281000", "I1O", "E1", "S72001A", "ABC"]
    answer = "diagnostic associé : " + ", ".join(f"Diagnostic ({code})" for code in given)
    row = {"id": "a", "answer": answer} if kind == "answer" else {"id": "a", "codes": given}
    exact = evaluate(gold, jsonl("p.jsonl", [row]))[2]["exact"]
    assert exact["micro"]["precision"] == pytest.approx(2 / 9) and exact["micro"]["recall"] == 1


def test_ids_are_compared_as_text(jsonl, evaluate):
    gold = jsonl("g.jsonl", [{"id": stay, "codes": ["I10"]} for stay in ("000121", "000122", "123")])
    numbers = [{"id": stay, "codes": ["I10"]} for stay in (121, 122, 123)]
    code, message, _ = evaluate(gold, jsonl("p.jsonl", numbers))
    assert code == 1
    assert "2 of 3 predictions with an id that gold does not have, such as '121', '122'" in message
    assert "no prediction, such as '000121', '000122'" in message and "--ignore_extra" in message
    assert evaluate(gold, jsonl("p.jsonl", numbers[2:]))[2]["counts"]["missing_predictions"] == 2
    more = [{"id": stay, "codes": ["I10"]} for stay in ("000121", "000122", "123", "124")]
    assert evaluate(gold, jsonl("p.jsonl", more))[2]["counts"]["unexpected_ids"] == ["124"]


def test_scores_by_group_of_stays(jsonl, evaluate, tmp_path):
    rows = [
        {**instruct_row("mot " * words, answer_of(("DP", "I10")), str(number)), "unit": unit, "discharge": date}
        for number, (words, unit, date) in enumerate(
            [(300, "cardiology", "2024-03-01"), (3000, "cardiology", "31/12/2023"), (20, "surgery", ""), (20, None, "")]
        )
    ]
    predictions = [
        {"id": number, "codes": [{"role": "DP", "code": "I10" if number else "E119"}]} for number in range(4)
    ]
    result = evaluate(jsonl("g.jsonl", rows), jsonl("p.jsonl", predictions), "--html", tmp_path / "r.html")[2]
    found = {
        fact: {name: (scores["notes"], scores["dp_accuracy"]["score"]) for name, scores in groups.items()}
        for fact, groups in result["by_stay"].items()
    }
    assert found == {
        "specialty": {"cardiology": (2, 0.5), "surgery": (1, 1), "unknown": (1, 1)},
        "year": {"2023": (1, 1), "2024": (1, 0), "unknown": (2, 1)},
        "words": {"up to 250": (2, 1), "up to 500": (1, 0), "more than 2000": (1, 1)},
    }
    assert "By specialty" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_precision_is_over_predicted_and_recall_over_gold_codes(gold, jsonl, evaluate):
    more = [{"id": row["id"], "answer": row["answer"] + ", Peste (A209)"} for row in ANSWERS]
    exact = evaluate(gold, jsonl("more.jsonl", more))[2]["exact"]
    assert exact["micro"]["recall"] == 1 and exact["micro"]["precision"] < 1
    fewer = [{"id": note.id, "codes": [note.diagnoses[0].code]} for note in NOTES]
    exact = evaluate(gold, jsonl("fewer.jsonl", fewer))[2]["exact"]
    assert exact["micro"]["precision"] == 1 and exact["micro"]["recall"] == pytest.approx(
        len(NOTES) / sum(len(note.diagnoses) for note in NOTES)
    )


def test_answers_and_codes_with_and_without_roles_have_the_same_scores(gold, jsonl, evaluate):
    cut = [note.diagnoses[: 1 + number % 3] for number, note in enumerate(NOTES)]
    files = [
        jsonl("answers.jsonl", [{"id": n.id, "answer": build_answer(codes)} for n, codes in zip(NOTES, cut)]),
        jsonl("objects.jsonl", [{"id": n.id, "codes": [d._asdict() for d in codes]} for n, codes in zip(NOTES, cut)]),
        jsonl("codes.jsonl", [{"id": n.id, "codes": [d.code.lower() for d in codes]} for n, codes in zip(NOTES, cut)]),
    ]
    by_answer, by_object, by_code = (evaluate(gold, file)[2] for file in files)
    assert by_answer == by_object
    assert by_code["exact"]["micro"] == by_answer["exact"]["micro"]
    assert by_code["counts"]["codes_without_role"] == by_answer["exact"]["predicted"]
    assert by_code["exact"]["by_role"]["DP"]["predicted"] == 0


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("as_text", [True, False])
def test_rows_without_id_are_matched_by_number(jsonl, evaluate, first, as_text):
    gold = jsonl("g.jsonl", [{"messages": row["messages"]} for row in ROWS])
    name = str if as_text else int
    predictions = [{"id": name(number), "answer": row["answer"]} for number, row in enumerate(ANSWERS, start=first)]
    assert evaluate(gold, jsonl("p.jsonl", predictions[::-1]))[2]["exact"]["exact_match"] == 1
    by_order = [{"answer": row["answer"]} for row in ANSWERS]
    assert evaluate(gold, jsonl("o.jsonl", by_order))[2]["exact"]["exact_match"] == 1


def test_messages_quote_no_note(jsonl, evaluate):
    """A note that became a key, a role or a code by mistake."""
    note = "Madame Xylophone, 78 ans, est hospitalisée pour une dyspnée."
    gold = jsonl("g.jsonl", [{"id": "a", "codes": ["I10"]}])
    wrong = [{"role": "DP", "text": note}, {"role": note, "code": "I10"}, note]
    for row in ({note: 1}, *({"codes": [code]} for code in wrong)):
        code, message, _ = evaluate(gold, jsonl("p.jsonl", [{"id": "a"} | row]))
        assert code == 1 and "line 1: " in message and "Xylophone" not in message, message


def test_text_in_place_of_a_code_is_refused_in_tables(jsonl, evaluate, tmp_path):
    gold = jsonl("g.jsonl", [{"id": "a", "codes": ["I10"]}])
    table = write_csv(tmp_path / "p.csv", "id,role,code\na,DP,Madame Xylophone est hospitalisée pour dyspnée\n")
    code, message, _ = evaluate(gold, table)
    assert code == 1 and "stay 'a' has text in place of a code" in message and "Xylophone" not in message


def test_ids_are_only_counted_from_zero_if_gold_is_numbered(jsonl, evaluate):
    gold = jsonl("g.jsonl", [{"visit_occurence_id": stay, "codes": ["I10"]} for stay in ("1", "2", "5")])
    predictions = jsonl("p.jsonl", [{"id": stay, "codes": ["I10"]} for stay in ("0", "1", "2")])
    code, message, _ = evaluate(gold, predictions)
    assert code == 1 and "such as '0', and 1 gold stay has no prediction, such as '5'" in message


def test_missing_and_unexpected_predictions_are_counted_and_listed(gold, jsonl, evaluate):
    predictions = [*ANSWERS[2:], {"id": "unknown", "answer": ANSWERS[0]["answer"]}]
    code, message, _ = evaluate(gold, jsonl("p.jsonl", predictions))
    assert code == 1 and "such as 'unknown', and 2 gold stays have no prediction, such as '" in message, message
    _, output, result = evaluate(gold, jsonl("p.jsonl", predictions), "--ignore_extra")
    counts = result["counts"]
    assert counts["missing_ids"] == [NOTES[0].id, NOTES[1].id] and counts["missing_predictions"] == 2
    assert counts["unexpected_ids"] == ["unknown"] and counts["answers_without_code"] == 0
    assert result["exact"]["micro"]["precision"] == 1 and result["exact"]["exact_match"] == 38 / 40
    assert "notes without a prediction (scored as no codes): 2" in output and NOTES[0].id in output
    assert "predictions without a gold note (ignored): 1" in output


def test_repeated_codes_count_once_and_are_counted(gold, jsonl, evaluate):
    first = NOTES[0].diagnoses[0]
    again = f", {first.label} ({first.code}), {first.label} ({first.code.lower()})"
    predictions = [
        {**ANSWERS[0], "answer": ANSWERS[0]["answer"] + again},
        *ANSWERS[1:-1],
        {**ANSWERS[-1], "answer": "?"},
    ]
    result = evaluate(gold, jsonl("p.jsonl", predictions))[2]
    assert result["counts"]["repeated_codes"] == 2 and result["exact"]["micro"]["precision"] == 1
    assert result["counts"]["answers_without_code"] == 1
    diagnoses = [Diagnosis("DP", "I10"), Diagnosis("DAS", "I10"), Diagnosis("DAS", "E43")]
    assert Prediction.of_codes(diagnoses).repeated == 1
    assert (
        Prediction.of_answer("diagnostic principal : HTA (I50.1), diagnostic associé : x (I501), y (I5011)").repeated
        == 1
    )


def test_table_and_training_rows_add_rates_and_frequencies(gold, jsonl, evaluate, tmp_path):
    save_notes(iter(NOTES), tmp_path / "notes", [0] * len(NOTES), table_of(CATALOGUE))
    predictions = [{"id": row["id"], "answer": row["answer"] + ", Invention (A999)"} for row in ANSWERS]
    train = jsonl("train.jsonl", ROWS[:10])
    table = tmp_path / "notes/cim10.tsv"
    _, output, result = evaluate(gold, jsonl("p.jsonl", predictions), "--cim10", table, "--train", train)
    predicted = result["exact"]["predicted"]
    assert result["rates"]["unknown"] == {"count": 40, "of": predicted, "rate": 40 / predicted}
    assert result["rates"]["forbidden_DP"]["count"] == result["rates"]["no_DP"]["count"] == 0
    assert f"codes that are not in the table: 40 of {predicted}" in output
    assert result["counts"]["training_notes"] == 10
    trained = {item.code for note in NOTES[:10] for item in note.diagnoses}
    unseen = sum(item.code not in trained for note in NOTES for item in note.diagnoses)
    assert result["exact"]["by_frequency"]["0"]["gold"] == unseen > 0
    assert result["errors"] == {"missed": [], "added": [{"code": "A999", "label": "", "notes": 40}]}


def test_csv_has_one_line_per_note_and_adds_up(gold, jsonl, evaluate, tmp_path):
    predictions = [{"id": note.id, "codes": ["A209", *(d.code for d in note.diagnoses[1:])]} for note in NOTES[:-1]]
    path = tmp_path / "new/notes.csv"
    result = evaluate(gold, jsonl("p.jsonl", predictions), "--csv", path)[2]
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == [note.id for note in NOTES]
    assert sum(len(line["missed"].split()) for line in lines) == result["exact"]["gold"] - result["exact"]["correct"]
    assert (
        sum(len(line["added"].split()) for line in lines) == result["exact"]["predicted"] - result["exact"]["correct"]
    )
    first, last = lines[0], lines[-1]
    assert first["missed"] == NOTES[0].diagnoses[0].code and first["added"] == "A209"
    assert first["gold"] == " ".join(f"{item.role}:{item.code}" for item in NOTES[0].diagnoses)
    assert float(first["f1"]) == pytest.approx(1 - 1 / len(NOTES[0].diagnoses), abs=1e-4)
    assert last["predicted"] == "" and float(last["f1"]) == 0 and last["exact_match"] == "0"


class Page(HTMLParser):
    """Tags that are open, attributes that name something elsewhere, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(jsonl, evaluate, tmp_path):
    """Evaluate predictions for some of the notes: the scores, the page's source and the parsed page."""

    def make(*options, rows=ROWS, predictions=ANSWERS, name="predictions.jsonl"):
        path = tmp_path / "report.html"
        code, output, result = evaluate(jsonl("g.jsonl", rows), jsonl(name, predictions), "--html", path, *options)
        assert code == 0, output
        parsed = Page()
        parsed.feed(path.read_text(encoding="utf-8"))
        return result, path.read_text(encoding="utf-8"), parsed

    return make


def test_page_is_self_contained_and_shows_the_scores(page):
    rows = [{**row, "id": f"<b>{row['id']}"} for row in ROWS]
    predictions = [{"id": f"<b>{row['id']}", "answer": row["answer"]} for row in ANSWERS[:30]]
    result, source, parsed = page(rows=rows, predictions=predictions, name="p & <q>.jsonl")
    assert not parsed.open and not {"script", "link", "img", "b", "q"} & set(parsed.tags)
    assert "http" not in source and not parsed.addresses
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert parsed.tags.count("svg") == 3 and "p & <q>.jsonl" in parsed.text and f"<b>{NOTES[-1].id}" in parsed.text
    assert f"{result['exact']['micro']['f1']:.3f} [" in parsed.text


def test_page_names_chapters_and_roles(page):
    covid = instruct_row("Note", answer_of(("DP", "J128"), ("DAS", "U0710")), "covid")
    result, source, parsed = page(rows=[*ROWS, covid])
    names = [f"{numeral}  {name}" for numeral, name in CHAPTER_NAMES.items()]
    shown = re.findall(rf">({'|'.join(names)})<", source)
    assert shown == [name for name in names if name in shown] and len(shown) == len(result["exact"]["by_chapter"])
    assert "DP, main diagnosis" in parsed.text and "DAS, associated diagnoses" in parsed.text
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(svg)


def test_every_chapter_of_the_classification_has_a_name():
    firsts = [f"{letter}{number:02}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for number in range(100)]
    assert {chapter(code) for code in firsts if chapter(code)} == set(CHAPTER_NAMES)


@pytest.mark.parametrize(
    ("about", "facts"),
    [
        (None, ["Checkpoint", "not recorded", "Answers", "not recorded"]),
        ({"cim10": None, "checkpoint": "runs/a/checkpoint_000300"}, ["runs/a/checkpoint_000300", "not constrained to"]),
        (
            {"run_name": "icd v1", "checkpoint": "x", "answered": "2026-01-02 03:04"},
            ["Run icd v1", "Answered 2026-01-02"],
        ),
        ({"cim10": "hash", "checkpoint": "x"}, ["Answers", "constrained to codes of the CIM-10 table"]),
        ({"cim10": "hash"}, ["not recorded", "constrained to codes of the CIM-10 table"]),
        ([], ["not recorded", "not recorded"]),
    ],
)
def test_page_shows_the_origin_of_the_predictions(about, facts, page, tmp_path):
    if about is not None:
        (tmp_path / "predictions.about.json").write_text(json.dumps(about), encoding="utf-8")
    text = re.sub(r"\s+", " ", page()[2].text)
    assert re.search(r".*".join(map(re.escape, facts)), text)
    assert re.search(r"Evaluated \d{4}-\d\d-\d\d \d\d:\d\d ", text) and "Notes 40" in text and "Gold g.jsonl" in text
    if about and about.get("cim10"):
        assert "not constrained" not in text


def test_bars_are_as_long_as_their_values():
    groups = [BarGroup("a&b", "(12)", [Bar(0.5, 0.4, 0.75), None]), BarGroup("c", "(3)", [None, Bar(1, 1, 1)])]
    svg = ElementTree.fromstring(bar_chart("bars", "<F1>", groups))
    bars = {
        path.find("title").text: [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d"))]
        for path in svg.iter("path")
        if path.find("title") is not None
    }
    assert list(bars) == ["a&b: 0.500 [0.400, 0.750]", "c: 1.000 [1.000, 1.000]"]
    (start, half), (_, end) = ((min(xs), max(xs)) for xs in bars.values())
    assert half - start == pytest.approx((end - start) / 2)
    whiskers = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d")) for path in svg.iter("path")]
    places = [start + share * (end - start) for share in (0.4, 0.75)]
    assert any([float(x) for x, _ in line] == pytest.approx(places) for line in whiskers if len(line) == 2)
    text = [element.text for element in svg.iter("text")]
    assert "a&b" in text and "(12)   0.500 / –" in text and "(3)   – / 1.000" in text


def test_no_output_contains_text_of_a_note(gold, jsonl, evaluate, tmp_path):
    outputs = [tmp_path / "r.html", tmp_path / "r.csv"]
    _, output, _ = evaluate(gold, jsonl("p.jsonl", ANSWERS[5:]), "--html", outputs[0], "--csv", outputs[1])
    written = output + "".join(path.read_text(encoding="utf-8") for path in [*outputs, tmp_path / "out.json"])
    for note in NOTES:
        assert not any(sentence in written for sentence in re.split(r"[.\n]", note.text) if len(sentence) > 20)


GOOD = {"id": "a", "answer": "diagnostic principal : HTA (I10)"}


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([GOOD, GOOD], "p.jsonl, line 2: duplicate id 'a'"),
        ([GOOD, {"id": "b"}], "p.jsonl, line 2: neither an `answer` string nor a `codes` list"),
        ([{"id": "a", "codes": [10]}], 'p.jsonl, line 1: a code that is neither "I10" nor'),
        ([{"id": "a", "codes": [{"role": "chief", "code": "I10"}]}], "line 1: a code that is neither"),
        ([{"id": "z", "answer": "I10"}], "No prediction has the id of a gold row: the first prediction has 'z'"),
        ([], "p.jsonl is empty"),
        ([["I10"]], "p.jsonl, line 1: not a valid JSON object"),
    ],
)
def test_invalid_predictions_are_reported(predictions, expected, jsonl, evaluate, tmp_path):
    gold = jsonl("g.jsonl", [instruct_row("Note", answer_of(("DP", "I10")), "a")])
    code, message, _ = evaluate(gold, jsonl("p.jsonl", predictions))
    assert code == 1 and message.startswith("error: ") and expected in message, message
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Note"}, "not an instruct row"),
        ({"messages": []}, "no code in the last message"),
        ({"messages": [{"role": "user", "content": "HTA (I10)"}]}, "no code in the last message"),
        (instruct_row("Note", "Je ne sais pas."), "no code in the last message"),
    ],
)
def test_invalid_gold_rows_are_reported(row, expected, jsonl, evaluate):
    code, message, _ = evaluate(jsonl("g.jsonl", [ROWS[0], row]), jsonl("p.jsonl", [GOOD]))
    assert code == 1 and "g.jsonl, line 2: " in message and expected in message, message


def test_inputs_are_not_overwritten(gold, jsonl, evaluate, tmp_path):
    predictions = jsonl("p.jsonl", ANSWERS)
    before = gold.read_bytes(), predictions.read_bytes()
    (tmp_path / "link.html").hardlink_to(gold)
    for options in (
        ("--html", gold),
        ("--html", tmp_path / "link.html"),
        ("--csv", predictions),
        ("--csv", tmp_path / "out.json"),
    ):
        code, message, _ = evaluate(gold, predictions, *options)
        assert code == 1 and "another file of this command" in message
    assert (gold.read_bytes(), predictions.read_bytes()) == before and not (tmp_path / "out.json").exists()


def test_failure_writes_no_file(gold, jsonl, evaluate, tmp_path):
    (tmp_path / "folder").mkdir()
    code, message, _ = evaluate(gold, jsonl("p.jsonl", ANSWERS), "--html", tmp_path / "p.jsonl/r.html")
    assert code == 1 and message.startswith("error: ")
    assert not (tmp_path / "out.json").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the original 200 stays are not available")
def test_original_stays_score_one_against_themselves(evaluate, monkeypatch, tmp_path):
    files = {"text": "text.csv", "codes": "codes.csv", "cim10": "cim_10_atih_2019.tsv"}
    arguments = [part for option, name in files.items() for part in (f"--{option}", str(SHARED / name))]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments, "--out", str(tmp_path / "data"), "--ratios", "1"])
    prepare_icd10_data.main()
    gold = tmp_path / "data/train_instruct.jsonl"
    rows = [json.loads(line) for line in gold.read_text(encoding="utf-8").splitlines()]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text(
        "".join(json.dumps({"id": row["id"], "answer": row["messages"][2]["content"]}) + "\n" for row in rows), "utf-8"
    )
    result = evaluate(gold, predictions, "--cim10", SHARED / files["cim10"])[2]
    for level in ("exact", "category"):
        assert result[level]["micro"] == result[level]["macro"] == {"precision": 1, "recall": 1, "f1": 1}
        assert result[level]["exact_match"] == 1
    assert result["exact"]["gold"] == 902 and result["rates"] == result["gold_rates"]
    # Twelve stays have diabetes both with insulin (E1190) and without (E1198).
    assert {name: rate["count"] for name, rate in result["rates"].items() if rate["count"]} == {"excluded_pair": 12}
    assert not any(rate["count"] for rate in result["to_check"].values())
    assert result["counts"]["repeated_codes"] == 0
    assert sum(len(parse_answer(row["messages"][2]["content"])) for row in rows) == 902
