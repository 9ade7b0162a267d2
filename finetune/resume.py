"""The resumable state of a run, in each checkpoint's `state` folder.

`state/` contains the trained parameters and the optimizer's tensors as sharded by torch.distributed.checkpoint (in
safetensors, so loading cannot execute code), `run.json` (what all ranks share) and one `rank_*.json` per rank (data
position, RNG state). A different number of ranks can load the tensors, too.
"""

import base64
import dataclasses
import logging
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch.optim import Optimizer

from model.errors import UserError, first_line
from model.transformer import Transformer

from .anomalies import AnomalyDetector
from .args import TrainArgs
from .data.data_loader import TrainLoader
from .distributed import World
from .eval import EarlyStopping
from .fingerprints import Fingerprints, require_same_inputs
from .manifest import find_corruption
from .mixed_precision import LossScaler
from .optim import initialize_state
from .run_dir import LOCK_NAME, TEMPORARY_ARGS_NAME, WEIGHTS_NAME, find_checkpoint, saved_checkpoints
from .schedules import OPEN_ENDED, Plan, PlateauSchedule, Schedule, step_schedule
from .state_files import RankRecord, RunRecord, read_state_file
from .utils import TrainState

logger = logging.getLogger("resume")

STATE_NAME = "state"
RUN_NAME = "run.json"

# Settings that may change when a run is resumed: they affect neither data nor model nor schedule. A run whose length
# changes is planned again, and may change those of the schedule, too.
_FREE = {
    *("run_dir", "resume", "world_size", "checkpoint", "compile", "attention", "sharding", "cpu_offload", "guards"),
    *("log_freq", "wandb", "mlflow", "ckpt_freq", "save_adapters", "no_ckpt", "num_ckpt_keep", "keep_best"),
    *("eval_freq", "no_eval", "eval_batch_size", "data.eval_instruct_data", "eval_generation", "early_stopping"),
}
_OF_EVALUATION = {"eval_freq", "no_eval", "data.eval_instruct_data"}  # on which `reduce_lr_on_plateau` depends
_OF_LENGTH = {"epochs", "max_steps"}
_OF_PLAN = {
    *("max_norm", "optim.schedule", "optim.lr", "optim.weight_decay", "optim.pct_start", "optim.div_factor"),
    *("optim.final_div_factor", "optim.momentum", "optim.num_cycles", "optim.power", "optim.factor", "optim.patience"),
}


