"""Fine-tune a Mistral model: `torchrun --nproc-per-node N -m train CONFIG.yaml`, or `python -m train CONFIG.yaml`.

All settings are in the YAML file: docs/configuration.md describes them, example/ has files to start from. Arguments
replace single ones: `python -m train CONFIG.yaml run_dir=runs/b optim.lr=1e-4`.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.cli import config_and_overrides, run_cli

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    from finetune.settings_help import train_help

    run_cli(lambda: print(train_help(__doc__)))
    sys.exit()  # before the imports below, which take seconds

import fire
import torch
from torch.optim import Optimizer
from tqdm import tqdm

from finetune.args import TrainArgs, load_train_args
from finetune.data.args import parse_sources
from finetune.data.data_loader import Batch
from finetune.data.packing import PackingCounts
from finetune.distributed import World, full_tensor, init_world
from finetune.hardware import memory_bytes
from finetune.loss import batch_loss
from finetune.mixed_precision import LossScaler
from finetune.monitoring.metrics_logger import train_log_message, train_metrics
from finetune.monitoring.plot import draw_loss_curve
from finetune.monitoring.summary import summary
from finetune.monitoring.utils import set_up_logging
from finetune.next_commands import after_training
from finetune.preemption import StopRequest, exit_interrupted, stop_requests
from finetune.preflight import out_of_memory_advice
from finetune.run import Run, resolve, set_up
from finetune.run_lock import locked_run_dir
from finetune.schedules import PlateauSchedule, Schedule, step_schedule
from model.errors import UserError
from model.transformer import Transformer
from utils.icd10.metrics import answer_scores

logger = logging.getLogger("train")


def train(config: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train as configured in the YAML file `config`, whose settings the `KEY=VALUE` strings in `overrides` replace."""
    with init_world() as world:
        set_up_logging(world.rank)
        with world.synchronized_errors():
            args = load_train_args(Path(config), overrides)
        # A time in its name may differ between processes.
        args = dataclasses.replace(args, run_dir=world.gather(args.run_dir)[0])
        run_training(args, world)


def run_training(args: TrainArgs, world: World) -> None:
    """Train as configured in `args`, on every rank."""
    with locked_run_dir(Path(args.run_dir), world), advice_on_memory(args, world):
        with set_up(resolve(args, world, answer_scores), world) as run, advice_on_memory(args, world):
            training_loop(run)
        log_summary(run)


@contextlib.contextmanager
def advice_on_memory(args: TrainArgs, world: World) -> Iterator[None]:
    """Turn an error of exhausted memory into a UserError that names the settings to change."""
    try:
        yield
    except Exception as error:
        if advice := out_of_memory_advice(error, args, world.rank):
            raise UserError(advice) from error
        raise


def training_loop(run: Run) -> None:
    """Train from the current step to `max_steps`, or until early stopping.

    Raises:
        UserError: on every rank, if an anomaly or the disk ends the run.
        SystemExit: after a signal, see `finish_step`.
    """
    args, world, state = run.args, run.world, run.state
    step_tokens = args.num_microbatches * args.batch_size * args.seq_len * world.size
    bar = tqdm(total=args.max_steps, initial=state.step, unit="step", disable=None if world.is_master else True)
    with bar, stop_requests(run.world.size > 1) as stop:
        if state.evaluation_pending:  # before the first step, or because a signal interrupted it before this resume
            finish_step(run, stop)

        while state.step < args.max_steps and not run.early_stopping.should_stop:
            # ----------------------------------------------------------------------------------------------------------
            # One optimizer step: forward and backward over the micro-batches, clip, update, schedule.
            with state.timed_step(step_tokens):
                batches = list(itertools.islice(run.data_loader, args.num_microbatches))
                tokens = count_tokens_per_rank(batches, world) if args.loss_normalization == "tokens" else None
                result = train_step(
                    run.model, batches, run.optimizer, run.schedule, run.scaler, args.max_norm, world.device, tokens
                )
            state.record_step(batches, result.skipped)
            bar.update()
            # ----------------------------------------------------------------------------------------------------------

            # Anomalies: stop before a checkpoint of a run gone wrong replaces a good one. Averaging the loss makes the
            # ranks wait for each other, so it is done only for steps whose loss is logged.
            log_due = state.reaches(args.log_freq)
            failure = run.anomalies.check_step(state, batches, result.skipped)
            if log_due or run.evaluator.loss_due(state):
                loss = world.mean(result.loss).item()
                state.record_loss(loss)
                failure = failure or run.anomalies.check_loss(loss, state, batches)
            if failure:
                run.checkpointer.finish()  # the message names the last checkpoint, so it must be complete
                world.raise_on_all(failure)

            if log_due:
                log_step(run, result)
            finish_step(run, stop)
        run.checkpointer.finish()


