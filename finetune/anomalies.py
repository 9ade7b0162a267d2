"""Detection of training anomalies: non-finite gradients and loss spikes."""

import json
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from .args import GuardArgs
from .data.data_loader import Batch
from .utils import TrainState

logger = logging.getLogger("anomalies")

_MIN_LOSSES = 10  # the median of fewer losses is not meaningful


class AnomalyDetector:
    """Decide when a run has gone wrong, and record which rows were involved.

    Args:
        args: thresholds.
        folder: where the rows of anomalous steps are recorded, in one file per step and rank: file names and line
            numbers, never text.
        rank: of this process.
    """

    def __init__(self, args: GuardArgs, folder: Path, rank: int) -> None:
        self._args = args
        self._folder = folder
        self._rank = rank
        self._skipped: dict[int, list[str]] = {}  # rows of the current series of skipped steps
        self._losses: deque[float] = deque(maxlen=args.spike_window)

    def check_step(self, state: TrainState, batches: list[Batch], skipped: bool) -> str | None:
        """Check whether too many consecutive steps, or all steps of the run, have been skipped.

        Args:
            state: progress of the run.
            batches: this rank's batches of the step.
            skipped: the gradient was not finite, so the weights are unchanged; the same on all ranks.

        Returns:
            Why the run must stop, the same on every rank, or None.
        """
        if not skipped:
            self._skipped.clear()
            return None
        self._skipped[state.step] = _rows(batches)
        ends_unchanged = state.step == state.max_steps and not state.has_trained
        if len(self._skipped) < self._args.max_skipped_steps and not ends_unchanged:
            return None
        for step, rows in self._skipped.items():
            self._write(step, rows)
        if ends_unchanged:
            reason = f"the gradient was not finite in any of the {state.step} steps, so nothing was trained"
        else:
            reason = (
                f"the gradient was not finite in {len(self._skipped)} steps in a row (`guards.max_skipped_steps`), so "
                "training cannot make progress"
            )
        return (
            f"Stopped at step {state.step}: {reason}. The weights are those from before; {_last(state.checkpoint)}. "
            f"Lower `optim.lr`, or use bf16 if the GPU supports it; the rows are listed in {self._folder}."
        )

    def check_loss(self, loss: float, state: TrainState, batches: list[Batch]) -> str | None:
        """Check a step's loss, the mean over ranks, for a spike. Log it, or return why the run must stop."""
        if not math.isfinite(loss):
            return None  # left to check_step
        median = statistics.median(self._losses) if len(self._losses) >= _MIN_LOSSES else math.inf
        factor = self._args.spike_factor
        self._losses.append(loss)
        if not factor or loss <= factor * median:
            return None
        self._write(state.step, _rows(batches))
        message = (
            f"the loss of step {state.step} is {loss:.3f}, more than {factor:g} times the recent median of "
            f"{median:.3f} (`guards.spike_factor`); the rows are listed in {self._folder}"
        )
        if self._args.stop_on_spike:
            return f"Stopped: {message}; {_last(state.checkpoint)}."
        logger.warning("%s.", message[0].upper() + message[1:])
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serializable state needed to resume; without rows, which are recorded from there on."""
        return {"skipped": list(self._skipped), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        self._skipped = {step: [] for step in state["skipped"]}
        self._losses.extend(state["losses"])

    def _write(self, step: int, rows: list[str]) -> None:
        path = self._folder / f"step_{step:06d}.rank_{self._rank:05d}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            path.write_text(json.dumps({"step": step, "rows": rows}, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s.", path, error.strerror)


def _rows(batches: list[Batch]) -> list[str]:
    return [row for batch in batches for row in batch.rows]


def _last(checkpoint: Path | None) -> str:
    return f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint has been saved yet"
