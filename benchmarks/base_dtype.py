"""Effect of a 4-bit or 8-bit base on the losses: the demo's training, 300 steps, with each `base_dtype`.

Run `make demo` first to create its model and notes. `python -m benchmarks.base_dtype` trains and appends to
results/base_dtype.jsonl; `--show` prints the last table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import last_record, measure, print_table, run_json, spread
from benchmarks.small_runs import eval_losses, train_demo
from finetune.cli import run_cli
from finetune.monitoring.metrics_logger import read_metrics
from model.args import BASE_DTYPES
from model.errors import UserError

MODEL = Path("demo/model")
COLUMNS = {
    "base_dtype": lambda result: result["base_dtype"],
    "eval loss, step 100": lambda result: spread(result["first_eval_loss"], 1.0, 4),
    "eval loss, step 300": lambda result: spread(result["last_eval_loss"], 1.0, 4),
    "mean train loss of the last 100 steps": lambda result: spread(result["train_loss"], 1.0, 4),
}


def learn(base_dtype: str, seed: int, folder: Path) -> dict[str, float]:
    """Train in this process with the demo's settings, and return its losses."""
    run_dir = train_demo(folder, base_dtype=base_dtype, seed=seed)
    losses = list(eval_losses(run_dir).values())
    train_losses = [line["loss"] for line in read_metrics(run_dir, "train")][-100:]
    return {
        "first_eval_loss": losses[0],
        "last_eval_loss": losses[-1],
        "train_loss": sum(train_losses) / len(train_losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    parser.add_argument(
        "--seeds", type=int, default=1, help="number of seeds, for the adapter and the order of the notes"
    )
    parser.add_argument("--alone", choices=BASE_DTYPES, help="train in this process, using --seeds as the seed")
    options = parser.parse_args()
    if not options.show and not MODEL.is_dir():
        raise UserError(f"{MODEL} does not exist: run `make demo` to create it.")
    if options.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(learn(options.alone, options.seeds, Path(folder))))
        return
    print_table(last_record("base_dtype") if options.show else compare(options.seeds), COLUMNS)


def compare(seeds: int) -> dict[str, Any]:
    """Train with every `base_dtype`, each in a fresh process; each round uses another seed."""
    command = (sys.executable, "-m", "benchmarks.base_dtype", "--alone")
    rounds = {base_dtype: iter(range(seeds)) for base_dtype in BASE_DTYPES}

    def run(case: dict[str, Any]) -> dict[str, Any]:
        return run_json(*command, case["base_dtype"], "--seeds", str(next(rounds[case["base_dtype"]])))

    return measure("base_dtype", [{"base_dtype": name} for name in BASE_DTYPES], seeds, run)


if __name__ == "__main__":
    run_cli(main)
