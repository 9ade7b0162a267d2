"""Scores of answers as they are written, for a look during training; `utils.evaluate_icd10` says much more."""

from collections.abc import Sequence

from utils.icd10.answers import parse_answer
from utils.icd10.metrics import Pairs, exact_matches, score


def answer_scores(gold: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Micro F1 over codes, and the share of notes whose set of codes is exactly right."""
    pairs = Pairs.of(*([[code for _, code, _ in parse_answer(text)] for text in texts] for texts in (gold, answers)))
    return {
        "micro_f1": float(score(pairs)["micro"]["f1"][0]),
        "exact_match": float(exact_matches(pairs).mean()),
    }
