"""Scores of `make demo` over seeds of the weights, of the base model's notes, and of the order of the training data.

`python -m benchmarks.demo [--seeds 3]` runs the Makefile's commands once per seed, each time in an empty folder, and
appends the scores and the seconds to results/demo.jsonl; `--show` prints the tables again. The notes to train on and
those to score on are the same for all seeds. The same seed gives other scores on another processor, which rounds
differently.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ROOT, last_record, measure, print_table
from benchmarks.small_runs import Case, experiment_parser
from finetune.cli import run_cli

_NOTES = {"tuned": "held-out notes", "unseen": "wordings that fine-tuning never used"}
_SCORES = {
    "f1": "role-aware micro-F1",
    "precision": "precision",
    "recall": "recall",
    "role_blind_f1": "role-blind micro-F1",
    "dp_accuracy": "main diagnosis correct",
}


def prepare(folder: Path, seed: int) -> list[str]:
    """Copy the examples to an empty folder, with another seed; return the command to run there, `make demo`."""
    shutil.copytree(ROOT / "example", folder / "example")
    config = folder / "example/demo.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"^seed: \d+", f"seed: {seed}", text, flags=re.MULTILINE), encoding="utf-8")
    settings = [f"BIN={Path(sys.executable).parent}", f"DEMO_SEED={seed}"]
    return ["make", "-f", str(ROOT / "Makefile"), "-o", "setup", "demo", *settings]


def run_demo(case: Case, folder: Path) -> dict[str, float]:
    """Run the demo with a seed in an empty folder, without the installation; return its scores and wall time."""
    command = prepare(folder, case["seed"])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    scores = {"seconds": time.monotonic() - start}
    for name in _NOTES:
        found = json.loads((folder / f"demo/{name}.json").read_text(encoding="utf-8"))
        scores |= {f"{name}_{score}": value for score, value in found["exact"]["role_aware"]["micro"].items()}
        scores[f"{name}_role_blind_f1"] = found["exact"]["micro"]["f1"]
        scores[f"{name}_dp_accuracy"] = found["headline"]["dp_accuracy"]["score"]
    return scores


def summarize(record: Case) -> None:
    """Print mean and range of each score over the seeds of a record."""
    columns = {"": lambda row: row["score"]} | {title: lambda row, key=key: row[key] for key, title in _NOTES.items()}
    rows = []
    for score, title in _SCORES.items():
        rows.append({"score": title})
        for name in _NOTES:
            values = [result[f"{name}_{score}"][1] for result in record["results"]]
            rows[-1][name] = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    print_table(record | {"results": rows}, columns)
    print("\nSeconds:", ", ".join(f"{result['seconds'][1]:.0f}" for result in record["results"]))


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.set_defaults(seeds=3)
    options = parser.parse_args()

    def in_empty_folder(case: Case) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            return run_demo(case, Path(folder))

    cases = [{"seed": seed} for seed in range(options.seeds)]
    summarize(last_record("demo") if options.show else measure("demo", cases, 1, in_empty_folder))


if __name__ == "__main__":
    run_cli(main)
