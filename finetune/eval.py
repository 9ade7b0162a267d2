"""Evaluation on every rank's own rows."""

from collections.abc import Iterable

import numpy as np
import torch

from model.transformer import Transformer

from .data.data_loader import Batch
from .distributed import World
from .loss import batch_loss
from .wrapped_model import reshard

_PLACEHOLDER = Batch(x=np.zeros(1, dtype=np.int64), y=np.zeros(1, dtype=np.int64), sizes=[1])


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], world: World) -> float | None:
    """Mean over all ranks' batches of the batch's loss, in nats per token; None where no rank has a batch.

    A sharded model needs all ranks in every forward, so a rank whose rows are used up runs along on a token of its
    own, which does not count.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of batches
    rows = iter(batches)
    while True:
        batch = next(rows, None)
        if world.sum(torch.tensor(float(batch is not None))).item() == 0:
            break
        loss = batch_loss(model, batch or _PLACEHOLDER, world.device)
        if batch is not None:
            total += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
    reshard(model)
    model.train()
    loss_sum, count = world.sum(total).tolist()
    return loss_sum / count if count else None
