"""The one file that calls collectives."""

import contextlib
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.errors import UserError

from .hardware import choose_device

T = TypeVar("T")
_WATCH_S, _MEET_S = 1.0, 0.05  # between two looks at the store
_FAILED = "failed"  # key under which a process that fails leaves word


@dataclasses.dataclass(frozen=True)
class World:
    """Who this process is among how many. One process alone needs no process group."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine
    background_group: dist.ProcessGroup | None = None  # for collectives beside those of the training thread
    failures: "FailureWatch | None" = None

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def mesh(self, shards: int) -> DeviceMesh:
        """All processes; `shards` neighbours hold one copy of the model together."""
        if not dist.is_initialized():  # one process, which is alone with its shard
            dist.init_process_group(_backend(self.device), store=dist.HashStore(), rank=0, world_size=1)
        if shards == self.size:
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        shape = (self.size // shards, shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

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

    def run_everywhere(self, action: Callable[[], T]) -> T:
        """Runs something on every rank that may end in a user's mistake; if it does on one, it does on all.

        Without this the ranks that saw nothing wrong would wait for the others until a timeout.

        Raises:
            UserError, SystemExit: see `raise_on_all`.
        """
        result, message = None, None
        try:
            result = action()
        except UserError as error:
            message = str(error)
        self.raise_on_all(message)
        return result  # type: ignore[return-value]

    def announce(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Tells the other processes that this one fails; what it still has to close may take its time.

        An exit callback of contextlib.ExitStack.
        """
        if self.failures and isinstance(error, Exception):
            self.failures.announce(error)

    def raise_on_all(self, message: str | None) -> None:
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
        try:
            yield World(rank, size, device)
        finally:
            if dist.is_initialized():  # see World.mesh
                dist.destroy_process_group()
        return
    store = _connect(size, may_host=rank == 0)
    attempt = _meet(store, rank, size)
    dist.init_process_group(_backend(device), store=dist.PrefixStore(attempt, store), rank=rank, world_size=size)
    failures = FailureWatch(dist.PrefixStore(attempt, _connect(size)), rank)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    try:
        yield World(rank, size, device, local_size, dist.new_group(backend="gloo"), failures)
    except Exception as error:
        if failures.announce(error) or isinstance(error, UserError):
            raise
        # Its peer is gone, and has said why: what this one met in a collective is only the consequence.
        raise SystemExit(1) from None
    dist.destroy_process_group()  # not after an exception: it would wait for ranks that may be gone


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _connect(size: int, may_host: bool = False) -> dist.Store:
    """A connection to the key-value store where processes find each other: torchrun's, or else one of rank 0."""
    hosts = may_host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, size, is_master=hosts, wait_for_workers=False, multi_tenant=True)


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """Waits for all processes, and returns a name for this attempt: torchrun's store outlives a restart.

    Keys of processes that are gone are still in it, and torchrun's count of restarts is each node's own, so that it
    differs once a node was away (PyTorch's issue 135712). So each process asks under a name of its own, and rank 0
    answers all it finds, the dead ones' too, until the living have the answer.

    Raises:
        UserError: on rank 0, when some have not come in time.
    """
    own_name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"question_{rank}", own_name)
        attempt = store.get(f"answer_{own_name}").decode()
        store.add(f"{attempt}_arrived", 1)
        return attempt
    end = time.monotonic() + store.timeout.total_seconds()
    while (arrived := store.add(f"{own_name}_arrived", 0)) < size - 1:
        if time.monotonic() > end:
            raise UserError(f"Only {arrived + 1} of {size} processes have come. Is torchrun running on every node?")
        for question in filter(lambda key: store.check([key]), (f"question_{other}" for other in range(1, size))):
            store.set(f"answer_{store.get(question).decode()}", own_name)
        time.sleep(_MEET_S)
    return own_name


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
