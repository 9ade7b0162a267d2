"""Time to first batch, tokenize-and-pack throughput and memory of the data loader, for two file sizes.

`python -m benchmarks.loader [--rounds 5]` measures and appends to results/loader.jsonl; `--show` prints the last table.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import last_record, measure, peak_rss, print_table, run_json, spread
from finetune.data.args import DataArgs
from finetune.data.data_loader import build_data_loader
from finetune.data.tokenizer_files import load_instruct_tokenizer

SEQ_LEN = 8192
POSITIONS = 3_000_000  # in batches after the first, to measure throughput
CASES = [{"megabytes": size, "packing": packing} for packing in ("concat", "best_fit") for size in (20, 200)]
COLUMNS = {
    "packing": lambda result: result["packing"],
    "file, MB": lambda result: str(result["megabytes"]),
    "index, s": lambda result: spread(result["index_seconds"]),
    "CPU s": lambda result: spread(result["index_cpu_seconds"]),
    "then first batch, s": lambda result: spread(result["first_batch_seconds"]),
    "CPU s of that": lambda result: spread(result["first_batch_cpu_seconds"]),
    "million tokens/s": lambda result: spread(result["tokens_per_second"], 1e6),
    "per CPU s": lambda result: spread(result["tokens_per_cpu_second"], 1e6),
    "positions filled, %": lambda result: spread(result["filled"], 0.01, 1),
    "peak RSS, MB": lambda result: spread(result["peak_bytes"], 1e6, 0),
    "of which imports, MB": lambda result: spread(result["import_bytes"], 1e6, 0),
}


def load(path: Path, packing: str) -> dict[str, float]:
    """Measure this process: v3 tokenizer, shuffling and dynamic chunks on, one rank."""
    tokenizer = load_instruct_tokenizer(Path("has no tokenizer"), 32768)
    import_bytes = peak_rss()
    start = _clocks()
    args = DataArgs(instruct_data=str(path), packing=packing)
    loader = build_data_loader(tokenizer, args, 1, SEQ_LEN, seed=0, rank=0, world_size=1, is_eval=False)
    indexed = _clocks()
    next(loader)
    first = _clocks()
    before = loader.counts.filled
    for _ in range(POSITIONS // SEQ_LEN):
        next(loader)
    done = _clocks()
    loader.close()
    tokens = loader.counts.filled - before
    index, first_batch, rest = (end - begin for begin, end in itertools.pairwise((start, indexed, first, done)))
    return {
        "index_seconds": index[0],
        "index_cpu_seconds": index[1],
        "first_batch_seconds": first_batch[0],
        "first_batch_cpu_seconds": first_batch[1],
        "tokens_per_second": tokens / rest[0],
        "tokens_per_cpu_second": tokens / rest[1],
        "filled": loader.counts.filled / loader.counts.positions,
        "peak_bytes": peak_rss(),
        "import_bytes": import_bytes,
    }


def _clocks() -> np.ndarray:
    """Return [wall time, CPU time of this process] in seconds; other load on the machine affects mainly the first."""
    return np.array([time.perf_counter(), time.process_time()])


def in_fresh_process(case: dict[str, Any]) -> dict[str, float]:
    from benchmarks.data import icd_file  # not needed by the measured process

    path = str(icd_file(case["megabytes"]))
    return run_json(sys.executable, "-m", "benchmarks.loader", "--file", path, "--packing", case["packing"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    parser.add_argument("--file", type=Path, help="measure only this process, on this file")
    parser.add_argument("--packing", default="best_fit")
    options = parser.parse_args()
    if options.file:
        print(json.dumps(load(options.file, options.packing)))
        return
    record = last_record("loader") if options.show else measure("loader", CASES, options.rounds, in_fresh_process)
    print_table(record, COLUMNS)


if __name__ == "__main__":
    main()
