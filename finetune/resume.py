"""Where a run stands: taken down in each checkpoint's `state` folder, and gone on from.

`state/` holds the trained parameters and the optimizer's tensors in the shards of torch.distributed.checkpoint (as
safetensors: nothing that is loaded can run code), `run.json` (what all ranks share) and a `rank_*.json` each (place in
the data, random numbers). Another number of ranks can load the tensors too.
"""

import base64
import dataclasses
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from model.errors import UserError, first_line
from model.transformer import Transformer

from .args import TrainArgs
from .data.args import DataArgs
from .data.data_loader import TrainLoader
from .distributed import World
from .eval import EarlyStopping
from .guards import AnomalyDetector
from .manifest import find_corruption
from .mixed_precision import LossScaler
from .run_dir import TEMPORARY_ARGS_NAME, WEIGHTS_NAME, find_checkpoint, saved_checkpoints
from .utils import TrainState
from .wrapped_model import ADAPTER_NAME

logger = logging.getLogger("resume")

STATE_NAME = "state"
RUN_NAME = "run.json"

# Settings that may change when a run is continued: they alter neither its data nor its model.
_FREE = {
    *("run_dir", "resume", "world_size", "checkpoint", "compile", "attention", "sharding", "cpu_offload", "guards"),
    *("log_freq", "wandb", "mlflow", "ckpt_freq", "save_adapters", "no_ckpt", "num_ckpt_keep", "keep_best"),
    *("eval_freq", "no_eval", "data.eval_instruct_data", "eval_generation", "early_stopping"),
}


@dataclasses.dataclass(frozen=True)
class RunState:
    """All that changes while a run trains."""

    model: Transformer
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: LossScaler
    progress: TrainState
    early_stopping: EarlyStopping
    guards: AnomalyDetector
    batches: TrainLoader

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained parameters and the optimizer's state: the tensors themselves, or this rank's shards of them."""
        _fill_in(self.optimizer)
        options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        parts = {"model": model, "optimizer": optimizer}
        entries = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
        return {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}

    def of_rank(self) -> dict[str, Any]:
        """What each rank has of its own, as JSON can hold it."""
        return {"data": self.batches.state_dict(), "random": _random_state()}

    def of_run(self, args: TrainArgs, world: World) -> dict[str, Any]:
        """What all ranks share, as JSON can hold it. Every rank must ask: some of it is summed up."""
        trained_tokens = int(world.sum(torch.tensor(self.progress.trained_tokens)).item())
        return {
            "progress": self.progress.state_dict() | {"trained_tokens": trained_tokens},
            "best_so_far": self.early_stopping.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guards": self.guards.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.get_last_lr()},
            "groups": [_settings(group) for group in self.optimizer.param_groups],
            "world_size": world.size,
            "args": args.to_dict(),
        }

    def restore(self, saved: "SavedState", args: TrainArgs, world: World) -> None:
        """Continues from `saved` on every rank; the data loader has been told its place before.

        Raises:
            UserError, SystemExit: the state cannot be read, on every rank.
        """
        tensors = self.tensors()
        world.run_everywhere(lambda: _load(tensors, saved.folder, world))
        run = saved.run
        self.progress.load_state_dict(run["progress"])
        self.progress.checkpoint = saved.folder.parent / WEIGHTS_NAME
        if not world.is_master:
            self.progress.trained_tokens = 0  # the sum of all ranks goes on at one of them
        if saved.measures_as(args):
            self.early_stopping.load_state_dict(run["best_so_far"])
        self.scaler.load_state_dict(run["scaler"])
        self.guards.load_state_dict(run["guards"])
        self.schedule.last_epoch = run["schedule"]["last_epoch"]
        self.schedule._last_lr = run["schedule"]["last_lr"]
        for group, settings in zip(self.optimizer.param_groups, run["groups"], strict=True):
            group.update({name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
        if own := saved.of_rank(world):
            _set_random_state(own["random"])


@dataclasses.dataclass(frozen=True)
class SavedState:
    """A checkpoint's `state` folder, checked."""

    folder: Path
    run: dict[str, Any]

    @property
    def step(self) -> int:
        return self.run["progress"]["step"]

    @property
    def max_steps(self) -> int:
        return self.run["args"]["max_steps"]

    def measures_as(self, args: TrainArgs) -> bool:
        """Whether evaluations before and after can be compared, and the best checkpoint is in the same run folder."""
        before, now = self.run["args"], args.to_dict()
        same_data = before["data"]["eval_instruct_data"] == now["data"]["eval_instruct_data"]
        same_folder = Path(args.run_dir).resolve() in self.folder.resolve().parents
        return same_data and before["eval_generation"] == now["eval_generation"] and same_folder

    def of_rank(self, world: World) -> dict[str, Any] | None:
        """What this rank had of its own; None where another number of ranks was at work."""
        if self.run["world_size"] != world.size:
            return None
        return json.loads((self.folder / rank_name(world.rank)).read_text(encoding="utf-8"))


