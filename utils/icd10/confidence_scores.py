"""Scores of confidences: calibration, ranking, and how many stays need no reading at a given accuracy.

Shapes: N stays, B weightings of the stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from utils.icd10.calibration import AUTO, main_diagnoses, observations
from utils.icd10.headline import Ratio, headline_ratios, interval, scored
from utils.icd10.predictions import Prediction, Probability

BINS = 10  # of the reliability diagram and of the ECE, equally wide
RANKS = (1, 3, 5)  # k of precision at k
TARGETS = (0.9, 0.95, 0.98, 0.99)  # shares of right main diagnoses

_MOST_POINTS = 200  # of the coding curve
_CHUNK = 4_000_000  # elements of a [B, N] array in memory at once


def confidence_scores(
    gold: Mapping[str, Prediction], predictions: Mapping[str, Prediction], weights: np.ndarray
) -> dict[str, Any]:
    """Return what predictions with probabilities are worth; {} if no prediction has any.

    Args:
        gold: diagnoses by stay.
        predictions: predictions by stay.
        weights: bootstrap samples of the stays of gold, [B, N].

    Returns:
        `calibration` of each kind of probability, by role; and of the confidences, or of the probabilities where there
        are none, `precision_at`, `mean_average_precision` and `coding_curve`; `auto`, if stays were marked.
    """
    kinds = [kind for kind in get_args(Probability) if any(each.chances(kind) for each in predictions.values())]
    if not kinds:
        return {}
    if all(each.probability == each.confidence for each in predictions.values()):
        kinds = kinds[:1]  # not calibrated
    best = kinds[-1]
    ranked = [_ranked(expected, predictions.get(stay), best) for stay, expected in gold.items()]
    found: dict[str, Any] = {
        "calibration": {
            kind: {role: calibration(pairs) for role, pairs in observations(gold, predictions, kind).items()}
            for kind in kinds
        },
        "precision_at": {
            str(rank): scored(_precision_at(rank, [right for right, _ in ranked]), weights) for rank in RANKS
        },
        "mean_average_precision": _mean_average_precision(ranked, weights),
    }
    main = [any(item.role == "DP" for item in stay.diagnoses) for stay in gold.values()]
    if any(main):
        found["coding_curve"] = coding_curve(main_diagnoses(gold, predictions, best), weights[:, main])
    if any(each.decision for each in predictions.values()):
        found["auto"] = _auto(gold, predictions, weights)
    return found


def calibration(pairs: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Return how far probabilities are from the shares of right codes.

    Args:
        pairs: probability and whether it is right, at least one.

    Returns:
        `codes`; `mean` probability; share of `correct` ones; `ece`, the expected calibration error: the mean over codes
        of the difference between the two in the code's bin; `brier`, the mean squared error; and `bins`: codes, mean
        probability and share of correct ones of each bin that has codes.
    """
    chance, right = (np.array(column, dtype=float) for column in zip(*pairs))
    place = np.minimum((chance * BINS).astype(int), BINS - 1)
    counts, chances, rights = (np.bincount(place, values, BINS) for values in (np.ones(len(pairs)), chance, right))
    used = counts > 0
    means = np.array([chances[used] / counts[used], rights[used] / counts[used]])
    return {
        "codes": len(pairs),
        "mean": float(chance.mean()),
        "correct": float(right.mean()),
        "ece": float(np.abs(means[0] - means[1]) @ counts[used] / len(pairs)),
        "brier": float(((chance - right) ** 2).mean()),
        "bins": [[int(count), float(mean), float(share)] for count, mean, share in zip(counts[used], *means)],
    }


def _ranked(gold: Prediction, given: Prediction | None, which: Probability) -> tuple[list[bool], int]:
    """Return whether each predicted code is in gold, the surest code first, and the number of gold codes; no roles."""
    expected = {item.code for item in gold.diagnoses}
    chances = given.chances(which) if given else {}
    codes = dict.fromkeys(item.code for item in given.diagnoses) if given else {}
    ordered = sorted(codes, key=lambda code: -chances.get(code, 0.0))
    return [code in expected for code in ordered], len(expected)


