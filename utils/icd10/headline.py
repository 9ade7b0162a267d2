"""The headline of an evaluation: scores that are ratios of sums over stays, their intervals and paired tests.

Role-aware scores count a code in its role: a main diagnosis given as DAS is one missing and one wrong code. Role-blind
scores (`micro_f1`, `exact_match`) compare the sets of codes.

Shapes: N stays, B weightings of the stays, P patients.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from utils.icd10.answers import Diagnosis
from utils.icd10.codes import category

SAMPLES = 1000  # bootstrap samples
HEADLINE = {
    "dp_accuracy": "DP accuracy",
    "dp_category_accuracy": "DP accuracy, 3 characters",
    "role_micro_f1": "role-aware micro F1",
    "role_exact_match": "role-aware exact match",
    "dr_f1": "DR micro F1",
    "das_f1": "DAS micro F1",
    "micro_f1": "role-blind micro F1",
    "exact_match": "role-blind exact match",
}

_QUANTILES = (0.025, 0.975)
_CHUNK = 4_000_000  # elements of a [B, P] array in memory at once

Coding = Sequence[Diagnosis]


class Ratio(NamedTuple):
    """A score: the sum of `numerator` over the stays by the sum of `denominator`, both whole numbers, [N]."""

    numerator: np.ndarray
    denominator: np.ndarray

    def value(self, weights: np.ndarray) -> np.ndarray:
        """Return the score for each weighting of the stays [B, N]; NaN where the denominator is 0."""
        return _divide(weights @ self.numerator, weights @ self.denominator)

    @property
    def score(self) -> float | None:
        """The score with each stay counted once, or None if it is undefined."""
        whole = int(self.denominator.sum())
        return int(self.numerator.sum()) / whole if whole else None


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, and NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


class Comparison(NamedTuple):
    """The difference of two scores, its 95 % interval, and the two-sided p-value of no difference."""

    difference: float
    interval: list[float]
    p_value: float


def labels(
    coding: Coding, roles: Collection[str | None] | None = None, shorten: Callable[[str], str] = str
) -> set[str]:
    """Return the codes of a stay with their roles (`DP:I10`; `?` for none); with `roles`, only of these."""
    return {f"{item.role or '?'}:{shorten(item.code)}" for item in coding if roles is None or item.role in roles}


def headline_ratios(gold: Sequence[Coding], predicted: Sequence[Coding]) -> dict[str, Ratio]:
    """Return each score of HEADLINE as a ratio.

    The DP of a stay is right if the predicted DP are exactly those of gold; stays without DP in gold do not count. If
    gold names no role at all, role-aware scores are undefined.
    """
    pairs = list(zip(gold, predicted, strict=True))
    blind = _sets(pairs, lambda coding: {item.code for item in coding})
    ratios = {
        "dp_accuracy": _accuracy(_sets(pairs, lambda coding: labels(coding, ["DP"])), of_empty=False),
        "dp_category_accuracy": _accuracy(
            _sets(pairs, lambda coding: labels(coding, ["DP"], category)), of_empty=False
        ),
        "role_micro_f1": _f1(_sets(pairs, labels)),
        "role_exact_match": _accuracy(_sets(pairs, labels)),
        "dr_f1": _f1(_sets(pairs, lambda coding: labels(coding, ["DR"]))),
        "das_f1": _f1(_sets(pairs, lambda coding: labels(coding, ["DAS"]))),
    }
    if not any(item.role for coding in gold for item in coding):
        nothing = np.zeros(len(pairs), dtype=np.int64)
        ratios = dict.fromkeys(ratios, Ratio(nothing, nothing))
    return ratios | {"micro_f1": _f1(blind), "exact_match": _accuracy(blind)}


def _sets(pairs: Sequence[tuple[Coding, Coding]], select: Callable[[Coding], set[str]]) -> list[tuple[set[str], ...]]:
    return [(select(expected), select(given)) for expected, given in pairs]


def _accuracy(sets: Sequence[tuple[set[str], ...]], of_empty: bool = True) -> Ratio:
    counted = np.array([of_empty or bool(expected) for expected, _ in sets], dtype=np.int64)
    return Ratio(counted * np.array([expected == given for expected, given in sets], dtype=np.int64), counted)


def _f1(sets: Sequence[tuple[set[str], ...]]) -> Ratio:
    common = np.array([2 * len(expected & given) for expected, given in sets], dtype=np.int64)
    return Ratio(common, np.array([len(expected) + len(given) for expected, given in sets], dtype=np.int64))


def headline(gold: Sequence[Coding], predicted: Sequence[Coding], weights: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return `{"score", "interval"}` of each score of HEADLINE; both are None where the score is undefined.

    Args:
        gold: diagnoses of each stay.
        predicted: diagnoses of each stay, in the same order.
        weights: bootstrap samples of `resample`, [B, N].
    """
    return {name: scored(ratio, weights) for name, ratio in headline_ratios(gold, predicted).items()}


