"""What works on this GPU, how fast, and in how much memory: one command, at most nine minutes.

`python -m benchmarks.acceptance --out DIR` runs parts in processes of their own, each with a limit of time: versions,
attention engines and products of frozen weights against exact arithmetic, gradients and losses of small models against
the CPU's, resumed runs, a full memory, generated answers; then speed and memory of 7B models with random weights,
compared with transformers + PEFT. Nothing is downloaded. A part that fails or takes too long does not end the others.

Written to DIR at once: results.jsonl, a line per finding; log.txt, what the parts print; summary.md and summary.html,
after each part. `--preset tiny --device cpu` runs the same code on a CPU, with small models, in about a minute.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.acceptance.parts import SPEED, all_parts
from benchmarks.acceptance.runner import RESULTS, run_parts
from benchmarks.acceptance.summary import read_findings, write_summary
from finetune.cli import run_cli
from model.errors import UserError

_TO_START_AND_END_S = 15


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--preset", choices=SPEED, default="full", help="full: 7B models; tiny: small ones")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run these parts only")
    parser.add_argument("--minutes", type=float, default=9, help="limit of the whole run; default: 9")
    options = parser.parse_args()
    chosen = [part for part in all_parts(options.preset) if not options.parts or part.name in options.parts]
    _check(options, [part.name for part in chosen])
    options.out.mkdir(parents=True, exist_ok=True)
    total_s = 60 * options.minutes - _TO_START_AND_END_S
    lead = ""
    for ending in run_parts(chosen, options.device, options.preset, options.out, total_s):
        print(f"{ending['part']}: {ending['state']}, {ending['seconds']:.1f} s", flush=True)
        lead = write_summary(options.out)
    print(f"{lead} See {options.out / 'summary.md'}.")
    found = read_findings(options.out)
    if found.failed or found.unfinished:
        names = [
            f"{line['part']}: {line.get('name', line.get('state'))}" for line in [*found.failed, *found.unfinished]
        ]
        raise UserError(f"not all checks passed: {'; '.join(names)}.")


def _check(options: argparse.Namespace, chosen: list[str]) -> None:
    if unknown := sorted({*(options.parts or [])} - {*chosen}):
        names = ", ".join(part.name for part in all_parts(options.preset))
        raise UserError(f"--parts {unknown[0]} does not exist with --preset {options.preset}; the parts are: {names}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no GPU; on a CPU: --preset tiny --device cpu.")
    if options.device == "cpu" and options.preset != "tiny":
        raise UserError("--preset full trains 7B models, which a CPU cannot in nine minutes: add --preset tiny.")
    if (options.out / RESULTS).exists():
        raise UserError(f"{options.out} has the results of another run; choose another --out.")


if __name__ == "__main__":
    run_cli(main)