def _precision_at(rank: int, ranked: Sequence[list[bool]]) -> Ratio:
    """Return precision among the first `rank` codes of each stay, or all of them where there are fewer."""
    return Ratio(
        np.array([sum(right[:rank]) for right in ranked], dtype=np.int64),
        np.array([len(right[:rank]) for right in ranked], dtype=np.int64),
    )


def _mean_average_precision(ranked: Sequence[tuple[list[bool], int]], weights: np.ndarray) -> dict[str, Any]:
    """Return the mean over the stays of the mean precision at the ranks of gold codes; a code not predicted has 0."""
    values = np.array([
        sum(sum(right[:rank]) / rank for rank, hit in enumerate(right, start=1) if hit) / max(1, expected)
        for right, expected in ranked
    ])  # fmt: skip
    score = float(values.mean())
    return {"score": score, "interval": interval(weights @ values / weights.sum(1), score)}


def coding_curve(main: Sequence[tuple[float, bool]], weights: np.ndarray) -> dict[str, Any]:
    """Return how many stays need no reading if those are read whose main diagnosis is least sure.

    Args:
        main: probability of the DP of each stay and whether it is right, [N].
        weights: bootstrap samples of these stays, [B, N].

    Returns:
        `points`: share of the stays that are not read, and of right main diagnoses among them; `targets`: for each of
        TARGETS the largest such share with its interval, and from which probability.
    """
    chance, right = (np.array(column, dtype=float) for column in zip(*main))
    order = np.argsort(-chance, kind="stable")
    chance, right = chance[order], right[order]
    usable = np.append(chance[1:] < chance[:-1], True)  # the last stay of those with the same probability

    def curve(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return share and accuracy at each probability, for weightings of the stays."""
        drawn = drawn[:, order].astype(float)
        unread, correct = (part.cumsum(axis=1)[:, usable] for part in (drawn, drawn * right))
        accuracy = np.divide(correct, unread, out=np.zeros_like(correct), where=unread > 0)
        return unread / np.maximum(unread[:, -1:], 1), accuracy

    share, accuracy = (rows[0] for rows in curve(np.ones((1, len(main)))))
    rows = max(1, _CHUNK // len(main))
    reached: list[np.ndarray] = []  # the share at each target, [.., targets]
    for start in range(0, len(weights), rows):
        shares, accuracies = curve(weights[start : start + rows])
        reached.append(np.stack([np.where(accuracies >= target, shares, 0).max(axis=1) for target in TARGETS], axis=1))
    targets = {}
    for target, values in zip(TARGETS, np.concatenate(reached).T):
        enough = np.flatnonzero(accuracy >= target)
        score = float(share[enough[-1]]) if len(enough) else 0.0
        lowest = float(chance[usable][enough[-1]]) if len(enough) else None
        targets[str(target)] = {"score": score, "interval": interval(values, score), "from": lowest}
    shown = np.unique(np.linspace(0, len(share) - 1, _MOST_POINTS).round().astype(int))
    points = [[round(float(x), 4), round(float(y), 4)] for x, y in zip(share[shown], accuracy[shown])]
    return {"points": points, "targets": targets}


def _auto(gold: Mapping[str, Prediction], predictions: Mapping[str, Prediction], weights: np.ndarray) -> dict[str, Any]:
    """Return the number of stays marked `auto`, their share, and the share of right main diagnoses among them."""
    marked = np.array([(found := predictions.get(stay)) is not None and found.decision == AUTO for stay in gold])
    given = [predictions.get(stay, Prediction([])).diagnoses for stay in gold]
    right = headline_ratios([stay.diagnoses for stay in gold.values()], given)["dp_accuracy"]
    return {
        "stays": int(marked.sum()),
        "share": scored(Ratio(marked.astype(np.int64), np.ones(len(marked), np.int64)), weights),
        "dp_accuracy": scored(Ratio(*(marked * part for part in right)), weights),
    }
