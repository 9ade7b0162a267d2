"""torchrun whose workers are forked from it, so that torch is imported once.

Everything else is torchrun's own: arguments, rendezvous, environment, watching, ending and restarting the workers.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

import train  # noqa: F401
from tests.support.documents import ROOT
from tests.support.forked import import_before_forking


class _Worker:
    """What torchrun uses of subprocess.Popen, for a forked process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=(command, environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self._process.exitcode


def _work(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run `python -u -m MODULE ARGUMENT ...` as a new process would, in a session of its own."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun handles them itself
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    _, _, _, module, *arguments = command
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main(arguments: list[str], folder: Path = ROOT) -> None:
    """Run torchrun in this process, which should be a new or a forked one, and in a folder."""
    import_before_forking()
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Rendezvous records events with the name of the calling function, for which it searches all modules, of which there
    # are more here: so long, on a busy machine, that the other node has always changed the state, and none ever joins.
    dynamic_rendezvous.get_method_name = lambda depth=2: "not searched"
    SubprocessHandler._popen = lambda self, command, environment: _Worker(command, environment)
    torch.distributed.run.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
