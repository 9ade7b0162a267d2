"""Confidence: calibration before and after, the coding curve, and whether `--auto` keeps what it states, on the demo.

`python -m benchmarks.confidence [--training_seeds 0 1 2] [--steps 300] [--stays 400] [--target 0.95]` trains the demo's
model once per seed, answers validation stays, calibrates on them, answers others with `--auto`, scores these, and
appends to results/confidence.jsonl; `--show` prints the table again. Stays are fictional, with names of diseases that
training has not seen; no set shares a stay with another.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ROOT, spread
from benchmarks.small_runs import Case, experiment_parser, notes_file, run_experiment, trained_demo
from finetune.cli import run_cli
from utils.icd10.predictions import read_origin

NOTES = 3000
COLUMNS = {
    "seed": lambda result: str(result["training_seed"]),
    "main diagnosis correct, %": lambda result: spread(result["dp_accuracy"], 0.01, 1),
    "ECE of the DP": lambda result: spread(result["ece_DP"], 1.0, 3),
    "calibrated": lambda result: spread(result["calibrated_ece_DP"], 1.0, 3),
    "ECE of the DAS": lambda result: spread(result["ece_DAS"], 1.0, 3),
    "calibrated ": lambda result: spread(result["calibrated_ece_DAS"], 1.0, 3),
    "stays unread at 95 %": lambda result: spread(result["unread_at_0.95"], 1.0, 3),
    "at 98 %": lambda result: spread(result["unread_at_0.98"], 1.0, 3),
    "share marked auto": lambda result: spread(result["auto_share"], 1.0, 3),
    "their DP accuracy": lambda result: spread(result["auto_accuracy"], 1.0, 3),
    "stated from": lambda result: spread(result["auto_low"], 1.0, 3),
    "to": lambda result: spread(result["auto_high"], 1.0, 3),
    "in the stated interval": lambda result: spread(result["auto_in_interval"], 1.0, 0),
}


def _command(*arguments: object) -> None:
    """Run a command of the project."""
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def measure_confidence(case: Case, folder: Path) -> dict[str, float]:
    """Train, calibrate and score with one seed."""
    stays, table = case["stays"], ROOT / "example/demo_cim10.tsv"
    seed = case["training_seed"]
    run = trained_demo(NOTES, case["steps"], seed)
    sets = {name: notes_file(stays, start + seed, case["wordings"]) for name, start in (("val", 10), ("test", 20))}
    answers = {name: folder / f"{name}.jsonl" for name in sets}
    predict = ["utils.predict_icd10", "--run", run, "--batch_size", 50, "--max_tokens", 200, "--cim10", table]
    _command(*predict, "--notes", sets["val"], "--out", answers["val"])
    fitted = folder / "calibration.json"
    _command("utils.calibrate_icd10", "--gold", sets["val"], "--predictions", answers["val"], "--out", fitted)
    marked = ["--out", answers["test"], "--calibration", fitted, "--auto", case["target"]]
    _command(*predict, "--notes", sets["test"], *marked)
    scores = folder / "scores.json"
    _command("utils.evaluate_icd10", "--gold", sets["test"], "--predictions", answers["test"], "--json", scores)
    return _numbers(json.loads(scores.read_text(encoding="utf-8")), read_origin(answers["test"])["auto"])


def _numbers(scores: Case, stated: Case) -> dict[str, float]:
    """Return what the table shows, from the scores and from what `--auto` stated."""
    found = scores["confidence"]
    low, high = stated["accuracy_interval"]
    accuracy = found["auto"]["dp_accuracy"]["score"]
    measured = {
        f"{prefix}ece_{role}": found["calibration"][kind][role]["ece"]
        for kind, prefix in (("probability", ""), ("confidence", "calibrated_"))
        for role in ("DP", "DR", "DAS", "nothing_more")
    }
    for target, each in found["coding_curve"]["targets"].items():
        measured[f"unread_at_{target}"] = each["score"]
    return {
        "dp_accuracy": scores["headline"]["dp_accuracy"]["score"],
        **measured,
        "mean_average_precision": found["mean_average_precision"]["score"],
        "auto_share": found["auto"]["share"]["score"],
        "auto_accuracy": accuracy,
        "auto_low": low,
        "auto_high": high,
        "auto_in_interval": float(low <= accuracy <= high),
    }


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--training_seeds", type=int, nargs="+", default=[0, 1, 2], help="also of the stays")
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--stays", type=int, default=400, help="validation stays, and test stays (default: %(default)s)"
    )
    parser.add_argument("--target", type=float, default=0.95, help="of --auto (default: %(default)s)")
    options = parser.parse_args()
    # With the names of diseases that training used, nearly every main diagnosis is right.
    size = {"steps": options.steps, "stays": options.stays, "target": options.target}
    cases = [size | {"training_seed": seed, "wordings": "unseen"} for seed in options.training_seeds]
    run_experiment("confidence", options, cases, measure_confidence, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
