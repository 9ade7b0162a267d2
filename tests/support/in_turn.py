"""Commands in turn, in one process without network, as `python -m` would run them, so that torch is imported once."""

import contextlib
import functools
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed.run

from tests.support import forking_torchrun
from tests.support.documents import ROOT
from tests.support.forked import finished
from tests.support.no_network import block_network, without_network

TORCHRUN = "torch.distributed.run"
Outcome = tuple[int, str]  # exit code, -1 for an exception, and output


def run_in_turn(
    commands: Mapping[str, Sequence[str]], folder: Path, *, loopback: bool = False, forking: bool = True
) -> dict[str, Outcome]:
    """Run commands in a forked process that has no network, and each torchrun in one of its own.

    Args:
        commands: for each name, a module and its arguments.
        folder: current folder of the process; `sockets.txt` there records attempts to use the network, if any.
        loopback: allow connections within the machine, which torchrun needs.
        forking: let torchrun fork its workers; otherwise, it starts new processes.

    Returns:
        The exit code and the output of each.
    """
    environment, _ = without_network(folder, ROOT, loopback)
    outcomes: dict[str, Outcome] = {}

    def start(work: Callable[[], object]) -> subprocess.CompletedProcess[str]:
        def prepared() -> None:
            block_network(environment)
            os.chdir(folder)
            os.environ["OMP_NUM_THREADS"] = "1"
            work()

        return finished(prepared)

    def run_all(names: Sequence[str]) -> None:
        found = {name: outcome(*commands[name]) for name in names}
        (folder / "outcomes.json").write_text(json.dumps(found), encoding="utf-8")

    for is_torchrun, group in itertools.groupby(commands, lambda name: commands[name][0] == TORCHRUN):
        names = list(group)
        for name in names if is_torchrun else []:
            launch = functools.partial(_torchrun, commands[name][1:], folder, forking)
            done = start(launch)
            outcomes[name] = done.returncode, done.stdout + done.stderr
        if not is_torchrun:
            done = start(functools.partial(run_all, names))
            assert done.returncode == 0, done.stderr
            outcomes |= json.loads((folder / "outcomes.json").read_text(encoding="utf-8"))
    return outcomes


def _torchrun(arguments: Sequence[str], folder: Path, forking: bool) -> None:
    if forking:
        forking_torchrun.main([*arguments], folder)
    else:
        torch.distributed.run.main([*arguments])


def outcome(module: str, *arguments: str) -> Outcome:
    """Run a command in this process, which should be a forked or a new one."""
    sys.argv = [module, *arguments]
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            code = -1
    return code, output.getvalue()


def main() -> None:
    """Run the commands of standard input in this new process, and print their outcomes."""
    print(json.dumps([outcome(*command) for command in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
