"""The figures of weeks, compared with training."""

from collections import Counter

import pytest

from utils.icd10.drift import CodedOnce, Training, by_week, coded_once, shifts
from utils.icd10.journal import CODED, REVIEWED, Key, open_journal

TRAINING = Training.of([("I10", ["I10", "E119"]), ("J90", ["J90"]), ("I500", ["I500", "I10"]), ("I10", ["I10"])])


def stay(week, codes, confidence=0.5, marked="auto", decisions=None):
    return CodedOnce(week, frozenset(codes), codes[0] if codes else None, confidence, marked, decisions)


def test_weeks():
    stays = [
        stay("2026-W48", ["I10"], 0.9, "auto", ["accepted", "refused", "added"]),
        stay("2026-W48", ["J90", "Z999"], 0.7, "to_review", ["replaced", "accepted"]),
        stay("2026-W47", [], None, None),
    ]
    weeks = by_week(stays, TRAINING)
    assert list(weeks) == ["2026-W47", "2026-W48"]
    empty, week = weeks.values()
    assert empty == (1, 0.0, None, None, None, None, None)
    assert week.stays == 2 and week.codes == 1.5 and week.confidence == pytest.approx(0.8)
    assert week.accepted == 2 / 4  # added codes were not proposed
    assert week.to_review == 0.5 and week.unknown == pytest.approx(1 / 3)
    # Chapters of the DP in training: IX 3/4, X 1/4; this week 1/2 each.
    assert week.distance == pytest.approx(0.25)


def test_shifts_are_two_proportion_tests_of_the_latest_weeks():
    training = Training(400, Counter({"I10": 100, "J90": 100, "E119": 2}), Counter())
    old = [stay("2026-W01", ["J90"])] * 50  # over four weeks ago
    recent = [stay(f"2026-W{number}", ["I10"]) for number in (45, 46, 47, 48) for _ in range(25)]
    first, second = shifts([*old, *recent], training)
    assert (first.code, first.before, first.now) == ("I10", 0.25, 1.0)
    assert first.z == pytest.approx(0.75 / (0.4 * 0.6 * (1 / 400 + 1 / 100)) ** 0.5)
    assert (second.code, second.now) == ("J90", 0.0) and second.z < 0


def test_a_reviewed_stay_counts_with_its_final_codes(tmp_path):
    key = Key("s1", "n1")
    proposed = [{"role": "DP", "code": "I10", "confidence": 0.8}, {"role": "DAS", "code": "J90"}]
    decided = [
        {"role": "DP", "decision": "replaced", "final": "I500"},
        {"role": "DAS", "decision": "refused", "final": ""},
    ]
    with open_journal(tmp_path / "journal.jsonl") as journal:
        journal.append(CODED, key, {"codes": proposed, "decision": "auto"})
        (before,) = coded_once(journal)
        journal.append(REVIEWED, key, {"codes": decided})
        (after,) = coded_once(journal)
    assert before[1:] == ({"I10", "J90"}, "I10", 0.8, "auto", None)
    assert after[1:] == ({"I500"}, "I500", 0.8, "auto", ["replaced", "refused"])
