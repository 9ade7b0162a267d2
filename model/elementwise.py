"""Functions without matrix products, which torch.compile turns into one kernel each: norms, activations, rotations."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def elementwise(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """Return a function as it is, or compiled into one kernel for any number of tokens."""
    return _compiled(function) if compiled else function


@functools.cache
def _compiled(function: Callable[..., R]) -> Callable[..., R]:
    return torch.compile(function, dynamic=True)