def finish_step(run: Run, stop: StopRequest) -> None:
    """Evaluate and save if due.

    Raises:
        SystemExit: after a signal, once the step is saved. An evaluation that it interrupts is repeated on resume.
    """
    args, state = run.args, run.state
    # Evaluate before saving: the scores decide whether this checkpoint is the best one and whether to stop.
    metrics = run.evaluator.evaluate_if_due(run.model, state, stop)
    if metrics:
        run.eval_log.log(metrics, state.step)
    if isinstance(run.schedule, PlateauSchedule) and "eval_loss" in metrics:
        run.schedule.record_evaluation(metrics["eval_loss"])
    is_best = state.has_trained and run.early_stopping.update(metrics) and args.keep_best

    # Save at `ckpt_freq`, and whatever would be lost otherwise. A signal or a full disk on one rank stops all.
    stopping = run.world.any(bool(stop) or run.checkpointer.has_failed)
    save_due = is_best or stopping or run.early_stopping.should_stop or state.due(args.ckpt_freq)
    if save_due and state.has_trained and not args.no_ckpt:
        state.checkpoint = run.checkpointer.save(state.step, run, best=is_best)
    if stopping and (state.step < args.max_steps or state.evaluation_pending):
        run.checkpointer.finish()
        exit_interrupted(args, state, stop, run.world)


@dataclasses.dataclass(frozen=True)
class StepResult:
    loss: torch.Tensor  # scalar, this rank's part; the step's loss is the mean over ranks
    grad_norm: float  # of the gradient averaged over ranks, before clipping
    lr: float  # used by the step
    skipped: bool  # the gradient was not finite, so the weights are unchanged


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
    """Take one optimizer step. FSDP averages the gradients over ranks.

    The loss is the mean of the micro-batches' mean losses, as in mistral-finetune. With `tokens_per_rank`, the step's
    trained tokens averaged over ranks, it is the mean over all tokens of all ranks: each micro-batch's mean is
    multiplied by its tokens, and averaging over ranks turns the division by `tokens_per_rank` into one by the total.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for batch in batches:
        microbatch_loss = batch_loss(model, batch, device)
        divisor = tokens_per_rank / batch.loss_weight if tokens_per_rank else len(batches)
        (microbatch_loss * (scaler.scale / divisor)).backward()
        loss += microbatch_loss.detach() / divisor

    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = full_tensor(torch.nn.utils.get_total_norm(gradients)).item() / scaler.scale
    finite = math.isfinite(grad_norm)
    if finite:
        # Unscale and clip in one pass; the 1e-6 is clip_grad_norm_'s.
        torch._foreach_mul_(gradients, min(1.0, max_norm / (grad_norm + 1e-6)) / scaler.scale)
        optimizer.step()
    scaler.update(finite)
    lr = float(schedule.get_last_lr()[0])
    step_schedule(schedule)
    return StepResult(loss, grad_norm, lr, skipped=not finite)


def count_tokens_per_rank(batches: list[Batch], world: World) -> float:
    """Return a step's trained tokens averaged over ranks, each weighted by its message's weight."""
    own = sum(batch.loss_weight for batch in batches)
    return world.mean(torch.tensor(own, dtype=torch.float64)).item()


def log_step(run: Run, result: StepResult) -> None:
    """Print and record the metrics of a step."""
    peak_bytes, allocated_bytes = memory_bytes(run.world.device)
    metrics = train_metrics(
        **run.state.progress(), lr=result.lr, peak_bytes=peak_bytes, allocated_bytes=allocated_bytes
    )
    logger.info(train_log_message(metrics))
    metrics |= {"grad_norm": result.grad_norm, "skipped_steps": run.state.skipped_steps}
    metrics |= {"loss_scale": run.scaler.scale} if run.scaler.enabled else {}
    run.train_log.log(metrics, run.state.step)


def log_summary(run: Run) -> None:
    """Print the summary of a finished run and the commands to run next; draw the loss curve."""
    state, world = run.state, run.world
    trained_tokens = int(world.sum(torch.tensor(state.trained_tokens)).item())
    packing = PackingCounts(*world.sum(torch.tensor(dataclasses.astuple(run.data_loader.counts))).tolist())
    if world.is_master:
        facts = state.totals() | {"trained_tokens": trained_tokens, "packing": dataclasses.asdict(packing)}
        logger.info(summary(**facts, peak_bytes=memory_bytes(world.device)[0]))
        if state.checkpoint:
            evaluated = parse_sources(run.args.data.eval_instruct_data)
            logger.info(after_training(Path(run.args.run_dir), [source.path for source in evaluated]))
        draw_loss_curve(Path(run.args.run_dir))


def command(*arguments: str, config: str = "", train_yaml: str = "", **flags: str) -> None:
    """Train as the command line says: CONFIG.yaml, by position or by name, and KEY=VALUE settings."""
    unknown = [f"--{name}" for name in flags]  # fire would report them only after training
    if config and train_yaml:
        raise UserError("--config and --train_yaml both name the training YAML; give one of them.")
    train(*config_and_overrides([str(each) for each in arguments], str(train_yaml or config), unknown))


def main() -> None:
    if "-" in sys.argv[1:]:  # fire would train with the arguments before it, and then report the rest
        raise UserError("unexpected argument -")
    fire.Fire(command)


if __name__ == "__main__":
    run_cli(main)
