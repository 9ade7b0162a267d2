"""Rotary position embeddings (Su et al., 2021) in Mistral's layout: adjacent channels form a complex number."""

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .elementwise import elementwise


def rotary_phases(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Return exp(i * position * theta^(-2j/Dh)): positions [T] -> complex64 [T, Dh/2].

    Computed for the given positions only, so there is no table and no maximum sequence length.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # Not theta**-exponents, which rounds differently from mistral-finetune: 5e-4 at position 128,000.
    angles = torch.outer(positions.float(), 1 / theta**exponents)
    return torch.polar(torch.ones_like(angles), angles)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates each channel pair by its phase, in fp32; shape and dtype are preserved.

    In complex arithmetic, which is fastest on a CPU, or compiled in real arithmetic, as one kernel each for the forward
    and the backward pass: torch.compile does not support complex numbers.
    """

    compiled: bool = False

    def __call__(self, x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
        """x [T, heads, Dh], phases complex64 [T, Dh/2] -> [T, heads, Dh]."""
        if self.compiled:
            return _CompiledRotation.apply(x, torch.view_as_real(phases))
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [T, heads, Dh/2]
        return torch.view_as_real(pairs * phases[:, None]).flatten(-2).to(x.dtype)


class _CompiledRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(phases)
        return elementwise(_rotate, True)(x, phases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return elementwise(_rotate_back, True)(grad, *ctx.saved_tensors), None


def _rotate(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """x [T, heads, Dh], phases [T, Dh/2, 2] as (cosine, sine) -> [T, heads, Dh]."""
    cosine, sine = phases[:, None].unbind(-1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1).flatten(-2).to(x.dtype)


def _rotate_back(grad: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    return _rotate(grad, torch.stack([phases[..., 0], -phases[..., 1]], -1))
