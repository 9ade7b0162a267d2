"""Score predicted codes against gold codes.

`python -m utils.evaluate_icd10 --gold G.jsonl (--predictions P.jsonl | --run RUN_DIR) --json OUT.json`

Options: `--cim10 TABLE` counts invalid and forbidden codes, `--train TRAIN.jsonl` groups the scores by frequency in the
training data, `--html F` writes a page with charts, `--csv F` a line per note.

Gold rows are instruct rows: `id`, and `messages` whose last one, the assistant's, contains the codes. Prediction rows
are `{"id", "answer"}` or `{"id", "codes"}`, with codes as `"I10"` or `{"role": "DAS", "code": "I10"}`. Rows without id
are identified by their line number, from 1; predictions may count from 0. A missing prediction counts as no codes.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from finetune.cli import run_cli
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import Cim10Table, category
from utils.icd10.metrics import evaluate_codings, rule_rates
from utils.icd10.predictions import Prediction, describe_origin, read_gold, read_predictions
from utils.reports.evaluation_page import LEVEL_NAMES, html_page, score_rows, warnings
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import require_own_names, save
from utils.tables.rows_by_id import match_ids

MAX_ERRORS = 15  # codes listed among the most often missed and added


def evaluate(
    gold: Mapping[str, Sequence[Diagnosis]],
    predictions: Mapping[str, Prediction],
    table: Cim10Table | None = None,
    training: Sequence[Sequence[Diagnosis]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return `exact` and `category` of `evaluate_codings`, `rates` of `rule_rates`, `counts` and `errors`.

    Args:
        gold: diagnoses by note id.
        predictions: predictions by note id; a missing one counts as no codes, an unknown id is ignored.
        table: needed for `rates` (empty without it) and the labels of `errors`.
        training: diagnoses of the training notes, for the frequency bands; None for the frequencies in gold.
        seed: seed of the bootstrap.
    """
    given = [predictions.get(note_id, Prediction([])) for note_id in gold]
    codings = [prediction.diagnoses for prediction in given]
    missing = [note_id for note_id in gold if note_id not in predictions]
    return {
        "counts": {
            "notes": len(gold),
            "training_notes": None if training is None else len(training),
            "missing_predictions": len(missing),
            "answers_without_code": sum(not coding for coding in codings) - len(missing),
            "codes_without_role": sum(item.role is None for coding in codings for item in coding),
            "repeated_codes": sum(prediction.repeated for prediction in given),
            "unexpected_predictions": sum(note_id not in gold for note_id in predictions),
            "missing_ids": missing,
            "unexpected_ids": [note_id for note_id in predictions if note_id not in gold],
        },
        **evaluate_codings(list(gold.values()), codings, training, seed=seed),
        "rates": rule_rates(codings, table) if table else {},
        "errors": _most_frequent_errors(list(gold.values()), codings, table),
    }


def _most_frequent_errors(
    gold: Sequence[Sequence[Diagnosis]], predicted: Sequence[Sequence[Diagnosis]], table: Cim10Table | None
) -> dict[str, list[dict[str, Any]]]:
    counts: dict[str, Counter[str]] = {"missed": Counter(), "added": Counter()}
    for expected, given in zip(gold, predicted, strict=True):
        missed, added = _differences(expected, given)
        counts["missed"].update(missed)
        counts["added"].update(added)
    return {
        kind: [
            {"code": code, "label": (table and table.label(code)) or "", "notes": notes}
            for code, notes in found.most_common(MAX_ERRORS)
        ]
        for kind, found in counts.items()
    }


def _differences(gold: Sequence[Diagnosis], predicted: Sequence[Diagnosis]) -> tuple[list[str], list[str]]:
    """Return the missed codes (in gold only) and the added codes (predicted only), in their order."""
    expected, given = (dict.fromkeys(item.code for item in items) for items in (gold, predicted))
    return [code for code in expected if code not in given], [code for code in given if code not in expected]


def note_rows(
    gold: Mapping[str, Sequence[Diagnosis]], predictions: Mapping[str, Prediction]
) -> Iterator[dict[str, Any]]:
    """Yield the codes and scores of each gold note, without its text."""
    for note_id, expected in gold.items():
        given = predictions[note_id].diagnoses if note_id in predictions else []
        missed, added = _differences(expected, given)
        codes, found = {item.code for item in expected}, {item.code for item in given}
        precision, recall, f1 = _note_scores(codes, found)
        _, _, f1_category = _note_scores({category(code) for code in codes}, {category(code) for code in found})
        yield {
            "id": note_id,
            "gold": _with_roles(expected),
            "predicted": _with_roles(given),
            "missed": " ".join(missed),
            "added": " ".join(added),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1_category": f1_category,
            "exact_match": int(codes == found),
        }


def _with_roles(diagnoses: Sequence[Diagnosis]) -> str:
    return " ".join(f"{item.role or '?'}:{item.code}" for item in diagnoses)


def _note_scores(gold: set[str], predicted: set[str]) -> tuple[float, ...]:
    """Return precision, recall and F1 of a note; `gold` is not empty."""
    correct = len(gold & predicted)
    scores = correct / max(1, len(predicted)), correct / len(gold), 2 * correct / (len(gold) + len(predicted))
    return tuple(round(score, 4) for score in scores)


def summarize(result: Mapping[str, Any]) -> str:
    """Return a table of the main scores, and the warnings."""
    rows = [("95 % intervals in brackets", *LEVEL_NAMES.values()), *score_rows(result)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *warnings(result)])


def _csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = StringIO()
    first, *others = rows
    writer = CsvWriter(buffer, list(first))
    for row in (first, *others):
        writer.write(*row.values())
    return buffer.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", type=Path, required=True, metavar="FILE", help="instruct rows (jsonl)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", type=Path, metavar="FILE", help="answers or codes (jsonl)")
    source.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run; its latest checkpoint answers --gold first")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="write all scores to this file")
    parser.add_argument("--html", type=Path, metavar="F", help="write a page with charts")
    parser.add_argument("--csv", type=Path, metavar="F", help="write one line per note")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="ATIH's table; count invalid and forbidden codes")
    parser.add_argument("--train", type=Path, metavar="FILE", help="training rows (jsonl), to score by code frequency")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    outputs = (args.json, args.html, args.csv)
    require_own_names(outputs, (args.gold, args.predictions, args.cim10, args.train))
    if args.run:
        from utils.models.predictor import predict_in_run_dir  # imports torch

        args.predictions = predict_in_run_dir(args.run, args.gold)
        require_own_names(outputs, [args.predictions])
    table = Cim10Table.from_file(args.cim10) if args.cim10 else None
    training = list(read_gold(args.train).values()) if args.train else None
    gold = read_gold(args.gold)
    predictions = match_ids(gold, read_predictions(args.predictions))
    result = evaluate(gold, predictions, table, training, args.seed)
    contents = {args.json: json.dumps(result, ensure_ascii=False, indent=2) + "\n"}
    if args.html:
        about = {"Predictions": args.predictions.name, "Gold": args.gold.name, **describe_origin(args.predictions)}
        contents[args.html] = html_page(result, about | {"Evaluated": f"{datetime.now():%Y-%m-%d %H:%M}"})
    if args.csv:
        contents[args.csv] = _csv_text(note_rows(gold, predictions))
    save(contents)
    print(summarize(result))


if __name__ == "__main__":
    run_cli(main)
