"""Detection of failed, stopped and stuck processes among those of a run."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from .cli import FailureReport
from .ending import STORE_S, Ending, Store, machine, within

TIMEOUT_VARIABLE = "DISTRIBUTED_TIMEOUT_S"  # environment variable: longest time that ranks wait for one another
DEFAULT_TIMEOUT_S = 1800.0  # rank 0 may be writing a large merged model
WATCH_S = 1.0  # between two looks at the store
_SILENCE_S = 300.0  # at most this for a process that does not run at all: no work keeps it from reporting that it does
_LOST_S = 8.0  # silence of a rank after which a broken connection to it means that it is gone
_STORE_GONE_S = 30.0  # in which this rank must end, too, once the store is gone
_RUNNING = "running"  # start of the store key under which each rank reports that it is running


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
        advice: returns how to continue after a failure of a machine, a sentence.
        ending: prints why the run ends.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.collectives = 0
        self.progress: Callable[[], str] = lambda: "before the first step"
        self.advice: Callable[[], str] = lambda: "Start the run again."
        self.ending = Ending(store, rank)
        self._store = store
        self._rank = rank
        self._size = size
        self._beats = 0
        self._has_left = False
        self._neighbor = _Neighbor((rank + 1) % size, timeout)
        threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    def leave(self) -> None:
        """Report that this rank has nothing more to do with the others."""
        self._has_left = True
        within(STORE_S, self._report_running, None)

    def have_left(self, ranks: Iterable[int]) -> bool:
        """Return whether these ranks have left, or are gone."""
        reports = (_read_report(self._store, rank) for rank in ranks)
        return all(report.get("has_left") or _is_killed(report) for report in reports)

    def find_lost(self) -> str | None:
        """Return a message about the ranks that are gone, after a connection broke; None if all are still there."""
        others = [rank for rank in range(self._size) if rank != self._rank]

        def read() -> dict[int, dict[str, Any]] | None:
            return {rank: _read_report(self._store, rank) for rank in others}

        before, end = within(STORE_S, read, None), time.monotonic() + _LOST_S
        while before and (now := within(STORE_S, read, None)):
            if within(STORE_S, self.ending.failure, None):
                return None  # which is why that rank closed its connections
            is_over = time.monotonic() > end
            present = {rank: report for rank, report in now.items() if not report.get("has_left")}
            lost = {
                rank: report
                for rank, report in present.items()
                if _is_killed(report) or (is_over and report == before[rank])
            }
            if lost:
                when = next(iter(lost.values())).get("progress", "before the first step")
                reason = f"{_names(lost)} lost {when}: killed, perhaps for lack of memory, or its machine failed."
                return f"{reason} {self.advice()}"
            if is_over:
                return None
            time.sleep(WATCH_S / 10)
        return self._store_is_lost()

    def _store_is_lost(self) -> str:
        host = os.environ.get("MASTER_ADDR")
        return (
            f"The machine {host}, which hosts torchrun's store, was lost or cannot be reached, {self.progress()}. "
            f"{self.advice()}"
        )

    def _report_running(self) -> None:
        self._beats += 1
        report = {
            "beats": self._beats,
            "collectives": self.collectives,
            "progress": self.progress(),
            "process": f"process {os.getpid()} on {machine()}",
            "pid": os.getpid(),
            "machine": machine(),
            "has_left": self._has_left,
        }
        self._store.set(f"{_RUNNING}_{self._rank}", json.dumps(report))

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not (failure := self.ending.failure()):
                self._report_running()
                self._neighbor.look(self._store)
                if problem := self._neighbor.problem(self.collectives):
                    self._exit(f"{problem} {self.advice()}")
                time.sleep(WATCH_S)
            self.ending.wait(failure)
            self.leave()
            os._exit(1)
        if not self._has_left:
            time.sleep(_STORE_GONE_S)
            self._exit(self._store_is_lost())

    def _exit(self, problem: str) -> None:
        self.ending.fail(FailureReport(f"error: {problem}\n", problem))
        os._exit(1)


def _read_report(store: Store, rank: int) -> dict[str, Any]:
    """Return a rank's latest report; {} if it has not started."""
    key = f"{_RUNNING}_{rank}"
    return json.loads(store.get(key)) if store.check([key]) else {}


def _is_killed(report: dict[str, Any]) -> bool:
    """Return whether a process of this machine is gone."""
    if report.get("machine") == machine():
        try:
            os.kill(report["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return False


def _names(reports: dict[int, dict[str, Any]]) -> str:
    """Return "Rank 2 on n2 was", or "Ranks 2, 3 on n2 and 4 on n3 were"."""
    machines: dict[str, list[str]] = {}
    for rank, report in reports.items():
        machines.setdefault(report.get("machine", "a machine that did not start"), []).append(str(rank))
    names = " and ".join(f"{', '.join(ranks)} on {name}" for name, ranks in machines.items())
    return f"Rank {names} was" if len(reports) == 1 else f"Ranks {names} were"


class _Neighbor:
    """What this rank knows about the next one.

    Durations are counted in looks, so that time during which this process itself does not run is not part of them.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.name = f"rank {rank}"
        self._rank = rank
        self._timeout = timeout
        self._report: dict[str, Any] = {}
        self._changed_at = time.localtime()  # when its report last changed
        self._silent_looks = 0  # since then
        self._moved_at = time.localtime()  # when it last entered a collective
        self._still_looks = 0  # since then

    def look(self, store: Store) -> None:
        """Read the latest report."""
        report = _read_report(store, self._rank)
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
