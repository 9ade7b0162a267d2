"""Accuracy of finetune/memory_estimate.py: estimated memory compared with measured memory of training.

`python -m benchmarks.plan [--preset cpu-60m] [--rounds 1]` trains two steps of each setting in a fresh process and
appends to results/plan.jsonl; `--show` prints the last table. On a CPU, the process's high-water mark is compared with
the estimate plus the memory used before training (`import_bytes`); on a GPU, the peak allocated for tensors.
"""

import argparse
import dataclasses
import itertools
from typing import Any

import torch

from benchmarks.measure import last_record, measure, print_table, spread
from benchmarks.train import in_fresh_process
from benchmarks.training.inputs import train_args
from benchmarks.training.presets import PRESETS
from finetune.cli import run_cli
from finetune.hardware import choose_hardware
from finetune.memory_estimate import CHECKPOINTS, MemoryConfig

_LARGE_VOCABULARY = 131072
COLUMNS = {
    "preset": lambda result: result["preset"],
    "checkpoint": lambda result: result["checkpoint"],
    "seq_len": lambda result: f"{result['seq_len']:,}",
    "vocabulary": lambda result: f"{result['vocab_size']:,}",
    "measured, MB": lambda result: spread(result["measured_bytes"], 1e6, 0),
    "of which before training, MB": lambda result: spread(result["import_bytes"], 1e6, 0),
    "estimate, MB": lambda result: spread(result["estimated_bytes"], 1e6, 0),
    "error, %": lambda result: spread(result["error"], 0.01, 1),
}


def cases(preset_name: str, device: str, threads: int) -> list[dict[str, Any]]:
    """Return every `checkpoint` mode with the preset's shapes, longer sequences and a larger vocabulary."""
    preset = PRESETS[preset_name]
    seq_len, vocab_size = preset.seq_len, preset.shapes.vocab_size
    shapes = [(seq_len, vocab_size), (2 * seq_len, vocab_size), (seq_len, _LARGE_VOCABULARY)]
    common = {"preset": preset_name, "device": device, "dtype": "auto", "attention": "auto", "threads": threads}
    common |= {"warmup": 1, "steps": 1, "set": []}
    return [
        common | {"checkpoint": str(checkpoint).lower(), "seq_len": seq_len, "vocab_size": vocab_size}
        for (seq_len, vocab_size), checkpoint in itertools.product(shapes, CHECKPOINTS)
    ]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Train in a fresh process and return its memory and the estimate."""
    numbers = in_fresh_process("ours", case)
    before = numbers.get("import_bytes", 0)  # not recorded on a GPU, where imports use none
    estimate = before + estimated_bytes(case, numbers["trained_share"])
    measured = numbers["peak_bytes"]
    return {
        "measured_bytes": measured,
        "import_bytes": before,
        "estimated_bytes": estimate,
        "error": estimate / measured - 1,
        "trained_share": numbers["trained_share"],
    }


def estimated_bytes(case: dict[str, Any], trained_share: float) -> float:
    """Return the memory that training needs according to the estimate."""
    preset, device = PRESETS[case["preset"]], torch.device(case["device"])
    shapes = dataclasses.replace(preset.shapes, vocab_size=case["vocab_size"])
    args = train_args(preset, case)
    hardware = choose_hardware(device, args.param_dtype, args.attention, shapes)
    training = MemoryConfig.of(args, shapes, hardware.dtype, device.type, hardware.attention, 1, trained_share)
    return training.memory().total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-60m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    options = parser.parse_args()
    if options.show:
        record = last_record("plan")
    else:
        settings = cases(options.preset, options.device, options.threads)
        record = measure("plan", settings, options.rounds, compare)
    print_table(record, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
