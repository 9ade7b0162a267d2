"""The processes of a run: rendezvous and collectives. The only file that calls collectives.

Sharded tensors are recognized without importing torch.distributed.tensor, which would add a second to every start.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist

from model.errors import UserError

from .cli import FailureReport, failure_report
from .ending import ignore_sigterm, is_store_here, machine, torchrun_hosts_store, wait_to_leave
from .failure_watch import DEFAULT_TIMEOUT_S, TIMEOUT_VARIABLE, WATCH_S, FailureWatch
from .hardware import choose_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
_GLOO, _GLOO_TIMEOUT = "gloo", "Timed out waiting"  # in messages of exceptions without a type of their own
_POLL_S = 0.05  # between two reads of the store during the rendezvous


@dataclasses.dataclass(frozen=True)
class World:
    """This process's rank among all processes of the run. A single process needs no process group."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine
    background_group: dist.ProcessGroup | None = None  # for collectives that run concurrently with the training thread
    failures: FailureWatch | None = None

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def mesh(self, shards: int) -> DeviceMesh:
        """Return the mesh of all processes, in which `shards` neighboring ranks hold one copy of the model."""
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():  # a single process: with `cpu_offload` FSDP needs a group of one
            dist.init_process_group(_backend(self.device), store=dist.HashStore(), rank=0, world_size=1)
        if shards == self.size:
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        shape = (self.size // shards, shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a scalar over all ranks."""
        return self.sum(value) / self.size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a small tensor over all ranks; the argument is not changed."""
        if self.size == 1:
            return value
        self._count_collective()
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. Communicates over the CPU, without waiting for a GPU's queue."""
        if self.size == 1:
            return flag
        self._count_collective()
        total = torch.tensor(float(flag))
        dist.all_reduce(total)
        return total.item() > 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            self._count_collective()
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def synchronized_errors(self) -> Iterator[None]:
        """Run a block on every rank; a UserError on one rank ends them all.

        Without it, the ranks without an error would wait for the failed one until a timeout. The block must not call
        collectives, except for those that fail on all ranks together, as torch.distributed.checkpoint's do.

        Raises:
            UserError, SystemExit: see `raise_on_all`.
        """
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        self.raise_on_all(message)

    def raise_on_all(self, message: str | None) -> None:
        """End every rank if any of them passes an error message.

        Raises:
            UserError: on rank 0, with the message of the lowest failing rank, which it names unless that is rank 0.
            SystemExit: on the others, which wait at the end of the run until rank 0 has printed it.
        """
        if message and not self.is_master:
            message = self._name() + message
        if first := next(filter(None, self.gather(message)), None):
            raise _SharedError(first) if self.is_master else _EndedByRankZero(first)

    def _name(self) -> str:
        return f"[rank {self.rank} on {machine()}] "

    def report_failure(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Print why this rank is failing, or let another one do it, before files and trackers are closed.

        An exit callback for contextlib.ExitStack.
        """
        if not self.failures or error is None or isinstance(error, KeyboardInterrupt):
            return
        ignore_sigterm()
        if isinstance(error, _EndedByRankZero):
            self.failures.ending.wait(FailureReport(f"error: {error.reason}\n", error.reason))
        elif not isinstance(error, SystemExit):
            self.failures.ending.fail(self._reason(error, self.failures))
        elif self.is_master:
            self.failures.ending.mark_printed()
        else:  # after a signal; rank 0 says so
            self.failures.ending.wait(None)

    def _reason(self, error: BaseException, failures: FailureWatch) -> FailureReport:
        if isinstance(error, _SharedError):
            return failure_report(error)
        if isinstance(error, dist.DistError) or (_GLOO in str(error) and not isinstance(error, UserError)):
            if lost := failures.find_lost():
                return failure_report(UserError(lost))
            if _GLOO_TIMEOUT in str(error):
                waited = (
                    f"Waited in vain for the other processes, {failures.progress()}: one of them is stopped or stuck, "
                    f"or its machine cannot be reached. If it only needs more time, set the environment variable "
                    f"{TIMEOUT_VARIABLE} to more seconds."
                )
                return failure_report(UserError(waited), self._name())
        return failure_report(error, self._name())

    def show_progress(self, progress: Callable[[], str], advice: Callable[[], str]) -> None:
        """Name what this rank is doing and how to continue, for messages about ranks that stop responding."""
        if self.failures:
            self.failures.progress, self.failures.advice = progress, advice

    def _count_collective(self) -> None:
        if self.failures:
            self.failures.collectives += 1


class _SharedError(UserError):
    """An error that every rank knows; rank 0 prints it."""


class _EndedByRankZero(SystemExit):
    """Ends another rank for a reason that rank 0 prints."""

    def __init__(self, reason: str) -> None:
        super().__init__(1)
        self.reason = reason


@contextmanager
def init_world() -> Iterator[World]:
    """Join the processes that torchrun started; an exception in one of them ends the others within seconds.

    Raises:
        UserError: there are more processes than GPUs, some processes did not join in time, or they waited longer for
            each other than TIMEOUT_VARIABLE allows.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        with _several_processes(rank, size) as world:
            yield world
        return
    try:
        yield World(rank, size, _own_device())
    finally:
        if dist.is_initialized():  # see World.mesh
            dist.destroy_process_group()


@contextmanager
def _several_processes(rank: int, size: int) -> Iterator[World]:
    seconds = _timeout()
    timeout = timedelta(seconds=seconds + 10 * WATCH_S)  # the failure watch comes first: its message is better
    store = _store(size, may_host=rank == 0)
    attempt = _rendezvous(store, rank, size)
    failures = FailureWatch(dist.PrefixStore(attempt, _store(size)), rank, size, seconds)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    world = World(rank, size, torch.device("cpu"), local_size, failures=failures)
    try:
        device = _own_device()
        dist.init_process_group(
            _backend(device),
            store=dist.PrefixStore(attempt, store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,  # NCCL connects now, and not in the first step
        )
        background = dist.new_group(backend="gloo", timeout=timeout)
        yield dataclasses.replace(world, device=device, background_group=background)
    except BaseException as error:  # the process group is not destroyed: that would wait for ranks that may be gone
        world.report_failure(type(error), error, None)
        failures.leave()
        _leave_in_order(rank, size, local_size, failures)
        raise error if isinstance(error, (SystemExit, KeyboardInterrupt)) else SystemExit(1) from None
    failures.leave()
    dist.destroy_process_group()
    _leave_in_order(rank, size, local_size, failures)


def _leave_in_order(rank: int, size: int, local_size: int, failures: FailureWatch) -> None:
    if torchrun_hosts_store():
        first = rank - int(os.environ.get("LOCAL_RANK", rank))
        others = {*range(size)} - {*range(first, first + local_size)}
        is_host = bool(others) and is_store_here()
    else:
        others, is_host = {*range(1, size)}, rank == 0
    if is_host:
        wait_to_leave(lambda: failures.have_left(others))


def _own_device() -> torch.device:
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise UserError(f"The environment variable {TIMEOUT_VARIABLE} is {text!r}; expected a number of seconds.")
    return seconds


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _store(size: int, may_host: bool = False) -> dist.Store:
    """Connect to the key-value store used for rendezvous: torchrun's, or else one that rank 0 hosts."""
    hosts = may_host and not torchrun_hosts_store()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, size, is_master=hosts, wait_for_workers=False, multi_tenant=True)


def _rendezvous(store: dist.Store, rank: int, size: int) -> str:
    """Wait for all processes. Return a name unique to this attempt, since torchrun's store outlives a restart.

    Keys of terminated processes remain in the store, and torchrun counts restarts per node, so the counts differ once
    a node was away (PyTorch's issue 135712). Hence each process sends its request under a unique name, and rank 0
    replies to all requests it finds, stale ones included, until every running process has its reply.

    Raises:
        UserError: on rank 0, if some processes did not join in time.
    """
    own_name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"request_{rank}", own_name)
        attempt = store.get(f"reply_{own_name}").decode()
        store.add(f"{attempt}_joined", 1)
        return attempt
    end = time.monotonic() + store.timeout.total_seconds()  # type: ignore[attr-defined]  # missing in PyTorch's stub
    while (joined := store.add(f"{own_name}_joined", 0)) < size - 1:
        if time.monotonic() > end:
            raise UserError(f"Only {joined + 1} of {size} processes joined. Is torchrun running on every node?")
        for request in filter(lambda key: store.check([key]), (f"request_{other}" for other in range(1, size))):
            store.set(f"reply_{store.get(request).decode()}", own_name)
        time.sleep(_POLL_S)
    return own_name


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded; a collective operation if it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
