"""Scores answers to questions: `python -m utils.evaluate_qa --gold G.jsonl (--predictions P.jsonl | --run RUN)`.

Gold rows are instruct rows, whose last message, the assistant's, is the reference. Prediction rows are
`{"id", "answer"}`; rows without id are named by their line. With `--run` the run's newest checkpoint answers first. A
row without a prediction counts as one with an empty answer.

Two scores, each the mean over the rows, for references that are short (a name, a date, a span), as qa-expert has them:

- `word_recall`: the share of the reference's words that stand in the answer;
- `contains`: whether the reference stands in the answer, as it is, as one piece.

Before both, texts are normalised as there: lower case, no punctuation (taken out, not replaced: "l'eau" is "leau"),
without the words "a", "an" and "the", any blanks as one. Accents and digits stay. `contains` compares characters, so
"12" stands in "120". Two things are wider: punctuation is Unicode's (also « » and ’) and accents may be composed
or not. One differs: words are a set on both sides, so that a reference that repeats a word can be recalled whole.
"""

import argparse
import json
import re
import string
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.cli import run_cli
from utils.icd10.metrics import interval, resample
from utils.tables.jsonl import Row, SkippedRowError, require_own_names, save
from utils.tables.named_rows import last_answer, match_names, read_named_rows

SCORE_NAMES = {"word_recall": "word recall", "contains": "contains the answer"}

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """The text in lower case, without punctuation and English articles, words one blank apart."""
    lower = unicodedata.normalize("NFC", text).lower()
    kept = "".join(
        character
        for character in lower
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", kept).split())


def word_recall(reference: str, answer: str) -> float:
    """The share of the reference's words that stand in the answer; the reference must have one."""
    words = set(normalised(reference).split())
    return len(words & set(normalised(answer).split())) / len(words)


def contains(reference: str, answer: str) -> bool:
    """Whether the normalised reference is a piece of the normalised answer."""
    return normalised(reference) in normalised(answer)


def evaluate(references: Mapping[str, str], answers: Mapping[str, str], seed: int = 0) -> dict[str, Any]:
    """Scores answers by the names of their references; a missing one counts as empty, one of another name is left out.

    Returns:
        `word_recall` and `contains`, `intervals` with 95 % bootstrap intervals of both over the rows, and `counts`.
    """
    pairs = [(reference, answers.get(name, "")) for name, reference in references.items()]
    scores = {
        "word_recall": np.array([word_recall(*pair) for pair in pairs]),
        "contains": np.array([contains(*pair) for pair in pairs], dtype=float),
    }  # each [N]
    means = {name: float(values.mean()) for name, values in scores.items()}
    weights = resample(len(pairs), seed=seed)  # [B, N]
    missing = [name for name in references if name not in answers]
    return {
        **means,
        "intervals": {name: interval(weights @ scores[name] / len(pairs), mean) for name, mean in means.items()},
        "counts": {
            "rows": len(references),
            "missing_predictions": len(missing),
            "unexpected_predictions": sum(name not in references for name in answers),
            "missing_ids": missing,
        },
    }


def read_references(path: Path) -> dict[str, str]:
    """The reference of each instruct row, by its name.

    Raises:
        UserError: a row that does not end with an answer of at least one word, or a name that stands twice.
    """
    return read_named_rows(path, _reference)


def read_answers(path: Path) -> dict[str, str]:
    """The answer of each row, by its name.

    Raises:
        UserError: a row without answer, or a name that stands twice.
    """
    return read_named_rows(path, _answer)


def _reference(row: Row) -> str:
    reference = last_answer(row)
    if not normalised(reference):
        raise SkippedRowError("no words in the last message; expected the assistant's answer")
    return reference


def _answer(row: Row) -> str:
    if not isinstance(row.get("answer"), str):
        raise SkippedRowError("no `answer` that is a text", f"keys: {', '.join(row)}")
    return row["answer"]


def summarise(result: Mapping[str, Any]) -> str:
    """The scores with their intervals, and what to beware of."""
    counts = result["counts"]
    lines = [f"{'rows':20}  {counts['rows']:,}"]
    for key, name in SCORE_NAMES.items():
        low, high = result["intervals"][key]
        lines.append(f"{name:20}  {result[key]:.3f} [{low:.3f}, {high:.3f}]")
    if counts["missing_predictions"]:
        lines.append(f"rows without a prediction, which count as empty: {counts['missing_predictions']:,}")
    if counts["unexpected_predictions"]:
        lines.append(f"predictions for no gold row, which were left out: {counts['unexpected_predictions']:,}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", type=Path, required=True, help="jsonl of instruct rows")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", type=Path, help="jsonl of answers")
    source.add_argument("--run", type=Path, metavar="RUN_DIR", help="a training run, whose model answers first")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file, too")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    references = read_references(args.gold)
    if args.run:
        from utils.predict_icd10 import answer_with_newest  # torch, which scores alone do not need

        args.predictions = answer_with_newest(args.run, args.gold)
    require_own_names([args.json] if args.json else [], [args.gold, args.predictions])
    result = evaluate(references, match_names(references, read_answers(args.predictions)), args.seed)
    if args.json:
        save({args.json: json.dumps(result, ensure_ascii=False, indent=2) + "\n"})
    print(summarise(result))


if __name__ == "__main__":
    run_cli(main)
