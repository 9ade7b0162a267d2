"""Agreement of two coders of the same stays: Cohen's kappa by role, and scores with each of them as the reference."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.icd10.codes import ROLES
from utils.icd10.headline import Coding, headline, labels, patient_index, resample
from utils.icd10.metrics import Pairs, score


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa of two sequences of labels; None if both always use the same single label."""
    count = len(first)
    observed = sum(one == other for one, other in zip(first, second, strict=True)) / count
    counts = Counter(first), Counter(second)
    return _kappa(observed, sum(counts[0][label] * counts[1][label] for label in counts[0]) / count**2)


def _kappa(observed: float, expected: float) -> float | None:
    return None if expected == 1 else (observed - expected) / (1 - expected)


def _kappa_of_decisions(first: Sequence[set[str]], second: Sequence[set[str]]) -> float | None:
    """Return Cohen's kappa of the decisions, for each stay and each code that either coder uses, to give the code."""
    count = len(first) * len(set().union(*first, *second))
    if not count:
        return None
    given = sum(map(len, first)) / count, sum(map(len, second)) / count
    differing = sum(len(one ^ other) for one, other in zip(first, second, strict=True))
    return _kappa(1 - differing / count, given[0] * given[1] + (1 - given[0]) * (1 - given[1]))


def agreement(
    gold: Mapping[str, Coding], second: Mapping[str, Coding], patients: Sequence[str | None], seed: int = 0
) -> dict[str, Any]:
    """Compare gold with a second coder of the same stays.

    Args:
        gold: diagnoses by stay.
        second: diagnoses by stay of the second coder, at least of the stays of gold.
        patients: patient of each gold stay.
        seed: seed of the bootstrap.

    Returns:
        `notes`; `kappa` by role (DP and DR: one label per stay; DAS: a decision per stay and code);
        `headline` of the second coder's codes; `gold_as_reference` and `second_as_reference`: role-aware precision,
        recall, F1 (`micro_f1`) and macro F1 over the reference's codes, of all codes and by role.
    """
    codings = list(gold.values()), [second[stay] for stay in gold]
    by_role = {role: tuple([labels(coding, [role]) for coding in side] for side in codings) for role in ROLES}
    single = {
        role: kappa(*([" ".join(sorted(codes)) for codes in side] for side in by_role[role])) for role in ("DP", "DR")
    }
    sets = {"all": tuple([labels(coding) for coding in side] for side in codings)} | by_role
    return {
        "notes": len(gold),
        "kappa": {**single, "DAS": _kappa_of_decisions(*by_role["DAS"])},
        "headline": headline(*codings, resample(len(gold), seed=seed, patient=patient_index(patients))),
        "gold_as_reference": {name: _scores(*sides) for name, sides in sets.items()},
        "second_as_reference": {name: _scores(*sides[::-1]) for name, sides in sets.items()},
    }


def _scores(reference: Sequence[set[str]], given: Sequence[set[str]]) -> dict[str, float | None]:
    pairs = Pairs.of(reference, given)
    if not pairs.gold.any():
        return dict.fromkeys(("precision", "recall", "micro_f1", "macro_f1"))
    micro = score(pairs)["micro"]
    wanted = {pairs.codes[code] for code in np.unique(pairs.code[pairs.gold])}
    macro = score(pairs.only(wanted.__contains__))["macro"]
    return {
        "precision": float(micro["precision"][0]),
        "recall": float(micro["recall"][0]),
        "micro_f1": float(micro["f1"][0]),
        "macro_f1": float(macro["f1"][0]),
    }
