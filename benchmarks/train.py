"""Training speed and memory compared with transformers + PEFT, TRL and mistral-finetune, on random weights.

`python -m benchmarks.train --preset cpu-60m --impl ours --device cpu` measures one implementation in this process.
`--paired peft trl original` runs ours and these peers alternately, each in a fresh process, and ends with a line of
JSON: for each peer, ours / peer as medians with their ranges over the rounds. Both append to results/train.jsonl.
`--show` prints the last result of each setting and draws results/train.png.

`trl` needs the extra `peers`; `original` is a checkout of mistral-finetune that the environment variable
MISTRAL_FINETUNE names.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure import measure, run_json
from benchmarks.training.inputs import preset_rows
from benchmarks.training.presets import PRESETS
from benchmarks.training.report import draw, latest, print_results
from benchmarks.training.session import IMPLEMENTATIONS, RATIOS, measure_training
from finetune.cli import run_cli
from model.errors import UserError

_PEERS = [name for name in IMPLEMENTATIONS if name != "ours"]


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
        preset_rows(PRESETS[case["preset"]])  # else the first process would generate them
        record = measure("train", [case], options.rounds, lambda case: paired(options.paired, case))
        print(json.dumps(record))
        print(json.dumps({peer: _ratios(record["results"][0], peer) for peer in options.paired}))
    else:
        record = measure("train", [case], 1, lambda case: _named(options.impl, measure_training(options.impl, case)))
        print(json.dumps(record))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-60m")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="ours")
    parser.add_argument(
        "--paired", nargs="+", choices=_PEERS, metavar="PEER", help=f"compare with: {', '.join(_PEERS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of paired measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", default="true", help="as in a training YAML; peers support true and false")
    parser.add_argument("--dtype", default="auto", help="param_dtype of a training YAML")
    parser.add_argument("--attention", default="auto", help="attention engine, or the peers' attn_implementation")
    parser.add_argument("--packing", choices=("concat", "best_fit"), help="default: the preset's; trl has its own")
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
    for key in ("seq_len", "packing", "warmup", "steps"):
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


def paired(peers: Sequence[str], case: dict[str, Any]) -> dict[str, Any]:
    """Measure one round: ours and the peers, one after the other, in fresh processes."""
    numbers = {impl: in_fresh_process(impl, case) for impl in ("ours", *peers)}
    found = {}
    for impl, measured in numbers.items():
        found |= _named(impl, measured)
        for ratio, key in RATIOS.items():
            if impl != "ours" and measured[key]:  # no sample may be whole
                found[f"{impl}.{ratio}"] = numbers["ours"][key] / measured[key]
    return found


def _ratios(result: dict[str, Any], peer: str) -> dict[str, Any]:
    """Return the median and the range of each ratio."""
    known = {ratio: result[name] for ratio in RATIOS if (name := f"{peer}.{ratio}") in result}
    return {ratio: spread[1] for ratio, spread in known.items()} | {
        f"{ratio}_range": spread[::2] for ratio, spread in known.items()
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
