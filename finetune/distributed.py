"""The one file that calls collectives."""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.errors import UserError

from .hardware import choose_device

T = TypeVar("T")
_WATCH_S = 1.0
_FAILED = "failed"  # key under which a process that fails leaves word


@dataclasses.dataclass(frozen=True)
class World:
    """Who this process is among how many. One process alone needs no process group."""

    rank: int
    size: int
    device: torch.device
    background_group: dist.ProcessGroup | None = None  # for collectives beside those of the training thread
    failures: "FailureWatch | None" = None

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
        """Whether any rank says yes. Asks over the CPUs, so that a GPU's queue of work goes on."""
        if self.size == 1:
            return flag
        total = torch.tensor(float(flag))
        dist.all_reduce(total)
        return total.item() > 0

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

    def announce(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Tells the other processes that this one fails; what it still has to close may take its time.

        An exit callback of contextlib.ExitStack.
        """
        if self.failures and isinstance(error, Exception):
            self.failures.announce(error)

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
    """Joins the processes that torchrun started; an exception in one of them ends the others within seconds.

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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_connect(size, may_host=rank == 0), rank=rank, world_size=size)
    failures = FailureWatch(_connect(size), rank)
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo"), failures)
    except Exception as error:
        if failures.announce(error) or isinstance(error, UserError):
            raise
        # Its peer is gone, and has said why: what this one met in a collective is only the consequence.
        raise SystemExit(1) from None
    dist.destroy_process_group()  # not after an exception: it would wait for ranks that may be gone


def _connect(size: int, may_host: bool = False) -> dist.Store:
    """A connection to the key-value store where processes find each other.

    torchrun's own store outlives a restart, with the addresses of processes that are gone in it (torch 2.13): each
    attempt has its own keys. Without torchrun's, rank 0 hosts one.
    """
    hosts = may_host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, size, is_master=hosts, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class FailureWatch:
    """Ends this process soon after another one has failed.

    One that waits in a collective for a rank that is gone notices after many minutes, or never. So who fails leaves
    word in torchrun's key-value store, and a thread of each process looks there every second.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    def announce(self, error: Exception) -> bool:
        """Leaves word that this process fails, and says whether it is the first."""
        word = f"rank {self._rank}: {type(error).__name__}"
        try:
            return self._store.compare_set(_FAILED, "", word).decode().startswith(f"rank {self._rank}:")
        except RuntimeError:  # the store went with the process that held it
            return True

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._store.check([_FAILED]):
                time.sleep(_WATCH_S)
            time.sleep(_WATCH_S)  # who fails with us may still be saying why
            print(f"[rank {self._rank}] stops, since another failed ({self._store.get(_FAILED).decode()})", flush=True)
            os._exit(1)
