"""The lock of a run folder: one training run at a time."""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from model.errors import UserError

from .distributed import World
from .run_dir import LOCK_NAME

logger = logging.getLogger("train")

_WAIT_S, _POLL_S = 3.0, 0.2  # torchrun may start a process again before the earlier one has ended
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # by the file system


@contextlib.contextmanager
def locked_run_dir(run_dir: Path, world: World) -> Iterator[None]:
    """Keep other training runs out of `run_dir` while the block runs, on every rank.

    The operating system releases the lock when rank 0 ends, however it ends. Folders created for the lock are removed
    unless the block puts something into them.

    Raises:
        UserError, SystemExit: on every rank, if another process trains in `run_dir` or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with world.synchronized_errors():
            if world.is_master:
                stack.enter_context(_locked(run_dir))
        yield


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    created = [folder for folder in (run_dir, *run_dir.parents) if not os.path.lexists(folder)]
    try:
        descriptor = _acquire(run_dir)
    except OSError as error:
        raise UserError(f"The run folder {run_dir} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_dir / LOCK_NAME).unlink()  # before it is released: see _is_current
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()


def _acquire(run_dir: Path) -> int:
    """Return the descriptor of the locked file; closing it releases the lock."""
    import fcntl  # POSIX

    path, deadline = run_dir / LOCK_NAME, time.monotonic() + _WAIT_S
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logger.warning("%s cannot be locked (%s): do not start this run twice.", path, error.strerror)
                return descriptor
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise UserError(
                    f"The run folder {run_dir} is in use: {owner} trains in it. Wait until it has ended or stop it, or "
                    "choose another `run_dir`."
                ) from error
            time.sleep(_POLL_S)
            continue
        if _is_current(descriptor, path):
            break
        os.close(descriptor)
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S},"
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, owner.encode(), 0)
    return descriptor


def _is_current(descriptor: int, path: Path) -> bool:
    """Return whether the open file still has its name; the process that held the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
