"""Precision, recall, F1 and exact match of predicted codes against gold codes, with bootstrap intervals.

The codes of a note are a set: a repeated code counts once, whatever its roles. `micro` pools the codes of all notes.
`macro` is the mean over the codes in gold or predictions; the precision of a code that is never predicted is 0, and so
is the recall of a code that is never in gold (scikit-learn with zero_division=0).

Shapes: N notes, M (note, code) pairs, C codes, B weightings of the notes.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.icd10.answers import parse_answer
from utils.icd10.codes import ROLES, Cim10Table, category, chapter
from utils.icd10.headline import (
    SAMPLES,
    Coding,
    Ratio,
    headline_ratios,
    interval,
    labels,
    patient_index,
    resample,
    scored,
)
from utils.icd10.rule_kinds import Case
from utils.icd10.rules import RuleSet, guide_rules

DEPTHS: dict[str, Callable[[str], str]] = {
    "code": str,
    "4 characters": lambda code: code[:4],
    "category": category,
    "chapter": lambda code: chapter(code) or code,
}
LEVELS: dict[str, Callable[[str], str]] = {"exact": str, "category": category}

_BAND_ENDS = (0, 5, 20, 100)
FREQUENCY_BANDS = ("0", "1-5", "6-20", "21-100", "more than 100")
NO_CHAPTER = "none"
_CHUNK = 4_000_000  # elements of a [B, M] array in memory at once

Scores = dict[str, np.ndarray]  # precision, recall, f1: each [B]


@dataclass(frozen=True)
class Pairs:
    """The (note, code) pairs found in gold, in the predictions or in both, sorted by code.

    Attributes:
        codes: the C codes.
        notes: number of notes, N.
        note: index of the note of each pair, [M].
        code: index of the code of each pair, ascending, [M].
        gold: whether the pair is in gold, [M].
        predicted: whether the pair is in the predictions, [M].
    """

    codes: tuple[str, ...]
    notes: int
    note: np.ndarray
    code: np.ndarray
    gold: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, gold: Iterable[Collection[str]], predicted: Iterable[Collection[str]]) -> "Pairs":
        """Build the pairs from the codes of each note."""
        sets = [(set(expected), set(given)) for expected, given in zip(gold, predicted, strict=True)]
        codes = tuple(sorted(set().union(*(expected | given for expected, given in sets))))
        index_of = {code: index for index, code in enumerate(codes)}
        rows = sorted(
            (index_of[code], note, code in expected, code in given)
            for note, (expected, given) in enumerate(sets)
            for code in expected | given
        )
        code, note, is_gold, is_predicted = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        return cls(codes, len(sets), note, code, is_gold.astype(bool), is_predicted.astype(bool))

    def only(self, keep: Callable[[str], bool]) -> "Pairs":
        """Return the pairs of the codes for which `keep` is true; the number of notes stays the same."""
        kept = np.array([keep(code) for code in self.codes], dtype=bool)[self.code]
        columns = (column[kept] for column in (self.note, self.code, self.gold, self.predicted))
        return Pairs(self.codes, self.notes, *columns)


def score(pairs: Pairs, weights: np.ndarray | None = None) -> dict[str, Scores]:
    """Return micro and macro precision, recall and F1 for each weighting of the notes.

    Args:
        pairs: gold and predicted codes.
        weights: how often each note counts, [B, N]; None counts each note once.
    """
    weights = np.ones((1, pairs.notes), np.float32) if weights is None else weights
    rows = max(1, _CHUNK // max(1, len(pairs.note)))
    chunks = [_score(pairs, weights[start : start + rows]) for start in range(0, len(weights), rows)]
    return {
        mean: {name: np.concatenate([chunk[mean][name] for chunk in chunks]) for name in ("precision", "recall", "f1")}
        for mean in ("micro", "macro")
    }


def _score(pairs: Pairs, weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    drawn = weights[:, pairs.note]  # [B, M]
    starts = np.flatnonzero(np.diff(pairs.code, prepend=-1))
    correct, predicted, gold = (
        np.add.reduceat(drawn * present, starts, axis=1)  # [B, C]
        for present in (pairs.gold & pairs.predicted, pairs.predicted, pairs.gold)
    )
    present = (predicted + gold) > 0  # a bootstrap sample does not contain every code
    return {
        "micro": _rates(correct.sum(1), predicted.sum(1), gold.sum(1)),
        "macro": {
            name: _ratio(of_codes.sum(1), present.sum(1)) for name, of_codes in _rates(correct, predicted, gold).items()
        },
    }


def _rates(correct: np.ndarray, predicted: np.ndarray, gold: np.ndarray) -> Scores:
    return {
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, gold),
        "f1": _ratio(2 * correct, predicted + gold),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0, dtype=np.float64)


def exact_matches(pairs: Pairs) -> np.ndarray:
    """Return whether the predicted codes of each note equal its gold codes, [N]."""
    return np.bincount(pairs.note, pairs.gold != pairs.predicted, minlength=pairs.notes) == 0


def answer_scores(gold: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the scores of `headline.HEADLINE` that are defined, for use during training.

    Args:
        gold: reference answer of each note, as text.
        answers: generated answer of each note, as text.
    """
    codings = ([parse_answer(text) for text in texts] for texts in (gold, answers))
    scores = {name: ratio.score for name, ratio in headline_ratios(*codings).items()}
    return {name: score for name, score in scores.items() if score is not None}