@dataclasses.dataclass(frozen=True)
class RunState:
    """Everything that changes while a run trains."""

    model: Transformer
    optimizer: Optimizer
    schedule: Schedule
    plan: Plan  # the steps that the schedule spans
    scaler: LossScaler
    state: TrainState
    early_stopping: EarlyStopping
    anomalies: AnomalyDetector
    data_loader: TrainLoader
    fingerprints: Fingerprints

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters and the optimizer's state, without copies; this rank's shards if sharded."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        initialize_state(self.optimizer)
        options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        entries: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
        entries |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        return {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}

    def of_rank(self) -> dict[str, Any]:
        """Return this rank's own state, JSON-serializable."""
        return {"data": self.data_loader.state_dict(), "random": _random_state()}

    def of_run(self, args: TrainArgs, world: World) -> dict[str, Any]:
        """Return the state that all ranks share, JSON-serializable. A collective operation."""
        trained_tokens = int(world.sum(torch.tensor(self.state.trained_tokens)).item())
        return {
            "progress": self.state.state_dict() | {"trained_tokens": trained_tokens},
            "best_so_far": self.early_stopping.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guards": self.anomalies.state_dict(),
            "schedule": self._schedule_state(),
            "groups": [_settings(group) for group in self.optimizer.param_groups],
            "world_size": world.size,
            "args": args.to_dict(),
            "fingerprints": self.fingerprints,
        }

    def restore(self, saved: "SavedState", args: TrainArgs, world: World) -> None:
        """Restore `saved` on every rank, except for the data loader, which needs its position before its first batch.

        Raises:
            UserError, SystemExit: on every rank, if the state cannot be loaded.
        """
        tensors = self.tensors()
        run, own = saved.run, saved.of_rank(world)
        with world.synchronized_errors():
            if len(run["groups"]) != len(self.optimizer.param_groups):
                raise UserError(f"{saved.folder / RUN_NAME} is of a run with another optimizer.")
            _load(tensors, saved.folder, world)
            if own:
                _set_random_state(own["random"], saved.folder)
        self.state.load_state_dict(run["progress"])
        self.state.checkpoint = saved.folder.parent / WEIGHTS_NAME
        if not world.is_master:
            self.state.trained_tokens = 0  # the saved number is the sum over ranks; rank 0 continues it
        if saved.evaluates_as(args, self.fingerprints):
            self.early_stopping.load_state_dict(run["best_so_far"])
            if self.early_stopping.should_stop and self.state.step < args.max_steps and world.is_master:
                logger.warning(
                    "Early stopping has ended this run after step %d; raise `early_stopping.patience` to train on.",
                    self.state.step,
                )
        self.scaler.load_state_dict(run["scaler"])
        self.anomalies.load_state_dict(run["guards"])
        if self.plan == saved.plan:  # otherwise the schedule begins here
            self._restore_schedule(run)
        if isinstance(self.schedule, PlateauSchedule) and saved.evaluates_same(args, self.fingerprints):
            self.schedule.load_plateau_state(run["schedule"].get("plateau") or {"best": None, "worse_since": 0})

    def _schedule_state(self) -> dict[str, Any]:
        schedule = self.schedule
        plateau = schedule.plateau_state() if isinstance(schedule, PlateauSchedule) else None
        state = {"last_epoch": schedule.last_epoch, "last_lr": schedule.get_last_lr()}
        return state | {"plan": dataclasses.asdict(self.plan), "plateau": plateau}

    def _restore_schedule(self, run: dict[str, Any]) -> None:
        self.schedule.last_epoch = run["schedule"]["last_epoch"]
        self.schedule._last_lr = run["schedule"]["last_lr"]
        for group, settings in zip(self.optimizer.param_groups, run["groups"], strict=True):
            group.update({name: tuple(v) if isinstance(v, list) else v for name, v in _settings(settings).items()})
        if self.schedule.last_epoch < self.state.step - self.plan.start:
            step_schedule(self.schedule)  # the run was saved after what was its last step and is longer now


