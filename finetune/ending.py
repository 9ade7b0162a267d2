"""How the processes of a run end together: one of them prints the reason, and none leaves before it has.

torchrun ends all processes once one has left with an error, so what is not printed by then is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from .cli import FailureReport, report_to_torchrun

T = TypeVar("T")
STORE_S = 10.0  # longest time for calls to the store: those to a stopped process never return
_PRINT_S = 20.0  # longest time that the others wait for the rank that prints; torchrun's own patience is 30 s
_LEAVE_S = 10.0  # longest time that the machine of torchrun's store waits for the other machines
_AGENT_S = 1.0  # in which torchrun notices that its processes have left; it looks every 0.1 s
_POLL_S = 0.05
_FAILED = "failed"  # store key under which the first rank that fails reports it, and then prints the reason
_PRINTED = "printed"  # store key that is set once the reason is printed


class Store(Protocol):
    """torch.distributed's key-value store. Its methods raise RuntimeError if the process that hosts it is gone."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


def machine() -> str:
    """Return the name of this machine, as messages use it."""
    return socket.gethostname()


def within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """Return what a call to the store returns, or `otherwise` if the store is gone or does not answer in time."""
    found = [otherwise]

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(call())

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[-1]


class Ending:
    """The end of a run of several processes, on one of them. Its methods may be called from several threads.

    Args:
        store: shared by all ranks of this attempt.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._has_ended = False

    def fail(self, report: FailureReport) -> None:
        """Print why this rank fails, or wait until another one that failed first has printed its reason.

        Further calls do nothing: the first is made before files and trackers are closed, which may take long.
        """
        if self._has_ended:
            return
        self._has_ended = True
        ignore_sigterm()
        own = json.dumps({"rank": self._rank, **dataclasses.asdict(report)})
        first = within(STORE_S, lambda: self._store.compare_set(_FAILED, "", own).decode(), None)
        if first == own:
            self._print(report)
            self.mark_printed()
        elif first:
            self.wait(_parse(first))
        elif os.environ.get("LOCAL_RANK", "0") == "0":  # the store is gone: one rank of each machine prints
            self._print(report)
        else:
            report_to_torchrun(report.summary)
            time.sleep(_AGENT_S)

    def mark_printed(self) -> None:
        """Let the other ranks leave, as this one has said all there is to say."""
        within(STORE_S, lambda: self._store.set(_PRINTED, "yes"), None)

    def wait(self, report: FailureReport | None) -> None:
        """Wait until another rank has printed why all of them end. If it does not in time, print `report` instead."""
        self._has_ended = True
        ignore_sigterm()
        if report:
            report_to_torchrun(report.summary)
        end, is_printed = time.monotonic() + _PRINT_S, False
        while not is_printed and time.monotonic() < end:
            # If the store is gone, so is its host, which leaves last.
            is_printed = within(STORE_S, lambda: self._store.check([_PRINTED]), True)
            time.sleep(_POLL_S)
        if report and not is_printed:
            own = f"rank {self._rank}, thread {threading.get_ident()}"
            if within(STORE_S, lambda: self._store.compare_set(_PRINTED, "", own).decode(), own) == own:
                self._print(report)

    def failure(self) -> FailureReport | None:
        """Return what another rank has reported to be failing with. Raise RuntimeError if the store is gone."""
        if not self._store.check([_FAILED]):
            return None
        first = self._store.get(_FAILED).decode()
        return _parse(first) if json.loads(first)["rank"] != self._rank else None

    def _print(self, report: FailureReport) -> None:
        report_to_torchrun(report.summary)
        with contextlib.suppress(OSError):
            sys.stderr.write(report.text)  # in one write, or lines of several processes mix
            sys.stderr.flush()


def _parse(reported: str) -> FailureReport:
    found = json.loads(reported)
    return FailureReport(found["text"], found["summary"])


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on: torchrun sends it when another process has left, and SIGKILL 30 s later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def wait_to_leave(others_have_left: Callable[[], bool]) -> None:
    """Wait until other processes have left, where this one or its torchrun hosts the store.

    If the host ended first, the others would report a lost connection: torchrun does with pages of stack frames.
    """
    end = time.monotonic() + _LEAVE_S
    while not within(STORE_S, others_have_left, True) and time.monotonic() < end:
        time.sleep(_POLL_S)
    if torchrun_hosts_store():
        time.sleep(_AGENT_S)


def torchrun_hosts_store() -> bool:
    """Return whether the store belongs to torchrun, and not to rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_store_here() -> bool:
    """Return whether this machine hosts the store: whether MASTER_ADDR is an address of it."""
    try:
        with socket.create_server((os.environ["MASTER_ADDR"], 0)):
            return True
    except OSError:
        return False
