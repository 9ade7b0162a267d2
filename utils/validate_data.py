"""Validate the data that a training YAML names, describe it, and estimate how long the run will take.

`python -m utils.validate_data CONFIG.yaml [KEY=VALUE ...] [--create_corrected] [--save_reports] [--num_gpus N]`

Rows are read, tokenized and packed as in training. Every invalid row of every file is reported, and the exit code is
then 1. Rows that can be trained on, but are probably mistakes, are listed as warnings.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from finetune.cli import parse_config_args, run_cli

ERROR_REPORT, TRAIN_STATS = "data_errors.txt", "train_stats.json"  # names that --save_reports uses


def main() -> None:
    options = _options()
    from utils.validation.validator import validate  # loads mistral-common, which --help does not need

    if not validate(options):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--create_corrected", action="store_true", help="write the valid rows of each invalid file to FILE.corrected")
    add("--save_reports", action="store_true", help=f"write {ERROR_REPORT} and {TRAIN_STATS} (or the names given)")
    add("--error_report_txt", type=Path, metavar="F", help="write all errors and warnings to this file")
    add("--train_stats_json", type=Path, metavar="F", help="write the estimate of the run to this file")
    add("--num_gpus", type=_at_least_one, metavar="N", help="GPUs of the run (default: the visible ones)")
    add("--wps", type=_positive, help="measured speed of the run in tokens per second, from its log, for the duration")
    add("--plot", type=Path, metavar="F.png", help="write a plot of the row lengths")
    add(
        "--num_workers",
        type=_at_least_one,
        metavar="K",
        default=_cores(),
        help="processes that read rows (default: one per core)",
    )
    options = parse_config_args(parser)
    if options.save_reports:
        options.error_report_txt = options.error_report_txt or Path(ERROR_REPORT)
        options.train_stats_json = options.train_stats_json or Path(TRAIN_STATS)
    return options


def _cores() -> int:
    """Return the number of cores this process may use, or of all cores where the system does not report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


if __name__ == "__main__":
    run_cli(main)
