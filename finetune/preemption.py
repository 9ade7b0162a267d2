"""Signals that ask a run to stop: SIGTERM (Slurm, spot instances, torchrun), SIGUSR1 (Slurm's warning), Ctrl-C."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .args import TrainArgs
    from .distributed import World
    from .utils import TrainState

from .cli import report_to_torchrun

logger = logging.getLogger("train")

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start it again
MARKER_NAME = "interrupted"  # file in the run folder
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __str__(self) -> str:
        return self.signal.name if self.signal else "no signal"

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C does not wait for the step and the checkpoint."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def stop_requests(several_processes: bool = False) -> Iterator[StopRequest]:
    """Record signals instead of being terminated by them while the block runs; in the main thread only.

    If one of several processes fails, it continues to ignore SIGTERM, with which torchrun ends it while it, or another
    one, still prints why.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in _SIGNALS}
    try:
        yield request
    except (Exception, SystemExit):
        if several_processes:
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_interrupted(args: TrainArgs, state: TrainState, stop: StopRequest, world: World) -> NoReturn:
    """End a run that a signal interrupted, after its last checkpoint is complete, on every rank; rank 0 says so.

    Creates `run_dir/interrupted`, by which a job script recognizes that the run can be requeued: torchrun does not
    pass on exit codes. Every rank creates it, so that no node has to wait for a shared file system to show it. A run
    with `no_ckpt`, which would start from the beginning each time, does not create it.

    Raises:
        SystemExit: always, with EXIT_INTERRUPTED.
    """
    stops = world.gather(str(stop) if stop else None)
    first = next(filter(None, stops), "a signal")
    message = f"Stopped by {first} after step {state.step}. {_what_remains(args, state)}"
    report_to_torchrun(message)
    if world.is_master:
        logger.warning(message)
        if world.size > 1:
            logger.info("torchrun reports this below as failures with exit code %d.", EXIT_INTERRUPTED)
    if not args.no_ckpt:
        marker = Path(args.run_dir) / MARKER_NAME
        try:
            marker.touch()
        except OSError as error:
            logger.warning("%s cannot be created: %s.", marker, error.strerror)
    raise SystemExit(EXIT_INTERRUPTED)


def _what_remains(args: TrainArgs, state: TrainState) -> str:
    if args.no_ckpt:
        earlier = f" The latest checkpoint is {state.checkpoint}, from before this run." if state.checkpoint else ""
        return f"Nothing was saved (`no_ckpt: true`): the steps of this run are lost.{earlier}"
    if not state.has_trained:
        return "Nothing was trained yet. Rerun the same command with `resume: auto` to start from the beginning."
    return f"Checkpoint: {state.checkpoint}. Rerun the same command with `resume: auto` to continue."


def clear_interrupted(run_dir: Path) -> None:
    """Remove the marker of an earlier interruption, since the run has started again."""
    (run_dir / MARKER_NAME).unlink(missing_ok=True)
