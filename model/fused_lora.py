"""Frozen linear layers that share an input, with their adapters, as a single autograd function.

y_i = W_i x + scaling_i * B_i A_i x. With plain autograd, every layer and every adapter would save its input and read it
and its gradient again. Here the input is not saved at all: the backward pass recomputes it from tensors that are saved
anyway (see `InputFn`). The A matrices of all layers are multiplied as one, and sums are accumulated inside the matrix
products.

Shapes: T tokens, I input width, O_i output width of a layer, R_i rank of its adapter.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .elementwise import elementwise
from .frozen_weights import FrozenWeight


@dataclasses.dataclass(frozen=True)
class Adapter:
    a: torch.Tensor  # [R, I], in the compute dtype
    b: torch.Tensor  # [O, R]
    scaling: float


class InputFn(Protocol):
    """A cheap function that computes the layers' input x from tensors that are saved for the backward pass anyway."""

    @property
    def forward(self) -> Callable[..., torch.Tensor]:
        """(*tensors) -> x [T, I]."""

    @property
    def gradients(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """(gradient of x, which may be overwritten, *tensors) -> gradients of the tensors."""


class Identity:
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


def project(
    input_fn: InputFn,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[FrozenWeight],
    adapters: Sequence[Adapter | None],
    needs_output: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Return the layers' outputs [T, O_i] for the input `input_fn(*tensors)`.

    Args:
        needs_output: False when the call is repeated for its backward pass only: the outputs then have the right shape
            and undefined values.
    """
    factors = [factor for adapter in adapters if adapter for factor in (adapter.a, adapter.b)]
    scalings = [adapter and adapter.scaling for adapter in adapters]
    return _Project.apply(input_fn, weights, scalings, needs_output, len(tensors), *tensors, *factors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_fn: InputFn,
        weights: Sequence[FrozenWeight],
        scalings: Sequence[float | None],
        needs_output: bool,
        n_tensors: int,
        *saved: torch.Tensor,  # the tensors, then a and b of each adapter
    ) -> tuple[torch.Tensor, ...]:
        x = input_fn.forward(*saved[:n_tensors])
        a, b = saved[n_tensors::2], saved[n_tensors + 1 :: 2]
        low = x @ torch.cat(a).T if a else None  # [T, sum of R_i]
        ctx.input_fn, ctx.weights, ctx.scalings, ctx.n_tensors = input_fn, weights, scalings, n_tensors
        ctx.save_for_backward(low, *saved)
        if not needs_output:
            return tuple(x.new_empty(len(x), weight.out_features) for weight in weights)
        outputs = weights[0].products(weights, x)  # layers that share an input use the same storage format
        for i, scaling, part, factor in _adapted(scalings, low, a, b):
            outputs[i].addmm_(part, factor.T, alpha=scaling)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, *saved = ctx.saved_tensors
        tensors, a, b = saved[: ctx.n_tensors], saved[ctx.n_tensors :: 2], saved[ctx.n_tensors + 1 :: 2]
        grad_factors: list[torch.Tensor] = []
        if a:
            grad_low = torch.empty_like(low)
            for i, scaling, part, factor in _adapted(ctx.scalings, grad_low, a, b):
                torch.mm(grads[i], factor, out=part).mul_(scaling)
            grads_b = [grads[i].T @ part * scaling for i, scaling, part, _ in _adapted(ctx.scalings, low, a, b)]
            grads_a = (grad_low.T @ ctx.input_fn.forward(*tensors)).split([len(factor) for factor in a])
            grad_factors = [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]
        no_gradients = (None,) * 5  # the arguments before `saved`
        if not any(ctx.needs_input_grad[5 : 5 + ctx.n_tensors]):  # directly after frozen embeddings
            return (*no_gradients, *[None] * ctx.n_tensors, *grad_factors)
        grad_x = ctx.weights[0].input_gradient(grads[0])
        for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
            grad_x = weight.input_gradient(grad, grad_x)
        if a:
            grad_x.addmm_(grad_low, torch.cat(a))
        return (*no_gradients, *ctx.input_fn.gradients(grad_x, *tensors), *grad_factors)


def _adapted(
    scalings: Sequence[float | None], low: torch.Tensor | None, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
) -> Iterator[tuple[int, float, torch.Tensor, torch.Tensor]]:
    """Yield each adapted layer's index, its scaling, its columns of `low` [T, sum of R_i], and its B."""
    if low is None:
        return
    adapted = [(i, scaling) for i, scaling in enumerate(scalings) if scaling is not None]
    parts = low.split([len(factor) for factor in a], dim=1)
    for (i, scaling), part, factor in zip(adapted, parts, b, strict=True):
        yield i, scaling, part, factor
