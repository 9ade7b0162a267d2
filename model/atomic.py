"""Write files, folders and symlinks atomically: under a temporary name first, then renamed.

Readers see the old content or the new, never a part. On an exception the temporary is removed and the old content
stays; what a killed process has written remains under a name that no command reads, until `remove_temporaries`.

File contents are flushed to disk (fsync) before the rename, so a power failure cannot leave an empty or partial file
under the final name. The rename itself is flushed only by `replace_folder`, whose callers delete older folders next.
"""

import errno
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from .errors import UserError


def temporary_path(path: Path) -> Path:
    """Return the name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of `path`; no other process may be writing it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if left.name.split(".")[-2].isdecimal() and left.is_file():
            left.unlink()


def shared_temporary_path(path: Path, owner: str = "") -> Path:
    """Return the name under which the processes of `owner` write `path`; `remove_leftovers` finds it after a kill."""
    return path.with_name(f"tmp.{path.name}{owner and '.'}{owner}")


def owner_only(path: str, flags: int) -> int:
    """Open a file so that a new one can be read by its owner only: an `opener` for `open`."""
    return os.open(path, flags, 0o600)


@contextmanager
def temporary_file(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; unless `replace_file` has renamed it, it is removed afterwards.

    A file that exists keeps its permissions. With `private`, a new one can be read by its owner only.
    """
    temporary = temporary_path(path)
    try:
        with _owner_only_files() if private or path.exists() else nullcontext():
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _owner_only_files() -> Iterator[None]:
    """Let new files of this process be read by their owner only, whoever opens them."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def replace_file(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file and rename it to `path`, whose permissions it gets if `path` exists."""
    _finish(temporary, path)
    os.replace(temporary, path)


def _finish(temporary: Path, path: Path) -> None:
    if path.exists():
        shutil.copymode(path, temporary)
    _flush(temporary)


@contextmanager
def new_file(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it replaces `path`. See `temporary_file`."""
    with temporary_file(path, private) as temporary:
        yield temporary
        replace_file(temporary, path)


@contextmanager
def new_files(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Yield a temporary path for each path; at the end of the block they replace the paths, all or none.

    New files can be read by their owner only: they are outputs of commands, which may quote notes.
    """
    with ExitStack() as stack:
        temporaries = {path: stack.enter_context(temporary_file(path, private=True)) for path in paths}
        yield temporaries
        for path, temporary in temporaries.items():
            _finish(temporary, path)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)


def require_new_folder(path: Path) -> None:
    """Raise UserError if `path` exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists and is not an empty folder: remove it or choose another name.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end of the block it becomes `path`.

    Raises:
        UserError: `path` exists and is not an empty folder, or the operating system refuses (disk full, no permission).
    """
    path = path.resolve()
    require_new_folder(path)
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same id
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _flush_tree(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}. Nothing was kept of it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Flush a finished temporary folder and rename it to `path`, which may exist."""
    _flush_tree(temporary)
    hidden = _hide(path) if path.exists() else None
    os.replace(temporary, path)
    _flush(path.parent)
    if hidden is not None:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists; it is never visible in part."""
    if path.exists():
        shutil.rmtree(_hide(path), ignore_errors=True)


def _hide(path: Path) -> Path:
    """Rename a folder to a name that `remove_leftovers` finds, and return that."""
    hidden = path.with_name(f"tmp.old_{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    return hidden


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target`, a name in the same folder; the link exists at every moment."""
    temporary = shared_temporary_path(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder` under shared temporary names."""
    for path in folder.glob("tmp.*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _flush(path)


def _flush(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk; a read-only descriptor suffices for both."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)