def evaluate_codings(
    gold: Sequence[Coding],
    predicted: Sequence[Coding],
    training: Sequence[Coding] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    patients: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Score predictions by exact code (`exact`) and by 3-character category (`category`).

    Each of the two contains `micro` and `macro` ({precision, recall, f1}), `exact_match` (fraction of the notes),
    `intervals` (95 % bootstrap intervals [low, high] of the same scores) and the number of `gold`, `predicted` and
    `correct` codes, all of them without roles. They are repeated in `role_aware` (a code counts in its role), in
    `edin_2023` (predicted codes that gold lacks are left out), in `by_role`, and without `exact_match` in `by_chapter`
    and `by_frequency`.

    Args:
        gold: diagnoses of each note.
        predicted: diagnoses of each note, in the same order.
        training: diagnoses of the training notes, which define the frequency of a code: the number of notes that have
            it. None uses the gold notes.
        samples: number of bootstrap samples.
        seed: seed of the bootstrap.
        patients: patient of each note, over which the bootstrap draws; None draws notes.

    Raises:
        ValueError: there are no notes, or the number of predictions differs.
    """
    if not gold or len(gold) != len(predicted):
        raise ValueError(
            f"expected as many predictions as gold notes ({len(gold)}, at least 1), found {len(predicted)}"
        )
    weights = resample(len(gold), samples, seed, None if patients is None else patient_index(patients))
    return {
        level: _describe_level(shorten, gold, predicted, gold if training is None else training, weights)
        for level, shorten in LEVELS.items()
    }


def _describe_level(
    shorten: Callable[[str], str],
    gold: Sequence[Coding],
    predicted: Sequence[Coding],
    training: Sequence[Coding],
    weights: np.ndarray,
) -> dict[str, Any]:
    def code_sets(codings: Sequence[Coding], roles: Collection[str | None] | None = None) -> list[set[str]]:
        return [{shorten(item.code) for item in coding if roles is None or item.role in roles} for coding in codings]

    pairs = Pairs.of(code_sets(gold), code_sets(predicted))
    in_roles = Pairs.of(*([labels(coding, shorten=shorten) for coding in side] for side in (gold, predicted)))
    in_gold = {pairs.codes[code] for code in pairs.code[pairs.gold]}
    of_roles = {role: Pairs.of(code_sets(gold, [role]), code_sets(predicted, [role])) for role in ROLES}
    frequency = Counter(code for codes in code_sets(training) for code in codes)
    return {
        **_describe_notes(pairs, weights),
        "role_aware": _describe_notes(in_roles, weights),
        "edin_2023": _describe_notes(pairs.only(in_gold.__contains__), weights),
        "by_role": {role: _describe_notes(of_role, weights) for role, of_role in of_roles.items()},
        "by_chapter": _by_group(pairs, weights, {code: chapter(code) or NO_CHAPTER for code in pairs.codes}),
        "by_frequency": _by_group(
            pairs, weights, {code: _band(frequency[code]) for code in sorted(pairs.codes, key=frequency.__getitem__)}
        ),
    }


def _band(frequency: int) -> str:
    return FREQUENCY_BANDS[bisect_left(_BAND_ENDS, frequency)]


def _by_group(pairs: Pairs, weights: np.ndarray, group_of: dict[str, str]) -> dict[str, Any]:
    """Return the scores of each group of codes, in the order of `group_of`."""
    groups: dict[str, set[str]] = {}
    for code, group in group_of.items():
        groups.setdefault(group, set()).add(code)
    return {group: _describe(pairs.only(codes.__contains__), weights) for group, codes in groups.items()}


def _describe(pairs: Pairs, weights: np.ndarray) -> dict[str, Any]:
    scores = {mean: {name: float(value[0]) for name, value in of.items()} for mean, of in score(pairs).items()}
    return {
        **scores,
        "gold": int(pairs.gold.sum()),
        "predicted": int(pairs.predicted.sum()),
        "correct": int((pairs.gold & pairs.predicted).sum()),
        "intervals": {
            mean: {name: interval(values, scores[mean][name]) for name, values in of.items()}
            for mean, of in score(pairs, weights).items()
        },
    }


def _describe_notes(pairs: Pairs, weights: np.ndarray) -> dict[str, Any]:
    matches = exact_matches(pairs)
    described = _describe(pairs, weights)
    described["exact_match"] = float(matches.mean())
    described["intervals"]["exact_match"] = interval(weights @ matches / weights.sum(1), described["exact_match"])
    return described


def depth_aware(gold: Sequence[Coding], predicted: Sequence[Coding], weights: np.ndarray) -> dict[str, Any]:
    """Return precision, recall and F1 at each depth of DEPTHS and over `all` of them, as CoPHE (2021).

    A stay's codes are counted at each depth, not only named: of three codes of one category, two are wrong where gold
    has one.

    Args:
        gold: diagnoses of each stay.
        predicted: diagnoses of each stay, in the same order.
        weights: bootstrap samples of `resample`, [B, N].
    """
    sides = [[{item.code for item in coding} for coding in side] for side in (gold, predicted)]
    expected, given = (np.array([len(codes) for codes in side], dtype=np.int64) for side in sides)
    common = {}
    for depth, shorten in DEPTHS.items():
        counts = ([Counter(map(shorten, codes)) for codes in side] for side in sides)
        common[depth] = np.array([(one & other).total() for one, other in zip(*counts, strict=True)], dtype=np.int64)
    common["all"] = np.sum(list(common.values()), axis=0)
    described = {}
    for depth, found in common.items():
        layers = len(DEPTHS) if depth == "all" else 1
        described[depth] = {
            name: scored(Ratio(factor * found, layers * whole), weights)
            for name, factor, whole in (("precision", 1, given), ("recall", 1, expected), ("f1", 2, given + expected))
        }
    return described


def rule_rates(
    codings: Sequence[Coding],
    table: Cim10Table,
    facts: Sequence[Mapping[str, Any]] | None = None,
    rules: RuleSet | None = None,
) -> dict[str, dict[str, float]]:
    """Count codes that do not exist or are too general, and stays that break rules.

    Out of all codes: `unknown` (not in the table), `category` (a type-3 code with children), `closed` (a type-3 code
    without children). Out of the stays to which they apply: the rules, by name.

    Args:
        codings: diagnoses of each stay.
        table: CIM-10 table.
        facts: `sex`, `age` and `year` of discharge of each stay, where known; None if they are not.
        rules: of a file; None for those of the guide.

    Returns:
        {count, of, rate} for each rule; rate is 0 if `of` is 0.
    """
    rules = rules or guide_rules()
    codes = [code for coding in codings for code in {item.code for item in coding}]
    unusable = [code for code in codes if (entry := table.get(code)) and entry.type == 3]
    counts = {
        "unknown": [sum(code not in table for code in codes), len(codes)],
        "category": [sum(bool(table.children(code)) for code in unusable), len(codes)],
        "closed": [sum(not table.children(code) for code in unusable), len(codes)],
        **{name: [0, 0] for name in rules.rules},
    }
    for coding, known in zip(codings, facts or [{}] * len(codings)):
        for rule, broken in rules.in_year(known.get("year")).check(Case.build(coding, table, known)):
            counts[rule.name][0] += bool(broken)
            counts[rule.name][1] += 1
    return {name: {"count": count, "of": of, "rate": count / of if of else 0.0} for name, (count, of) in counts.items()}
