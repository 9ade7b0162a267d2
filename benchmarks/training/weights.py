"""Random weights without files: generated on the device when they are read, the same at every read."""

import zlib
from pathlib import Path

import torch

from model.args import ModelArgs
from model.transformer import Transformer


class RandomWeights:
    """Replaces a `model.weights.WeightsReader`."""

    def __init__(self, shapes: ModelArgs, device: torch.device, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            model = Transformer(shapes)
        self.model_args = shapes
        self.source = Path("random weights")
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.dtypes = dict.fromkeys(self.shapes, dtype)
        self._device = device

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a tensor, or some of its rows: norms are 1, matrices preserve the variance of their input."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)[rows or slice(None)]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return tensor.normal_(std=shape[1] ** -0.5, generator=generator)[rows or slice(None)]

    read_finite = read
