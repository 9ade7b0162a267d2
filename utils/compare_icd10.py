"""Compare evaluations of the same gold stays: `python -m utils.compare_icd10 "base=A.json" "tuned=B.json"`.

The files are written by `utils.evaluate_icd10 --json`. The first one is the baseline: each score of another one comes
with its difference from the baseline, the 95 % interval of the difference (paired bootstrap) and the p-value of no
difference (approximate randomization), by patient if the evaluations know the patients, otherwise by stay.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.cli import run_cli
from model.errors import UserError
from model.wording import counted
from utils.icd10.headline import HEADLINE, Comparison, Ratio, paired_comparison
from utils.tables.jsonl import file_errors


class Evaluation(NamedTuple):
    """The scores of one evaluation, stay by stay.

    `gold` identifies the gold stays and codes, `patient` numbers the patient of each stay, [N], or is None.
    """

    path: Path
    gold: str
    patient: np.ndarray | None
    ratios: dict[str, Ratio]

    @property
    def stays(self) -> int:
        return len(self.ratios["micro_f1"].numerator)


def read_evaluation(path: Path) -> Evaluation:
    """Read the JSON file of an evaluation.

    Raises:
        UserError: the file cannot be read, or contains no scores by stay.
    """
    with file_errors():
        text = path.read_text(encoding="utf-8")
    try:
        per_stay: dict[str, Any] = json.loads(text)["per_stay"]
        ratios = {name: Ratio(*map(np.array, per_stay["scores"][name])) for name in HEADLINE}
        patient = None if per_stay["patient"] is None else np.array(per_stay["patient"])
        return Evaluation(path, per_stay["gold_sha256"], patient, ratios)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} contains no scores by stay; expected a file written by utils.evaluate_icd10 --json (files of "
            "version 0.1.0 have none: evaluate again)."
        ) from error


def require_same_gold(evaluations: dict[str, Evaluation]) -> None:
    """Raise UserError unless all evaluations are of the same gold stays and codes."""
    baseline, *others = evaluations.values()
    for other in others:
        if other.gold != baseline.gold:
            counts = " and ".join(
                f"{each.path} is of {counted(each.stays, 'stay')} ({int(codes.sum()):,} gold and predicted codes)"
                for each in (baseline, other)
                for codes in [each.ratios["micro_f1"].denominator]
            )
            raise UserError(
                f"{counts}, but not of the same gold codes: their scores cannot be compared. Evaluate both predictions "
                "with the same --gold."
            )


def score_table(evaluations: dict[str, Evaluation]) -> str:
    """Return a table with one line per score and one column per evaluation."""
    rows: list[tuple[str, ...]] = [("", *evaluations)]
    for name, title in HEADLINE.items():
        scores = [evaluation.ratios[name].score for evaluation in evaluations.values()]
        rows.append((title, *("-" if score is None else f"{score:.3f}" for score in scores)))
    return _aligned(rows)


def difference_table(baseline: str, name: str, evaluations: dict[str, Evaluation]) -> str:
    """Return a table of the differences between one evaluation and the baseline."""
    first, second = evaluations[baseline], evaluations[name]
    patient = first.patient if second.patient is None else second.patient
    unit = "by stay: the patients are not known" if patient is None else f"by patient ({patient.max() + 1:,})"
    rows: list[tuple[str, ...]] = [(f"{name} - {baseline}", "difference", "95 % interval", "p")]
    for key, title in HEADLINE.items():
        found = paired_comparison(first.ratios[key], second.ratios[key], patient)
        rows.append((title, *(("-", "", "") if found is None else _cells(found))))
    return f"{_aligned(rows)}\n{counted(second.stays, 'stay')}, paired {unit}"


def _cells(found: Comparison) -> tuple[str, str, str]:
    low, high = found.interval
    p_value = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    return f"{found.difference:+.3f}", f"[{low:+.3f}, {high:+.3f}]", p_value


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", metavar="NAME=FILE", help="name of the evaluation, and its JSON file")
    evaluations: dict[str, Evaluation] = {}
    for text in parser.parse_args().scores:
        name, _, file = text.partition("=")
        if not (name and file) or name in evaluations:
            raise UserError(f"{text}: expected NAME=FILE, each name once.")
        evaluations[name] = read_evaluation(Path(file))
    require_same_gold(evaluations)
    print(score_table(evaluations))
    baseline, *others = evaluations
    for name in others:
        print(f"\n{difference_table(baseline, name, evaluations)}")


if __name__ == "__main__":
    run_cli(main)
