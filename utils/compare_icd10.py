"""Puts the scores of several evaluations side by side: `python -m utils.compare_icd10 "base=A.json" "tuned=B.json"`.

The files are what `utils.evaluate_icd10 --json` writes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from finetune.cli import run_cli
from model.errors import UserError
from utils.tables.jsonl import file_errors

_COLUMNS = ("micro-F1", "precision", "recall", "category F1", "exact notes")


def read_scores(path: Path) -> list[float]:
    """The figures of `_COLUMNS`, of an evaluation's JSON file.

    Raises:
        UserError: the file cannot be read or holds no scores.
    """
    with file_errors():
        text = path.read_text(encoding="utf-8")
    try:
        result: dict[str, Any] = json.loads(text)
        exact, category = result["exact"], result["category"]
        micro = exact["micro"]
        return [micro["f1"], micro["precision"], micro["recall"], category["micro"]["f1"], exact["exact_match"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no scores; expected what utils.evaluate_icd10 --json writes.") from error


def comparison(scores: dict[str, list[float]]) -> str:
    """A table with a line per name."""
    width = max(map(len, scores))
    lines = ["  ".join([" " * width, *_COLUMNS])]
    for name, figures in scores.items():
        cells = (f"{figure:{len(column)}.3f}" for figure, column in zip(figures, _COLUMNS))
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", metavar="NAME=FILE", help="what to call it, and the scores")
    named = [text.partition("=") for text in parser.parse_args().scores]
    for name, sign, file in named:
        if not (name and sign and file):
            raise UserError(f"{name}{sign}{file}: expected NAME=FILE.")
    print(comparison({name: read_scores(Path(file)) for name, _, file in named}))


if __name__ == "__main__":
    run_cli(main)
