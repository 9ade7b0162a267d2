"""Everything before the first step: settings resolved, inputs checked, the model built, a saved state restored."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from model.args import ParamDtype

from .anomalies import AnomalyDetector
from .args import TrainArgs
from .batch_tensors import prepare_for_gpu
from .checkpointing import Checkpointer
from .data.data_loader import TrainLoader, build_data_loader
from .data.tokenizer_files import load_instruct_tokenizer, tokenizer_warnings
from .data.word_cache import cache_words
from .distributed import World
from .epochs import count_epoch_steps, count_steps
from .eval import EarlyStopping, Evaluator, Scoring
from .fingerprints import Fingerprints, fingerprints
from .hardware import Hardware, choose_compile, choose_hardware, enable_tf32
from .mixed_precision import DTYPE_NAMES, LossScaler, choose_dtype
from .monitoring.metrics_logger import MetricsLogger
from .optim import build_optimizer
from .preemption import clear_interrupted
from .preflight import check_preflight, check_shared, resolve_checkpoint
from .resume import RunState, SavedState, find_saved_state
from .run_dir import create_run_dir, how_to_continue
from .schedules import Plan
from .speed_estimate import expected_time
from .utils import TrainState, set_seed
from .wrapped_model import BaseModel, build_model, open_base_model, trainable_parameters

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

logger = logging.getLogger("train")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run trains on: checked and opened, but no weights loaded yet."""

    args: TrainArgs  # complete: `auto` and `epochs` are resolved
    base: BaseModel
    hardware: Hardware
    tokenizer: InstructTokenizerBase
    data_loader: TrainLoader
    evaluator: Evaluator
    saved: SavedState | None  # to resume from
    plan: Plan  # the steps that the schedule spans
    fingerprints: Fingerprints
    epoch_steps: float | None  # if they had to be counted


@dataclasses.dataclass(frozen=True)
class Run(RunState):
    """A run in progress: the state that a checkpoint restores, and what observes and saves it."""

    args: TrainArgs
    world: World
    evaluator: Evaluator
    checkpointer: Checkpointer
    train_log: MetricsLogger
    eval_log: MetricsLogger


def resolve(args: TrainArgs, world: World, score: Scoring) -> Inputs:
    """Check and open everything a run needs, so that a user's mistake is found before the run folder exists.

    Raises:
        UserError, SystemExit: on every rank, for the first mistake found on any.
    """
    for warning in args.warnings(world.size) if world.is_master else ():
        logger.warning(warning)
    set_seed(args.seed)
    saved = find_saved_state(args, Path(args.run_dir), world)
    with world.synchronized_errors():
        base = open_base_model(args)
    args = dataclasses.replace(args, param_dtype=_agreed_dtype(args.param_dtype, base, saved, world))
    with world.synchronized_errors():
        hardware = choose_hardware(world.device, args.param_dtype, args.attention, base.args)
        tokenizer = load_instruct_tokenizer(base.folder, base.args.vocab_size)
        cache_words(tokenizer)
        no_tf32 = enable_tf32(hardware) if args.tf32 else None
        compile_here = choose_compile(args.compile, hardware.device)
        if world.is_master:
            base.require_intact()
    if world.is_master:
        if no_tf32:
            logger.warning("`tf32: true` has no effect: %s.", no_tf32)
        for warning in tokenizer_warnings(base.folder, tokenizer, base.args.vocab_size):
            logger.warning(warning)
    args = dataclasses.replace(args, world_size=world.size, compile=compile_here, **hardware.settings())
    args = resolve_checkpoint(base, args, hardware, world)
    check_preflight(base, args, hardware, Path(args.run_dir), world)

    with world.synchronized_errors():
        if saved:
            saved.require_same_settings(args)
        data_loader = build_data_loader(
            *(tokenizer, args.data, args.batch_size, args.seq_len, args.seed, world.rank, world.size),
            is_eval=False,
            prepare=prepare_for_gpu if world.device.type == "cuda" else None,
        )
        inputs = fingerprints(args, base, tokenizer, data_loader) if world.is_master else {}
        if saved and world.is_master:
            saved.require_same_inputs(inputs, base.folder)
    inputs = world.gather(inputs)[0]
    # The number of steps of a resumed run is in its checkpoint, unless its length has changed.
    counted = args.epochs is not None and (saved is None or saved.changes_length(args))
    epoch_steps = count_epoch_steps(args, data_loader, world) if counted or args.acts_each_epoch else None
    if args.epochs is not None:
        max_steps = count_steps(args.epochs, cast(float, epoch_steps)) if counted else cast(SavedState, saved).max_steps
        args = dataclasses.replace(args, max_steps=max_steps)
    with world.synchronized_errors():
        plan = saved.next_plan(args) if saved else Plan(0, args.max_steps)
        if saved and (own := saved.of_rank(world)):
            data_loader.load_state_dict(own["data"])
        data_loader.wait_for_first()
    evaluator = Evaluator(args, tokenizer, score, world)
    return Inputs(args, base, hardware, tokenizer, data_loader, evaluator, saved, plan, inputs, epoch_steps)


