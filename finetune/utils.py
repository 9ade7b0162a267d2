"""Seeds and training progress."""

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.settings import Frequency

from .data.data_loader import Batch


def set_seed(seed: int) -> None:
    """Seed every generator that dropout or library code may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


_SAVED = ("step", "tokens", "seconds", "trained_tokens", "skipped_steps", "first_loss", "last_loss")


@dataclasses.dataclass
class TrainState:
    """Progress, speed and losses of a run."""

    max_steps: int
    epoch_steps: float | None = None  # of an epoch; needed if a frequency is `epoch`
    started: float = dataclasses.field(default_factory=time.perf_counter)
    step: int = 0
    tokens: int = 0  # of all ranks
    seconds: float = 0.0  # in training steps, data loading included, evaluations and checkpoints excluded
    step_tokens: int = 0
    step_seconds: float = 0.0
    trained_tokens: int = 0  # of this rank: positions with loss
    skipped_steps: int = 0  # gradient not finite
    first_loss: float | None = None
    last_loss: float | None = None
    eval_losses: dict[int, float] = dataclasses.field(default_factory=dict)
    evaluation_pending: bool = True  # the evaluation before the first step, or one that a signal interrupted
    checkpoint: Path | None = None

    @contextmanager
    def timed_step(self, tokens: int) -> Iterator[None]:
        """Count one step of `tokens` tokens and measure its time."""
        start = time.perf_counter()
        yield
        self.step_seconds = time.perf_counter() - start
        self.seconds += self.step_seconds
        self.step_tokens = tokens
        self.tokens += tokens
        self.step += 1

    def record_step(self, batches: list[Batch], skipped: bool) -> None:
        """Record the batches of a step and whether it was skipped."""
        self.trained_tokens += sum(batch.trained_tokens for batch in batches)
        self.skipped_steps += skipped

    @property
    def has_trained(self) -> bool:
        """Whether any step has changed the weights."""
        return self.skipped_steps < self.step

    def record_loss(self, loss: float) -> None:
        """Record a step's training loss, the mean over ranks."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serializable state needed to resume."""
        state = {name: getattr(self, name) for name in _SAVED}
        eval_losses = [list(item) for item in self.eval_losses.items()]
        return state | {"eval_losses": eval_losses, "evaluation_pending": self.evaluation_pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        for name in _SAVED:
            setattr(self, name, state[name])
        self.eval_losses = dict(state["eval_losses"])
        self.evaluation_pending = state.get("evaluation_pending", False)  # missing if an earlier version saved it

    def due(self, freq: Frequency) -> bool:
        """Return whether an action is due: as often as `freq` says and after the last step; with 0 only after that."""
        return self.step == self.max_steps or self.reaches(freq)

    def reaches(self, freq: Frequency) -> bool:
        """Return whether this step completes another period: `freq` steps, share of the run, or epoch."""
        if isinstance(freq, int):
            return freq > 0 and self.step % freq == 0
        period = freq * self.max_steps if isinstance(freq, float) else self.epoch_steps
        assert period, "a frequency is `epoch`, but the length of an epoch is not known"
        # A period of 2.5 steps is complete after 3, 5, 8, ... steps. 0.1 * 30 is slightly more than 3.
        completed = [math.floor(step / period + 1e-9) for step in (self.step - 1, self.step)]
        return completed[1] > completed[0]

    def progress(self) -> dict[str, Any]:
        """Return the arguments of `train_metrics` that depend on progress."""
        names = ("step", "max_steps", "step_tokens", "step_seconds", "tokens", "seconds")
        return {name: getattr(self, name) for name in names} | {"loss": self.last_loss}

    def totals(self) -> dict[str, Any]:
        """Return the arguments of `summary` that depend on progress."""
        names = ("max_steps", "skipped_steps", "tokens", "first_loss", "last_loss", "eval_losses", "checkpoint")
        wall_seconds = time.perf_counter() - self.started
        return {name: getattr(self, name) for name in names} | {
            "steps": self.step,
            "wall_seconds": wall_seconds,
            "train_seconds": self.seconds,
        }
