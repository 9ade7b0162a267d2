"""Learning rate schedules: OneCycleLR as in mistral-finetune, or a linear warm-up and a decay.

Each spans a plan: all steps of the run or, after its length has changed, the remaining ones.
"""

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from .args import OptimArgs

logger = logging.getLogger("train")

_LONG_WARM_UP = 10_000  # steps that set the pace of `inverse_sqrt` without a warm-up, as in transformers


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


# Share of the difference between peak and final learning rate that is left, given the share of the decay steps done.
_DECAY: dict[str, Callable[[float, OptimArgs], float]] = {
    "cosine": lambda done, args: _cosine(done),
    "cosine_with_restarts": lambda done, args: _cosine(done * args.option("num_cycles") % 1) if done < 1 else 0.0,
    "linear": lambda done, args: 1 - done,
    "polynomial": lambda done, args: (1 - done) ** args.option("power"),
    "constant": lambda done, args: 1.0,
    "reduce_lr_on_plateau": lambda done, args: 1.0,
}
OPEN_ENDED = ("constant", "inverse_sqrt", "reduce_lr_on_plateau")  # rates that do not depend on the run's last step


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that a schedule spans."""

    start: int  # steps of the run before it
    end: int  # the run's length when it was made; an open-ended schedule may continue beyond it
    rate: float | None = None  # learning rate of its first step; None: that of a new run

    @property
    def steps(self) -> int:
        return self.end - self.start


class WarmUpSchedule(LRScheduler):
    """Linear warm-up from lr / div_factor to lr, then decay to OneCycleLR's final rate; same peak step as OneCycleLR.

    Args:
        optimizer: whose learning rate is set.
        args: shape and rates.
        plan: the steps.
        total_steps: number of steps from the plan's start to the end of the run.
    """

    def __init__(self, optimizer: Optimizer, args: OptimArgs, plan: Plan, total_steps: int) -> None:
        self._args = args
        self._plan = plan
        self.total_steps = total_steps
        self._first_rate = args.lr / args.div_factor if plan.rate is None else plan.rate
        # A run whose length has changed has at least one step of warm-up, so that its rate is continuous.
        self._peak = max(args.pct_start * plan.steps - 1, 0.0 if plan.rate is None else 1.0)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each parameter group at step `last_epoch`, counted from the plan's start."""
        return [self._rate(self.last_epoch)] * len(self.optimizer.param_groups)

    def _rate(self, step: int) -> float:
        args, peak, last = self._args, self._peak, self._plan.steps - 1
        if step < peak:
            return self._first_rate + (args.lr - self._first_rate) * step / peak
        if args.schedule == "inverse_sqrt":
            pace = peak or _LONG_WARM_UP
            return args.lr * math.sqrt(pace / (pace + step - peak))
        last_rate = final_rate(args)
        done = (step - peak) / (last - peak) if last > peak else 0.0
        return last_rate + (args.lr - last_rate) * _DECAY[args.schedule](done, args)


class PlateauSchedule(WarmUpSchedule):
    """Linear warm-up, then PyTorch's ReduceLROnPlateau on the evaluation loss, down to OneCycleLR's final rate."""

    def __init__(self, optimizer: Optimizer, args: OptimArgs, plan: Plan, total_steps: int) -> None:
        super().__init__(optimizer, args, plan, total_steps)
        self._plateau = ReduceLROnPlateau(
            optimizer,
            factor=args.option("factor"),
            patience=int(args.option("patience")),
            min_lr=final_rate(args),
            eps=0.0,
        )

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each parameter group: after the warm-up, what evaluations have made of it."""
        if self.last_epoch - 1 < self._peak:
            return super().get_lr()
        return [group["lr"] for group in self.optimizer.param_groups]

    def record_evaluation(self, loss: float) -> None:
        """Lower the learning rate of the next step if `loss`, the same on all ranks, has stopped improving."""
        if self.last_epoch < self._peak:
            return  # the warm-up would overwrite it
        before, group = self.get_last_lr(), self.optimizer.param_groups[0]
        self._plateau.step(loss)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self._last_lr != before:
            logger.info("The evaluation loss has stopped improving: the learning rate is now %g.", group["lr"])

    def plateau_state(self) -> dict[str, Any]:
        """Return what evaluations have left, JSON-serializable."""
        best = self._plateau.best
        return {"best": best if math.isfinite(best) else None, "worse_since": self._plateau.num_bad_epochs}

    def load_plateau_state(self, state: dict[str, Any]) -> None:
        """Restore what `plateau_state` returned."""
        self._plateau.best = math.inf if state["best"] is None else state["best"]
        self._plateau.num_bad_epochs = state["worse_since"]


Schedule = OneCycleLR | WarmUpSchedule


def build_schedule(optimizer: Optimizer, args: OptimArgs, plan: Plan, max_steps: int) -> Schedule:
    """Build the schedule of `plan` for a run of `max_steps` steps."""
    if args.schedule == "onecycle":
        return _one_cycle(optimizer, args, plan)
    kind = PlateauSchedule if args.schedule == "reduce_lr_on_plateau" else WarmUpSchedule
    return kind(optimizer, args, plan, max_steps - plan.start)


def final_rate(args: OptimArgs) -> float:
    """Return the learning rate at the end of a decay."""
    return args.lr / args.div_factor / args.final_div_factor


def step_schedule(schedule: Schedule) -> None:
    """Set the learning rate of the next step; after the last step this does nothing, since there is none."""
    if schedule.last_epoch < schedule.total_steps - 1:
        with warnings.catch_warnings():
            # PyTorch warns if the optimizer has not taken a step yet, as when fp16 skips the first one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            schedule.step()


def _one_cycle(optimizer: Optimizer, args: OptimArgs, plan: Plan) -> OneCycleLR:
    """Build the original's schedule.

    For AdamW, PyTorch's momentum cycling stays on, so beta1 runs 0.95 -> 0.85 -> 0.95 over the run and overrides the
    betas of the optimizer. The original does so too, perhaps unintentionally.
    """
    pct_start = args.pct_start
    if plan.rate is not None:
        pct_start = max(pct_start, min(2 / plan.steps, 1.0))  # one step of warm-up, as above
    if pct_start * plan.steps == 1.0:
        # The warm-up is the first step alone, and PyTorch would divide by its length of zero. The limit from above
        # starts at lr / div_factor, as a longer warm-up does; a run of one step has none to warm up for.
        pct_start = min(pct_start * (1 + 1e-9), 1 - 1e-9)
    schedule = OneCycleLR(
        optimizer,
        max_lr=args.lr,
        total_steps=plan.steps,
        pct_start=pct_start,
        cycle_momentum="adamw" in args.name,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
    )
    if plan.rate is not None:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] = plan.rate
        schedule._last_lr = [plan.rate] * len(optimizer.param_groups)
    return schedule
