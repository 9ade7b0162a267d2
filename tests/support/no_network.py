"""Processes without network access, and a record of their attempts."""

import os
from pathlib import Path

# Python imports sitecustomize at every start, in child processes too. Attempts whose error is caught are recorded.
SITECUSTOMIZE = """
import os, socket, sys

HARMLESS = ("__new__", "gethostname")
WITH_PEER = ("bind", "connect", "sendto", "sendmsg")
THIS_MACHINE = (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1", "::", socket.gethostname())

def refuse(event, args):
    module, _, name = event.partition(".")
    if module != "socket" or name in HARMLESS or name in WITH_PEER and args[0].family == socket.AF_UNIX:
        return
    if name == "bind" and args[1][0] == "::1":  # urllib3 checks for IPv6 when it is imported
        return
    if "LOOPBACK_ALLOWED" in os.environ:
        peer = args[1][0] if name in WITH_PEER else args[0][0] if name == "getnameinfo" else args[0]
        if peer in THIS_MACHINE:
            return
    with open(os.environ["SOCKET_RECORD"], "a", encoding="utf-8") as file:
        file.write(f"{event} {args}\\n")
    raise PermissionError(f"no network here: {event} {args}")

sys.addaudithook(refuse)
"""


def without_network(folder: Path, root: Path, loopback: bool = False) -> tuple[dict[str, str], Path]:
    """Return the environment of such processes, and the file that records their attempts, if any.

    Args:
        folder: folder for both files.
        root: root folder of the project, added to the import path.
        loopback: allow connections to this machine, which torchrun needs.
    """
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    record = folder / "sockets.txt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), str(root)])}
    environment |= {"SOCKET_RECORD": str(record)} | ({"LOOPBACK_ALLOWED": "1"} if loopback else {})
    return environment, record


def block_network(environment: dict[str, str]) -> None:
    """Take the network from this process, a forked one, and its children, with what `without_network` returned."""
    os.environ.update(environment)
    exec(SITECUSTOMIZE, {})
