"""What a run measures, how a log line says it, and where it is written."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from finetune.redaction import redacted
from model.errors import UserError

from .args import MLFlowArgs, WandbArgs
from .trackers import (
    FaultTolerant,
    MLFlowTracker,
    TensorBoardTracker,
    Tracker,
    WandbTracker,
    describe,
)

logger = logging.getLogger(__name__)

GIB = 1024**3


def train_metrics(
    *,
    step: int,
    max_steps: int,
    lr: float,
    loss: float,
    step_tokens: int,
    step_seconds: float,
    tokens: int,
    seconds: float,
    peak_bytes: int,
    allocated_bytes: int,
) -> dict[str, float]:
    """Returns one training step's metrics in the order of `metrics.train.jsonl`.

    Args:
        step: steps done, this one included; counts from 1.
        max_steps: steps of the whole run.
        lr: the learning rate this step used.
        loss: mean over micro-batches and ranks.
        step_tokens: tokens of this step, all ranks together.
        step_seconds: time this step took.
        tokens: tokens of steps 1 to `step`.
        seconds: training time of steps 1 to `step`, without evaluations and checkpoints.
        peak_bytes: most accelerator memory ever allocated; 0 on CPU.
        allocated_bytes: accelerator memory allocated now; 0 on CPU.
    """
    return {
        "lr": lr,
        "step": step,
        "loss": loss,
        "percent_done": 100 * step / max_steps,
        "peak_allocated_mem": peak_bytes / GIB,
        "allocated_mem": allocated_bytes / GIB,
        "wps": step_tokens / step_seconds if step_seconds else 0.0,
        "avg_wps": tokens / seconds if seconds else 0.0,
        "eta_in_seconds": (max_steps - step) * seconds / step,
    }


def eval_metrics(*, step: int, train_loss: float, eval_loss: float) -> dict[str, float]:
    """Returns one evaluation's metrics in the order of `metrics.eval.jsonl`; losses in nats per token."""
    return {"step": step, "train_loss": train_loss, "perplexity": perplexity(eval_loss), "eval_loss": eval_loss}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def train_log_message(metrics: Mapping[str, float], now: datetime | None = None) -> str:
    """The line a training step prints, from what `train_metrics` returns; `now` is the moment the ETA counts from."""
    eta = (now or datetime.now()) + timedelta(seconds=metrics["eta_in_seconds"])
    return " - ".join(
        [
            f"step: {metrics['step']:06}",
            f"done (%): {metrics['percent_done']:.1f}",
            f"loss: {metrics['loss']:.3f}",
            f"lr: {metrics['lr']:.1e}",
            f"peak_alloc_mem (GB): {metrics['peak_allocated_mem']:.1f}",
            f"alloc_mem (GB): {metrics['allocated_mem']:.1f}",
            f"words_per_second: {metrics['wps']:.1f}",
            f"avg_words_per_second: {metrics['avg_wps']:.1f}",
            f"ETA: {eta:%Y-%m-%d %H:%M:%S}",
        ]
    )


def eval_log_message(metrics: Mapping[str, float]) -> str:
    """The line an evaluation prints, from what `eval_metrics` returns."""
    return " - ".join(
        [
            f"step: {metrics['step']:06}",
            f"eval_perplexity: {metrics['perplexity']:.3f}",
            f"eval_loss: {metrics['eval_loss']:.3f}",
            f"train_loss: {metrics['train_loss']:.3f}",
        ]
    )


def answers_log_message(step: int, scores: Mapping[str, float]) -> str:
    """The line that scored answers print."""
    return " - ".join([f"step: {step:06}", *(f"{name}: {value:.3f}" for name, value in scores.items())])


class MetricsLogger:
    """Writes metrics to `run_dir/metrics.{tag}.jsonl`, TensorBoard and the trackers that are set.

    Only the jsonl is vital: a tracker that fails is reported and left behind. Loggers of several tags share one
    wandb and one MLflow run, which the first of them starts and ends; so close it last (an ExitStack does).

    Args:
        run_dir: an existing folder.
        tag: `train` or `eval`; also the prefix of every name in the trackers (`train.loss`).
        wandb, mlflow: which trackers to use.
        config: the resolved settings, shown by the trackers; API keys are taken out.
        is_master: other ranks' loggers do nothing.
        purge_step: where a run goes on: what all its loggers wrote of this step and later ones does not count.
    """

    def __init__(
        self,
        run_dir: Path,
        tag: str,
        wandb: WandbArgs,
        mlflow: MLFlowArgs,
        config: dict[str, Any],
        is_master: bool,
        purge_step: int | None = None,
    ) -> None:
        self._tag = tag
        self._file: TextIO | None = None
        self._trackers: list[FaultTolerant] = []
        if not is_master:
            return
        self._file = _open_for_lines(metrics_path(run_dir, tag))
        config = redacted(config)
        self._add_tracker("TensorBoard", lambda: TensorBoardTracker(run_dir / "tb", purge_step))
        if wandb.project:
            self._add_tracker("wandb", lambda: WandbTracker(wandb, run_dir, config))
        if mlflow.tracking_uri:
            self._add_tracker("MLflow", lambda: MLFlowTracker(mlflow, run_dir, config))

    def _add_tracker(self, name: str, start: Callable[[], Tracker]) -> None:
        try:
            self._trackers.append(FaultTolerant(start(), name))
        except Exception as error:
            logger.warning("%s could not start (%s); training goes on without it.", name, describe(error))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes one line, out of our hands when this returns; numbers that are not finite become null.

        JSON has no NaN: null keeps every line readable by any tool, and pandas reads it back as NaN.
        """
        if self._file is None:
            return
        record = {name: _json_number(value) for name, value in metrics.items()}
        record.setdefault("step", step)
        line = json.dumps({**record, "at": datetime.now().isoformat(timespec="microseconds")}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"Metrics cannot be written to {self._file.name}: {error.strerror}.") from error
        scalars = {f"{self._tag}.{name}": value for name, value in metrics.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(scalars, step)

    def close(self, failed: bool = False) -> None:
        """Ends everything this logger started; `failed` marks the run as such in the trackers. May be called twice."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        for tracker in self._trackers:
            tracker.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def metrics_path(run_dir: Path, tag: str) -> Path:
    """Where the metrics of `tag` (`train` or `eval`) stand in a run folder."""
    return run_dir / f"metrics.{tag}.jsonl"


def read_metrics(run_dir: Path, tag: str) -> list[dict[str, Any]]:
    """Returns the metrics of a run in order of steps; empty where nothing was logged.

    Lines that a crash cut short are passed over. Where a resumed run goes back to an earlier step, what the
    interrupted one logged from there on is dropped.
    """
    path = metrics_path(run_dir, tag)
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def _open_for_lines(path: Path) -> TextIO:
    """Opens `path` for appending; a last line that a crash cut short is ended first, so that the next stands alone."""
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")


def _json_number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
