"""A batch as tensors: built in host memory, ahead of the step that copies them to its device."""

import dataclasses

import numpy as np
import torch

from model.attention import PackedDocuments

from .data.data_loader import Batch


@dataclasses.dataclass(frozen=True)
class BatchTensors:
    """T positions, of which N are trained."""

    inputs: torch.Tensor  # [T] int64
    documents: PackedDocuments
    targets: torch.Tensor  # [N] int64, the tokens to predict
    trained: torch.Tensor | None  # [N] int64, the trained positions; None: all
    loss_weights: torch.Tensor | None  # [N], the weight of each; None: all equal

    @classmethod
    def of(cls, batch: Batch, pin: bool) -> "BatchTensors":
        """Return a batch in host memory; in pinned memory, from which a GPU copies without the host waiting."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            made = torch.from_numpy(array)
            return made.pin_memory() if pin else made

        mask, targets, trained, loss_weights = batch.y_mask, batch.y, None, None
        if mask is not None:
            positions = np.flatnonzero(mask)
            targets, trained = targets[positions], tensor(positions)
            if mask.dtype != bool:
                loss_weights = tensor(mask[positions].astype(np.float32))
        documents = PackedDocuments.from_lengths(batch.sizes, torch.device("cpu"))
        if pin:
            documents = documents.map(torch.Tensor.pin_memory)
        return cls(tensor(batch.x), documents, tensor(targets), trained, loss_weights)

    def to(self, device: torch.device) -> "BatchTensors":
        """Copy everything to a device, without waiting if the memory is pinned."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return BatchTensors(
            moved(self.inputs),
            self.documents.map(moved),
            moved(self.targets),
            None if self.trained is None else moved(self.trained),
            None if self.loss_weights is None else moved(self.loss_weights),
        )


def prepare_for_gpu(batch: Batch) -> None:
    """Make the tensors of a batch ahead of its step, in pinned memory."""
    batch.prepared = BatchTensors.of(batch, pin=True)


def tensors_on(device: torch.device, batch: Batch) -> BatchTensors:
    """Return a batch's tensors on a device."""
    return (batch.prepared or BatchTensors.of(batch, pin=device.type == "cuda")).to(device)
