"""Metrics of a run: their values, their log lines, and the files and trackers they are written to."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
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
    """Return the metrics of one training step, in the order of `metrics.train.jsonl`.

    Args:
        step: number of the step, from 1.
        max_steps: steps of the whole run.
        lr: learning rate used by this step.
        loss: mean over micro-batches and ranks, in nats per token.
        step_tokens: tokens of this step, of all ranks.
        step_seconds: duration of this step.
        tokens: tokens of steps 1 to `step`, of all ranks.
        seconds: duration of steps 1 to `step`, without evaluations and checkpoints.
        peak_bytes: peak GPU memory allocated; 0 on CPU.
        allocated_bytes: GPU memory allocated now; 0 on CPU.
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
    """Return the metrics of one evaluation, in the order of `metrics.eval.jsonl`; losses in nats per token."""
    return {"step": step, "train_loss": train_loss, "perplexity": perplexity(eval_loss), "eval_loss": eval_loss}


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def train_log_message(metrics: Mapping[str, float], now: datetime | None = None) -> str:
    """Return the log line of a training step, given its `train_metrics`; the ETA is relative to `now`."""
    eta = (now or datetime.now()) + timedelta(seconds=metrics["eta_in_seconds"])
    return " - ".join(
        [
            f"step: {metrics['step']:06}",
            f"done (%): {metrics['percent_done']:.1f}",
            f"loss: {metrics['loss']:.3f}",
            f"lr: {metrics['lr']:.1e}",
            f"peak_alloc_mem (GiB): {metrics['peak_allocated_mem']:.1f}",
            f"alloc_mem (GiB): {metrics['allocated_mem']:.1f}",
            f"tokens_per_second: {metrics['wps']:.1f}",
            f"avg_tokens_per_second: {metrics['avg_wps']:.1f}",
            f"ETA: {eta:%Y-%m-%d %H:%M:%S}",
        ]
    )


def eval_log_message(metrics: Mapping[str, float]) -> str:
    """Return the log line of an evaluation, given its `eval_metrics`."""
    return " - ".join(
        [
            f"step: {metrics['step']:06}",
            f"eval_perplexity: {metrics['perplexity']:.3f}",
            f"eval_loss: {metrics['eval_loss']:.3f}",
            f"train_loss: {metrics['train_loss']:.3f}",
        ]
    )


def answers_log_message(step: int, scores: Mapping[str, float]) -> str:
    """Return the log line of scored answers; `ended` is the share that ended within `max_tokens`."""
    parts = [f"{name}: {value:.3f}" for name, value in scores.items() if name != "ended"]
    return " - ".join([f"step: {step:06}", *parts, f"answers ended within max_tokens (%): {100 * scores['ended']:.1f}"])


class MetricsLogger:
    """Write metrics to `run_dir/metrics.{tag}.jsonl`, TensorBoard and the configured trackers.

    Only the jsonl file is required: a failing tracker is reported, and training continues. Loggers with different tags
    share one wandb run and one MLflow run. The first logger starts and ends them, so close it last, as an ExitStack
    does.

    Args:
        run_dir: an existing folder.
        tag: `train` or `eval`; in trackers, also the prefix of every name (`train.loss`).
        wandb, mlflow: settings of the trackers.
        config: the resolved settings, shown by the trackers; API keys are redacted.
        is_master: whether this is rank 0; loggers of other ranks do nothing.
        purge_step: for a resumed run: TensorBoard discards the events of this step and later ones.

    Raises:
        UserError: the file cannot be opened.
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
        self._path = metrics_path(run_dir, tag)
        with self._reported_errors():
            self._file = _open_for_lines(self._path)
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
            logger.warning("%s could not start (%s); training continues without it.", name, describe(error))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write and flush one line; non-finite numbers become null.

        JSON has no NaN. Any tool can read null, and pandas reads it as NaN.

        Raises:
            UserError: the file cannot be written.
        """
        if self._file is None:
            return
        record = {name: _json_number(value) for name, value in metrics.items()}
        record.setdefault("step", step)
        line = json.dumps({**record, "at": datetime.now().isoformat(timespec="microseconds")}, allow_nan=False)
        with self._reported_errors():
            self._file.write(line + "\n")
            self._file.flush()
        scalars = {f"{self._tag}.{name}": value for name, value in metrics.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(scalars, step)

    @contextlib.contextmanager
    def _reported_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"Metrics cannot be written to {self._path}: {error.strerror}.") from error

    def close(self, failed: bool = False) -> None:
        """Close the file and the trackers, which record whether the run failed; a second call does nothing."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # `log` flushes each line and has reported that one could not be written
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
    """Return the path of the metrics of `tag` (`train` or `eval`) in a run folder."""
    return run_dir / f"metrics.{tag}.jsonl"


def read_metrics(run_dir: Path, tag: str) -> list[dict[str, Any]]:
    """Return the metrics of a run in order of steps; empty if nothing was logged.

    Lines that a crash truncated, and values other than numbers, null and the time, are skipped. If the run was resumed
    from an earlier step, the lines that it logged again replace the earlier ones.
    """
    path = metrics_path(run_dir, tag)
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parse_metrics(line)
        if not isinstance(record.get("step"), int):
            continue
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def _parse_metrics(line: str) -> dict[str, Any]:
    """Return the numbers, nulls and the time of a line; empty if it is not a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {key: value for key, value in record.items() if key == "at" or value is None or _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _open_for_lines(path: Path) -> TextIO:
    """Open `path` for appending; a last line that a crash truncated gets its line break first."""
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
