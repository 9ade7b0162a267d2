"""Frozen linear layers that share an input, with their adapters, as one step of differentiation.

y_i = W_i x + scaling_i * B_i A_i x. Left to autograd, every layer and every adapter would keep its input and pass over
it and over its gradient again. Here the input is not kept at all: it is computed anew from what is kept anyway (see
`Source`). The A of all layers are multiplied as one matrix, and what adds up is added where it is multiplied.

Shapes: T tokens, I input width, O_i output width of a layer, R_i rank of its adapter.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .frozen_weights import FrozenWeight

P, R = ParamSpec("P"), TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Adapter:
    a: torch.Tensor  # [R, I], in the dtype that computes
    b: torch.Tensor  # [O, R]
    scaling: float


class Source(Protocol):
    """Where the layers' input x comes from: a cheap function of tensors that are kept for the backward pass anyway."""

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """x [T, I]."""

    def gradients(self, grad: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Those of the tensors, given that of x, which may be overwritten."""


class Given:
    """x itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gradients(self, grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (grad,)


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """x = silu(gate) * up (Shazeer, 2020)."""

    compiled: bool = False

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return elementwise(_swiglu, self.compiled)(gate, up)

    def gradients(self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise(_swiglu_gradients, self.compiled)(grad, gate, up)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _swiglu_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up


def elementwise(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """A function of no matrix products, or the one kernel that torch.compile makes of it for any number of tokens."""
    return _compiled(function) if compiled else function


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function, dynamic=True)


def project(
    source: Source,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[FrozenWeight],
    adapters: Sequence[Adapter | None],
    output_matters: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The layers' outputs [T, O_i] for the input that `source` makes of `tensors`.

    Args:
        output_matters: False where a step is repeated for its backward pass alone: what is returned then has the right
            shape and no meaning.
    """
    factors = [factor for adapter in adapters if adapter for factor in (adapter.a, adapter.b)]
    scalings = [adapter and adapter.scaling for adapter in adapters]
    return _Project.apply(source, weights, scalings, output_matters, len(tensors), *tensors, *factors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Source,
        weights: Sequence[FrozenWeight],
        scalings: Sequence[float | None],
        output_matters: bool,
        n_tensors: int,
        *saved: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        x = source.forward(*saved[:n_tensors])
        a, b = saved[n_tensors::2], saved[n_tensors + 1 :: 2]
        low = x @ torch.cat(a).T if a else None  # [T, sum of R_i]
        ctx.source, ctx.weights, ctx.scalings, ctx.n_tensors = source, weights, scalings, n_tensors
        ctx.save_for_backward(low, *saved)
        if not output_matters:
            return tuple(x.new_empty(len(x), weight.out_features) for weight in weights)
        outputs = weights[0].products(weights, x)  # layers that share an input are stored alike
        for i, part, factor in _adapted(scalings, low, a, b):
            outputs[i].addmm_(part, factor.T, alpha=scalings[i])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, *saved = ctx.saved_tensors
        tensors, a, b = saved[: ctx.n_tensors], saved[ctx.n_tensors :: 2], saved[ctx.n_tensors + 1 :: 2]
        grad_factors: list[torch.Tensor] = []
        if a:
            grad_low = torch.empty_like(low)
            for i, part, factor in _adapted(ctx.scalings, grad_low, a, b):
                torch.mm(grads[i], factor, out=part).mul_(ctx.scalings[i])
            grads_b = [grads[i].T @ part * ctx.scalings[i] for i, part, _ in _adapted(ctx.scalings, low, a, b)]
            grads_a = (grad_low.T @ ctx.source.forward(*tensors)).split([len(factor) for factor in a])
            grad_factors = [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]
        if not any(ctx.needs_input_grad[5 : 5 + ctx.n_tensors]):  # behind frozen embeddings
            return *[None] * (5 + ctx.n_tensors), *grad_factors
        total = None
        for grad, weight in zip(grads, ctx.weights, strict=True):
            total = weight.input_gradient(grad, total)
        if a:
            total.addmm_(grad_low, torch.cat(a))
        return *[None] * 5, *ctx.source.gradients(total, *tensors), *grad_factors


def _adapted(
    scalings: Sequence[float | None], low: torch.Tensor | None, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
) -> zip:
    """Of each layer with an adapter: its index, its columns of `low` [T, sum of R_i], and its B."""
    if low is None:
        return zip((), (), ())
    layers = (i for i, scaling in enumerate(scalings) if scaling is not None)
    return zip(layers, low.split([len(factor) for factor in a], dim=1), b, strict=True)
