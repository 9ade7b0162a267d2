"""Epochs to optimizer steps."""

import logging
import math

from .args import TrainArgs
from .data.data_loader import TrainLoader
from .distributed import World

logger = logging.getLogger("train")


def count_epoch_steps(args: TrainArgs, data_loader: TrainLoader, world: World) -> float:
    """Return the number of steps of an epoch, the same on every rank. Reads every row once.

    An epoch is the number of positions needed to pack each row of all ranks and sources once. A source whose weight
    exceeds its share of the rows is repeated more often within an epoch, and the others less.

    Raises:
        UserError, SystemExit: on every rank, if any rank has a row that cannot be trained on.
    """
    with world.synchronized_errors():
        positions = data_loader.count_epoch(show_progress=world.is_master)
    step_positions = args.batch_size * args.num_microbatches * args.seq_len * world.size
    return sum(world.gather(positions)) / step_positions


def count_steps(epochs: float, epoch_steps: float) -> int:
    """Return the number of steps of `epochs`."""
    steps = max(1, math.ceil(epochs * epoch_steps))
    logger.info("Epochs: %g, which is max_steps: %d (an epoch takes %.1f steps)", epochs, steps, epoch_steps)
    return steps
