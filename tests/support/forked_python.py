"""`python` and `torchrun` for shells and notebooks, forked from a process that has imported torch."""

import contextlib
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support import forking_torchrun
from tests.support.forked import end_as_python, fork
from tests.support.patience import wait_until

# Sends its arguments, environment, current folder and streams to the process that forks, and ends as the command does.
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and arguments[:1] != ["-m"]:
    os.execv({python!r}, sys.argv)
request = [name, arguments, dict(os.environ), os.getcwd()]
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    server.sendmsg([b"streams"], streams)
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(100) or 1))
"""


@contextlib.contextmanager
def forked_python(folder: Path) -> Iterator[Path]:
    """Create a folder with the programs; `python -m` and `torchrun` are forked, other uses of `python` are not.

    Args:
        folder: where the programs are created.

    Yields:
        The folder of the programs, for PATH.
    """
    folder.mkdir()
    address, log = folder / "socket", folder / "log"
    for name in ("python", "torchrun"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=str(address)), encoding="utf-8")
        (folder / name).chmod(0o755)
    server = fork(lambda: _serve(address), log, log)
    try:
        wait_until(address.exists, f"no process that forks: {log}")
        yield folder
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def _serve(address: Path) -> None:
    """Fork a process for each client, in which the command runs."""
    faulthandler.cancel_dump_traceback_later()  # a forked process would wait for its thread, which is not copied
    sys.executable = str(address.with_name("python"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _run(client)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _run(client: socket.socket) -> None:
    """Run the command of a client in this process, and end it."""
    _, streams, _, _ = socket.recv_fds(client, 100, 3)
    name, arguments, environment, folder = json.loads(client.makefile().read())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)

    def command() -> None:
        if name == "torchrun":
            return forking_torchrun.main(arguments, Path(folder))
        _, module, *sys.argv[1:] = arguments
        sys.argv[0] = module
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    end_as_python(command, lambda code: client.sendall(str(code).encode()))
