"""Probabilities of codes compared with enumeration; calibration, decisions and their scores compared with loops."""

import hashlib
import json
import math
import random
import shutil
from functools import cache

import numpy as np
import pytest

from model.errors import UserError
from utils import calibrate_icd10, evaluate_icd10
from utils.engines.marking import Marker
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.calibration import Calibration, fit, main_diagnoses, observations
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.confidence import ProbabilityReader
from utils.icd10.confidence_scores import calibration, coding_curve, confidence_scores
from utils.icd10.constrained_decoding import AnswerGrammar
from utils.icd10.headline import resample
from utils.icd10.predictions import NOTHING_MORE, Prediction, read_predictions
from utils.icd10.rule_kinds import Types
from utils.icd10.rules import RuleSet, guide_rules

LABELS = {
    "I10": "Hypertension",
    "I11": "Hypertension maligne",
    "E119": "Diabète",
    "E1190": "Diabète traité",
    "Z511": "Été",
}
TABLE = Cim10Table([Cim10Entry(code, 4 if code == "Z511" else 0, label) for code, label in LABELS.items()])
# Any DP with any DR, as in lists of codes.
RULES = RuleSet("types", [rule for rule in guide_rules().rules.values() if isinstance(rule.condition, Types)])
GRAMMAR = AnswerGrammar(TABLE, rules=RULES)
END = -1


@cache
def chance(written: bytes, byte: int) -> float:
    """Return how likely a random model is to write a byte, or END, next: a share of what the grammar allows."""
    states = GRAMMAR.start
    for previous in written:
        states = GRAMMAR.following(states)[previous]
    allowed = [*GRAMMAR.following(states), *([END] if GRAMMAR.may_end(states) else [])]
    weight = {each: 1 + hashlib.sha256(written + str(each).encode()).digest()[0] for each in allowed}
    return weight[byte] / sum(weight.values())


def spelled(answer: str, ended: bool = True) -> tuple[list[bytes], list[float]]:
    """Return the bytes of an answer as tokens, and the logarithms of their probabilities."""
    text = answer.encode()
    chances = [math.log(chance(text[:place], byte)) for place, byte in enumerate(text)]
    end = [math.log(chance(text, END))] if ended else []
    return [bytes([byte]) for byte in text] + [b""] * ended, chances + end


def written(answer: str, start: str) -> float:
    """Return the probability that the model continues `start` to `answer`."""
    chances = spelled(answer, ended=False)[1]
    return math.exp(sum(chances[len(start.encode()) :]))


def test_a_code_is_as_probable_as_all_that_leads_to_it():
    """With one token per byte, a code has one spelling: its probability is that of its complete text."""
    reader = ProbabilityReader(TABLE, RULES)
    roles = {"I11": "DP", "Z511": "DR", "E1190": "DAS", "I10": "DAS"}
    items = [f"{LABELS[code]} ({code})" for code in roles]
    opening = build_answer([Diagnosis("DP", "?", "?")]).partition("? (?)")[0]
    answer = build_answer([Diagnosis(role, code, LABELS[code]) for code, role in roles.items()])
    pieces, chances = spelled(answer)
    found = reader.read(answer, [b" ", *pieces], [0.0, *chances])
    upto = [answer.index(item) + len(item) for item in items]
    expected = [
        written(answer[: upto[0]], opening),
        written(answer[: upto[1]], answer[: answer.index(items[1])]),
        written(answer[: upto[2]], answer[: answer.index(items[2])]),
        written(answer[: upto[3]], answer[: upto[2]]),  # with the decision to name another
    ]
    assert found.codes == pytest.approx(expected)
    assert found.nothing_more == pytest.approx(chance(answer.encode(), END))
    every = [written(opening + f"{label} ({code})", opening) for code, label in LABELS.items() if code != "Z511"]
    assert sum(every) == pytest.approx(1)


