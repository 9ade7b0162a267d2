"""Cost of saving: seconds per step of the demo's training without checkpoints and with one every 10 steps.

`python -m benchmarks.saving [--rounds 5]` measures and appends to results/saving.jsonl; `--show` prints the last table.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data import icd_file
from benchmarks.measure import last_record, measure, print_table, run_json, spread
from benchmarks.small_runs import train_demo
from finetune.monitoring.metrics_logger import read_metrics

STEPS, WARM_UP = 60, 10
CASES = [{"ckpt_freq": 0}, {"ckpt_freq": 10}]
COLUMNS = {
    "a checkpoint every": lambda result: f"{result['ckpt_freq']} steps" if result["ckpt_freq"] else "none",
    "seconds per step": lambda result: spread(result["seconds_per_step"], 1.0, 4),
    "checkpoint, MB": lambda result: spread(result["checkpoint_bytes"], 1e6, 1),
}


def time_steps(model: Path, ckpt_freq: int, folder: Path) -> dict[str, float]:
    """Train in this process with the demo's settings; time the steps after the warm-up, including the last save."""
    run_dir = train_demo(
        folder,
        data={"instruct_data": str(icd_file(20)), "packing": "best_fit"},
        model_id_or_path=str(model),
        max_steps=STEPS,
        ckpt_freq=ckpt_freq,
        no_ckpt=not ckpt_freq,
        no_eval=True,
        num_ckpt_keep=3,
    )
    end = datetime.datetime.now()
    start = datetime.datetime.fromisoformat(read_metrics(run_dir, "train")[WARM_UP - 1]["at"])
    files = (run_dir / "checkpoints").glob("last/**/*")
    return {
        "seconds_per_step": (end - start).total_seconds() / (STEPS - WARM_UP),
        "checkpoint_bytes": sum(path.stat().st_size for path in files if path.is_file()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    parser.add_argument("--model", type=Path, help="measure only this process, with this model")
    parser.add_argument("--ckpt_freq", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model:
            print(json.dumps(time_steps(options.model, options.ckpt_freq, Path(folder))))
            return
        record = last_record("saving") if options.show else compare(Path(folder) / "model", options.rounds)
    print_table(record, COLUMNS)
    without, every_ten = (result["seconds_per_step"][1] for result in record["results"])
    print(f"\nSaving costs {every_ten / without - 1:.1%} of a step (medians).")


def compare(model: Path, rounds: int) -> dict[str, Any]:
    """Run the cases alternately, each in a fresh process, on one random model of the demo's size."""
    from utils.models.demo_model import demo_model_args, make_demo_model

    make_demo_model(model, demo_model_args(128, 2), seed=0)
    command = (sys.executable, "-m", "benchmarks.saving", "--model", str(model), "--ckpt_freq")
    return measure("saving", CASES, rounds, lambda case: run_json(*command, str(case["ckpt_freq"])))


if __name__ == "__main__":
    main()
