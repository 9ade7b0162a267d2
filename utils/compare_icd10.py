"""Compare the scores of several evaluations: `python -m utils.compare_icd10 "base=A.json" "tuned=B.json"`.

The files are written by `utils.evaluate_icd10 --json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from finetune.cli import run_cli
from model.errors import UserError
from utils.tables.jsonl import file_errors

_COLUMNS = ("micro-F1", "precision", "recall", "category F1", "exact match")


def read_scores(path: Path) -> list[float]:
    """Return the scores of `_COLUMNS` from the JSON file of an evaluation.

    Raises:
        UserError: the file cannot be read, or contains no scores.
    """
    with file_errors():
        text = path.read_text(encoding="utf-8")
    try:
        result: dict[str, Any] = json.loads(text)
        exact, category = result["exact"], result["category"]
        micro = exact["micro"]
        return [micro["f1"], micro["precision"], micro["recall"], category["micro"]["f1"], exact["exact_match"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} contains no scores; expected a file written by utils.evaluate_icd10 --json."
        ) from error


def comparison(scores: dict[str, list[float]]) -> str:
    """Return a table with one line per evaluation."""
    width = max(map(len, scores))
    lines = ["  ".join([" " * width, *_COLUMNS])]
    for name, values in scores.items():
        cells = (f"{value:{len(column)}.3f}" for value, column in zip(values, _COLUMNS))
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", metavar="NAME=FILE", help="name of the evaluation, and its JSON file")
    named = [text.partition("=") for text in parser.parse_args().scores]
    for name, sign, file in named:
        if not (name and sign and file):
            raise UserError(f"{name}{sign}{file}: expected NAME=FILE.")
    print(comparison({name: read_scores(Path(file)) for name, _, file in named}))


if __name__ == "__main__":
    run_cli(main)