def scored(ratio: Ratio, weights: np.ndarray) -> dict[str, Any]:
    """Return `{"score", "interval"}`, the interval from the bootstrap samples [B, N]; both are None if undefined."""
    score = ratio.score
    return {"score": score, "interval": None if score is None else interval(ratio.value(weights), score)}


def patient_index(patients: Sequence[str | None]) -> np.ndarray:
    """Return a number for the patient of each stay, [N]; a stay without a patient counts as a patient of its own."""
    numbers: dict[Any, int] = {}
    keys = ((patient,) if patient else stay for stay, patient in enumerate(patients))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def resample(stays: int, samples: int = SAMPLES, seed: int = 0, patient: np.ndarray | None = None) -> np.ndarray:
    """Return how often each stay is drawn in each bootstrap sample, [samples, stays].

    A sample draws as many patients as there are, each with all of its stays.

    Args:
        stays: number of stays, N.
        samples: number of samples.
        seed: of the random numbers.
        patient: number of the patient of each stay, [N]; None draws stays.
    """
    patient = np.arange(stays) if patient is None else patient
    patients = int(patient.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(patients, size=patients) for _ in range(samples))
    # float32 counts exactly up to 2**24 codes.
    return np.stack([np.bincount(numbers, minlength=patients)[patient].astype(np.float32) for numbers in drawn])


def interval(values: np.ndarray, score: float, low: float = 0.0) -> list[float]:
    """Return the 95 % interval of the bootstrap values, shifted so that their mean is the score on all notes.

    A bootstrap sample misses some notes and therefore some rare codes, which are then left out of the mean over codes:
    sampled macro scores are biased. The shift removes the bias; it hardly changes micro scores. Bounds are clipped to
    [low, 1]; undefined (NaN) values do not count.
    """
    values = values[np.isfinite(values)]
    bounds = np.quantile(values, _QUANTILES) - values.mean() + score
    return [float(bound) for bound in np.clip(bounds, low, 1)]


def paired_comparison(
    first: Ratio, second: Ratio, patient: np.ndarray | None = None, samples: int = SAMPLES, seed: int = 0
) -> Comparison | None:
    """Return `second - first` of one score on the same stays; None if either is undefined.

    The p-value is of approximate randomization: predictions are exchanged between the two, all stays of a patient
    together. The interval is of a paired bootstrap over patients.

    Args:
        first: the score of one evaluation.
        second: the same score of another evaluation, with the stays in the same order.
        patient: number of the patient of each stay, [N]; None treats stays as independent.
        samples: number of random exchanges, and of bootstrap samples.
        seed: of the random numbers.
    """
    if first.score is None or second.score is None:
        return None
    patient = np.arange(len(first.numerator)) if patient is None else patient
    first, second = (Ratio(*(np.bincount(patient, part).astype(float) for part in ratio)) for ratio in (first, second))
    patients = len(first.numerator)
    once = np.ones((1, patients))
    difference = float((second.value(once) - first.value(once))[0])
    rng = np.random.default_rng(seed)
    exchanged, drawn = [], []
    rows = max(1, _CHUNK // patients)
    for count in (min(rows, samples - start) for start in range(0, samples, rows)):
        swap = rng.integers(2, size=(count, patients)).astype(float)
        one, other = (_exchange(*sides, swap) for sides in ((first, second), (second, first)))
        exchanged.append(other - one)
        weights = resample(patients, count, int(rng.integers(2**31)))
        drawn.append(second.value(weights) - first.value(weights))
    as_large = np.abs(np.concatenate(exchanged)) >= abs(difference) - 1e-12
    bounds = interval(np.concatenate(drawn), difference, low=-1.0)
    return Comparison(difference, bounds, float((1 + as_large.sum()) / (1 + samples)))


def _exchange(score: Ratio, other: Ratio, swap: np.ndarray) -> np.ndarray:
    """Return the score with the patients of `swap` [B, P] taken from the other one, [B]."""
    numerator, denominator = (own.sum() + swap @ (others - own) for own, others in zip(score, other))
    return _divide(numerator, denominator)
