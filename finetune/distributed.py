"""The one file that calls collectives."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.errors import UserError

from .hardware import choose_device

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """Who this process is among how many. One process alone needs no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def mesh(self) -> DeviceMesh:
        """All processes in one row."""
        return init_device_mesh(self.device.type, (self.size,))

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all ranks."""
        return self.sum(value) / self.size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over all ranks, in a new tensor."""
        if self.size == 1:
            return value
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        return self.sum(torch.tensor(float(flag))).item() > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in the order of ranks."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Runs something on every rank that may end in a user's mistake; if it does on one, it does on all.

        Without this the ranks that saw nothing wrong would wait for the others until a timeout.

        Raises:
            UserError, SystemExit: see `fail_together`.
        """
        result, message = None, None
        try:
            result = action()
        except UserError as error:
            message = str(error)
        self.fail_together(message)
        return result  # type: ignore[return-value]

    def fail_together(self, message: str | None) -> None:
        """Ends every rank if any of them brings a message.

        Raises:
            UserError: on rank 0, with the message of the lowest such rank, so that it is printed once.
            SystemExit: on the others.
        """
        if first := next(filter(None, self.gather(message)), None):
            raise UserError(first) if self.is_master else SystemExit(1)


@contextmanager
def init_world() -> Iterator[World]:
    """Joins the processes that torchrun started.

    Raises:
        UserError: a process without a GPU of its own.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield World(rank, size, device)
    dist.destroy_process_group()  # not after an exception: it would wait for ranks that may be gone
