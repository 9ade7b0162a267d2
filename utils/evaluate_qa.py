"""Score answers to questions.

python -m utils.evaluate_qa --gold G.jsonl --predictions P.jsonl       answers that exist
python -m utils.evaluate_qa --gold G.jsonl --run RUN                   answers of a run
python -m utils.evaluate_qa --gold G.jsonl --run EXPORT --engine vllm --out P.jsonl
python -m utils.evaluate_qa --gold G.jsonl --engine server --server http://127.0.0.1:8000/v1 --out P.jsonl

Gold rows are instruct rows whose last message, the assistant's, is the reference. Prediction rows are
`{"id", "answer"}`; rows without id are identified by their line number. A missing prediction counts as an empty
answer. Otherwise the model answers the questions first, with any engine of `utils.predict_icd10`; after an
interruption, the same command continues. Answers are written to `--out`, by default in the run's folder `predictions`.

Two scores from qa-expert, each the mean over the rows, for short references (a name, a date, a span):

- `word_recall`: fraction of the reference's words that occur in the answer;
- `contains`: whether the answer contains the whole reference as a substring.

Texts are normalized first, as in qa-expert: lower case, punctuation removed ("l'eau" becomes "leau"), the words "a",
"an" and "the" removed, whitespace collapsed. Accents and digits are kept. `contains` compares characters: "120"
contains "12". Differences from qa-expert: punctuation includes Unicode's (« » ’), accents may be composed or
decomposed, and words are a set on both sides, so that a reference with a repeated word can reach a recall of 1.
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
from utils.engines.choice import add_engine_options, given_options, parse_engine
from utils.icd10.metrics import interval, resample
from utils.tables.jsonl import Row, SkippedRowError, require_own_names, save
from utils.tables.rows_by_id import last_answer, match_ids, read_by_id

SCORE_NAMES = {"word_recall": "word recall", "contains": "contains reference"}

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_text(text: str) -> str:
    """Return the text in lower case, without punctuation and English articles, words separated by one space."""
    lower = unicodedata.normalize("NFC", text).lower()
    kept = "".join(
        character
        for character in lower
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", kept).split())


def word_recall(reference: str, answer: str) -> float:
    """Return the fraction of the reference's words that occur in the answer; the reference must have a word."""
    words = set(normalize_text(reference).split())
    return len(words & set(normalize_text(answer).split())) / len(words)


def contains(reference: str, answer: str) -> bool:
    """Return whether the normalized answer contains the normalized reference."""
    return normalize_text(reference) in normalize_text(answer)


def evaluate(references: Mapping[str, str], answers: Mapping[str, str], seed: int = 0) -> dict[str, Any]:
    """Score answers by row id; a missing answer counts as empty, an unknown id is ignored.

    Returns:
        `word_recall`, `contains`, `intervals` (95 % bootstrap intervals of both, over the rows) and `counts`.
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
    """Return the reference of each instruct row by row id.

    Raises:
        UserError: a row does not end with an answer of at least one word, or an id appears twice.
    """
    return read_by_id(path, _reference)


def read_answers(path: Path) -> dict[str, str]:
    """Return the answer of each row by row id.

    Raises:
        UserError: a row has no answer, or an id appears twice.
    """
    return read_by_id(path, _answer)


def _reference(row: Row) -> str:
    reference = last_answer(row)
    if not normalize_text(reference):
        raise SkippedRowError("no words in the last message; expected the assistant's answer")
    return reference


def _answer(row: Row) -> str:
    if not isinstance(row.get("answer"), str):
        raise SkippedRowError("no `answer` string", f"keys: {', '.join(row)}")
    return row["answer"]


def summarize(result: Mapping[str, Any]) -> str:
    """Return the scores with their intervals, and the warnings."""
    counts = result["counts"]
    lines = [f"{'rows':20}  {counts['rows']:,} (95 % intervals in brackets)"]
    for key, name in SCORE_NAMES.items():
        low, high = result["intervals"][key]
        lines.append(f"{name:20}  {result[key]:.3f} [{low:.3f}, {high:.3f}]")
    if counts["missing_predictions"]:
        lines.append(f"rows without a prediction (scored as empty): {counts['missing_predictions']:,}")
    if counts["unexpected_predictions"]:
        lines.append(f"predictions without a gold row (ignored): {counts['unexpected_predictions']:,}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", type=Path, required=True, metavar="FILE", help="instruct rows (jsonl)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--predictions", type=Path, metavar="FILE", help="answers (jsonl)")
    source.add_argument("--run", type=Path, metavar="FOLDER", help="a run or a model; answers --gold first")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the scores to this file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the model's answers (jsonl; default: in the run)")
    add_engine_options(parser)
    options = parser.parse_args()
    if options.predictions and (given := [*given_options(options), *(["--out"] if options.out else [])]):
        parser.error(f"{given[0]} is for a model that answers --gold, and --predictions are its answers")
    if options.predictions is None and options.run is None and options.engine != "server":
        parser.error("give --predictions, or a model that answers --gold: --run, or --engine server")
    if options.engine != "local" and options.out is None:
        parser.error(f"--engine {options.engine} needs --out FILE for its answers")
    return options


def main() -> None:
    args = _arguments()
    require_own_names([args.json, args.out], [args.gold, args.predictions])
    references = read_references(args.gold)
    if args.predictions is None:
        choice = parse_engine(args, args.run)
        from utils.engines.answer_file import answers_to_gold  # imports mistral_common

        args.predictions = answers_to_gold(choice, args.gold, args.out)
        require_own_names([args.json], [args.predictions])
    result = evaluate(references, match_ids(references, read_answers(args.predictions)))
    if args.json:
        save({args.json: json.dumps(result, ensure_ascii=False, indent=2) + "\n"})
    print(summarize(result))


if __name__ == "__main__":
    run_cli(main)
