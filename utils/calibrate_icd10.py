"""Calibrate the confidence of codes on validation stays.

`python -m utils.calibrate_icd10 --gold VAL.jsonl --predictions VAL_PREDICTIONS.jsonl`

The predictions are a jsonl file of `utils.predict_icd10`, for stays that training has not seen. For each role, and for
"nothing more to code", it fits the share of right codes to the model's probabilities, and stores the result with the
run: `utils.predict_icd10` applies it to later answers of the same checkpoint. `--out F` writes it elsewhere, for models
that are not in a run. The printed errors of calibration (ECE) are cross-validated.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.cli import run_cli
from finetune.next_commands import aligned
from model.errors import UserError
from utils.engines.marking import calibration_path
from utils.icd10.calibration import (
    CONDITIONS,
    FEWEST,
    METHODS,
    ORIGIN,
    Calibration,
    fit_roles,
    main_diagnoses,
    observations,
)
from utils.icd10.codes import ROLES
from utils.icd10.confidence_scores import TARGETS, calibration
from utils.icd10.predictions import NOTHING_MORE, read_gold, read_origin, read_predictions
from utils.tables.jsonl import require_own_names, save
from utils.tables.rows_by_id import match_ids

_FOLDS = 5

Pairs = Sequence[tuple[float, bool]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", type=Path, required=True, metavar="FILE", help="validation stays (jsonl, csv)")
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="their answers (jsonl)")
    parser.add_argument("--method", choices=METHODS, default="platt", help="isotonic: for thousands of codes per role")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: in the folder of the run")
    return parser.parse_args()


def cross_validated(pairs: Pairs, role: str, method: str) -> Pairs:
    """Return the pairs with the confidence that a calibration on the other folds gives them."""
    found: list[tuple[float, bool]] = []
    for fold in range(_FOLDS):
        others = [pair for index, pair in enumerate(pairs) if index % _FOLDS != fold]
        fitted = Calibration(method, fit_roles({role: others}, method), [], {})
        found += [(fitted.confidence(role, chance), right) for chance, right in pairs[fold::_FOLDS]]
    return found


def _summary(pairs: Mapping[str, Pairs], fitted: Calibration) -> list[str]:
    lines = {}
    for role in (role for role in (*ROLES, NOTHING_MORE) if role in pairs):
        before = calibration(pairs[role])
        if role in fitted.maps:
            after = f"{calibration(cross_validated(pairs[role], role, fitted.method))['ece']:.3f} after"
        else:
            after = "too few to calibrate"
        lines[role] = f"{before['codes']:,}, {before['correct']:.1%} right; ECE {before['ece']:.3f} before, {after}"
    for target in TARGETS if "DP" in fitted.maps else ():
        rule = fitted.auto_rule(target)
        share = f"{rule.stays / rule.validation:.0%} of the stays" if rule.validation else "no stays"
        lines[f"--auto {target}"] = f"{share}, {rule.correct:,} of {rule.stays:,} main diagnoses right"
    if "DP" not in fitted.maps:
        lines["--auto"] = f"not possible: needs {FEWEST} main diagnoses with a probability"
    return aligned(lines)


def main() -> None:
    options = _arguments()
    origin = read_origin(options.predictions)
    out = options.out or calibration_path(Path(str(origin.get("checkpoint", ""))))
    if out is None:
        raise UserError(f"{options.predictions} is not of a checkpoint of a run (by its .about.json): give --out FILE.")
    require_own_names([out], [options.gold, options.predictions])
    gold = read_gold(options.gold)
    predictions = match_ids(gold, read_predictions(options.predictions))
    gold = {stay: coding for stay, coding in gold.items() if stay in predictions}
    pairs = observations(gold, predictions, "probability")
    if not pairs:
        raise UserError(
            f"{options.predictions} has no probability of a code; expected a jsonl file that utils.predict_icd10 wrote "
            "with an engine that gives probabilities."
        )
    maps = fit_roles(pairs, options.method)
    conditions = {key: origin.get(key) for key in (*CONDITIONS, *ORIGIN)}
    fitted = Calibration(options.method, maps, main_diagnoses(gold, predictions, "probability"), conditions)
    save({out: fitted.to_json()})
    print(f"Calibrated on {len(gold):,} stays: {out}", *_summary(pairs, fitted), sep="\n")


if __name__ == "__main__":
    run_cli(main)
