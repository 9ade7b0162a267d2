"""The peer mistral-finetune: a checkout of it, in a process of its own, on our batches and weights.

The environment variable MISTRAL_FINETUNE names the checkout, which is not part of this project. Its packages have the
names of ours, so `original_loop` runs them elsewhere and gets everything in files of a temporary folder.

Its own: the model, LoRA layers and their initial values, the wrapper for recomputation, reading the weights, the loss,
the copies for mixed precision, and PyTorch's optimizer and schedule in its settings. Replaced: attention, on a CPU,
where xformers has none, by PyTorch's, one document at a time; FSDP, which one process does not need; its data loader,
which its time to the first step lacks; and the loop around these parts, rewritten without CUDA, evaluation and logs.
The dtype is that of the setting, while its own loop only knows bf16.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.measure import run_json
from finetune.args import TrainArgs
from finetune.data.data_loader import Batch
from model.args import ModelArgs
from model.errors import UserError

from .inputs import packed_batches
from .peer import peer_dtype
from .trial import Trial
from .weights import RandomWeights
from .work import Work

VARIABLE = "MISTRAL_FINETUNE"
_MARK = "finetune/mixed_precision.py", "def upcast_mixed_precision"  # a file, and what it has only there
_LOOP = Path(__file__).with_name("original_loop.py")


def train_original(args: TrainArgs, shapes: ModelArgs, device: torch.device, warmup: int) -> Trial:
    """Train a model with random weights.

    Raises:
        UserError: there is no checkout, xformers is not installed, or a setting is not supported.
    """
    checkout, dtype = find_checkout(), peer_dtype(args, shapes, device)
    batches, work = packed_batches(args), Work()
    count, untimed = args.max_steps * args.num_microbatches, warmup * args.num_microbatches
    micro_batches = list(itertools.islice(batches, untimed))
    filled = batches.counts.filled
    micro_batches += itertools.islice(batches, count - untimed)
    tokens = batches.counts.filled - filled
    batches.close()
    work.add(*micro_batches[untimed:])
    with tempfile.TemporaryDirectory() as folder:
        weights = RandomWeights(shapes, device, dtype)
        write_inputs(Path(folder), args, weights, micro_batches, warmup, device)
        found = run_json(sys.executable, str(_LOOP), str(checkout), folder)
    keys = ("seconds", "first_step_seconds", "losses", "attention", "memory")
    return Trial(work, tokens, dtype=dtype, version=_commit(checkout), **{key: found[key] for key in keys})


def find_checkout() -> Path:
    """Return the checkout that the environment names.

    Raises:
        UserError: it names none, or another folder; xformers, which its model imports, is not installed.
    """
    remedy = f"clone https://github.com/mistralai/mistral-finetune and set {VARIABLE} to its folder."
    if not (named := os.environ.get(VARIABLE)):
        raise UserError(f"--impl original needs a checkout of mistral-finetune: {remedy}")
    checkout = Path(named).absolute()
    file, line = checkout / _MARK[0], _MARK[1]
    if not file.is_file() or line not in file.read_text(encoding="utf-8"):
        raise UserError(f"{VARIABLE} is {named}, which is not a checkout of mistral-finetune: {remedy}")
    if importlib.util.find_spec("xformers") is None:
        raise UserError('--impl original needs xformers: run `pip install -e ".[test]"`, with a GPU ".[cuda]".')
    return checkout


def _commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_inputs(
    folder: Path, args: TrainArgs, weights: RandomWeights, batches: list[Batch], warmup: int, device: torch.device
) -> None:
    """Write what `original_loop` reads: weights and shapes in Mistral's format, batches, settings."""
    save_file({name: weights.read(name).cpu() for name in weights.shapes}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(dataclasses.asdict(weights.model_args)), encoding="utf-8")
    arrays = {}
    for number, batch in enumerate(batches):
        arrays |= {f"x{number}": batch.x, f"y{number}": batch.y, f"sizes{number}": np.array(batch.sizes)}
        if batch.y_mask is not None:
            arrays[f"y_mask{number}"] = batch.y_mask
    np.savez(folder / "batches.npz", **arrays)
    settings = {
        "device": device.type,
        "dtype": str(weights.dtypes["norm.weight"]).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "lora": {"rank": args.lora.rank, "scaling": args.lora.scaling, "dropout": args.lora.dropout},
        "checkpoint": args.checkpoint,
        "num_microbatches": args.num_microbatches,
        "steps": args.max_steps,
        "warmup": warmup,
        "optim": {key: getattr(args.optim, key) for key in ("lr", "weight_decay", "pct_start")},
        "max_norm": args.max_norm,
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
