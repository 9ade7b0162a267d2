"""Peak memory and time of loading a 1.1 GB checkpoint, relative to its size.

`python -m benchmarks.load_checkpoint [--rounds 3]` measures and appends to results/load_checkpoint.jsonl; `--show`
prints the last table. Weights are bf16 on disk; a LoRA adapter of rank 16 is added, as in training.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import WORK_DIR
from benchmarks.measure import last_record, measure, peak_rss, print_table, run_json, spread
from finetune.args import TrainArgs
from finetune.cli import run_cli
from finetune.data.args import DataArgs
from finetune.distributed import World, init_world
from finetune.hardware import choose_hardware
from finetune.wrapped_model import build_model, open_base_model
from model.args import ModelArgs
from model.transformer import Transformer
from model.weights import PTH_NAME, SAFETENSORS_NAME, SafetensorsWriter

SHAPES = ModelArgs(  # 559 million parameters
    dim=2048,
    n_layers=9,
    head_dim=128,
    hidden_dim=5632,
    n_heads=16,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32768,
    rope_theta=1e6,
)
CASES = [
    {"file": file, "dtype": dtype, "ranks": ranks}
    for ranks in (1, 2)
    for dtype in ("bf16", "fp32")
    for file in (SAFETENSORS_NAME, PTH_NAME)
]
COLUMNS = {
    "file, bf16": lambda result: result["file"],
    "loaded as": lambda result: result["dtype"],
    "processes": lambda result: str(result["ranks"]),
    "seconds": lambda result: spread(result["seconds"]),
    "file, MB": lambda result: spread(result["file_bytes"], 1e6, 0),
    "peak RSS of a process, MB": lambda result: spread(result["peak_bytes"], 1e6, 0),
    "of which imports, MB": lambda result: spread(result["import_bytes"], 1e6, 0),
    "peak / file": lambda result: spread(result["peak_per_file"]),
    "without imports": lambda result: spread(result["peak_per_file_without_imports"]),
}


def checkpoint(file: str) -> Path:
    """Return a model folder with random weights in this file."""
    folder = WORK_DIR / file
    path = folder / file
    if path.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(dataclasses.asdict(SHAPES)), encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(SHAPES).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = ((name, torch.randn(shape, generator=generator).bfloat16()) for name, shape in shapes.items())
    if file == PTH_NAME:
        torch.save(dict(tensors), path)
    else:
        with SafetensorsWriter(path, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
    return folder


def load(folder: Path, dtype: str) -> dict[str, float] | None:
    """Measure every rank; rank 0 returns the maximum of each number."""
    import_bytes = peak_rss()
    with init_world() as world:
        numbers = _maximum(_build(folder, dtype, world) | {"import_bytes": import_bytes}, world.size)
    if not world.is_master:
        return None
    file_bytes, added = numbers["file_bytes"], numbers["peak_bytes"] - numbers["import_bytes"]
    return numbers | {
        "peak_per_file": numbers["peak_bytes"] / file_bytes,
        "peak_per_file_without_imports": added / file_bytes,
    }


def _build(folder: Path, dtype: str, world: World) -> dict[str, float]:
    args = TrainArgs(DataArgs(), model_id_or_path=str(folder), run_dir="", param_dtype=dtype)
    start = time.perf_counter()
    base = open_base_model(args)
    model = build_model(base, args, choose_hardware(world.device, dtype, args.attention, base.args), world)
    seconds = time.perf_counter() - start
    assert sum(parameter.numel() for parameter in model.parameters()) > 559e6
    return {"seconds": seconds, "peak_bytes": peak_rss(), "file_bytes": base.weights.size_bytes}


def _maximum(numbers: dict[str, float], ranks: int) -> dict[str, float]:
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    if ranks > 1:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return dict(zip(numbers, values.tolist(), strict=True))


def in_fresh_processes(case: dict[str, Any]) -> dict[str, float]:
    launcher = [sys.executable, "-m"]
    if case["ranks"] > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={case['ranks']}", "-m"]
    folder = str(checkpoint(case["file"]))
    return run_json(*launcher, "benchmarks.load_checkpoint", "--folder", folder, "--dtype", case["dtype"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    parser.add_argument("--folder", type=Path, help="measure only this process, on this model")
    parser.add_argument("--dtype", default="bf16")
    options = parser.parse_args()
    if options.folder:
        if numbers := load(options.folder, options.dtype):
            print(json.dumps(numbers))
        return
    name = "load_checkpoint"
    record = last_record(name) if options.show else measure(name, CASES, options.rounds, in_fresh_processes)
    print_table(record, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
