"""Linux namespaces of this process, a forked one; Python has these functions from 3.12 on."""

import ctypes
import faulthandler
import os
import time
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def _end_second_thread() -> None:
    """Cancel pytest's timeout and wait for its thread: a process with two threads cannot enter a namespace."""
    faulthandler.cancel_dump_traceback_later()
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) == 1:
            break
        time.sleep(0.001)


def enter(pid: int) -> None:
    """Enter the user and network namespaces of a process.

    Raises:
        OSError: the kernel does not permit it.
    """
    _end_second_thread()
    namespaces = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("user", "net")]
    for namespace in namespaces:
        _call("setns", namespace, 0)
        os.close(namespace)


def make_mounts_private() -> None:
    """Enter a new mount namespace as its root; what is mounted there vanishes with the process.

    Raises:
        OSError: the kernel does not permit it.
    """
    ids = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    _end_second_thread()
    _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    for name, content in ids.items():
        Path("/proc/self", name).write_text(content)
