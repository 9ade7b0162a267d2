"""Headline scores compared with naive loops and scikit-learn; bootstrap by patient and paired tests with references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from finetune.args import EarlyStoppingArgs
from utils.icd10.answers import Diagnosis
from utils.icd10.headline import (
    HEADLINE,
    Ratio,
    headline,
    headline_ratios,
    paired_comparison,
    patient_index,
    resample,
)
from utils.icd10.metrics import answer_scores, evaluate_codings

# Valid codes, an unknown one and malformed ones.
CODES = ["I10", "I109", "J181", "J189", "E1198", "Z511", "U9999", "E11X", "ABC", "E1"]
DIAGNOSES = st.builds(Diagnosis, st.sampled_from(["DP", "DR", "DAS", "DAS", None]), st.sampled_from(CODES))
GOLD = st.lists(st.builds(Diagnosis, st.sampled_from(["DP", "DR", "DAS"]), st.sampled_from(CODES)), max_size=5)
STAYS = st.lists(st.tuples(GOLD, st.lists(DIAGNOSES, max_size=6)), min_size=1, max_size=8)


def coding(text):
    """Return "DP:J189 DAS:I10" as diagnoses; "?" is an unknown role."""
    pairs = (item.split(":") for item in text.split())
    return [Diagnosis(None if role == "?" else role, code) for role, code in pairs]


def naive(stays):
    """Compute the headline stay by stay, with lists."""

    def f1(select):
        common = total = 0
        for stay in stays:
            wanted, found = [], []
            for items, unique in zip(stay, (wanted, found)):
                for item in items:
                    if (value := select(item)) is not None and value not in unique:
                        unique.append(value)
            common += sum(value in found for value in wanted)
            total += len(wanted) + len(found)
        return 2 * common / total if total else None

    def equal(select, only_with_gold=False):
        right = counted = 0
        for stay in stays:
            sides = [sorted({str(select(item)) for item in items if select(item)}) for items in stay]
            if sides[0] or not only_with_gold:
                counted += 1
                right += sides[0] == sides[1]
        return right / counted if counted else None

    blind = {"micro_f1": f1(lambda item: item.code), "exact_match": equal(lambda item: item.code)}
    if not any(item.role for expected, _ in stays for item in expected):
        return dict.fromkeys(HEADLINE) | blind
    return blind | {
        "dp_accuracy": equal(lambda item: item.role == "DP" and item.code, True),
        "dp_category_accuracy": equal(lambda item: item.role == "DP" and item.code[:3], True),
        "role_micro_f1": f1(lambda item: (item.role, item.code)),
        "role_exact_match": equal(lambda item: (item.role, item.code)),
        "dr_f1": f1(lambda item: item.code if item.role == "DR" else None),
        "das_f1": f1(lambda item: item.code if item.role == "DAS" else None),
    }


@settings(max_examples=80, deadline=None)
@given(STAYS)
def test_headline_matches_a_naive_reference(stays):
    found = {name: ratio.score for name, ratio in headline_ratios(*zip(*stays)).items()}
    assert found.keys() == HEADLINE.keys()
    assert found == pytest.approx(naive(stays), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(STAYS)
def test_role_aware_and_blind_scores_match_scikit_learn(stays):
    gold, predicted = zip(*stays)
    if not any(item.role for coding in gold for item in coding):
        return
    exact = evaluate_codings(gold, predicted, samples=2)["exact"]
    found = {name: ratio.score for name, ratio in headline_ratios(gold, predicted).items()}
    for scores, key, names in (
        (exact["role_aware"], lambda item: f"{item.role}:{item.code}", ("role_micro_f1", "role_exact_match")),
        (exact, lambda item: item.code, ("micro_f1", "exact_match")),
    ):
        sides = [[{key(item) for item in coding} for coding in side] for side in (gold, predicted)]
        binarizer = MultiLabelBinarizer().fit(sides[0] + sides[1])
        if len(binarizer.classes_) < 2:
            continue  # scikit-learn treats a single column as binary and averages over both values
        truth, answer = map(binarizer.transform, sides)
        for mean in ("micro", "macro"):
            expected = precision_recall_fscore_support(truth, answer, average=mean, zero_division=0)[:3]
            assert list(scores[mean].values()) == pytest.approx(expected, abs=1e-9)
        assert found[names[0]] == pytest.approx(f1_score(truth, answer, average="micro", zero_division=0), abs=1e-9)
        assert found[names[1]] == scores["exact_match"] == pytest.approx(accuracy_score(truth, answer), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(STAYS)
def test_edin_leaves_out_predicted_codes_that_gold_lacks(stays):
    gold, predicted = zip(*stays)
    wanted = {item.code for coding in gold for item in coding}
    if len(wanted) < 2:
        return
    sides = [[{item.code for item in coding} & wanted for coding in side] for side in (gold, predicted)]
    truth, answer = map(MultiLabelBinarizer(classes=sorted(wanted)).fit(sides[0]).transform, sides)
    found = evaluate_codings(gold, predicted, samples=2)["exact"]["edin_2023"]
    for mean in ("micro", "macro"):
        expected = precision_recall_fscore_support(truth, answer, average=mean, zero_division=0)[:3]
        assert list(found[mean].values()) == pytest.approx(expected, abs=1e-9)
    assert found["exact_match"] == pytest.approx(accuracy_score(truth, answer))


def test_exchanged_roles_are_wrong():
    gold = [coding("DP:I5010 DAS:I10 DAS:I489"), coding("DP:J181 DAS:E1198"), coding("DP:Z511 DR:C509")]
    swapped = [coding("DP:I10 DAS:I5010 DAS:I489"), coding("DP:E1198 DAS:J181"), coding("DP:C509 DR:Z511")]
    scores = {name: ratio.score for name, ratio in headline_ratios(gold, swapped).items()}
    assert scores == pytest.approx({
        "dp_accuracy": 0, "dp_category_accuracy": 0, "role_micro_f1": 1 / 7, "role_exact_match": 0, "dr_f1": 0,
        "das_f1": 1 / 3, "micro_f1": 1, "exact_match": 1,
    })  # fmt: skip


def test_main_diagnosis_counts_where_gold_has_one():
    gold = [coding("DP:I5010"), coding("DP:I10"), coding("DAS:I10"), coding("DP:J181")]
    predicted = [coding("DP:I5019"), coding("DP:I10 DP:J181"), coding("DP:I10"), []]
    scores = {name: ratio.score for name, ratio in headline_ratios(gold, predicted).items()}
    assert scores["dp_accuracy"] == 0 and scores["dp_category_accuracy"] == pytest.approx(1 / 3)
    assert headline_ratios([coding("?:I10")], [coding("DP:I10")])["dp_accuracy"].score is None


def test_scores_of_training_are_the_headline_and_can_be_selected():
    answer = "diagnostic principal : HTA (I10), diagnistic relié : cancer (C61), diagnostic associé : x (E119)"
    scores = answer_scores([answer], [answer])
    assert scores.keys() == HEADLINE.keys()
    choices = EarlyStoppingArgs.__dataclass_fields__["metric"].type.__args__
    assert set(choices) == {"eval_loss", *HEADLINE}


# ---- Intervals and paired tests


def random_codings(count, seed, right=0.7):
    rng = np.random.default_rng(seed)
    gold = [[Diagnosis("DAS", str(code)) for code in rng.choice(CODES, 3, replace=False)] for _ in range(count)]
    return gold, [
        [item if rng.random() < right else Diagnosis("DAS", str(rng.choice(CODES))) for item in coding]
        for coding in gold
    ]


def test_bootstrap_draws_patients():
    stays = 60
    gold, predicted = random_codings(stays, 0)
    patients = [f"p{number // 3}" for number in range(stays)]
    found = evaluate_codings(gold, predicted, samples=2000, patients=patients)["exact"]["intervals"]["micro"]["f1"]
    ratio = headline_ratios(gold, predicted)["micro_f1"]
    rng = np.random.default_rng(1)
    values = []
    for _ in range(2000):
        drawn = [3 * patient + member for patient in rng.integers(stays // 3, size=stays // 3) for member in range(3)]
        values.append(ratio.numerator[drawn].sum() / ratio.denominator[drawn].sum())
    reference = np.quantile(values, [0.025, 0.975]) - np.mean(values) + ratio.score
    assert found == pytest.approx(reference, abs=0.015)
    weights = resample(stays, 50, patient=patient_index(patients))
    assert (weights.reshape(50, -1, 3).std(axis=2) == 0).all()  # the stays of a patient are drawn together


def test_copies_of_a_stay_do_not_narrow_the_interval_of_its_patient():
    gold, predicted = random_codings(30, 3)
    copies = [[coding for coding in side for _ in range(4)] for side in (gold, predicted)]
    patients = [str(number // 4) for number in range(120)]
    alone = headline(gold, predicted, resample(30))["micro_f1"]
    by_patient = headline(*copies, resample(120, patient=patient_index(patients)))["micro_f1"]
    by_stay = headline(*copies, resample(120))["micro_f1"]
    assert by_patient == alone
    assert np.diff(by_stay["interval"]) < 0.7 * np.diff(alone["interval"])


def test_stays_without_patient_are_patients_of_their_own():
    assert patient_index(["a", None, "b", "a", None]).tolist() == [0, 1, 2, 0, 3]


def test_an_undefined_score_has_no_interval():
    found = headline([coding("DP:I10")], [coding("DP:I10")], resample(1, 10))
    assert found["dr_f1"] == {"score": None, "interval": None}
    assert found["dp_accuracy"] == {"score": 1.0, "interval": [1.0, 1.0]}


def accuracy(right):
    return Ratio(np.asarray(right, dtype=np.int64), np.ones(len(right), dtype=np.int64))


def test_paired_test_matches_the_exact_sign_test():
    """6 stays are right in the second only, 1 in the first only: p = P(|X - 3.5| >= 2.5) of 7 fair coins = 16 / 128."""
    first, second = accuracy([1] + [0] * 6 + [1] * 13), accuracy([0] + [1] * 6 + [1] * 13)
    found = paired_comparison(first, second, samples=20_000)
    assert found.difference == pytest.approx(5 / 20)
    assert found.p_value == pytest.approx(16 / 128, abs=0.01)
    assert found.interval[0] < 5 / 20 < found.interval[1]
    same = paired_comparison(first, first)
    assert (same.difference, same.interval, same.p_value) == (0, [0, 0], 1)
    back = paired_comparison(second, first)
    assert back.difference == -found.difference and back.interval[0] < 0


def test_interval_of_the_difference_matches_resampled_stays():
    gold, predicted = random_codings(50, 5)
    _, other = random_codings(50, 5, right=0.5)
    first, second = (headline_ratios(gold, side)["micro_f1"] for side in (predicted, other))
    found = paired_comparison(first, second, samples=4000)
    rng = np.random.default_rng(9)
    draws = [rng.integers(50, size=50) for _ in range(4000)]
    values = [np.subtract(*(r.numerator[d].sum() / r.denominator[d].sum() for r in (second, first))) for d in draws]
    assert found.interval == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.015)


@pytest.mark.parametrize("members", [1, 4])
def test_paired_test_has_its_false_positive_rate(members):
    """Two equally good predictions differ with p < 0.05 in 5 % of trials, also if a patient's stays are alike."""
    rng = np.random.default_rng(0)
    trials, patients = 300, 40
    patient = np.repeat(np.arange(patients), members)
    by_patient, by_stay = [], []
    for trial in range(trials):
        first, second = (accuracy((rng.random(patients) < 0.6)[patient]) for _ in range(2))
        by_patient.append(paired_comparison(first, second, patient, 100, trial).p_value < 0.05)
        if members > 1:
            by_stay.append(paired_comparison(first, second, None, 100, trial).p_value < 0.05)
    # Scores are discrete: the rate is at most 5 %, with a standard error of 1.3 %.
    assert 0.01 < np.mean(by_patient) < 0.085
    assert members == 1 or np.mean(by_stay) > 0.2
