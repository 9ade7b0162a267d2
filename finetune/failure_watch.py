"""Detection of failed, stopped and stuck processes among those of a run."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from .cli import report_to_torchrun

TIMEOUT_VARIABLE = "DISTRIBUTED_TIMEOUT_S"  # environment variable: longest time that ranks wait for one another
DEFAULT_TIMEOUT_S = 1800.0  # rank 0 may be writing a large merged model
WATCH_S = 1.0  # between two looks at the store
_REPORT_S = 10.0  # longest time to report a failure: calls to the store of a stopped process never return
_SILENCE_S = 300.0  # at most this for a process that does not run at all: no work keeps it from reporting that it does
_FAILED = "failed"  # store key under which the first rank that fails reports it
_RUNNING = "running"  # start of the store key under which each rank reports that it is running


class Store(Protocol):
    """torch.distributed's key-value store. Its methods raise RuntimeError if the process that hosts it is gone."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class FailureWatch:
    """End this process soon after another rank has failed, or minutes after one has stopped responding.

    A process waiting in a collective for a rank that is gone notices after many minutes, or never, and cannot name it.
    So a thread of each process writes to torchrun's key-value store every second that it is running and how many
    collectives it has entered, and reads what the next rank has written; a failing rank writes that, too.

    Args:
        store: shared by all ranks of this attempt.
        rank, size: of this process, and number of processes.
        timeout: seconds that ranks may wait for one another.

    Attributes:
        collectives: how many collectives this rank has entered; all ranks enter the same ones.
        progress: returns what this rank is doing, for messages of other ranks.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.collectives = 0
        self.progress: Callable[[], str] = lambda: "before the first step"
        self._store = store
        self._rank = rank
        self._beats = 0
        self._has_left = False
        self._neighbor = _Neighbor((rank + 1) % size, timeout)
        threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    def report(self, error: BaseException) -> bool:
        """Report that this rank is failing. Return whether it is the first."""
        return self._report_failure(f"rank {self._rank}: {type(error).__name__}")

    def leave(self) -> None:
        """Report that this rank has nothing more to do with the others."""
        self._has_left = True
        with contextlib.suppress(RuntimeError):
            self._report_running()

    def _report_failure(self, report: str) -> bool:
        first = [report]  # stays so if the process that hosts the store is gone, or does not answer

        def write() -> None:
            with contextlib.suppress(RuntimeError):
                first.append(self._store.compare_set(_FAILED, "", report).decode())

        writer = threading.Thread(target=write, name="failure report", daemon=True)
        writer.start()
        writer.join(_REPORT_S)
        return first[-1].startswith(f"rank {self._rank}:")

    def _report_running(self) -> None:
        self._beats += 1
        report = {
            "beats": self._beats,
            "collectives": self.collectives,
            "progress": self.progress(),
            "process": f"process {os.getpid()} on {socket.gethostname()}",
            "has_left": self._has_left,
        }
        self._store.set(f"{_RUNNING}_{self._rank}", json.dumps(report))

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._store.check([_FAILED]):
                self._report_running()
                self._neighbor.look(self._store)
                if problem := self._neighbor.problem(self.collectives):
                    self._end_all(problem)
                time.sleep(WATCH_S)
            time.sleep(WATCH_S)  # a rank that fails at the same time may still be printing why
            print(f"[rank {self._rank}] exiting: another rank failed ({self._store.get(_FAILED).decode()})", flush=True)
            os._exit(1)

    def _end_all(self, problem: str) -> None:
        if self._report_failure(f"rank {self._rank}: {self._neighbor.name} does not respond"):
            print(f"error: {problem}", file=sys.stderr, flush=True)
            report_to_torchrun(problem)
            os._exit(1)


class _Neighbor:
    """What this rank knows about the next one.

    Durations are counted in looks, so that time during which this process itself does not run is not part of them.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.name = f"rank {rank}"
        self._key = f"{_RUNNING}_{rank}"
        self._timeout = timeout
        self._report: dict[str, Any] = {}
        self._changed_at = time.localtime()  # when its report last changed
        self._silent_looks = 0  # since then
        self._moved_at = time.localtime()  # when it last entered a collective
        self._still_looks = 0  # since then

    def look(self, store: Store) -> None:
        """Read the latest report."""
        report = json.loads(store.get(self._key)) if store.check([self._key]) else {}
        self._silent_looks += 1
        self._still_looks += 1
        if report != self._report:
            self._changed_at, self._silent_looks = time.localtime(), 0
        if report.get("collectives") != self._report.get("collectives"):
            self._moved_at, self._still_looks = time.localtime(), 0
        self._report = report

    def problem(self, own_collectives: int) -> str | None:
        """Return why waiting for this rank is in vain, or None.

        Args:
            own_collectives: collectives that the waiting rank has entered.
        """
        report = self._report
        if report.get("has_left"):
            return None
        name = f"R{self.name[1:]} ({report.get('process', 'not started')})"
        doing = report.get("progress", "before the first step")
        silence = self._silent_looks * WATCH_S
        if silence > min(self._timeout, _SILENCE_S):
            return (
                f"{name} has not responded for {silence:.0f} s, since {time.strftime('%H:%M:%S', self._changed_at)}, "
                f"{doing}: it is stopped, or its machine cannot be reached. The other processes end, too."
            )
        waited = self._still_looks * WATCH_S
        is_running = self._silent_looks <= 1  # else it may have stopped, which takes longer to tell
        if is_running and waited > self._timeout and report.get("collectives", 0) < own_collectives:
            return (
                f"{name} has kept other processes waiting for {waited:.0f} s, since "
                f"{time.strftime('%H:%M:%S', self._moved_at)}, {doing}: it is running but does not arrive where they "
                f"wait. If it only needs more time, set the environment variable {TIMEOUT_VARIABLE} to more seconds."
            )
        return None
