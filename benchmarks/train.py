"""Training speed and memory compared with transformers + PEFT, on random weights.

`python -m benchmarks.train --preset cpu-60m --impl ours --device cpu` measures one implementation in this process.
`--paired peft` runs both alternately, each in a fresh process, and ends with a line of JSON: `speed_ratio` and
`memory_ratio`, ours / peer (medians over the rounds). Both append to results/train.jsonl. `--show` prints the last
result of each setting and draws results/train.png.
"""

import argparse
import json
import os
import sys
from typing import Any

import torch

from benchmarks.measure import measure, run_json
from benchmarks.training.presets import PRESETS
from benchmarks.training.report import draw, latest, print_results
from benchmarks.training.session import BUILDERS, measure_training
from finetune.cli import run_cli
from model.errors import UserError

_RATIOS = ("speed_ratio", "memory_ratio")


def main() -> None:
    options = _parser().parse_args()
    if options.show:
        records = latest()
        print_results(records)
        draw(records)
        return
    case = _case(options)
    if options.unrecorded:
        print(json.dumps(measure_training(options.impl, case)))
    elif options.paired:
        record = measure("train", [case], options.rounds, lambda case: paired("ours", options.paired, case))
        print(json.dumps(record))
        result = record["results"][0]
        spreads = {f"{ratio}_range": result[ratio][::2] for ratio in _RATIOS}
        print(json.dumps({ratio: result[ratio][1] for ratio in _RATIOS} | spreads))
    else:
        record = measure("train", [case], 1, lambda case: _named(options.impl, measure_training(options.impl, case)))
        print(json.dumps(record))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-60m")
    parser.add_argument("--impl", choices=BUILDERS, default="ours")
    parser.add_argument(
        "--paired", choices=[name for name in BUILDERS if name != "ours"], help="compare with this peer"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of paired measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", default="true", help="as in a training YAML; the peer supports true and false")
    parser.add_argument("--dtype", default="auto", help="param_dtype of a training YAML")
    parser.add_argument("--attention", default="auto", help="attention engine, or the peer's attn_implementation")
    parser.add_argument("--seq_len", type=int, help="default: the preset's")
    parser.add_argument("--vocab_size", type=int, help="default: the preset's; must not be smaller")
    parser.add_argument("--warmup", type=int, help="untimed steps; default: the preset's")
    parser.add_argument("--steps", type=int, help="timed steps; default: the preset's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of a training YAML")
    parser.add_argument("--unrecorded", action="store_true", help="print this process's numbers without recording them")
    parser.add_argument("--show", action="store_true", help="print and draw the recorded results")
    return parser


def _case(options: argparse.Namespace) -> dict[str, Any]:
    """Return the complete setting, as it is recorded and passed to a fresh process."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no GPU.")
    preset = PRESETS[options.preset]
    case = {key: getattr(options, key) for key in ("preset", "device", "checkpoint", "dtype", "attention", "threads")}
    for key in ("seq_len", "warmup", "steps"):
        given = getattr(options, key)
        case[key] = getattr(preset, key) if given is None else given
    case["vocab_size"] = options.vocab_size or preset.shapes.vocab_size
    case["set"] = options.set
    for key, least in (("steps", 1), ("warmup", 0), ("seq_len", 1), ("threads", 1)):
        if case[key] < least:
            raise UserError(f"--{key} is {case[key]}; it must be at least {least}.")
    if case["vocab_size"] < preset.shapes.vocab_size:
        raise UserError(f"--vocab_size is {case['vocab_size']}; the tokenizer has {preset.shapes.vocab_size} tokens.")
    if malformed := [item for item in case["set"] if "=" not in item]:
        raise UserError(f"--set {malformed[0]}: expected KEY=VALUE.")
    return case


def paired(ours: str, peer: str, case: dict[str, Any]) -> dict[str, Any]:
    """Measure one round: both implementations, one after the other, in fresh processes."""
    numbers = {impl: in_fresh_process(impl, case) for impl in (ours, peer)}
    ratios = zip(_RATIOS, ("tokens_per_second", "peak_bytes"), strict=True)
    return {ratio: numbers[ours][key] / numbers[peer][key] for ratio, key in ratios} | {
        key: value for impl, found in numbers.items() for key, value in _named(impl, found).items()
    }


def in_fresh_process(impl: str, case: dict[str, Any]) -> dict[str, Any]:
    """Measure one implementation in a fresh process. Only ours supports the keys of `--set`."""
    command = [sys.executable, "-m", "benchmarks.train", "--unrecorded", "--impl", impl]
    for key, value in case.items():
        if key != "set":
            command += [f"--{key}", str(value)]
    if case["set"] and impl == "ours":
        command += ["--set", *case["set"]]
    return run_json(*command)


def _named(impl: str, numbers: dict[str, Any]) -> dict[str, Any]:
    return {f"{impl}.{key}": value for key, value in numbers.items()}


if __name__ == "__main__":
    run_cli(main)
