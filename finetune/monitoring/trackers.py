"""Where metrics go besides the run folder's jsonl: TensorBoard, Weights & Biases, MLflow."""

import logging
import os
import secrets
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from finetune.redaction import redacted

from .args import MLFlowArgs, WandbArgs

logger = logging.getLogger(__name__)

LOGIN_TIMEOUT_S = 60  # wandb asks for a key on a terminal where it has none; nobody may be there to answer
FINISH_TIMEOUT_S = 600  # what is not uploaded by then stays on disk for `wandb sync`
RETRY_AFTER_S = 60.0  # first pause after a tracker failed; doubles while it keeps failing


class Tracker(Protocol):
    """Something that takes named numbers. It may raise: `FaultTolerant` stands between it and training."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class FaultTolerant:
    """Keeps a tracker's failures away from training: they are reported once, then retried at growing intervals.

    The pauses bound the time a dead server can cost; what is missed meanwhile stands in the jsonl files.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker = tracker
        self._name = name
        self._reported = False
        self._pause = RETRY_AFTER_S
        self._retry_at = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            self._tracker.log(metrics, step)
            self._pause = RETRY_AFTER_S
        except Exception as error:
            self._retry_at = time.monotonic() + self._pause
            self._pause *= 2
            self._report(error)

    def close(self, failed: bool) -> None:
        try:
            self._tracker.close(failed)
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if not self._reported:
            logger.warning("%s failed at logging (%s); training goes on.", self._name, describe(error))
        self._reported = True


class TensorBoardTracker:
    """Event files under `folder`; several writers may share it. What it holds of step `purge_step` on becomes void."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=purge_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbTracker:
    """Joins the process's wandb run or starts it; whoever started it ends it."""

    def __init__(self, args: WandbArgs, run_dir: Path, config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise crash reports go to a third party
        import wandb

        self._owns_run = wandb.run is None
        self._run = wandb.run or _start_wandb(args, run_dir, config)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        if self._owns_run:
            self._run.finish(exit_code=int(failed))


def _start_wandb(args: WandbArgs, run_dir: Path, config: dict[str, Any]) -> Any:
    """Returns a wandb run, the same for a run that goes on: online unless told otherwise or the server is away."""
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.exists() or not id_file.read_text(encoding="utf-8"):
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    options: dict[str, Any] = {
        "id": id_file.read_text(encoding="utf-8"),
        "project": args.project,
        "name": args.run_name or run_dir.name,
        "dir": str(run_dir),
        "config": config,
        "job_type": "training",
    }
    # Metrics and settings are what a tracker is for; console output, sources and diffs stay here.
    private: dict[str, Any] = {"console": "off", "disable_code": True, "disable_git": True}
    if not args.offline:
        try:
            # Given this way, the key lives in this process only: wandb writes neither ~/.netrc nor a settings file.
            settings = wandb.Settings(
                api_key=args.key, login_timeout=LOGIN_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, **private
            )
            return wandb.init(**options, resume="allow", settings=settings)
        except Exception as error:
            logger.warning(
                "wandb could not start online (%s); this run is recorded offline under %s, to be uploaded with "
                "`wandb sync`.",
                describe(error),
                run_dir / "wandb",
            )
            del options["id"]  # wandb takes it for in use
    return wandb.init(**options, mode="offline", settings=wandb.Settings(**private))


class MLFlowTracker:
    """Joins MLflow's active run or starts one; whoever started it ends it."""

    def __init__(self, args: MLFlowArgs, run_dir: Path, config: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow's own defaults hold a training step up for many minutes when the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self._mlflow = mlflow
        self._owns_run = mlflow.active_run() is None
        if self._owns_run:
            mlflow.set_tracking_uri(args.tracking_uri)
            if args.experiment_name:
                mlflow.set_experiment(args.experiment_name)
            mlflow.start_run(run_name=run_dir.name)
            mlflow.log_params(_flattened(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        if self._owns_run:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` becomes `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def describe(error: Exception) -> str:
    """One short line for a log: the kind of error and the beginning of what it says, without secrets."""
    text = textwrap.shorten(redacted(str(error)), 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
