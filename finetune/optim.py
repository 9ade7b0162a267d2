"""AdamW in fp32 or 8 bits; learning rate schedules: OneCycleLR as in mistral-finetune, or warm-up and decay."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from model.errors import UserError

from .args import OptimArgs

# Share of the difference between peak and final learning rate that is left, given the share of the decay steps done.
_DECAY: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


class WarmUpSchedule(LRScheduler):
    """Linear warm-up from lr / div_factor to lr, then decay to OneCycleLR's final rate; same peak step as OneCycleLR.

    Args:
        optimizer: whose learning rate is set.
        args: shape and rates.
        total_steps: of the run.
    """

    def __init__(self, optimizer: Optimizer, args: OptimArgs, total_steps: int) -> None:
        self._args = args
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each parameter group at step `last_epoch`, counted from 0."""
        return [self._rate(self.last_epoch)] * len(self.optimizer.param_groups)

    def _rate(self, step: int) -> float:
        args, last = self._args, self.total_steps - 1
        first_rate = args.lr / args.div_factor
        peak = max(args.pct_start * self.total_steps - 1, 0.0)
        if step < peak:
            return first_rate + (args.lr - first_rate) * step / peak
        last_rate = first_rate / args.final_div_factor
        done = (step - peak) / (last - peak) if last > peak else 0.0
        return last_rate + (args.lr - last_rate) * _DECAY[args.schedule](done)


Schedule = OneCycleLR | WarmUpSchedule


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], args: OptimArgs, max_steps: int
) -> tuple[Optimizer, Schedule]:
    """Build the optimizer and its schedule.

    Raises:
        UserError: `adamw8bit` is set but bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": args.weight_decay}
    optimizer: Optimizer
    if args.name == "adamw8bit":
        optimizer = _adamw_8bit(parameters, **settings)
    else:
        # Fused: on a CPU 3 to 6 times as fast as PyTorch's default, which updates one tensor at a time.
        optimizer = AdamW(parameters, **settings, fused=True)
    if args.schedule == "onecycle":
        return optimizer, _one_cycle(optimizer, args, max_steps)
    return optimizer, WarmUpSchedule(optimizer, args, max_steps)


def step_schedule(schedule: Schedule) -> None:
    """Set the learning rate of the next step; after the last step this does nothing, since there is none."""
    if schedule.last_epoch < schedule.total_steps - 1:
        with warnings.catch_warnings():
            # PyTorch warns if the optimizer has not taken a step yet, as when fp16 skips the first one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            schedule.step()


def check_optimizer(args: OptimArgs, world_size: int) -> None:
    """Raise UserError if the chosen optimizer cannot run here."""
    if args.name != "adamw8bit":
        return
    if world_size > 1:
        raise UserError(
            f"`optim.name: adamw8bit` works on one process, and this run has {world_size}: bitsandbytes cannot update "
            "parameters that are sharded. Use `optim.name: adamw`, whose state is sharded too, or one process."
        )
    _import_adamw_8bit()


def _import_adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError('`optim.name: adamw8bit` needs bitsandbytes: pip install -e ".[bitsandbytes]".') from error
    return AdamW8bit


def _adamw_8bit(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> Optimizer:
    """Build bitsandbytes' AdamW with its whole state in separate tensors, as checkpoints need it."""
    optimizer = _import_adamw_8bit()(parameters, **settings)
    optimizer.non_castable_tensor_keys = set()  # so that state_dict() does not nest these tensors in another dict
    optimizer.register_state_dict_post_hook(_without_maps)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.int64)  # bitsandbytes sets an int
    # Else its first step would move the step counts to the GPU, and every step would wait for them.
    optimizer.initialized = True
    return optimizer


def _without_maps(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Drop the quantization maps from a state dict: they are constants, the same for all parameters."""
    states = {
        number: {name: value for name, value in state.items() if not name.startswith("qmap")}
        for number, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}


def _one_cycle(optimizer: Optimizer, args: OptimArgs, max_steps: int) -> OneCycleLR:
    """Build the original's schedule.

    PyTorch's momentum cycling stays on, so beta1 runs 0.95 -> 0.85 -> 0.95 over the run and overrides the betas given
    above. The original does so too, perhaps unintentionally.
    """
    pct_start = args.pct_start
    if pct_start * max_steps == 1.0:
        # The warm-up is the first step alone, and PyTorch would divide by its length of zero. The limit from above
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
