"""Calibrate the probabilities of codes on validation stays, and decide which stays need no reading.

A calibration maps the probability that the model gives a code in its role to the share of such codes that gold has. It
is fitted with scikit-learn and applied without it.

A stay is marked `auto` if its main diagnosis is sure enough: from the lowest confidence on at which the mean confidence
of the validation stays at or above it reaches the target.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.errors import UserError
from utils.icd10.codes import ROLES
from utils.icd10.predictions import NOTHING_MORE, Prediction, Probability, gold_has
from utils.tables.jsonl import file_errors

METHODS = ("platt", "isotonic")
AUTO, TO_REVIEW = "auto", "to_review"
CONDITIONS = ("cim10", "rules", "sampling")  # of answers: others have other probabilities
ORIGIN = ("run", "model", "notes")  # what answered the validation notes, and their hash
FEWEST = 20  # codes of a role to calibrate it

_NEAREST = 1e-6  # to 0 and to 1
_STEEPEST = 700.0  # log odds; exp overflows soon after
_ROUNDING = 1e-9  # of a mean of equal confidences
_DRAWS = 100_000
_QUANTILES = (0.025, 0.975)


class AutoRule(NamedTuple):
    """The confidence from which a stay needs no reading.

    Attributes:
        target: share of right main diagnoses among such stays.
        threshold: lowest confidence of the DP; None if the validation stays have none that reaches the target.
        correct: number of validation stays at or above it whose DP is right.
        stays: number of validation stays at or above it.
        validation: number of validation stays.
    """

    target: float
    threshold: float | None
    correct: int
    stays: int
    validation: int

    def decide(self, confidence: float | None) -> tuple[str, str]:
        """Return AUTO or TO_REVIEW and why, given the confidence of the DP; None if there is none."""
        if self.threshold is None:
            return TO_REVIEW, f"no confidence reaches {self.target:.1%} on the {self.validation} validation stays"
        if confidence is None:
            return TO_REVIEW, "no main diagnosis whose confidence is known"
        compared = "at least" if confidence >= self.threshold else "below"
        reason = f"DP confidence {confidence:.3f}, {compared} {self.threshold:.3f}"
        return (AUTO if confidence >= self.threshold else TO_REVIEW), reason

    def interval(self, stays: int) -> tuple[float, float]:
        """Return the 95 % prediction interval of the share of right main diagnoses among as many new `auto` stays.

        Beta-binomial: the true share has a Jeffreys prior and the counts of the validation stays.
        """
        rng = np.random.default_rng(0)
        shares = rng.beta(self.correct + 0.5, self.stays - self.correct + 0.5, _DRAWS)
        low, high = np.quantile(rng.binomial(stays, shares) / stays, _QUANTILES)
        return float(low), float(high)


class Calibration(NamedTuple):
    """A fitted calibration.

    Attributes:
        method: one of METHODS.
        maps: by role, and NOTHING_MORE: `slope` and `intercept` on the scale of log odds (Platt), or points `x` and `y`
            (isotonic), with the numbers of `codes` and of `correct` ones. A role that is missing is not calibrated.
        main_diagnoses: probability of the DP of each validation stay, and whether it is right; 0 without a DP.
        conditions: CONDITIONS and ORIGIN of the answers.
    """

    method: str
    maps: Mapping[str, Mapping[str, Any]]
    main_diagnoses: Sequence[tuple[float, bool]]
    conditions: Mapping[str, Any]

    def confidence(self, role: str, probability: float) -> float:
        """Return the calibrated probability of a code in a role, or of NOTHING_MORE."""
        found = self.maps.get(role)
        if found is None:
            return probability
        if "x" in found:
            return round(float(np.interp(probability, found["x"], found["y"])), 6)
        odds = found["slope"] * _log_odds(probability) + found["intercept"]
        return round(1 / (1 + math.exp(-min(max(odds, -_STEEPEST), _STEEPEST))), 6)

    def auto_rule(self, target: float) -> AutoRule:
        """Return the rule with which the share of right main diagnoses is expected to be `target`."""
        pairs = sorted(((self.confidence("DP", p), right) for p, right in self.main_diagnoses), reverse=True)
        confidences = np.array([confidence for confidence, _ in pairs])
        means = np.cumsum(confidences) / np.arange(1, len(pairs) + 1)
        is_last = np.append(confidences[1:] < confidences[:-1], True)  # of those with the same confidence
        enough = np.flatnonzero(is_last & (means >= target - _ROUNDING))
        if not len(enough):
            return AutoRule(target, None, 0, 0, len(pairs))
        stays = int(enough[-1]) + 1
        return AutoRule(target, pairs[stays - 1][0], sum(right for _, right in pairs[:stays]), stays, len(pairs))

    def to_json(self) -> str:
        """Return the content of a calibration file."""
        return json.dumps(self._asdict(), indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "Calibration":
        """Read a file that `to_json` gave.

        Raises:
            UserError: it is not one.
        """
        with file_errors():
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            found = cls(**json.loads(text))
            found._require_valid()
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            raise UserError(f"{path} is not a file that utils.calibrate_icd10 wrote.") from None
        return found

    def _require_valid(self) -> None:
        """Raise ValueError, or what a wrong type raises, if a confidence or a decision could not be computed."""
        for role in (*ROLES, NOTHING_MORE):
            values = [self.confidence(role, probability) for probability in (0.0, 0.5, 1.0)]
            if not 0 <= values[0] <= values[1] <= values[2] <= 1:
                raise ValueError
        if not all(0 <= chance <= 1 and isinstance(right, bool) for chance, right in self.main_diagnoses):
            raise ValueError
        points = [of_role.get("x", []) for of_role in self.maps.values()]
        if any(each != sorted(each) for each in points) or not isinstance(self.conditions, dict):
            raise ValueError


def observations(
    gold: Mapping[str, Prediction], predictions: Mapping[str, Prediction], which: Probability
) -> dict[str, list[tuple[float, bool]]]:
    """Return the probability of each code and whether gold has it in its role, by role; NOTHING_MORE is one of them.

    Args:
        gold: diagnoses by stay.
        predictions: predictions by stay; codes without one, and stays that a person edited, do not count.
        which: the probabilities to take.
    """
    found: dict[str, list[tuple[float, bool]]] = {}
    for stay, expected in gold.items():
        given = predictions.get(stay, Prediction([]))
        chances = {} if given.edited else given.chances(which)
        for item in given.diagnoses:
            if (chance := chances.get(item.code)) is not None:
                found.setdefault(item.role or "?", []).append((chance, gold_has(expected, item)))
        if (chance := chances.get(NOTHING_MORE)) is not None:
            complete = {item.code for item in expected.diagnoses} <= {item.code for item in given.diagnoses}
            found.setdefault(NOTHING_MORE, []).append((chance, complete))
    return found


def main_diagnoses(
    gold: Mapping[str, Prediction], predictions: Mapping[str, Prediction], which: Probability
) -> list[tuple[float, bool]]:
    """Return the probability of the DP of each stay of gold that has one, and whether it is right.

    A stay without a DP, with several or without a probability has 0 and counts as wrong.
    """
    found = []
    for stay, expected in gold.items():
        if not any(item.role == "DP" for item in expected.diagnoses):
            continue
        given = predictions.get(stay, Prediction([]))
        mains = [item for item in given.diagnoses if item.role == "DP"]
        chance = given.chances(which).get(mains[0].code) if len(mains) == 1 else None
        found.append((chance or 0.0, chance is not None and gold_has(expected, mains[0])))
    return found


def fit(pairs: Sequence[tuple[float, bool]], method: str) -> dict[str, Any]:
    """Return the map of one role: see `Calibration.maps`.

    Args:
        pairs: probability and whether it is right, at least one.
        method: one of METHODS.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.isotonic import IsotonicRegression
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("Calibrating needs the extra `calibration`: pip install -e '.[calibration]'.") from error
    right = np.array([correct for _, correct in pairs], dtype=float)
    counts = {"codes": len(pairs), "correct": int(right.sum())}
    if method == "isotonic":
        curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit([p for p, _ in pairs], right)
        return {"x": curve.X_thresholds_.tolist(), "y": curve.y_thresholds_.tolist()} | counts
    # Platt (1999): targets a little inside 0 and 1, so that no probability becomes certain.
    targets = np.where(right > 0, (right.sum() + 1) / (right.sum() + 2), 1 / (len(pairs) - right.sum() + 2))
    odds = np.array([_log_odds(p) for p, _ in pairs])[:, None]
    model = LogisticRegression(C=1e6)
    both = np.repeat([1, 0], len(pairs))
    model.fit(np.concatenate([odds, odds]), both, sample_weight=np.concatenate([targets, 1 - targets]))
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < 0:  # the probabilities say nothing: the share of right codes for all of them
        slope, intercept = 0.0, _log_odds(float(targets.mean()))
    return {"slope": slope, "intercept": intercept} | counts


def fit_roles(pairs: Mapping[str, Sequence[tuple[float, bool]]], method: str) -> dict[str, dict[str, Any]]:
    """Return the map of each role that has enough codes."""
    return {role: fit(of_role, method) for role, of_role in pairs.items() if len(of_role) >= FEWEST}


def _log_odds(probability: float) -> float:
    inside = min(max(probability, _NEAREST), 1 - _NEAREST)
    return math.log(inside / (1 - inside))
