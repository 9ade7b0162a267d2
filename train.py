"""Fine-tunes a Mistral model: `torchrun --nproc-per-node N -m train CONFIG.yaml` (or plain `python -m train`)."""

import contextlib
import dataclasses
import itertools
import logging
import math
import warnings
from pathlib import Path

import fire
import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from tqdm import tqdm

from finetune.args import TrainArgs, load_train_args
from finetune.checkpointing import Checkpointer
from finetune.cli import run_cli
from finetune.data.data_loader import Batch, TrainLoader, build_data_loader
from finetune.data.packing import PackingCounts
from finetune.data.tokenize import load_instruct_tokenizer
from finetune.distributed import World, init_world
from finetune.epochs import count_steps
from finetune.eval import EarlyStopping, Evaluator
from finetune.guards import AnomalyDetector
from finetune.hardware import choose_hardware, memory_bytes
from finetune.loss import batch_loss
from finetune.mixed_precision import LossScaler
from finetune.monitoring.metrics_logger import MetricsLogger, train_log_message, train_metrics
from finetune.monitoring.plot import draw_loss_curve
from finetune.monitoring.summary import summary
from finetune.monitoring.utils import set_up_logging
from finetune.optim import Schedule, build_optimizer
from finetune.preemption import EXIT_INTERRUPTED, stop_requests
from finetune.preflight import check_preflight, check_shared, out_of_memory_advice, resolve_checkpoint
from finetune.resume import RunState, find_saved_state
from finetune.run_dir import create_run_dir
from finetune.utils import TrainState, set_seed
from finetune.wrapped_model import build_model, open_base_model, trainable_parameters
from model.errors import UserError
from model.transformer import Transformer
from utils.icd10.scoring import answer_scores

logger = logging.getLogger("train")
_STOPPED = "Stopped by %s behind step %d. Checkpoint: %s. The same command with `resume: auto` goes on."


@dataclasses.dataclass(frozen=True)
class StepResult:
    loss: torch.Tensor  # scalar, this rank's part; the mean over ranks is the step's
    grad_norm: float  # of all ranks' mean gradient, before clipping
    lr: float  # what the step used
    skipped: bool  # the gradient was not finite and the weights are as they were


def train_step(
    model: Transformer,
    batches: list[Batch],
    optimizer: Optimizer,
    schedule: Schedule,
    scaler: LossScaler,
    max_norm: float,
    device: torch.device,
    tokens_per_rank: float | None = None,
) -> StepResult:
    """One optimizer step on the mean of the micro-batches' mean losses; gradients are averaged over ranks.

    With `tokens_per_rank`, the mean over ranks of a step's trained tokens, it is on the mean over all ranks' tokens: a
    micro-batch's mean counts as often as it has tokens, and the average over ranks then divides by the sum of all.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for batch in batches:
        microbatch_loss = batch_loss(model, batch, device)
        divisor = tokens_per_rank / batch.loss_weight if tokens_per_rank else len(batches)
        (microbatch_loss * (scaler.scale / divisor)).backward()
        loss += microbatch_loss.detach() / divisor

    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item() / scaler.scale
    lr = schedule.get_last_lr()[0]
    finite = math.isfinite(grad_norm)
    if finite:
        # Unscales and clips at once. The 1e-6 is that of clip_grad_norm_.
        torch._foreach_mul_(gradients, min(1.0, max_norm / (grad_norm + 1e-6)) / scaler.scale)
        optimizer.step()
    scaler.update(finite)
    if schedule.last_epoch < schedule.total_steps - 1:  # there is no rate beyond the last step's
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # where the first step is skipped
            schedule.step()
    return StepResult(loss, grad_norm, lr, skipped=not finite)


def count_tokens_per_rank(batches: list[Batch], world: World) -> float:
    """The mean over ranks of the tokens that a step trains on, each counting as its message's weight says."""
    own = sum(batch.loss_weight for batch in batches)
    return world.mean(torch.tensor(own, dtype=torch.float64)).item()


def train(config: str) -> None:
    """Trains as the YAML file `config` says."""
    with init_world() as world:
        set_up_logging(world.rank)
        args = world.run_everywhere(lambda: load_train_args(Path(config)))
        try:
            run(args, world)
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory_advice(error, args, world.rank)) from error


def run(args: TrainArgs, world: World) -> None:
    """Trains as `args` say, on every rank. Whatever the user can get wrong is found before the run folder exists."""
    run_dir = Path(args.run_dir)
    set_seed(args.seed)
    base = world.run_everywhere(lambda: open_base_model(args))
    hardware = world.run_everywhere(lambda: choose_hardware(world.device, args.param_dtype, args.attention, base.args))
    tokenizer = world.run_everywhere(lambda: load_instruct_tokenizer(base.folder, base.args.vocab_size))
    args = dataclasses.replace(args, world_size=world.size, **hardware.settings())
    args = resolve_checkpoint(base, args, hardware, world)
    check_preflight(base, args, hardware, run_dir, world)
    saved = find_saved_state(args, run_dir, world)
    batches = world.run_everywhere(
        lambda: build_data_loader(
            tokenizer, args.data, args.batch_size, args.seq_len, args.seed, world.rank, world.size, is_eval=False
        )
    )
    if saved and (own := saved.of_rank(world)):
        world.run_everywhere(lambda: batches.load_state_dict(own["data"]))
    if args.epochs is not None:
        args = dataclasses.replace(args, max_steps=saved.max_steps if saved else count_steps(args, batches, world))
    world.run_everywhere(batches.wait_for_first)
    examiner = Evaluator(args, tokenizer, answer_scores, world)
    world.run_everywhere(lambda: create_run_dir(run_dir, args) if world.is_master else None)
    world.run_everywhere(lambda: check_shared(run_dir))
    logger.info("Run dir: %s on %d x %s", run_dir, world.size, hardware.describe())
    for remark in args.remarks() if world.is_master else ():
        logger.warning(remark)

    model = build_model(base, args, hardware, world)
    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
    scaler = LossScaler(hardware.dtype)
    checkpointer = Checkpointer(model, tokenizer, args, run_dir, hardware.dtype, world)
    guards = AnomalyDetector(args.guards, run_dir / "anomalies", world.rank)
    state, early_stopping = TrainState(args.max_steps), EarlyStopping(args.early_stopping)
    run_state = RunState(model, optimizer, schedule, scaler, state, early_stopping, guards, batches)
    if saved:
        run_state.restore(saved, args, world)
    checkpointer.recover(state.step)

    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        sinks = (args.wandb, args.mlflow, args.to_dict(), world.is_master)
        train_log = stack.enter_context(MetricsLogger(run_dir, "train", *sinks, purge_step=saved and saved.step + 1))
        eval_log = stack.enter_context(MetricsLogger(run_dir, "eval", *sinks))
        stack.push(world.announce)
        training_loop(run_state, args, examiner, checkpointer, train_log, eval_log, world)
    finish(state, batches, run_dir, world)


