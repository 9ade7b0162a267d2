"""Checks that fail before anything is loaded: memory, disk, and the connection between processes."""

import dataclasses
import logging
import math
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from model.args import BASE_DTYPES
from model.errors import UserError, first_line, full_memory
from model.settings import Frequency
from model.weights import TensorSource

from .args import TrainArgs
from .distributed import World
from .hardware import Hardware, free_bytes
from .memory_estimate import CHECKPOINTS, RESERVE, MemoryConfig, memory_rows
from .mixed_precision import DTYPE_NAMES
from .optim import check_optimizer
from .run_dir import saved_checkpoints
from .wrapped_model import BaseModel, shard_count

logger = logging.getLogger("preflight")

_GIB = 1024**3
# Bytes per number of a tensor that is merged: as stored; W, B A, scaling B A and their sum in fp32; as written.
_MERGE_BYTES = 4 + 4 * 4 + 4


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
    with world.synchronized_errors():
        doubt = check_memory(hardware, config, world.local_size)
        if doubt and world.is_master:
            logger.warning(doubt)
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


def check_memory(hardware: Hardware, config: MemoryConfig, processes: int) -> str | None:
    """Check that what stays in memory for the whole run fits. Return a warning if the rest of the estimate does not.

    Args:
        hardware: of this process.
        config: configuration of the run.
        processes: number of processes on this node.

    Raises:
        UserError: weights, gradients and optimizer alone do not fit, on the GPU or in RAM and swap.
    """
    memory, device = config.memory(), hardware.device
    on_gpu = device.type == "cuda"
    offloads = config.cpu_offload and on_gpu
    if offloads:
        on_host = dataclasses.replace(config, cpu_offload=False).memory().permanent
        _require(torch.device("cpu"), processes, on_host, on_host, config)
    return _require(device, processes, memory.unsharded if offloads else memory.permanent, memory.total, config)


def check_inference_memory(base: BaseModel, args: TrainArgs, hardware: Hardware) -> None:
    """Raise UserError if a model's weights do not fit in the memory of this process, on the GPU or in RAM and swap."""
    device = hardware.device
    config = MemoryConfig.of(args, base.args, hardware.dtype, device.type, hardware.attention, 1)
    needed, free = config.weight_bytes(), free_bytes(device, 1, swap=True)
    if free is None or needed <= free:
        return
    name = hardware.settings()["param_dtype"]
    in_half = hardware.dtype == torch.float32 and args.run_dir and needed / 2 <= free
    advice = "Set `param_dtype: bf16` in the run's args.yaml, use" if in_half else "Use"
    raise UserError(
        f"The weights of {base.folder} take {needed / _GIB:.1f} GiB in {name}, but {_has(device, free)}. {advice} a "
        "machine with more memory, or end other programs."
    )


def check_tensor_memory(weights: TensorSource) -> None:
    """Raise UserError if the largest of a model's tensors does not fit in memory while it is merged or exported."""
    name = max(weights.shapes, key=lambda name: math.prod(weights.shapes[name]))
    device = torch.device("cpu")
    needed, free = math.prod(weights.shapes[name]) * _MERGE_BYTES, free_bytes(device, 1, swap=True)
    if free is not None and needed > free:
        raise UserError(
            f"Tensors are written one at a time, and `{name}` alone needs {needed / _GIB:.1f} GiB, but "
            f"{_has(device, free)}. Use a machine with more memory, or end other programs."
        )


def _has(device: torch.device, free: float) -> str:
    on_gpu = device.type == "cuda"
    where = (
        f"{device} ({torch.cuda.get_device_name(device)})" if on_gpu else "each process (RAM, swap, container limit)"
    )
    return f"{where} has {free / _GIB:.1f} GiB free"


def _require(device: torch.device, processes: int, permanent: float, total: float, config: MemoryConfig) -> str | None:
    free = free_bytes(device, processes, swap=True)
    if free is None or total <= free:
        return None
    if permanent <= free:  # the rest is an estimate: let the run try
        return (
            f"The run may need {total / _GIB:.1f} GiB, but {_has(device, free)}. It starts, and may run out of memory. "
            f"{settings_that_fit(config, free)}"
        )
    other = "Is another process using it (`nvidia-smi`)? " if device.type == "cuda" else ""
    raise UserError(
        f"Weights, gradients and optimizer alone take {permanent / _GIB:.1f} GiB (about {total / _GIB:.1f} GiB with "
        f"activations), but {_has(device, free)}. {other}{settings_that_fit(config, free)}"
    )


def settings_that_fit(config: MemoryConfig, free: float) -> str:
    """Return a sentence with the settings that fit in `free` bytes: those closest to the run's, at most three."""
    usable = free * (1 - RESERVE)
    dtypes = [config.dtype, *([torch.bfloat16] if config.dtype == torch.float32 else [])]
    formats = BASE_DTYPES if config.lora.enable else BASE_DTYPES[:1]
    rows = [
        row | {"param_dtype": DTYPE_NAMES[dtype]}
        for dtype in dtypes
        for row in memory_rows(dataclasses.replace(config, dtype=dtype), formats, usable)
    ]
    keys = ("param_dtype", "base_dtype", "checkpoint")
    shown = [", ".join(f"`{key}: {str(row[key]).lower()}`" for key in keys) for row in rows]
    if fitting := [text for text, row in zip(shown, rows, strict=True) if row["fits"]]:
        return f"With `seq_len: {config.seq_len}` these fit: {'; '.join(fitting[:3])}."
    text, longest = max(zip(shown, rows, strict=True), key=lambda pair: pair[1]["largest_seq_len"])
    if longest["largest_seq_len"]:
        return f"The longest that fits is `seq_len: {longest['largest_seq_len']}` with {text}."
    more = "more GPUs, `cpu_offload: true`" if config.device == "cuda" else "a machine with more memory"
    return f"Otherwise use {more}, a smaller `lora.rank` or a smaller model: no other setting is enough."


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