def _agreed_dtype(
    name: Literal["auto", ParamDtype], base: BaseModel, saved: SavedState | None, world: World
) -> Literal["auto", ParamDtype]:
    """Resolve `param_dtype: auto` for all ranks, which may measure different rates on a CPU.

    There, a resumed run keeps its dtype.
    """
    if name == "auto" and saved and world.device.type == "cpu":
        name = saved.run["args"]["param_dtype"]
    if name == "auto":
        name = world.gather(DTYPE_NAMES[choose_dtype(name, world.device, base.args)])[0]
    return name


@contextlib.contextmanager
def set_up(inputs: Inputs, world: World) -> Iterator[Run]:
    """Build the model, create the run folder, restore the saved state if there is one; close everything at the end."""
    args, hardware, saved, run_dir = inputs.args, inputs.hardware, inputs.saved, Path(inputs.args.run_dir)
    with world.synchronized_errors():
        model = build_model(inputs.base, args, hardware, world)
    with world.synchronized_errors():
        if world.is_master:
            create_run_dir(run_dir, args)
            clear_interrupted(run_dir)
    with world.synchronized_errors():
        check_shared(run_dir)
    if world.is_master:
        logger.info("Run dir: %s on %d x %s", run_dir, world.size, hardware.describe())
        if gpu := hardware.gpu():
            steps = args.max_steps - (saved.step if saved else 0)
            logger.info(expected_time(args, inputs.base.args, gpu, world.size, steps))

    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps, inputs.plan)
    with contextlib.ExitStack() as stack:
        stack.callback(inputs.data_loader.close)
        trackers = (args.wandb, args.mlflow, args.to_dict(), world.is_master)
        purge_step = saved.step + 1 if saved else None
        run = Run(
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            plan=inputs.plan,
            scaler=LossScaler(hardware.dtype),
            state=TrainState(args.max_steps, inputs.epoch_steps),
            early_stopping=EarlyStopping(args.early_stopping),
            anomalies=AnomalyDetector(args.guards, run_dir / "anomalies", world.rank),
            data_loader=inputs.data_loader,
            fingerprints=inputs.fingerprints,
            args=args,
            world=world,
            evaluator=inputs.evaluator,
            checkpointer=Checkpointer(model, inputs.tokenizer, args, run_dir, hardware.dtype, world),
            train_log=stack.enter_context(MetricsLogger(run_dir, "train", *trackers, purge_step=purge_step)),
            eval_log=stack.enter_context(MetricsLogger(run_dir, "eval", *trackers)),
        )
        world.show_progress(lambda: f"after step {run.state.step}", lambda: how_to_continue(run_dir))
        stack.push(world.report_failure)  # called first on exit: closing the trackers may take long
        if saved:
            run.restore(saved, args, world)
        run.checkpointer.recover(run.state.step)
        yield run