def training_loop(
    run: RunState,
    args: TrainArgs,
    examiner: Evaluator,
    checkpointer: Checkpointer,
    train_log: MetricsLogger,
    eval_log: MetricsLogger,
    world: World,
) -> None:
    """Trains from where `run` stands to the last step, or until evaluations find nothing better any more.

    Raises:
        UserError: a guard or the disk ends the run, on every rank.
        SystemExit: a signal does, behind a saved step.
    """
    model, state, early_stopping = run.model, run.progress, run.early_stopping
    with progress_bar(state, world) as bar, stop_requests() as stop:
        if state.step == 0 and (metrics := examiner.examine(model, state)):
            eval_log.log(metrics, 0)

        while state.step < args.max_steps and not early_stopping.should_stop:
            with state.timed_step(args.num_microbatches * args.batch_size * args.seq_len * world.size):
                batches = list(itertools.islice(run.batches, args.num_microbatches))
                tokens = count_tokens_per_rank(batches, world) if args.loss_normalization == "tokens" else None
                result = train_step(
                    model, batches, run.optimizer, run.schedule, run.scaler, args.max_norm, world.device, tokens
                )
            state.note(batches, result.skipped)
            bar.update()

            log_due = state.step % args.log_freq == 0
            complaint = run.guards.check_step(state, batches, result.skipped)
            if log_due or examiner.loss_due(state):
                state.record_loss(world.mean(result.loss).item())
                complaint = complaint or run.guards.check_loss(state, batches)
            if complaint:
                checkpointer.finish()
                world.raise_on_all(complaint)
            if log_due:
                log_step(state, result, run.scaler, train_log, world)

            if metrics := examiner.examine(model, state):
                eval_log.log(metrics, state.step)
            improved = early_stopping.improved(metrics) and args.keep_best
            stopping = world.any(bool(stop) or checkpointer.has_failed)
            save_due = improved or stopping or early_stopping.should_stop or state.due(args.ckpt_freq)
            if save_due and not args.no_ckpt:
                state.checkpoint = checkpointer.save(state.step, run, best=improved)
            if stopping and state.step < args.max_steps:
                checkpointer.finish()
                logger.warning(_STOPPED, stop, state.step, state.checkpoint)
                raise SystemExit(EXIT_INTERRUPTED)
        checkpointer.finish()


def progress_bar(state: TrainState, world: World) -> tqdm:
    """A bar on rank 0, where somebody watches."""
    hidden = None if world.is_master else True
    return tqdm(total=state.max_steps, initial=state.step, unit="step", disable=hidden)


def log_step(state: TrainState, result: StepResult, scaler: LossScaler, log: MetricsLogger, world: World) -> None:
    """Prints and records what a step was like."""
    peak_bytes, allocated_bytes = memory_bytes(world.device)
    memory = {"peak_bytes": peak_bytes, "allocated_bytes": allocated_bytes}
    metrics = train_metrics(**state.progress(), lr=result.lr, **memory)
    logger.info(train_log_message(metrics))
    metrics |= {"grad_norm": result.grad_norm, "skipped_steps": state.skipped_steps}
    log.log(metrics | ({"loss_scale": scaler.scale} if scaler.enabled else {}), state.step)


def finish(state: TrainState, batches: TrainLoader, run_dir: Path, world: World) -> None:
    """Draws and prints what the run came to."""
    trained_tokens = int(world.sum(torch.tensor(state.trained_tokens)).item())
    packing = PackingCounts(*world.sum(torch.tensor(dataclasses.astuple(batches.counts))).tolist())
    if world.is_master:
        draw_loss_curve(run_dir)
        facts = state.totals() | {"trained_tokens": trained_tokens, "packing": dataclasses.asdict(packing)}
        logger.info(summary(**facts, peak_bytes=memory_bytes(world.device)[0]))


def command(config: str = "", *more: str, **flags: str) -> None:
    """Trains as the YAML file CONFIG says."""
    if not config:
        raise UserError("Name a YAML file: python -m train CONFIG.yaml. The folder example/ has some.")
    if more or flags:  # fire would train first and complain then
        given = " ".join([*map(str, more), *(f"--{name}" for name in flags)])
        raise UserError(f"`{given}` is not understood: every setting stands in the YAML file, the only argument.")
    train(str(config))


if __name__ == "__main__":
    run_cli(lambda: fire.Fire(command))
