"""Measure the training of one model in this process, or for `original` in one that it starts."""

import dataclasses
from typing import Any

import torch

from benchmarks.measure import peak_rss
from finetune.mixed_precision import DTYPE_NAMES

from .inputs import train_args
from .original import train_original
from .ours import build_ours
from .peer import build_peft
from .presets import PRESETS
from .sft import train_trl
from .trial import Train, timed
from .work import matmul_rate, model_flops, recomputed_flops

IMPLEMENTATIONS: dict[str, Train] = {
    "ours": timed(build_ours),
    "peft": timed(build_peft),
    "trl": train_trl,
    "original": train_original,
}
# Ours / peer, by what is compared.
RATIOS = {
    "speed_ratio": "tokens_per_second",
    "whole_ratio": "whole_tokens_per_second",
    "memory_ratio": "peak_bytes",
    "start_ratio": "first_step_seconds",
}


def measure_training(impl: str, case: dict[str, Any]) -> dict[str, Any]:
    """Build, warm up and time one implementation in one setting (the options of benchmarks.train).

    Raises:
        UserError: the implementation is not installed, or does not support a setting.
    """
    import_bytes = peak_rss()
    torch.set_num_threads(case["threads"])
    preset, device = PRESETS[case["preset"]], torch.device(case["device"])
    shapes = dataclasses.replace(preset.shapes, vocab_size=case["vocab_size"])
    args = train_args(preset, case)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trial = IMPLEMENTATIONS[impl](args, shapes, device, case["warmup"])
    memory = trial.memory or device_memory(device, import_bytes)
    rate = matmul_rate(device, trial.dtype)
    work, seconds = trial.work, trial.seconds
    flops = model_flops(shapes, args.lora.rank, work)
    recomputed = recomputed_flops(shapes, args.lora.rank, work) if str(args.checkpoint).lower() == "true" else 0.0
    return memory | {
        "seconds": seconds,
        "tokens": trial.tokens,
        "first_loss": trial.losses[0],
        "last_loss": trial.losses[-1],
        "first_step_seconds": trial.first_step_seconds,
        "attention": trial.attention,
        "dtype": DTYPE_NAMES[trial.dtype],  # what `param_dtype: auto` came to
        "version": trial.version,
        "recomputed": str(args.checkpoint).lower(),  # what `checkpoint: auto` came to
        "tokens_per_second": trial.tokens / seconds,
        "whole_tokens_per_second": work.complete_positions / seconds,
        "samples_per_second": work.complete / seconds,
        "severed_documents": work.documents - work.complete,
        "trained_share": work.trained / work.positions,
        "flops_per_second": flops / seconds,
        "matmul_flops_per_second": rate,
        "mfu": flops / seconds / rate,
        "hfu": (flops + recomputed) / seconds / rate,
    }


def device_memory(device: torch.device, import_bytes: int) -> dict[str, int]:
    """Return the process's peak memory; on a GPU, the peaks allocated and reserved for tensors."""
    if device.type == "cpu":
        return {"peak_bytes": peak_rss(), "import_bytes": import_bytes}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "host_peak_bytes": peak_rss(),
    }