@dataclasses.dataclass(frozen=True)
class SavedState:
    """The `state` folder of a valid checkpoint."""

    folder: Path
    run: dict[str, Any]

    @property
    def step(self) -> int:
        return self.run["progress"]["step"]

    @property
    def max_steps(self) -> int:
        return self.run["args"]["max_steps"]

    @property
    def plan(self) -> Plan:
        """The steps that the schedule of the saved run spans."""
        plan = self.run["schedule"].get("plan")
        return Plan(**plan) if plan else Plan(0, self.max_steps)

    def changes_length(self, args: TrainArgs) -> bool:
        """Return whether `args`, in which `epochs` are not counted yet, set another length.

        Only the key that is set now is compared: `max_steps` is also known of a run that was given its `epochs`.
        """
        key = "max_steps" if args.epochs is None else "epochs"
        changed: bool = getattr(args, key) != self.run["args"][key]
        return changed

    def next_plan(self, args: TrainArgs) -> Plan:
        """Return the steps that the schedule of a run with the complete settings `args` spans.

        An unchanged run keeps its plan, and so does an open-ended schedule. Otherwise the remaining steps are planned
        as a run of their own, whose first learning rate is the present one.

        Raises:
            UserError: the run has taken as many steps already.
        """
        same_settings = args.to_dict()["optim"] == self.run["args"]["optim"]
        if same_settings and args.max_steps == self.max_steps:
            return self.plan
        if args.max_steps <= self.step:
            raise UserError(
                f"The run in {self.folder.parent} has taken {self.step} of {self.max_steps} steps already and "
                f"would now end after {args.max_steps}: set `max_steps` or `epochs` higher."
            )
        is_open = same_settings and args.optim.schedule in OPEN_ENDED
        plan = self.plan if is_open else Plan(self.step, args.max_steps, self.run["schedule"]["last_lr"][0])
        logger.info(
            "The run now ends after step %d instead of %d. Its learning rate %s.",
            args.max_steps,
            self.max_steps,
            "continues: the schedule has no end"
            if is_open
            else f"is {plan.rate:g} now, and the rest is planned from there",
        )
        return plan

    def evaluates_same(self, args: TrainArgs, now_read: Fingerprints) -> bool:
        """Return whether `args` evaluate the loss on the same data."""
        before, now = self.run["args"], args.to_dict()
        recorded = self.run.get("fingerprints")
        same_data: bool = before["data"]["eval_instruct_data"] == now["data"]["eval_instruct_data"]
        return same_data and (not recorded or recorded["evaluation"] == now_read["evaluation"])

    def evaluates_as(self, args: TrainArgs, now_read: Fingerprints) -> bool:
        """Return whether `args` evaluate on the same data in the same run folder, so that the best so far is valid."""
        same_answers = self.run["args"]["eval_generation"] == args.to_dict()["eval_generation"]
        same_folder = Path(args.run_dir).resolve() in self.folder.resolve().parents
        return self.evaluates_same(args, now_read) and same_answers and same_folder

    def require_same_settings(self, args: TrainArgs) -> None:
        """Raise UserError if a setting has changed that affects data, model or schedule."""
        free = _FREE | _OF_LENGTH
        if args.optim.schedule == "reduce_lr_on_plateau":
            free -= _OF_EVALUATION
        if self.changes_length(args):
            free |= _OF_PLAN | _OF_EVALUATION
        if changes := _changes(self.run["args"], args.to_dict(), free):
            raise UserError(
                f"The run in {self.folder.parent} cannot be resumed: settings that affect data, model or schedule have "
                "changed:\n"
                + "\n".join(f"  - {change}" for change in changes)
                + "\nRestore them, or start a new run with another `run_dir`."
            )

    def of_rank(self, world: World) -> dict[str, Any] | None:
        """Return this rank's own state; None if the run was saved by a different number of ranks.

        Raises:
            UserError: the state cannot be read.
        """
        if self.run["world_size"] != world.size:
            return None
        return read_state_file(self.folder / rank_name(world.rank), RankRecord)

    def require_same_inputs(self, now: Fingerprints, model_folder: Path) -> None:
        """Raise UserError if data, base model or tokenizer are not those of the saved run."""
        if before := self.run.get("fingerprints"):
            require_same_inputs(before, now, model_folder)
        else:
            logger.warning(
                "%s is of an earlier version, which did not record the content of data and base model: make sure "
                "yourself that neither has changed.",
                self.folder.parent,
            )


def rank_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def find_saved_state(args: TrainArgs, run_dir: Path, world: World) -> SavedState | None:
    """Return the state to resume from, as configured by `resume`; None if the run starts from the beginning.

    Rank 0 chooses the checkpoint for all ranks.

    Raises:
        UserError, SystemExit: on every rank, if the run folder contains something else or no checkpoint is valid.
    """
    chosen: Path | None = None
    with world.synchronized_errors():
        if world.is_master:
            chosen = _choose_checkpoint(args.resume, run_dir)
    checkpoint = world.gather(chosen)[0]
    if checkpoint is None:
        return None
    with world.synchronized_errors():
        saved = _open(checkpoint)
    logger.info("Resuming from %s (step %d)", checkpoint, saved.step)
    if saved.run["world_size"] != world.size:
        logger.warning(
            "Resuming a %d-process run with %d processes: weights, optimizer and schedule continue; data is resharded "
            "from the first epoch, so some rows are repeated; a step has %d sequences instead of %d, and the number of "
            "steps is unchanged.",
            saved.run["world_size"],
            world.size,
            args.batch_size * args.num_microbatches * world.size,
            args.batch_size * args.num_microbatches * saved.run["world_size"],
        )
    return saved


