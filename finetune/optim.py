"""AdamW and its schedule: OneCycleLR, as mistral-finetune sets it up, or a warm-up and a plain way down."""

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from .args import OptimArgs

# How much of the way from the highest rate to the last one is left, given the share of the steps behind the warm-up.
_WAYS_DOWN: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


class WarmUpSchedule(LRScheduler):
    """From lr / div_factor straight up to lr, then down to what OneCycleLR ends with; the peak is at the same step.

    Args:
        optimizer: whose rate it sets.
        args: shape and rates.
        total_steps: of the run.
    """

    def __init__(self, optimizer: Optimizer, args: OptimArgs, total_steps: int) -> None:
        self._args = args
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The rate of each group at the step `last_epoch`, counted from 0."""
        return [self._rate(self.last_epoch)] * len(self.optimizer.param_groups)

    def _rate(self, step: int) -> float:
        args, last = self._args, self.total_steps - 1
        first_rate = args.lr / args.div_factor
        peak = max(args.pct_start * self.total_steps - 1, 0.0)
        if step < peak:
            return first_rate + (args.lr - first_rate) * step / peak
        last_rate = first_rate / args.final_div_factor
        done = (step - peak) / (last - peak) if last > peak else 0.0
        return last_rate + (args.lr - last_rate) * _WAYS_DOWN[args.schedule](done)


Schedule = OneCycleLR | WarmUpSchedule


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], args: OptimArgs, max_steps: int
) -> tuple[AdamW, Schedule]:
    """Builds the optimizer and its schedule."""
    optimizer = AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay)
    if args.schedule == "onecycle":
        return optimizer, _one_cycle(optimizer, args, max_steps)
    return optimizer, WarmUpSchedule(optimizer, args, max_steps)


def _one_cycle(optimizer: AdamW, args: OptimArgs, max_steps: int) -> OneCycleLR:
    """The original's schedule.

    It keeps PyTorch's momentum cycling, so beta1 runs 0.95 -> 0.85 -> 0.95 over the run, whatever the betas given
    before: the original's behaviour, though it may not have been meant.
    """
    pct_start = args.pct_start
    if pct_start * max_steps == 1.0:
        # The warm-up is the first step alone; PyTorch then divides by its length of zero. The limit from above
        # starts at lr / div_factor, as a longer warm-up does; a run of one step has none to warm up for.
        pct_start = min(pct_start * (1 + 1e-9), 1 - 1e-9)
    return OneCycleLR(
        optimizer,
        max_lr=args.lr,
        total_steps=max_steps,
        pct_start=pct_start,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
    )
