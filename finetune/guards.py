"""What watches a run's numbers: gradients that are not finite, losses that jump."""

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

logger = logging.getLogger("guards")

_FEW = 10  # losses without which a median says little


class AnomalyDetector:
    """Says when a run has gone wrong, and which rows it met there.

    Args:
        args: how much is borne.
        rescue: folder for what is told of the rows when the run stops or its loss jumps, one file per step and rank:
            files and lines, never texts.
        rank: this process.
    """

    def __init__(self, args: GuardArgs, rescue: Path, rank: int) -> None:
        self._args = args
        self._rescue = rescue
        self._rank = rank
        self._skipped: dict[int, list[str]] = {}  # rows of the steps skipped in a row
        self._losses: deque[float] = deque(maxlen=args.spike_window)

    def check_step(self, state: TrainState, batches: list[Batch], skipped: bool) -> str | None:
        """Takes note of a step.

        Args:
            state: where the run stands.
            batches: what this rank trained on.
            skipped: the gradient was not finite, so the step changed nothing; the same on all ranks.

        Returns:
            Why to stop, the same on every rank: too many steps in a row changed nothing.
        """
        if not skipped:
            self._skipped.clear()
            return None
        self._skipped[state.step] = _rows(batches)
        if len(self._skipped) < self._args.max_skipped_steps:
            return None
        for step, rows in self._skipped.items():
            self._keep(step, rows)
        return (
            f"Stopped at step {state.step}: the gradient was not finite in {len(self._skipped)} steps in a row "
            f"(`guards.max_skipped_steps`), so going on would teach nothing. The weights are those from before; "
            f"{_last(state.checkpoint)}. Lower `optim.lr`, or use bf16 where the card has it; the rows are named in "
            f"{self._rescue}."
        )

    def check_loss(self, state: TrainState, batches: list[Batch]) -> str | None:
        """Takes note of a step's loss, the mean over ranks; reports one that jumped, or returns why to stop."""
        loss = state.last_loss
        usual = statistics.median(self._losses) if len(self._losses) >= _FEW else math.inf
        factor = self._args.spike_factor
        if not math.isfinite(loss):
            return None  # check_step's business
        self._losses.append(loss)
        if not factor or loss <= factor * usual:
            return None
        self._keep(state.step, _rows(batches))
        message = (
            f"the loss of step {state.step} is {loss:.3f}, more than {factor:g} times the usual {usual:.3f} "
            f"(`guards.spike_factor`); the rows are named in {self._rescue}"
        )
        if self._args.stop_on_spike:
            return f"Stopped: {message}; {_last(state.checkpoint)}."
        logger.warning("%s.", message[0].upper() + message[1:])
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a continued run takes over: how often and what, as numbers; rows are named from there on."""
        return {"skipped": list(self._skipped), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._skipped = {step: [] for step in state["skipped"]}
        self._losses.extend(state["losses"])

    def _keep(self, step: int, rows: list[str]) -> None:
        path = self._rescue / f"step_{step:06d}.rank_{self._rank:05d}.json"
        try:
            self._rescue.mkdir(exist_ok=True)
            path.write_text(json.dumps({"step": step, "rows": rows}, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s.", path, error.strerror)


def _rows(batches: list[Batch]) -> list[str]:
    return [row for batch in batches for row in batch.rows]


def _last(checkpoint: Path | None) -> str:
    return f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
