"""Agreement of two coders, compared with scikit-learn; depth-aware scores, compared with manual calculation."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

from utils import evaluate_icd10
from utils.icd10.agreement import agreement, kappa
from utils.icd10.answers import Diagnosis
from utils.icd10.headline import resample
from utils.icd10.metrics import depth_aware

CODES = ["I10", "J181", "J189", "E1198", "Z511", "E11X"]


def random_coding(rng):
    codes = rng.choice(CODES, size=rng.integers(1, 5), replace=False)
    roles = ["DP", "DR" if rng.random() < 0.4 else "DAS", "DAS", "DAS"]
    return [Diagnosis(role, str(code)) for role, code in zip(roles, codes)]


@pytest.fixture(scope="module")
def coders():
    rng = np.random.default_rng(0)
    first = {f"s{number}": random_coding(rng) for number in range(60)}
    second = {stay: coding if rng.random() < 0.6 else random_coding(rng) for stay, coding in first.items()}
    return first, second


def test_kappa_by_role_matches_scikit_learn(coders):
    found = agreement(*coders, [None] * 60)["kappa"]
    for role in ("DP", "DR"):
        sides = [[next((i.code for i in coding if i.role == role), "none") for coding in c.values()] for c in coders]
        assert found[role] == pytest.approx(cohen_kappa_score(*sides), abs=1e-9)
    given = [[{i.code for i in coding if i.role == "DAS"} for coding in coder.values()] for coder in coders]
    used = sorted(set().union(*given[0], *given[1]))
    decisions = [[code in codes for codes in side for code in used] for side in given]
    assert found["DAS"] == pytest.approx(cohen_kappa_score(*decisions), abs=1e-9)


def test_scores_are_given_both_ways(coders):
    found = agreement(*coders, [None] * 60)
    sides = [[{f"{i.role}:{i.code}" for i in coding} for coding in coder.values()] for coder in coders]
    for name, (truth, answer) in (("gold_as_reference", sides), ("second_as_reference", sides[::-1])):
        used = sorted(set().union(*truth, *answer))
        rows = [[[code in codes for code in used] for codes in side] for side in (truth, answer)]
        precision, recall, f1, _ = precision_recall_fscore_support(*rows, average="micro", zero_division=0)
        scores = found[name]["all"]
        assert [scores[key] for key in ("precision", "recall", "micro_f1")] == pytest.approx([precision, recall, f1])
        wanted = sorted(set().union(*truth))
        rows = [[[code in codes for code in wanted] for codes in side] for side in (truth, answer)]
        macro = precision_recall_fscore_support(*rows, average="macro", zero_division=0)[2]
        assert scores["macro_f1"] == pytest.approx(macro, abs=1e-9)
    assert found["gold_as_reference"]["DP"]["precision"] == pytest.approx(found["second_as_reference"]["DP"]["recall"])


def test_kappa_of_one_label_is_undefined():
    assert kappa(["a", "a"], ["a", "a"]) is None
    assert kappa(["a", "b"], ["a", "b"]) == 1 and kappa(["a", "b"], ["b", "a"]) == -1
    same = agreement({"s": [Diagnosis("DP", "I10")]}, {"s": [Diagnosis("DP", "I10")]}, [None])
    assert same["kappa"] == {"DP": None, "DR": None, "DAS": None}
    assert same["gold_as_reference"]["DR"]["micro_f1"] is None and same["headline"]["dp_accuracy"]["score"] == 1


def test_codes_of_one_category_are_counted():
    gold = [[Diagnosis("DP", "E1198")], [Diagnosis("DP", "I10"), Diagnosis("DAS", "J181")]]
    given = [[Diagnosis("DAS", code) for code in ("E1198", "E1148", "E112", "E1198")], [Diagnosis("DP", "J189")]]
    found = depth_aware(gold, given, resample(2, 10))
    scores = {depth: [of[key]["score"] for key in ("precision", "recall", "f1")] for depth, of in found.items()}
    assert scores["code"] == pytest.approx([1 / 4, 1 / 3, 2 / 7])
    assert scores["4 characters"] == pytest.approx([1 / 4, 1 / 3, 2 / 7])
    assert scores["category"] == scores["chapter"] == pytest.approx([2 / 4, 2 / 3, 4 / 7])
    assert scores["all"] == pytest.approx([6 / 16, 6 / 12, 12 / 28])
    alone = depth_aware(gold[:1], given[:1], resample(1, 10))
    assert alone["category"]["precision"]["score"] == pytest.approx(1 / 3)


def test_command_shows_both(jsonl, run_command, tmp_path):
    rows = [{"id": stay, "codes": [{"role": "DP", "code": code}]} for stay, code in (("a", "I10"), ("b", "E119"))]
    gold = jsonl("gold.jsonl", rows)
    second = tmp_path / "second.csv"
    second.write_text("id,role,code\na,DP,I10\nb,DP,E1198\n", encoding="utf-8")
    arguments = ["--gold", gold, "--predictions", gold, "--json", tmp_path / "s.json", "--second", second, "--cophe"]
    code, output = run_command(evaluate_icd10, *arguments, "--html", tmp_path / "s.html")
    assert code == 0, output
    assert "Second coder of 2 stays" in output and "Depth-aware scores (CoPHE)" in output
    line = next(line for line in output.splitlines() if line.startswith("DP ") and "accuracy" not in line)
    assert line.split() == ["DP", "0.333", *["0.500"] * 8]
    assert "Second coder of 2 stays" in (tmp_path / "s.html").read_text(encoding="utf-8")
    second.write_text("id,role,code\nA,DP,I10\nb,DP,E1198\n", encoding="utf-8")
    code, message = run_command(evaluate_icd10, *arguments)
    assert code == 1 and "second.csv: 1 of 2" in message and "'A'" in message
