"""Time from the start of a training command to its first optimizer step, with a checkpoint of 1.1 GB.

`python -m benchmarks.startup [--rounds 5] [--before CHECKOUT]` measures and appends to results/startup.jsonl; `--show`
prints the last table. With `--before`, another checkout is measured in turn with this one.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.measure import last_record, measure, peak_rss, print_table, run_json, spread

LENGTHS: dict[str, dict[str, Any]] = {"max_steps": {"max_steps": 300}, "epochs": {"epochs": 3}}
COLUMNS = {
    "data, MB": lambda result: str(result["megabytes"]),
    "length in": lambda result: result["length"],
    "version": lambda result: result["version"],
    "imports, s": lambda result: spread(result["import_seconds"]),
    "checks and data, s": lambda result: spread(result["resolve_seconds"]),
    "model, s": lambda result: spread(result["set_up_seconds"]),
    "all, s": lambda result: spread(result["seconds"]),
    "CPU s": lambda result: spread(result["cpu_seconds"]),
    "peak RSS, MB": lambda result: spread(result["peak_bytes"], 1e6, 0),
}


def run_until_first_step(config: str, began: float) -> None:
    """Run `train` in this process, and print its times instead of taking the first step.

    Args:
        config: path of a training YAML.
        began: `time.monotonic()` of the process that started this one, which all processes share on Linux.
    """
    clocks = [(began, 0.0)]

    def look() -> None:
        clocks.append((time.monotonic(), time.process_time()))

    train = importlib.import_module("train")
    look()
    set_up = train.set_up

    def set_up_later(*arguments: Any) -> Any:
        look()
        return set_up(*arguments)

    def report(*_: Any) -> NoReturn:
        look()
        stages = ("import", "resolve", "set_up")
        times = {f"{name}_seconds": end[0] - start[0] for name, (start, end) in zip(stages, itertools.pairwise(clocks))}
        all_of_it = {"seconds": clocks[-1][0] - began, "cpu_seconds": clocks[-1][1], "peak_bytes": peak_rss()}
        print(json.dumps(times | all_of_it), flush=True)
        os._exit(0)

    train.set_up, train.train_step = set_up_later, report
    train.train(config)


def write_config(folder: Path, length: str, megabytes: int) -> Path:
    """Write a training YAML into `folder` and return its path."""
    from benchmarks.data import icd_file  # not needed by the measured process
    from benchmarks.load_checkpoint import SAFETENSORS_NAME, checkpoint

    settings = {
        "data": {"instruct_data": str(icd_file(megabytes)), "packing": "best_fit"},
        "model_id_or_path": str(checkpoint(SAFETENSORS_NAME)),
        "run_dir": str(folder / "run"),
        "seq_len": 8192,
        "lora": {"rank": 16},
        **LENGTHS[length],
    }
    path = folder / f"startup-{length}.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return path


def in_fresh_process(case: dict[str, Any], root: Path) -> dict[str, Any]:
    from benchmarks.data import WORK_DIR

    WORK_DIR.mkdir(parents=True, exist_ok=True)
    config = write_config(WORK_DIR, case["length"], case["megabytes"])
    shutil.rmtree(WORK_DIR / "run", ignore_errors=True)
    # Run by its path, so that another checkout measures the same.
    start = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    command = [sys.executable, "-c", start, "--config", str(config), "--began", str(time.monotonic())]
    return run_json(*command, root=root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure this checkout, too")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the data")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    parser.add_argument("--config", help="measure only this process, with this training YAML")
    parser.add_argument("--began", type=float, help="when this process was started")
    options = parser.parse_args()
    if options.config:
        run_until_first_step(options.config, options.began)
        return
    if options.show:
        print_table(last_record("startup"), COLUMNS)
        return
    from benchmarks.measure import checkouts  # an earlier checkout, which the measured process imports from, lacks it

    versions = checkouts(options.before)
    grid = itertools.product(options.lengths, versions)
    cases = [{"megabytes": options.megabytes, "length": length, "version": version} for length, version in grid]
    record = measure("startup", cases, options.rounds, lambda case: in_fresh_process(case, versions[case["version"]]))
    print_table(record, COLUMNS)


if __name__ == "__main__":
    main()
