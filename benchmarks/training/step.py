"""What every implementation gives the benchmark."""

import dataclasses
from collections.abc import Callable

import torch

from finetune.data.data_loader import Batch


@dataclasses.dataclass(frozen=True)
class Trainee:
    step: Callable[[list[Batch]], torch.Tensor]  # one optimizer step on these micro-batches; their mean loss
    attention: str  # the engine in use
