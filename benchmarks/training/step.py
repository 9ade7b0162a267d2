"""The interface of an implementation to the benchmark."""

import dataclasses
from collections.abc import Callable

import torch

from finetune.data.data_loader import Batch


@dataclasses.dataclass(frozen=True)
class Trainee:
    step: Callable[[list[Batch]], torch.Tensor]  # runs one optimizer step on micro-batches and returns their mean loss
    attention: str  # the engine in use
    dtype: torch.dtype  # of matrix products
