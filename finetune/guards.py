"""What watches a run's numbers: gradients that are not finite, losses that jump."""

import json
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Protocol

import torch

from .args import GuardArgs
from .data.data_loader import Batch
from .utils import TrainState

logger = logging.getLogger("guards")

_FEW = 10  # losses without which a median says little


class StepResult(Protocol):
    """What the guards look at."""

    loss: torch.Tensor
    skipped: bool


class Guards:
    """Says when a run has gone wrong, and keeps which rows it met there.

    Args:
        args: how much is borne.
        rescue: folder for what is kept, one file per step and rank: files and lines, never texts.
        rank: this process.
    """

    def __init__(self, args: GuardArgs, rescue: Path, rank: int) -> None:
        self._args = args
        self._rescue = rescue
        self._rank = rank
        self._skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=args.spike_window)

    def watch_step(self, state: TrainState, batches: list[Batch], result: StepResult) -> str | None:
        """Takes note of a step.

        Args:
            state: where the run stands.
            batches: what this rank trained on.
            result: what came of it.

        Returns:
            Why to stop, the same on every rank: too many steps in a row changed nothing.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            return None
        self._keep(state.step, batches, result.loss.item())
        if self._skipped_in_a_row < self._args.max_skipped_steps:
            return None
        return (
            f"Stopped at step {state.step}: the gradient was not finite in {self._skipped_in_a_row} steps in a row "
            f"(`guards.max_skipped_steps`), so going on would teach nothing. The weights are those from before; "
            f"{_last(state.checkpoint)}. Lower `optim.lr`, or use bf16 where the card has it; the rows are named in "
            f"{self._rescue}."
        )

    def watch_loss(self, state: TrainState, batches: list[Batch]) -> str | None:
        """Takes note of a step's loss, the mean over ranks; reports one that jumped, or returns why to stop."""
        loss = state.last_loss
        usual = statistics.median(self._losses) if len(self._losses) >= _FEW else math.inf
        factor = self._args.spike_factor
        if not math.isfinite(loss):
            return None  # watch_step's business
        self._losses.append(loss)
        if not factor or loss <= factor * usual:
            return None
        self._keep(state.step, batches, loss)
        message = (
            f"the loss of step {state.step} is {loss:.3f}, more than {factor:g} times the usual {usual:.3f} "
            f"(`guards.spike_factor`); the rows are named in {self._rescue}"
        )
        if self._args.stop_on_spike:
            return f"Stopped: {message}; {_last(state.checkpoint)}."
        logger.warning("%s.", message[0].upper() + message[1:])
        return None

    def _keep(self, step: int, batches: list[Batch], loss: float) -> None:
        rows = [row for batch in batches for row in batch.rows]
        record = {"step": step, "loss": loss if math.isfinite(loss) else str(loss), "rows": rows}
        self._rescue.mkdir(exist_ok=True)
        path = self._rescue / f"step_{step:06d}.rank_{self._rank:05d}.json"
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def _last(checkpoint: Path | None) -> str:
    return f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
