"""How many optimizer steps a number of epochs comes to."""

import logging
import math

from .args import TrainArgs
from .data.data_loader import TrainLoader
from .distributed import World

logger = logging.getLogger("train")


def count_steps(args: TrainArgs, batches: TrainLoader, world: World) -> int:
    """The steps of `args.epochs`, the same on every rank. Every row is read once for it.

    An epoch is as many positions as it takes to pack each row of all ranks and sources once. So a source whose weight
    is above its share of the rows comes round more often, and another one less.

    Raises:
        UserError, SystemExit: on every rank, for a row on any that cannot be trained on.
    """
    assert args.epochs is not None, "there are epochs to count"
    own = world.run_everywhere(lambda: batches.count_epoch(show_progress=world.is_master))
    step_positions = args.batch_size * args.num_microbatches * args.seq_len * world.size
    epoch_steps = sum(world.gather(own)) / step_positions
    steps = max(1, math.ceil(args.epochs * epoch_steps))
    logger.info("Epochs: %g, which is max_steps: %d (an epoch takes %.1f steps)", args.epochs, steps, epoch_steps)
    return steps