def _choose_checkpoint(resume: str, run_dir: Path) -> Path | None:
    # os.path.exists, unlike Path.exists, does not raise for names that no file can have.
    unused = {TEMPORARY_ARGS_NAME, LOCK_NAME}  # left by a process that was killed before it created a run
    occupied = os.path.exists(run_dir) and not (run_dir.is_dir() and set(os.listdir(run_dir)) <= unused)
    seed = None if resume in ("never", "auto") else Path(resume)
    if occupied and resume == "never":
        raise UserError(
            f"The run folder {run_dir} already exists. Set `resume: auto` to continue that run, choose another "
            "`run_dir`, or move the folder away first."
        )
    if occupied and not (run_dir / "args.yaml").is_file():
        raise UserError(
            f"The run folder {run_dir} is not empty and does not contain a run (no args.yaml). Choose another."
        )
    if occupied:
        if latest := _latest_valid_checkpoint(run_dir):
            return latest
        logger.warning("The run in %s has no checkpoint yet; it starts from the beginning.", run_dir)
    return seed and _checked(find_checkpoint(seed))


def _checked(checkpoint: Path) -> Path:
    if not (checkpoint / STATE_NAME / RUN_NAME).is_file():
        raise UserError(f"`resume`: {checkpoint} is not a resumable checkpoint: it has no {STATE_NAME}/{RUN_NAME}.")
    if fault := find_corruption(checkpoint):
        raise UserError(f"`resume`: the checkpoint {checkpoint} is corrupt: {fault}. Choose an earlier one.")
    return checkpoint


def _latest_valid_checkpoint(run_dir: Path) -> Path | None:
    saved = saved_checkpoints(run_dir / "checkpoints")
    for checkpoint in reversed(saved):
        if not (checkpoint / STATE_NAME).is_dir():
            continue  # weights only, as mistral-finetune saves them
        if not (fault := find_corruption(checkpoint)):
            return checkpoint
        logger.warning("The checkpoint %s is corrupt (%s); trying the previous one.", checkpoint, fault)
    if saved:
        raise UserError(f"No checkpoint in {run_dir} can be resumed. Choose another `run_dir`.")
    return None


def _open(checkpoint: Path) -> SavedState:
    folder = checkpoint / STATE_NAME
    run = read_state_file(folder / RUN_NAME, RunRecord)
    try:
        before = TrainArgs.from_dict(run["args"]).to_dict()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        invalid = f"{folder / RUN_NAME} has invalid settings (`args.{key}`)"
        raise UserError(f"{invalid}. Resume from another checkpoint.") from None
    saved = SavedState(
        folder, run | {"args": before}
    )  # with defaults for settings that did not exist when it was saved
    step, plan = saved.step, saved.plan
    # A run that was shortened keeps an open-ended schedule, whose plan has the earlier length.
    longest_end = math.inf if before["optim"]["schedule"] in OPEN_ENDED else saved.max_steps
    starts_and_ends = plan.start <= step and plan.start < plan.end <= longest_end
    if not starts_and_ends or max(step, run["schedule"]["last_epoch"]) > saved.max_steps:
        raise UserError(
            f"{folder / RUN_NAME} is corrupt: it has more steps than its run. Resume from another checkpoint."
        )
    return saved


def _changes(before: dict[str, Any], now: dict[str, Any], free: set[str], prefix: str = "") -> list[str]:
    """Return one line per setting that differs but is not in `free`."""
    found = []
    for key in {**before, **now}:
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if name in free:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, free, f"{name}.")
        elif old != new:
            found.append(f"`{name}` is {new!r}, it was {old!r}")
    return found


def _load(tensors: dict[str, torch.Tensor], folder: Path, world: World) -> None:
    """Load this rank's `tensors` from `folder`, in place."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"The state in {folder} cannot be loaded: {first_line(error)}") from error


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *position],
        "torch": _base64(torch.get_rng_state()),
        "cuda": _base64(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any], folder: Path) -> None:
    version, words, gauss = state["python"]
    try:
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(_bytes(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(state["cuda"]))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"The state of the random generators in {folder} is corrupt: {first_line(error)}") from error


def _base64(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