def test_other_spellings_after_the_decision_do_not_lower_the_probability():
    """`Diab` is shared by two codes; after `Diabète ` and `(` only one is left, however it is spelled."""
    answer = build_answer([Diagnosis("DP", "E119", "Diabète")])
    head, _, tail = answer.partition("Diabète (E119)")
    pieces = [head.encode(), b"Diab", "ète".encode(), b" (", b"E1", b"19)", tail.encode(), b""]
    chances = [math.log(x) for x in (0.9, 0.5, 0.8, 0.25, 0.1, 0.1, 0.7, 0.6)]
    found = ProbabilityReader(TABLE).read(answer, pieces, chances)
    assert found == ([pytest.approx(0.5 * 0.8 * 0.25)], pytest.approx(0.7 * 0.6))
    free = ProbabilityReader(None).read(answer, pieces, chances)
    assert free == ([pytest.approx(0.5 * 0.8 * 0.25 * 0.1 * 0.1)], pytest.approx(0.7 * 0.6))


def test_other_layouts_and_missing_probabilities():
    reader = ProbabilityReader(None)
    pieces, chances = [b"[I10", b", E11", b".9]", b""], [math.log(x) for x in (0.5, 0.4, 0.5, 0.9)]
    assert reader.read("[I10, E11.9]", pieces, chances) == ([0.5, pytest.approx(0.2)], pytest.approx(0.9))
    assert reader.read("[I10, E11.9]", (), ()) == ([None, None], None)
    assert reader.read("[I10, E11.9]", [b"something else"], [0.0]) == ([None, None], None)
    assert reader.read("[I10, E11.9]", pieces[:-1], chances[:-1]).nothing_more is None  # cut