def rank_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def find_saved_state(args: TrainArgs, run_dir: Path, world: World) -> SavedState | None:
    """Where the run goes on, as `resume` says; None: it starts. Asked on every rank, found by rank 0.

    Raises:
        UserError: the run folder holds something else, there is nothing sound to go on from, or a setting changed
            that makes it another run.
    """
    checkpoint = world.run_everywhere(lambda: _choose_checkpoint(args.resume, run_dir) if world.is_master else None)
    checkpoint = world.gather(checkpoint)[0]
    if checkpoint is None:
        return None
    saved = world.run_everywhere(lambda: _open(checkpoint, args))
    logger.info("Goes on from %s, behind step %d", checkpoint, saved.step)
    if saved.run["world_size"] != world.size:
        logger.warning(
            "The run was at work with %d processes and goes on with %d: weights, optimizer and schedule continue; the "
            "rows are dealt out anew from the first epoch on, so some are seen again, and a step takes %d sequences "
            "instead of %d, of as many steps in all.",
            saved.run["world_size"],
            world.size,
            args.batch_size * args.num_microbatches * world.size,
            args.batch_size * args.num_microbatches * saved.run["world_size"],
        )
    return saved


def _choose_checkpoint(resume: str, run_dir: Path) -> Path | None:
    # os.path.exists is not put off by names that no file can have.
    inhabited = os.path.exists(run_dir) and not (run_dir.is_dir() and set(os.listdir(run_dir)) <= {TEMPORARY_ARGS_NAME})
    seed = None if resume in ("never", "auto") else Path(resume)
    if inhabited and resume == "never":
        raise UserError(
            f"The run folder {run_dir} already exists. Set `resume: auto` to go on with that run, choose another "
            "`run_dir`, or move it away first."
        )
    if inhabited and not (run_dir / "args.yaml").is_file():
        raise UserError(f"The run folder {run_dir} is not empty and holds no run (no args.yaml). Choose another.")
    if inhabited:
        if newest := _newest_sound_checkpoint(run_dir):
            return newest
        logger.warning("The run in %s had not saved a checkpoint yet; it starts again.", run_dir)
    return seed and _sound(find_checkpoint(seed))


def _sound(chosen: Path) -> Path:
    if not (chosen / STATE_NAME / RUN_NAME).is_file():
        raise UserError(f"`resume`: {chosen} is no checkpoint to go on from: it holds no {STATE_NAME}/{RUN_NAME}.")
    if fault := find_corruption(chosen):
        raise UserError(f"`resume`: the checkpoint {chosen} is damaged: {fault}. Name an earlier one.")
    return chosen


def _newest_sound_checkpoint(run_dir: Path) -> Path | None:
    saved = saved_checkpoints(run_dir / "checkpoints")
    for checkpoint in reversed(saved):
        if not (checkpoint / STATE_NAME).is_dir():
            continue  # weights alone, as mistral-finetune saves them
        if not (fault := find_corruption(checkpoint)):
            return checkpoint
        logger.warning("The checkpoint %s is damaged (%s); trying the one before.", checkpoint, fault)
    if saved:
        raise UserError(f"None of the checkpoints in {run_dir} can be gone on from. Choose another `run_dir`.")
    return None


def _open(checkpoint: Path, args: TrainArgs) -> SavedState:
    folder = checkpoint / STATE_NAME
    run = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
    before, now = _completed(run["args"], TrainArgs(DataArgs(), "", "").to_dict()), args.to_dict()
    # Epochs are not counted again; and max_steps may take their place where it says the same.
    key = "epochs" if args.epochs is None else "max_steps"
    now[key] = before[key]
    if changes := _changes(before, now):
        longer = any((now[key] or 0) > (before[key] or 0) for key in ("epochs", "max_steps"))
        raise UserError(
            f"The run in {checkpoint} cannot go on with other settings for its data or model:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\nSet them back, or start a new run with another `run_dir`."
            + (f" To train for more steps, start one from these weights: {_as_start(checkpoint)}." if longer else "")
        )
    return SavedState(folder, run)


def _as_start(checkpoint: Path) -> str:
    weights = checkpoint / WEIGHTS_NAME
    key = "lora.from_adapter" if (weights / ADAPTER_NAME).is_file() else "model_id_or_path"
    return f"`{key}: {weights}`"


def _completed(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """With the settings that did not exist yet when a run was saved: their defaults are what it did."""
    inner = {key: value for key, value in settings.items() if isinstance(value, dict)}
    return defaults | settings | {key: _completed(value, defaults.get(key) or {}) for key, value in inner.items()}


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """One line per setting that differs and must not; JSON has made lists of tuples."""
    found = []
    for key in {**before, **now}:
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if name in _FREE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{name}.")
        elif old != new:
            found.append(f"`{name}` is {new!r}, it was {old!r}")
    return found


def _fill_in(optimizer: Optimizer) -> None:
    """Gives Adam the state it starts from where it has none yet: no step has been taken, or all were skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                # As the optimizers themselves do it: the step's number stays on the CPU unless they are fused.
                state["step"] = torch.zeros((), device=parameter.device if group.get("fused") else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _load(tensors: dict[str, torch.Tensor], folder: Path, world: World) -> None:
    """Fills this rank's `tensors` from `folder`."""
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"The state in {folder} cannot be loaded: {first_line(error)}") from error


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *position],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
