"""Checks that fail before anything is loaded: memory, disk, and the connection between processes."""

import dataclasses
import logging
import math
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from model.errors import UserError, first_line, full_memory
from model.settings import Frequency

from .args import TrainArgs
from .distributed import World
from .hardware import Hardware, free_bytes
from .memory_estimate import CHECKPOINTS, RESERVE, MemoryConfig
from .optim import check_optimizer
from .run_dir import saved_checkpoints
from .wrapped_model import BaseModel, shard_count

logger = logging.getLogger("preflight")

_GIB = 1024**3


def resolve_checkpoint(base: BaseModel, args: TrainArgs, hardware: Hardware, world: World) -> TrainArgs:
    """Resolve `checkpoint: auto`: the fastest mode that fits in the memory of the process with the least.

    Every position is assumed to be trained: the actual number is not known before the data is read.
    """
    if args.checkpoint != "auto":
        return args
    gathered = world.gather(free_bytes(hardware.device, world.local_size))
    free = [value for value in gathered if value is not None]
    usable = min(free) * (1 - RESERVE) if len(free) == len(gathered) else None
    config = _memory_config(base, args, hardware, world)
    chosen = True if usable is None else config.resolved_checkpoint(usable)
    totals = {mode: dataclasses.replace(config, checkpoint=mode).memory().total for mode in CHECKPOINTS}
    needs = ", ".join(f"{str(mode).lower()} needs about {total / _GIB:.1f} GiB" for mode, total in totals.items())
    has = "an unknown amount of memory" if usable is None else f"{usable / _GIB:.1f} GiB available"
    logger.info("`checkpoint: auto` is %s: %s; each process has %s.", str(chosen).lower(), needs, has)
    return dataclasses.replace(args, checkpoint=chosen)


def _memory_config(base: BaseModel, args: TrainArgs, hardware: Hardware, world: World) -> MemoryConfig:
    device, shards = hardware.device.type, shard_count(args, world)
    return MemoryConfig.of(args, base.args, hardware.dtype, device, hardware.attention, shards)


def check_preflight(base: BaseModel, args: TrainArgs, hardware: Hardware, run_dir: Path, world: World) -> None:
    """Check that the ranks can communicate and that memory and disk suffice.

    Raises:
        UserError: on every rank, if a check fails on any.
    """
    with world.synchronized_errors():
        check_optimizer(args.optim, world.size, hardware.device)
    world.sum(torch.ones((), device=world.device))  # fails if the ranks cannot communicate
    if args.base_dtype != "same" and (world.size > 1 or args.cpu_offload) and not _shards_bytes():
        world.raise_on_all(
            f"`base_dtype: {args.base_dtype}` on several processes or with `cpu_offload` needs PyTorch 2.12 or later, "
            f"this is {torch.__version__}; use one process without it, or `base_dtype: same`."
        )
    if args.sharding == "hybrid":
        world.raise_on_all(uneven_machines(world.gather(world.local_size)))
    config = _memory_config(base, args, hardware, world)
    trained, frozen = config.trained_and_frozen()
    exported = trained if args.save_adapters else trained + frozen
    state_bytes = trained * 4 + config.optimizer_bytes(shards=1)  # trained parameters are saved in fp32
    checkpoint_bytes = exported * hardware.dtype.itemsize + state_bytes
    memory = config.memory()
    held = memory.frozen + memory.trained + memory.gradients + memory.moments
    with world.synchronized_errors():
        check_memory(hardware.device, memory.unsharded if args.cpu_offload else held)
        if world.is_master and not args.no_ckpt:
            check_disk(run_dir, checkpoint_bytes, _planned(args, run_dir))


def _shards_bytes() -> bool:
    """Return whether FSDP2 supports parameters of integer dtypes."""
    major, minor, *_ = torch.__version__.split(".")
    return (int(major), int(minor)) >= (2, 12)


def _planned(args: TrainArgs, run_dir: Path) -> int:
    """Return how many more checkpoints there will be at once: those kept, and the one being written."""
    if args.epochs is not None:
        return 1  # at least: the steps are not known yet
    saved = _times(args.ckpt_freq, args.max_steps)
    if args.keep_best:
        saved += _times(args.eval_freq, args.max_steps)
    most = saved if args.num_ckpt_keep is None else min(saved, args.num_ckpt_keep + 1 + args.keep_best)
    return max(1, most - len(saved_checkpoints(run_dir / "checkpoints")))


def _times(freq: Frequency, max_steps: int) -> int:
    """Return how often a frequency occurs in a run; 1 for `epoch`, whose steps are not known yet."""
    if isinstance(freq, str) or freq == 0:
        return 1
    period = freq * max_steps if isinstance(freq, float) else freq
    return math.ceil(max_steps / period)


def uneven_machines(local_sizes: Sequence[int]) -> str | None:
    """Return why `sharding: hybrid` does not work, or None, given the number of processes on each process's machine."""
    fewest, most = min(local_sizes), max(local_sizes)
    if fewest == most:
        return None
    return (
        f"`sharding: hybrid` needs the same number of processes on all machines; there are {fewest} on one and {most} "
        "on another. Start torchrun with the same --nproc-per-node everywhere, or set `sharding: full`."
    )


def check_shared(run_dir: Path) -> None:
    """Raise UserError if this process does not see the run folder that rank 0 created."""
    if not (run_dir / "args.yaml").is_file():
        raise UserError(
            f"A process on {socket.gethostname()} does not see the run folder {run_dir}: `run_dir` must lie on a file "
            "system that all nodes share."
        )


def check_disk(run_dir: Path, checkpoint_bytes: float, planned: int) -> None:
    """Raise UserError if the disk of `run_dir` has no space for `planned` checkpoints."""
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes * planned
    if free < needed:
        raise UserError(
            f"The disk of {folder} has {free / _GIB:.1f} GiB free; {planned} more checkpoints of "
            f"{checkpoint_bytes / _GIB:.1f} GiB need {needed / _GIB:.1f} GiB. Free some space, choose another "
            "`run_dir`, or lower `num_ckpt_keep`."
        )


def check_memory(device: torch.device, needed: float) -> None:
    """Raise UserError if a GPU has less than `needed` bytes free."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < needed:
        raise UserError(
            f"{device} ({torch.cuda.get_device_name(device)}) has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free; "
            f"weights, gradients and optimizer alone take {needed / _GIB:.1f} GiB. Is another process using it "
            "(`nvidia-smi`)? Otherwise use more GPUs, `cpu_offload: true`, a smaller `lora.rank` or a smaller model."
        )


def out_of_memory_advice(error: Exception, args: TrainArgs, rank: int) -> str | None:
    """Return the settings to change after a GPU or the host ran out of memory; None for any other error."""
    full = full_memory(error)
    if full is None:
        return None
    on_gpu = full == "gpu"
    advice = [
        *([] if args.checkpoint is True else ["`checkpoint: true`"]),
        *([f"a smaller `batch_size` (now {args.batch_size})"] if args.batch_size > 1 else []),
        f"a smaller `seq_len` (now {args.seq_len})",
        *([f"a smaller `lora.rank` (now {args.lora.rank})"] if args.lora.enable else []),
        *(["`base_dtype: nf4`"] if args.lora.enable and args.base_dtype == "same" else []),
        "more GPUs" if on_gpu else "a machine with more memory",
    ]
    what = f"The GPU of process {rank} is out of memory" if on_gpu else f"Process {rank} is out of memory"
    return f"{what}: {first_line(error).removesuffix('.')}. Use " + ", ".join(advice) + "."