def sampled(count: int, slope: float, shift: float, seed: int = 0) -> list[tuple[float, bool]]:
    """Return probabilities, and whether they are right with log odds `slope` times theirs plus `shift`."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        odds = rng.gauss(1.5, 1.5)
        right = rng.random() < 1 / (1 + math.exp(-(slope * odds + shift)))
        pairs.append((1 / (1 + math.exp(-odds)), right))
    return pairs


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_calibration_makes_probabilities_shares(method):
    fitted = Calibration(method, {"DP": fit(sampled(4000, 0.4, -1), method)}, [], {})
    others = sampled(4000, 0.4, -1, seed=1)
    after = [(fitted.confidence("DP", p), right) for p, right in others]
    assert calibration(others)["ece"] > 0.25 and calibration(after)["ece"] < 0.03
    curve = [fitted.confidence("DP", p) for p in np.linspace(0, 1, 50)]
    assert curve == sorted(curve) and 0 <= curve[0] < curve[-1] <= 1
    assert fitted.confidence("DAS", 0.3) == 0.3


def test_calibration_of_probabilities_that_say_nothing_or_are_all_right():
    useless = Calibration("platt", {"DP": fit([(p, p < 0.5) for p in (0.1, 0.2, 0.8, 0.9)] * 10, "platt")}, [], {})
    assert useless.confidence("DP", 0.1) == pytest.approx(0.5) == useless.confidence("DP", 0.9)
    right = Calibration("platt", {"DP": fit([(0.9, True)] * 30, "platt")}, [], {})
    assert 0.9 < right.confidence("DP", 0.9) < 1


def test_probabilities_that_decide_everything_are_calibrated():
    """A steep curve: the log odds of 0, where a stay has no DP, would overflow."""
    steep = Calibration("platt", {"DP": fit([(0.5, False), (0.51, True)] * 500, "platt")}, [(0.0, False)], {})
    assert steep.confidence("DP", 0.0) == 0 and steep.confidence("DP", 1.0) == 1
    assert steep.auto_rule(0.9).threshold is None


def test_a_calibration_file_is_read_as_it_was_written(tmp_path):
    path, found = tmp_path / "c.json", Calibration("platt", {"DP": fit(sampled(50, 1, 0), "platt")}, [(0.5, True)], {})
    path.write_text(found.to_json())
    read = Calibration.from_file(path)
    assert read.confidence("DP", 0.7) == found.confidence("DP", 0.7) and read.auto_rule(0.4) == found.auto_rule(0.4)
    wrong = (
        {"maps": []},
        {"conditions": None},
        {"main_diagnoses": [[5, True]]},
        {"main_diagnoses": [[0.5, 7]]},
        {"main_diagnoses": [[float("nan"), True]]},
        {"maps": {"DP": {"x": [1, 0.4, 0], "y": [0, 0.5, 1]}}},
        {"maps": {"DP": {"slope": -1, "intercept": 0}}},
        {"maps": {"DP": {"slope": float("nan"), "intercept": 0}}},
    )
    edited = [json.dumps(found._asdict() | parts) for parts in wrong]
    for text in ("", "[]", '{"method": "platt"}', found.to_json().replace("slope", "hope"), "[" * 100_000, *edited):
        path.write_text(text)
        with pytest.raises(UserError, match=r"c\.json is not a file that utils\.calibrate_icd10 wrote"):
            Calibration.from_file(path)


def test_auto_takes_the_stays_whose_mean_confidence_reaches_the_target():
    pairs = [(0.99, True), (0.97, True), (0.9, False), (0.9, True), (0.5, False), (0.0, False)]
    known = Calibration("platt", {}, pairs, {})
    rule = known.auto_rule(0.94)  # 0.99, 0.97, 0.9, 0.9: mean 0.94
    assert (rule.threshold, rule.correct, rule.stays, rule.validation) == (0.9, 3, 4, 6)
    assert [rule.decide(c)[0] for c in (0.9, 0.95, 0.89, None)] == ["auto", "auto", "to_review", "to_review"]
    assert rule.decide(0.89)[1] == "DP confidence 0.890, below 0.900"
    assert known.auto_rule(0.941).stays == 2, "stays of the same confidence are not separated"
    assert Calibration("platt", {}, [(0.7, True)] * 3, {}).auto_rule(0.7).stays == 3, "their computed mean is lower"
    never = known.auto_rule(0.995)
    assert never.decide(1.0) == ("to_review", "no confidence reaches 99.5% on the 6 validation stays")


def test_the_stated_interval_contains_the_accuracy_of_new_stays():
    inside = 0
    for seed in range(60):
        rule = Calibration("platt", {}, sampled(300, 1, 0, seed), {}).auto_rule(0.9)
        auto = [right for p, right in sampled(300, 1, 0, 1000 + seed) if p >= rule.threshold]
        low, high = rule.interval(len(auto))
        inside += low <= sum(auto) / len(auto) <= high
    assert inside >= 54


def prediction(*codes: tuple[str, str, float], end: float = 0.5, **more) -> Prediction:
    chances = {code: chance for _, code, chance in codes} | {NOTHING_MORE: end}
    return Prediction(
        [Diagnosis(role, code) for role, code, _ in codes], probability=chances, confidence=chances, **more
    )


GOLD = {
    "a": Prediction([Diagnosis("DP", "I10"), Diagnosis("DAS", "E119"), Diagnosis("DAS", "J449")]),
    "b": Prediction([Diagnosis("DP", "C509")]),
    "c": Prediction([Diagnosis(None, "N390")]),
}
GIVEN = {
    "a": prediction(("DP", "I10", 0.9), ("DAS", "K210", 0.2), ("DAS", "E119", 0.6), end=0.3, decision="auto"),
    "b": prediction(("DP", "C508", 0.4), ("DAS", "C509", 0.8), end=0.7, decision="to_review"),
    "c": prediction(("DP", "N390", 0.7), end=1.0),
}


def test_a_code_is_right_in_its_role_and_the_end_if_nothing_is_missing():
    assert observations(GOLD, GIVEN, "confidence") == {
        "DP": [(0.9, True), (0.4, False), (0.7, True)],
        "DAS": [(0.2, False), (0.6, True), (0.8, False)],
        NOTHING_MORE: [(0.3, False), (0.7, True), (1.0, True)],
    }
    assert observations(GOLD, {"a": GIVEN["a"]._replace(edited=True)}, "confidence") == {}
    assert main_diagnoses(GOLD, GIVEN, "confidence") == [(0.9, True), (0.4, False)], "gold has no DP of c"
    assert main_diagnoses(GOLD, {}, "confidence") == [(0, False)] * 2


def test_expected_calibration_error_is_that_of_a_loop():
    pairs = sampled(500, 0.7, -0.5)
    bins = [[pair for pair in pairs if min(9, int(pair[0] * 10)) == number] for number in range(10)]
    gaps = [abs(sum(p for p, _ in each) - sum(right for _, right in each)) for each in bins]
    found = calibration(pairs)
    assert found["ece"] == pytest.approx(sum(gaps) / 500)
    assert found["brier"] == pytest.approx(sum((p - right) ** 2 for p, right in pairs) / 500)
    assert [count for count, _, _ in found["bins"]] == [len(each) for each in bins if each]


def test_precision_at_k_average_precision_and_auto():
    found = confidence_scores(GOLD, GIVEN, resample(3))
    assert found["precision_at"]["1"]["score"] == pytest.approx(3 / 3)
    assert found["precision_at"]["3"]["score"] == pytest.approx((2 + 1 + 1) / (3 + 2 + 1))
    # a: right at ranks 1 and 2 of 3 gold codes; b: its code is first; c: right.
    assert found["mean_average_precision"]["score"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert found["auto"]["stays"] == 1 and found["auto"]["dp_accuracy"]["score"] == 1
    assert list(found["calibration"]) == ["probability"], "confidences that are not calibrated are not shown twice"
    assert confidence_scores(GOLD, {"a": Prediction([Diagnosis("DP", "I10")])}, resample(3)) == {}


def test_coding_curve_is_the_largest_share_that_reaches_the_target():
    main = [(0.9, True), (0.8, True), (0.7, False), (0.7, True), (0.3, True), (0.0, False)]
    found = coding_curve(main, resample(6))
    assert found["points"] == [[round(x, 4), round(y, 4)] for x, y in (
        (1 / 6, 1), (2 / 6, 1), (4 / 6, 3 / 4), (5 / 6, 4 / 5), (1, 4 / 6))]  # fmt: skip
    assert found["targets"]["0.98"]["score"] == pytest.approx(2 / 6) and found["targets"]["0.98"]["from"] == 0.8
    low, high = found["targets"]["0.98"]["interval"]
    assert 0 <= low <= 2 / 6 <= high <= 1
    assert coding_curve([(0.5, False)], resample(1))["targets"]["0.9"] == {"score": 0, "interval": [0, 0], "from": None}


def test_rows_that_a_person_edited_are_marked_too():
    rule = Calibration("platt", {}, [(0.9, True)], {}).auto_rule(0.5)
    row = {"id": "1", "codes": ["I10", {"role": "DP", "code": "I11"}], "decision": "auto", "reason": "before"}
    assert Marker(None, rule).mark(row) == row | {
        "decision": "to_review", "reason": "no main diagnosis whose confidence is known"}  # fmt: skip
    assert Marker().mark(row) == {"id": "1", "codes": row["codes"]}


@pytest.fixture
def val(jsonl, tmp_path):
    """Answers to 60 stays whose probabilities are too low, of a checkpoint in a run."""
    (tmp_path / "run/checkpoints/checkpoint_000300").mkdir(parents=True)
    (tmp_path / "run/args.yaml").touch()
    rows, gold = [], []
    for number, (chance, right) in enumerate(sampled(60, 1, 2)):
        code = {"role": "DP", "code": "I10", "label": "", "probability": chance, "confidence": chance}
        rows.append({"id": str(number), "codes": [code], "nothing_more": {"probability": chance}})
        gold.append({"id": str(number), "codes": [{"role": "DP", "code": "I10" if right else "I11"}]})
    answers = jsonl("p.jsonl", rows)
    origin = {
        "checkpoint": str(tmp_path / "run/checkpoints/checkpoint_000300"),
        "cim10": "x",
        "rules": "y",
        "sampling": None,
        "run": "r",
        "notes": "n",
    }
    (tmp_path / "p.about.json").write_text(json.dumps(origin))
    return jsonl("gold.jsonl", gold), answers


def test_calibrating_stores_the_result_with_the_run(val, tmp_path, run_command):
    gold, answers = val
    code, output = run_command(calibrate_icd10, "--gold", gold, "--predictions", answers)
    stored = tmp_path / "run/calibration/checkpoint_000300.json"
    assert code == 0 and f"Calibrated on 60 stays: {stored}" in output and "--auto 0.95" in output, output
    found = Calibration.from_file(stored)
    assert found.confidence("DP", 0.5) > 0.7 and found.maps.keys() == {"DP", NOTHING_MORE}
    assert found.conditions == {"cim10": "x", "rules": "y", "sampling": None, "run": "r", "model": None, "notes": "n"}
    assert stored.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(tmp_path / "run")
    code, output = run_command(calibrate_icd10, "--gold", gold, "--predictions", answers)
    assert code == 1 and "is not of a checkpoint of a run" in output and "--out FILE" in output
    code, output = run_command(calibrate_icd10, "--gold", gold, "--predictions", gold, "--out", tmp_path / "c.json")
    assert code == 1 and "has no probability of a code" in output


def test_too_few_main_diagnoses_decide_nothing(val, jsonl, tmp_path, run_command):
    """The model's probabilities, which nothing has compared with gold, do not mark stays."""
    few = [jsonl(path.name, map(json.loads, path.read_text().splitlines()[:19])) for path in val]
    code, output = run_command(calibrate_icd10, "--gold", few[0], "--predictions", few[1])
    assert (
        code == 0 and "  --auto        not possible: needs 20 main diagnoses" in output and "--auto 0.9" not in output
    )


