"""AdamW under OneCycleLR, as mistral-finetune sets them up."""

from collections.abc import Iterable

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from .args import OptimArgs


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], args: OptimArgs, max_steps: int
) -> tuple[AdamW, OneCycleLR]:
    """Builds the optimizer and its schedule.

    The schedule keeps PyTorch's momentum cycling, so beta1 runs 0.95 -> 0.85 -> 0.95 over the run, whatever the betas
    given here: the original's behaviour, though it may not have been meant.
    """
    optimizer = AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay)
    pct_start = args.pct_start
    if pct_start * max_steps == 1.0:
        # The warm-up is the first step alone; PyTorch then divides by its length of zero. The limit from above
        # starts at lr / div_factor, as a longer warm-up does; a run of one step has none to warm up for.
        pct_start = min(pct_start * (1 + 1e-9), 1 - 1e-9)
    schedule = OneCycleLR(
        optimizer,
        max_lr=args.lr,
        total_steps=max_steps,
        pct_start=pct_start,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
    )
    return optimizer, schedule
