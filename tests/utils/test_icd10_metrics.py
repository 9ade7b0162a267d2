"""Scores compared with manual calculation, scikit-learn and naive loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import ROLES, Cim10Entry, Cim10Table, category, chapter
from utils.icd10.metrics import (
    FREQUENCY_BANDS,
    Pairs,
    evaluate_codings,
    exact_matches,
    resample,
    rule_rates,
    score,
)


def coding(text):
    """ "DP:J189 DAS:I10" as diagnoses; "?" is an unknown role."""
    pairs = (item.split(":") for item in text.split())
    return [Diagnosis(None if role == "?" else role, code) for role, code in pairs]


GOLD = [coding(text) for text in (
    "DP:J189 DAS:I10 DAS:E1198",
    "DP:Z511 DR:C509 DAS:I10",
    "DP:I10",
    "DP:J189",
    "DP:K359",
)]  # fmt: skip
PREDICTED = [coding(text) for text in (
    "DP:J189 DAS:I10 DAS:E1190",
    "DP:C509 DR:Z511",
    "",
    "DP:J189 DAS:J440",
    "DP:K359 DAS:K359",
)]  # fmt: skip


def figures(scores):
    return tuple(pytest.approx(scores[name]) for name in ("precision", "recall", "f1"))


def test_scores_match_manual_calculation():
    exact, categories = evaluate_codings(GOLD, PREDICTED).values()
    # 9 codes in gold, 8 predicted (K359 once), 6 of them right: J189, I10; Z511, C509; J189; K359.
    assert (exact["gold"], exact["predicted"], exact["correct"]) == (9, 8, 6)
    assert figures(exact["micro"]) == (6 / 8, 6 / 9, 12 / 17)
    # J189 1 1 1; I10 1 1/3 1/2; C509, K359, Z511 1 1 1; E1198, E1190, J440 0 0 0.
    assert figures(exact["macro"]) == (5 / 8, (4 + 1 / 3) / 8, 4.5 / 8)
    assert exact["exact_match"] == 1 / 5
    # As categories the diabetes is right too.
    assert figures(categories["micro"]) == (7 / 8, 7 / 9, 14 / 17)
    assert figures(categories["macro"]) == (6 / 7, (5 + 1 / 3) / 7, 5.5 / 7)
    assert categories["exact_match"] == 2 / 5


def test_scores_by_role_match_manual_calculation():
    by_role = evaluate_codings(GOLD, PREDICTED)["exact"]["by_role"]
    assert figures(by_role["DP"]["micro"]) == (3 / 4, 3 / 5, 6 / 9)
    assert figures(by_role["DR"]["micro"]) == (0, 0, 0)
    assert figures(by_role["DAS"]["micro"]) == (1 / 4, 1 / 3, 2 / 7)
    assert [by_role[role]["exact_match"] for role in ROLES] == [3 / 5, 4 / 5, 1 / 5]


def test_scores_by_chapter_match_manual_calculation():
    by_chapter = evaluate_codings(GOLD, PREDICTED)["exact"]["by_chapter"]
    found = {name: (scores["gold"], scores["predicted"], scores["correct"]) for name, scores in by_chapter.items()}
    assert found == {
        "II": (1, 1, 1),
        "IV": (1, 1, 0),
        "IX": (3, 1, 1),
        "X": (2, 3, 2),
        "XI": (1, 1, 1),
        "XXI": (1, 1, 1),
    }
    assert "none" in evaluate_codings(GOLD[:1], [coding("DP:D999")])["exact"]["by_chapter"]


def test_scores_by_frequency_in_training_match_manual_calculation():
    training = [coding("DP:J189 DAS:I10")] * 5 + [coding("DP:I10 DAS:E1198 DAS:E1190")]
    exact, categories = evaluate_codings(GOLD, PREDICTED, training).values()
    found = {name: (of["gold"], of["predicted"], of["correct"]) for name, of in exact["by_frequency"].items()}
    assert found == {"0": (3, 4, 3), "1-5": (3, 3, 2), "6-20": (3, 1, 1)}
    assert list(categories["by_frequency"]) == ["0", "1-5", "6-20"]
    of_gold = evaluate_codings(GOLD, PREDICTED)["exact"]["by_frequency"]
    assert {name: of["predicted"] for name, of in of_gold.items()} == {"0": 2, "1-5": 6}


def test_frequency_bands_end_at_their_names():
    counts = {"A000": 0, "A001": 1, "A002": 5, "A003": 6, "A004": 20, "A005": 21, "A006": 100, "A007": 101}
    training = [[Diagnosis("DAS", code) for code, count in counts.items() if count > note] for note in range(101)]
    notes = [[Diagnosis("DP", code) for code in counts]]
    bands = evaluate_codings(notes, notes, training)["exact"]["by_frequency"]
    assert {name: scores["gold"] for name, scores in bands.items()} == dict(zip(FREQUENCY_BANDS, (1, 2, 2, 2, 1)))


CODES = [f"{letter}{number}" for letter, number in itertools.product("AEJ", ("100", "101", "11", "120"))]
NOTES = st.lists(st.tuples(st.sets(st.sampled_from(CODES)), st.sets(st.sampled_from(CODES))), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(NOTES)
def test_scores_match_scikit_learn(notes):
    for shorten in (str, category):
        gold, predicted = ([{shorten(code) for code in codes} for codes in side] for side in zip(*notes))
        binarizer = MultiLabelBinarizer().fit(gold + predicted)
        if len(binarizer.classes_) < 2:
            continue  # scikit-learn treats a single column as binary and averages over both values
        truth, answer = binarizer.transform(gold), binarizer.transform(predicted)
        pairs = Pairs.of(gold, predicted)
        for mean, found in score(pairs).items():
            expected = precision_recall_fscore_support(truth, answer, average=mean, zero_division=0)[:3]
            assert [found[name][0] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
        assert exact_matches(pairs).mean() == pytest.approx(accuracy_score(truth, answer))


@settings(max_examples=60, deadline=None)
@given(NOTES, st.data())
def test_weight_two_counts_as_two_notes(notes, data):
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(notes), max_size=len(notes)))
    repeated = [note for note, weight in zip(notes, weights) for _ in range(weight)]
    gold, predicted = zip(*notes)
    weighted = score(Pairs.of(gold, predicted), np.array([weights, weights]))
    alone = score(Pairs.of([right for right, _ in repeated], [given for _, given in repeated]))
    for mean, scores in alone.items():
        for name, value in scores.items():
            assert weighted[mean][name] == pytest.approx([value[0]] * 2)


def random_codings(count, seed):
    rng = np.random.default_rng(seed)
    return [
        [Diagnosis("DAS", str(code)) for code in rng.choice(CODES, size=rng.integers(0, 5), replace=False)]
        for _ in range(count)
    ]


def test_intervals_match_resampled_notes():
    gold, predicted = random_codings(40, 0), random_codings(40, 1)
    found = evaluate_codings(gold, predicted, samples=2000)["exact"]
    rng = np.random.default_rng(5)
    draws = [rng.integers(40, size=40) for _ in range(2000)]
    again = [
        score(Pairs.of(*([{item.code for item in side[note]} for note in draw] for side in (gold, predicted))))
        for draw in draws
    ]
    for mean, name in itertools.product(("micro", "macro"), ("precision", "recall", "f1")):
        values = np.array([scores[mean][name][0] for scores in again])
        shift = found[mean][name] - values.mean()
        assert found["intervals"][mean][name] == pytest.approx(np.quantile(values, [0.025, 0.975]) + shift, abs=0.015)


def test_intervals_are_seeded_contain_the_score_and_narrow_with_more_notes():
    few = [(random_codings(30, 2), random_codings(30, 3)) for _ in range(2)]
    assert evaluate_codings(*few[0]) == evaluate_codings(*few[1])
    assert evaluate_codings(*few[0], seed=1) != evaluate_codings(*few[0])
    widths = []
    for gold, predicted in (few[0], (few[0][0] * 20, few[0][1] * 20)):
        exact = evaluate_codings(gold, predicted)["exact"]
        for name, scores in (("micro", exact["micro"]), ("macro", exact["macro"])):
            for figure, value in scores.items():
                low, high = exact["intervals"][name][figure]
                assert 0 <= low <= value <= high <= 1
        low, high = exact["intervals"]["exact_match"]
        assert low <= exact["exact_match"] <= high
        widths.append(np.diff(exact["intervals"]["micro"]["f1"])[0])
    assert widths[1] < widths[0] / 3


def test_macro_intervals_contain_the_score_if_most_codes_are_rare():
    """Each note has a different wrong code: a third of them is missing from a bootstrap sample."""
    gold = [coding("DP:I10")] * 30
    predicted = [coding(f"DP:I10 DAS:J{100 + number}") for number in range(30)]
    exact = evaluate_codings(gold, predicted)["exact"]
    low, high = exact["intervals"]["macro"]["f1"]
    assert exact["macro"]["f1"] == pytest.approx(1 / 31) and low < 1 / 31 < high


def test_bootstrap_in_chunks_gives_the_same_scores(monkeypatch):
    pairs = Pairs.of(*([{item.code for item in notes} for notes in random_codings(20, seed)] for seed in (4, 5)))
    weights = resample(20, 50)
    assert (weights.sum(axis=1) == 20).all()
    whole = score(pairs, weights)
    monkeypatch.setattr("utils.icd10.metrics._CHUNK", 100)
    chunked = score(pairs, weights)
    assert all((whole[mean][name] == chunked[mean][name]).all() for mean in whole for name in whole[mean])


def test_perfect_and_empty_predictions():
    perfect = evaluate_codings(GOLD, GOLD)
    empty = evaluate_codings(GOLD, [[]] * len(GOLD))
    for level in ("exact", "category"):
        assert (1, 1, 1) == figures(perfect[level]["micro"]) == figures(perfect[level]["macro"])
        assert perfect[level]["exact_match"] == 1 and perfect[level]["intervals"]["exact_match"] == [1, 1]
        assert (0, 0, 0) == figures(empty[level]["micro"]) == figures(empty[level]["macro"])
        assert empty[level]["exact_match"] == 0
    with pytest.raises(ValueError, match="as many predictions"):
        evaluate_codings(GOLD, GOLD[1:])


def test_order_and_repetitions_are_ignored():
    def points(result):
        return [(result[level]["micro"], result[level]["macro"], result[level]["exact_match"]) for level in result]

    reversed_twice = [note[::-1] + note for note in PREDICTED]
    assert points(evaluate_codings(GOLD[::-1], reversed_twice[::-1])) == points(evaluate_codings(GOLD, PREDICTED))


TABLE = Cim10Table(
    Cim10Entry(code, kind, code)
    for code, kind in (
        ("I10", 0), ("I50", 3), ("I500", 0), ("Z37", 3), ("Z370", 1), ("D63", 3), ("C97", 4), ("X99", 2),
    )
)  # fmt: skip


def test_rule_rates_match_manual_calculation():
    answers = [
        coding("DP:I10 DAS:I50 DAS:I99"),  # a category with children, a code that is not in the table
        coding("DP:C97 DR:Z370 DAS:D63"),  # forbidden as DP, as DR; a closed code
        coding("DR:C97 DR:I10 DAS:X99 ?:I500"),  # no DP, two DR
        coding("DP:I10 DP:I500 DAS:I10 DAS:I10"),  # two DP; I10 counts once among all codes, once in each role
    ]
    rates = {name: (rate["count"], rate["of"]) for name, rate in rule_rates(answers, TABLE).items()}
    assert rates == {
        "DR_without_Z": (1, 1),
        "DR_is_DP": (0, 1),
        "DAS_is_DP_or_DR": (1, 4),
        "repeated_DAS": (1, 4),
        "session_without_DR": (0, 0),
        "parent_and_child": (0, 4),
        "excluded_pair": (0, 0),
        "asterisk_without_dagger": (0, 1),  # D63, whose dagger can be C97
        "wrong_sex": (0, 0),
        "wrong_age": (0, 0),
        "contradiction": (0, 1),
        "asterisk_as_DP": (0, 1),
        "injury_without_cause": (0, 0),
        "symptom_with_cause": (0, 3),
        "unknown_code": (1, 4),
        "unknown": (1, 12),
        "category": (1, 12),
        "closed": (1, 12),
        "forbidden_DP": (1, 3),
        "forbidden_DR": (1, 2),
        "forbidden_DAS": (2, 4),
        "no_DP": (1, 4),
        "several_DP": (1, 4),
        "several_DR": (1, 4),
    }
    assert rule_rates(answers, TABLE)["forbidden_DAS"]["rate"] == 2 / 4
    assert rule_rates([[]], TABLE)["unknown"] == {"count": 0, "of": 0, "rate": 0.0}


def test_every_code_is_in_one_chapter_and_one_band():
    gold, predicted = random_codings(30, 6), random_codings(30, 7)
    for level, scores in evaluate_codings(gold, predicted).items():
        for key in ("by_chapter", "by_frequency"):
            for figure in ("gold", "predicted", "correct"):
                assert sum(group[figure] for group in scores[key].values()) == scores[figure], (level, key)
        assert set(scores["by_chapter"]) == {chapter(code) for code in CODES}
