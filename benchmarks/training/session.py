"""Measure the training of one model in this process."""

import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.data import rows_file
from benchmarks.measure import peak_rss
from finetune.args import TrainArgs, read_train_args
from finetune.data.data_loader import TrainLoader, build_data_loader
from finetune.data.tokenizer_files import V3_VOCABULARY, load_instruct_tokenizer
from finetune.mixed_precision import DTYPE_NAMES

from .ours import build_ours
from .peer import build_peft
from .presets import PRESETS, Preset
from .step import Trainee
from .work import Work, matmul_rate, model_flops, recomputed_flops, synchronize

BUILDERS = {"ours": build_ours, "peft": build_peft}
_MEGABYTES = 4  # of rows, read repeatedly


def measure_training(impl: str, case: dict[str, Any]) -> dict[str, Any]:
    """Build, warm up and time one implementation in one setting (the options of benchmarks.train).

    Raises:
        UserError: the implementation does not support a setting.
    """
    import_bytes = peak_rss()
    torch.set_num_threads(case["threads"])
    preset, device = PRESETS[case["preset"]], torch.device(case["device"])
    shapes = dataclasses.replace(preset.shapes, vocab_size=case["vocab_size"])
    args = train_args(preset, case)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainee = BUILDERS[impl](args, shapes, device)
    work, numbers = _timed_steps(trainee, packed_batches(args), args, case["warmup"], device)
    memory = _memory(device, import_bytes)
    rate = matmul_rate(device, trainee.dtype)
    flops, seconds = model_flops(shapes, args.lora.rank, work), numbers["seconds"]
    recomputed = recomputed_flops(shapes, args.lora.rank, work) if str(args.checkpoint).lower() == "true" else 0.0
    return (
        numbers
        | memory
        | {
            "attention": trainee.attention,
            "dtype": DTYPE_NAMES[trainee.dtype],  # what `param_dtype: auto` came to
            "recomputed": str(args.checkpoint).lower(),  # what `checkpoint: auto` came to
            "tokens_per_second": numbers["tokens"] / seconds,
            "samples_per_second": work.complete / seconds,
            "severed_documents": work.documents - work.complete,
            "trained_share": work.trained / work.positions,
            "flops_per_second": flops / seconds,
            "matmul_flops_per_second": rate,
            "mfu": flops / seconds / rate,
            "hfu": (flops + recomputed) / seconds / rate,
        }
    )


def train_args(preset: Preset, case: dict[str, Any]) -> TrainArgs:
    """Write a YAML for this setting and read it like a user's; `case["set"]` adds or overrides keys."""
    source = "data" if preset.rows == "texts" else "instruct_data"
    settings = {
        "data": {source: str(rows_file(preset.rows, _MEGABYTES)), "packing": preset.packing},
        "model_id_or_path": case["preset"],
        "run_dir": "none",
        "seq_len": case["seq_len"],
        "batch_size": preset.batch_size,
        "num_microbatches": preset.num_microbatches,
        "max_steps": case["warmup"] + case["steps"],
        "lora.rank": preset.rank,
        "checkpoint": case["checkpoint"],
        "param_dtype": case["dtype"],
        "attention": case["attention"],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return read_train_args(path, overrides=case["set"])


def packed_batches(args: TrainArgs) -> TrainLoader:
    """Return the batches for every implementation: tokens of mistral-common's v3, for any vocabulary size."""
    tokenizer = load_instruct_tokenizer(Path("has no tokenizer"), V3_VOCABULARY)
    return build_data_loader(tokenizer, args.data, args.batch_size, args.seq_len, args.seed, 0, 1, is_eval=False)


def _timed_steps(
    trainee: Trainee, batches: TrainLoader, args: TrainArgs, warmup: int, device: torch.device
) -> tuple[Work, dict[str, float]]:
    work, losses = Work(), []
    for step in range(args.max_steps):
        if step == warmup:
            synchronize(device)
            start, filled = time.perf_counter(), batches.counts.filled
        micro_batches = list(itertools.islice(batches, args.num_microbatches))
        losses.append(trainee.step(micro_batches))
        if step >= warmup:
            for batch in micro_batches:
                work.add(batch)
    synchronize(device)
    seconds = time.perf_counter() - start
    tokens = batches.counts.filled - filled
    batches.close()
    return work, {
        "seconds": seconds,
        "tokens": tokens,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def _memory(device: torch.device, import_bytes: int) -> dict[str, int]:
    """Return the process's peak memory; on a GPU, the peaks allocated and reserved for tensors."""
    if device.type == "cpu":
        return {"peak_bytes": peak_rss(), "import_bytes": import_bytes}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "host_peak_bytes": peak_rss(),
    }
