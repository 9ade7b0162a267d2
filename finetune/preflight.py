"""What can be known to fail before anything is loaded."""

import shutil
import socket
from pathlib import Path

import torch

from model.errors import UserError

from .args import TrainArgs
from .distributed import World
from .hardware import Hardware
from .utils import saved_checkpoints
from .wrapped_model import BaseModel, empty_model

_GIB = 1024**3
_TRAINED_BYTES = 3 * 4  # per trained parameter, in fp32: itself and Adam's two moments


def check_preflight(base: BaseModel, args: TrainArgs, hardware: Hardware, run_dir: Path, world: World) -> None:
    """Checks that ranks reach each other and that memory and disk hold what is planned.

    Raises:
        UserError: on every rank, with what is missing.
    """
    world.sum(torch.ones((), device=world.device))  # where ranks cannot reach each other, it shows here
    parameters = [(p.numel(), p.requires_grad) for p in empty_model(base, args, hardware).parameters()]
    trained = sum(count for count, trains in parameters if trains)
    frozen = sum(count for count, trains in parameters if not trains)
    exported = trained if args.save_adapters else trained + frozen
    checkpoint_bytes = exported * hardware.dtype.itemsize + trained * _TRAINED_BYTES
    weights_bytes = (frozen * hardware.dtype.itemsize + trained * (_TRAINED_BYTES + 4)) / world.size
    world.together(lambda: check_memory(hardware.device, weights_bytes))
    if not args.no_ckpt:
        world.together(
            lambda: check_disk(run_dir, checkpoint_bytes, _planned(args, run_dir)) if world.is_master else None
        )


def _planned(args: TrainArgs, run_dir: Path) -> int:
    """Checkpoints there will be at once beside those there are: the kept ones, and the one being written."""
    saved = -(-args.max_steps // args.ckpt_freq) if args.ckpt_freq else 1
    if args.keep_best:
        saved += -(-args.max_steps // args.eval_freq) if args.eval_freq else 1
    most = saved if args.num_ckpt_keep is None else min(saved, args.num_ckpt_keep + 1 + args.keep_best)
    return max(1, most - len(saved_checkpoints(run_dir / "checkpoints")))


def check_shared(run_dir: Path) -> None:
    """Raises UserError where a process does not see the run folder that rank 0 made."""
    if not (run_dir / "args.yaml").is_file():
        raise UserError(
            f"A process on {socket.gethostname()} does not see the run folder {run_dir}: `run_dir` must lie on a file "
            "system that all nodes share."
        )


def check_disk(run_dir: Path, checkpoint_bytes: float, planned: int) -> None:
    """Raises UserError where the disk of `run_dir` has no room for `planned` checkpoints."""
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes * planned
    if free < needed:
        raise UserError(
            f"The disk of {folder} has {free / _GIB:.1f} GiB free; {planned} more checkpoints of "
            f"{checkpoint_bytes / _GIB:.1f} GiB need {needed / _GIB:.1f} GiB. Free some, choose another `run_dir`, or "
            "lower `num_ckpt_keep`."
        )


def check_memory(device: torch.device, needed: float) -> None:
    """Raises UserError where a GPU has not `needed` bytes free."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < needed:
        raise UserError(
            f"{device} ({torch.cuda.get_device_name(device)}) has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free; "
            f"weights, gradients and optimizer alone take {needed / _GIB:.1f} GiB. Does another process use it "
            "(`nvidia-smi`)? Else use more GPUs, a smaller `lora.rank` or a smaller model."
        )


def out_of_memory_advice(error: Exception, args: TrainArgs, rank: int) -> str:
    """What to change after a GPU ran out of memory."""
    advice = [
        *([] if args.checkpoint else ["`checkpoint: true`"]),
        *([f"a smaller `batch_size` (now {args.batch_size})"] if args.batch_size > 1 else []),
        f"a smaller `seq_len` (now {args.seq_len})",
        *([f"a smaller `lora.rank` (now {args.lora.rank})"] if args.lora.enable else []),
        "more GPUs",
    ]
    return f"The GPU of process {rank} is out of memory: {str(error).splitlines()[0]} Use " + ", ".join(advice) + "."
