"""Weights in another dtype: computed in fp32 or as stored, rounded once."""

import torch

from model.errors import UserError
from model.weights import WeightsReader


def rounded(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a finite tensor in another dtype.

    Raises:
        UserError: a value is too large for fp16, so that it would become infinite.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not result.isfinite().all():
        raise UserError(f"`{name}` has a value of more than 65,504, the largest in fp16: choose another --dtype.")
    return result


class RoundedWeights:
    """The tensors of a model in another dtype; each is rounded when it is read.

    Attributes:
        shapes: shape of each tensor.
        dtypes: dtype of each tensor.
    """

    def __init__(self, weights: WeightsReader, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype
        self.shapes = weights.shapes
        self.dtypes = dict.fromkeys(weights.shapes, dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of `shapes`."""
        return rounded(self._weights.read_finite(name), self._dtype, name)