def test_probabilities_that_are_none_are_refused(jsonl):
    for value in (1.2, -0.1, "high", [1], 10**400):
        path = jsonl("p.jsonl", [{"id": "1", "codes": [{"role": "DP", "code": "I10", "confidence": value}]}])
        with pytest.raises(UserError, match=r"line 1: a probability or confidence that is not a number from 0 to 1"):
            read_predictions(path)


def test_confidence_and_decision_are_read_from_csv_too(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        "id,role,code,label,confidence,decision,reason\n1,DP,I10,HTA,0.9,auto,why\n1,DAS,E11.9,,,auto,why\n2,DP,C509,,1,,\n"
    )
    found = read_predictions(path)
    assert found["1"].confidence == {"I10": 0.9} and found["1"].decision == "auto"
    assert found["2"].confidence == {"C509": 1.0} and found["2"].decision is None
    path.write_text(path.read_text().replace("0.9", "x"))
    with pytest.raises(UserError, match=r"p\.csv: stay '1': a probability or confidence that is not a number"):
        read_predictions(path)


def test_evaluation_shows_confidences_before_and_after(val, jsonl, tmp_path, run_command):
    gold, answers = val
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for row in rows:
        row["codes"][0]["confidence"] = min(1.0, 2 * row["codes"][0]["probability"])
        row["decision"] = "auto" if row["codes"][0]["confidence"] == 1 else "to_review"
    marked, scores, page = jsonl("m.jsonl", rows), tmp_path / "s.json", tmp_path / "s.html"
    arguments = ["--gold", gold, "--predictions", marked, "--json", scores, "--html", page]
    code, output = run_command(evaluate_icd10, *arguments)
    assert code == 0 and "98% right main diagnoses" in output and "DP: calibrated" in output, output
    found = json.loads(scores.read_text())["confidence"]
    assert found["calibration"]["confidence"]["DP"]["ece"] < found["calibration"]["probability"]["DP"]["ece"]
    html = page.read_text()
    assert 'aria-label="Reliability diagram"' in html and 'aria-label="Coding curve"' in html
    assert "Stays marked auto" in html
