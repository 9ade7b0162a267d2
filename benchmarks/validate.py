"""Wall time and memory of the validator on one and two cores.

`python -m benchmarks.validate [--rounds 3] [--before CHECKOUT]` measures and appends to results/validate.jsonl;
`--show` prints the last table. With `--before`, another checkout is measured in turn with this one.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.data import WORK_DIR, icd_file
from benchmarks.measure import checkouts, last_record, measure, print_table, spread

COLUMNS = {
    "version": lambda result: result.get("version", "now"),
    "file, MB": lambda result: str(result["megabytes"]),
    "million tokens": lambda result: spread(result["tokens"], 1e6),
    "cores": lambda result: str(result["cores"]),
    "seconds": lambda result: spread(result["seconds"]),
    "CPU s of all processes": lambda result: spread(result["cpu_seconds"]),
    "peak RSS of the largest process, MB": lambda result: spread(result["peak_bytes"], 1e6, 0),
}


def validate(case: dict[str, Any], root: Path) -> dict[str, float]:
    """Run the command of a checkout as a user would, including imports."""
    statistics = WORK_DIR / "stats.json"
    command = [sys.executable, "-m", "utils.validate_data", "--train_yaml", str(_yaml(case["megabytes"]))]
    command += ["--num_workers", str(case["cores"]), "--num_gpus", "1", "--train_stats_json", str(statistics)]
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # includes the processes it started
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed: run it to see why.")
    tokens = json.loads(statistics.read_text(encoding="utf-8"))["expected"]["data_tokens"]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _yaml(megabytes: int) -> Path:
    model = WORK_DIR / "model"
    model.mkdir(parents=True, exist_ok=True)
    params = {"dim": 64, "n_layers": 1, "head_dim": 16, "hidden_dim": 64, "n_heads": 4, "n_kv_heads": 4}
    (model / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5, "vocab_size": 32768}), encoding="utf-8")
    settings = {
        "data": {"instruct_data": str(icd_file(megabytes)), "packing": "best_fit"},
        "model_id_or_path": str(model),
        "run_dir": str(WORK_DIR / "no run"),
        "seq_len": 8192,
    }
    path = WORK_DIR / "validate.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure this checkout, too")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 200], help="sizes of the file")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    options = parser.parse_args()
    if options.show:
        print_table(last_record("validate"), COLUMNS)
        return
    versions = checkouts(options.before)
    grid = itertools.product(options.megabytes, options.cores, versions)
    cases = [{"megabytes": size, "cores": cores, "version": version} for size, cores, version in grid]
    record = measure("validate", cases, options.rounds, lambda case: validate(case, versions[case["version"]]))
    print_table(record, COLUMNS)


if __name__ == "__main__":
    main()
