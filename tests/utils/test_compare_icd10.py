"""Comparison of evaluations of the same gold stays."""

import json
import re

import pytest

from utils import compare_icd10, evaluate_icd10

GOLD = [
    {"id": f"s{number}", "codes": [{"role": "DP", "code": "I10"}, {"role": "DAS", "code": "E119"}]}
    for number in range(12)
]
WORSE = [{**row, "codes": row["codes"][: 1 + number % 2]} for number, row in enumerate(GOLD)]


@pytest.fixture
def evaluation(jsonl, run_command, tmp_path):
    """Evaluate predictions; return the JSON file."""

    def run(name, predictions, gold=GOLD):
        out = tmp_path / f"{name}.json"
        files = jsonl("gold.jsonl", gold), jsonl("predictions.jsonl", predictions)
        code, output = run_command(evaluate_icd10, "--gold", files[0], "--predictions", files[1], "--json", out)
        assert code == 0, output
        return out

    return run


def test_scores_and_differences_of_each_file(evaluation, run_command):
    base, tuned = evaluation("base", WORSE), evaluation("tuned", GOLD)
    code, output = run_command(compare_icd10, f"base={base}", f"fine-tuned={tuned}", f"again={base}")
    assert code == 0
    scores, difference, again = output.strip("\n").split("\n\n")
    assert scores.splitlines()[0].split() == ["base", "fine-tuned", "again"]
    assert re.search(r"^DP accuracy +1\.000  1\.000 +1\.000$", scores, re.MULTILINE)
    # 18 of 24 codes are given, all of them right.
    assert re.search(r"^role-aware micro F1 +0\.857  1\.000 +0\.857$", scores, re.MULTILINE)
    assert re.search(r"^role-blind exact match +0\.500  1\.000 +0\.500$", scores, re.MULTILINE)
    assert re.search(r"^DR micro F1 +- +- +-$", scores, re.MULTILINE)
    row = re.search(r"^role-blind exact match +(\S+) +\[(\S+), (\S+)\] +(.*)$", difference, re.MULTILINE)
    assert row[1] == "+0.500" and float(row[2]) < 0.5 < float(row[3])
    assert float(row[4].removeprefix("< ")) < 0.1
    assert re.search(r"^DP accuracy +\+0\.000 +\[\+0\.000, \+0\.000\] +1\.000$", difference, re.MULTILINE)
    assert "12 stays, paired by stay: the patients are not known" in difference
    assert re.search(r"^role-aware micro F1 +\+0\.000", again, re.MULTILINE)


def test_stays_are_paired_by_patient(evaluation, run_command):
    gold = [{**row, "patient": f"p{number // 2}"} for number, row in enumerate(GOLD)]
    base, tuned = evaluation("base", WORSE, gold), evaluation("tuned", GOLD[::-1], gold)
    _, output = run_command(compare_icd10, f"a={base}", f"b={tuned}")
    assert "12 stays, paired by patient (6)" in output
    _, output = run_command(compare_icd10, f"a={evaluation('unknown', WORSE)}", f"b={tuned}")
    assert "paired by patient (6)" in output


def test_order_of_gold_rows_does_not_matter(evaluation, run_command):
    base, tuned = evaluation("base", WORSE), evaluation("tuned", WORSE[::-1], GOLD[::-1])
    code, output = run_command(compare_icd10, f"a={base}", f"b={tuned}")
    assert code == 0 and re.search(r"^role-aware micro F1 +\+0\.000 +\[\+0\.000, \+0\.000\]", output, re.MULTILINE)


@pytest.mark.parametrize(
    "gold",
    [
        GOLD[:-1],
        [{**row, "id": f"t{row['id']}"} for row in GOLD],
        [{"id": row["id"], "codes": row["codes"][:1]} for row in GOLD],
        [{"id": row["id"], "codes": [row["codes"][0], {"role": "DR", "code": "E119"}]} for row in GOLD],
    ],
)
def test_different_gold_sets_are_refused(evaluation, run_command, gold):
    base, tuned = evaluation("base", GOLD), evaluation("tuned", gold, gold)
    code, message = run_command(compare_icd10, f"a={base}", f"b={tuned}")
    assert code == 1 and "tuned.json" in message and "not of the same gold codes" in message


@pytest.mark.parametrize("text", ["[]", "{}", "no json", json.dumps({"per_stay": {"scores": {}}})])
def test_file_without_scores_is_a_user_error(tmp_path, run_command, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    code, message = run_command(compare_icd10, f"a={tmp_path / 'a.json'}")
    assert code == 1 and "a.json contains no scores by stay" in message


@pytest.mark.parametrize("arguments", [["a.json"], ["=a.json"], ["a="]])
def test_arguments_need_a_name_and_a_file(run_command, arguments):
    code, message = run_command(compare_icd10, *arguments)
    assert code == 1 and "expected NAME=FILE" in message


def test_evaluation_file_names_no_stay_and_no_code_by_stay(evaluation):
    per_stay = json.loads(evaluation("base", GOLD).read_text(encoding="utf-8"))["per_stay"]
    assert "s0" not in json.dumps(per_stay) and "E119" not in json.dumps(per_stay)
