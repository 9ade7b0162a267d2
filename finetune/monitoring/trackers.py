"""Experiment trackers: TensorBoard, Weights & Biases, MLflow."""

import logging
import os
import secrets
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from finetune.redaction import redacted

from .args import MLFlowArgs, WandbArgs

logger = logging.getLogger(__name__)

LOGIN_TIMEOUT_S = 60  # without a key, wandb prompts on a terminal, which may be unattended
MLFLOW_RETRIES = 2  # of each request to its server
RETRY_AFTER_S = 60.0  # pause after a failure; doubles with each further failure


class Tracker(Protocol):
    """A destination for metrics. Its methods may raise: `FaultTolerant` wraps it."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class FaultTolerant:
    """Protect training from a failing tracker: log the first failure, and retry at growing intervals.

    The intervals bound the time lost to an unreachable server. Metrics that the tracker misses are in the jsonl files.
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
            logger.warning("%s could not log metrics (%s); training continues.", self._name, describe(error))
        self._reported = True


class TensorBoardTracker:
    """Event files in `folder`, which several writers may share; events from step `purge_step` on are discarded."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        threading.excepthook = _without_writer_threads
        self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=purge_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, failed: bool) -> None:
        self._writer.close()


def _without_writer_threads(failure: threading.ExceptHookArgs) -> None:
    """Print the traceback of a failed thread, except of TensorBoard's, whose errors its next call raises again."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


class WandbTracker:
    """The wandb run of this process; the instance that started it also ends it."""

    def __init__(self, args: WandbArgs, run_dir: Path, config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise crash reports are sent to a third party
        import wandb

        self._owns_run = wandb.run is None
        self._run = wandb.run or _start_wandb(args, run_dir, config)
        self._timeout = args.timeout

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        if not self._owns_run:
            return
        if not self._run.offline:
            logger.info("Uploading the last metrics to wandb, for at most %d s (`wandb.timeout`).", self._timeout)
        self._run.finish(exit_code=int(failed))


def _start_wandb(args: WandbArgs, run_dir: Path, config: dict[str, Any]) -> Any:
    """Return a wandb run, the same one after a resume; offline if configured or if the server cannot be reached."""
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
    # Upload metrics and settings only; no console output, source code or diffs.
    private: dict[str, Any] = {"console": "off", "disable_code": True, "disable_git": True}
    if not args.offline:
        logger.info(
            "Connecting to wandb; if it does not answer within %d s (`wandb.timeout`), the run is recorded offline.",
            args.timeout,
        )
        try:
            settings = wandb.Settings(
                api_key=args.key,  # stays in this process: wandb writes it neither to ~/.netrc nor to a settings file
                login_timeout=LOGIN_TIMEOUT_S,
                init_timeout=args.timeout,
                finish_timeout=args.timeout,
                quiet=True,  # otherwise wandb first asks the server, for 10 s more, who is logged in
                **private,
            )
            run = wandb.init(**options, resume="allow", settings=settings)
            logger.info("wandb shows this run at %s", run.url)
            return run
        except Exception as error:
            logger.warning(
                "wandb could not start online (%s); this run is recorded offline. Upload it with `wandb sync %s`.",
                describe(error),
                run_dir / "wandb" / "offline-run-*",
            )
            del options["id"]  # wandb considers it in use
    return wandb.init(**options, mode="offline", settings=wandb.Settings(**private))


class MLFlowTracker:
    """The active MLflow run of this process; the instance that started it also ends it."""

    def __init__(self, args: MLFlowArgs, run_dir: Path, config: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # With MLflow's defaults, an unreachable server blocks a training step for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, args.timeout // (1 + MLFLOW_RETRIES))))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(MLFLOW_RETRIES))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        # The URL may contain a password: print it nowhere, and log through our handler, which redacts.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
        import mlflow

        self._mlflow = mlflow
        self._owns_run = mlflow.active_run() is None
        if self._owns_run:
            logger.info(
                "Connecting to MLflow; if it does not answer within %d s (`mlflow.timeout`), it is not used.",
                args.timeout,
            )
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
    """Return nested settings with dotted keys: `{"optim": {"lr": 1}}` becomes `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def describe(error: Exception) -> str:
    """Return the type and the shortened message of an error as one line, with secrets redacted."""
    message = textwrap.shorten(redacted(str(error)), 200, placeholder=" ...")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
