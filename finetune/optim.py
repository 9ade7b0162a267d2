"""AdamW, in fp32 or 8 bits, and its schedule: OneCycleLR, as mistral-finetune sets it up, or a plain way down."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from model.errors import UserError

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
) -> tuple[Optimizer, Schedule]:
    """Builds the optimizer and its schedule.

    Raises:
        UserError: `adamw8bit` without bitsandbytes.
    """
    settings = {"lr": args.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": args.weight_decay}
    if args.name == "adamw8bit":
        optimizer = _adamw_8bit(parameters, **settings)
    else:
        # One kernel over all tensors: on a CPU 3 to 6 times as fast as PyTorch's default, which takes them one by one.
        optimizer = AdamW(parameters, **settings, fused=True)
    if args.schedule == "onecycle":
        return optimizer, _one_cycle(optimizer, args, max_steps)
    return optimizer, WarmUpSchedule(optimizer, args, max_steps)


def check_optimizer(args: OptimArgs, world_size: int) -> None:
    """Raises UserError where the chosen optimizer cannot run here."""
    if args.name != "adamw8bit":
        return
    if world_size > 1:
        raise UserError(
            f"`optim.name: adamw8bit` works on one process, and this run has {world_size}: bitsandbytes cannot update "
            "parameters that are sharded. Use `optim.name: adamw`, whose state is sharded too, or one process."
        )
    _import_adamw_8bit()


def _import_adamw_8bit() -> type[Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            '`optim.name: adamw8bit` needs bitsandbytes: pip install "recode-mistral-finetune[bitsandbytes]".'
        ) from error
    return AdamW8bit


def _adamw_8bit(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> Optimizer:
    """bitsandbytes' AdamW, whose whole state is tensors, each of its own, as checkpoints need them."""
    optimizer = _import_adamw_8bit()(parameters, **settings)
    optimizer.non_castable_tensor_keys = set()  # of state_dict(): wraps none of them in a dict of their own
    optimizer.register_state_dict_post_hook(_without_maps)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.int64)  # in place of an int
    optimizer.initialized = True  # else its first step would move the counts to the GPU, and each step wait for them
    return optimizer


def _without_maps(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the tables of what each 8-bit code means: constants that all parameters share."""
    states = {
        number: {name: value for name, value in state.items() if not name.startswith("qmap")}
        for number, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}


def _one_cycle(optimizer: Optimizer, args: OptimArgs, max_steps: int) -> OneCycleLR:
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
