"""Write the files of a command to its output folder, all of them or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model.atomic import new_files
from model.errors import UserError
from utils.tables.jsonl import file_errors


@contextmanager
def new_outputs(out: Path, names: Sequence[str], stale: Sequence[str], overwrite: bool) -> Iterator[dict[str, Path]]:
    """Yield a temporary path for each name; at the end of the block they become the files of `out`.

    Args:
        out: folder, created if missing.
        names: files to write.
        stale: files of an earlier call that would not match the new ones; removed at the end.
        overwrite: whether files may be replaced or removed.

    Raises:
        UserError: a file exists and `overwrite` is false, or the operating system refuses (disk full, no permission).
    """
    existing = [str(out / name) for name in (*names, *stale) if (out / name).exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)} already exist; give another --out, or --overwrite to replace them.")
    with file_errors():
        out.mkdir(parents=True, exist_ok=True)
        with new_files(out / name for name in names) as temporaries:
            yield {path.name: temporary for path, temporary in temporaries.items()}
        for name in stale:
            (out / name).unlink(missing_ok=True)
