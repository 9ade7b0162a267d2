"""Log lines: which rank speaks, and how it looks."""

import logging
import sys
import time
from datetime import timedelta

from tqdm import tqdm

from finetune.redaction import redacted


class RankFilter(logging.Filter):
    """Rank 0 speaks from INFO on; other ranks only to warn, and say who they are."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._level = logging.INFO if rank == 0 else logging.WARNING
        self._prefix = "" if rank == 0 else f"[rank {rank}] "

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank_prefix = self._prefix
        return record.levelno >= self._level


class LineFormatter(logging.Formatter):
    """`2024-12-19 09:24:38 (CET) - 0:03:12 - train - INFO - message`: local time, then time since the start.

    Secrets are left out, of tracebacks too.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s - %(elapsed)s - %(name)s - %(levelname)s - %(rank_prefix)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.elapsed = timedelta(seconds=int(record.relativeCreated / 1000))
        return redacted(super().format(record))  # tracebacks included

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S (%Z)", time.localtime(record.created))


class ConsoleHandler(logging.Handler):
    """Writes to the current stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def set_up_logging(rank: int) -> None:
    """Makes the root logger print this rank's lines on stdout; calling it again replaces the earlier set-up."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, ConsoleHandler)]:
        root.removeHandler(handler)
    handler = ConsoleHandler()
    handler.addFilter(RankFilter(rank))
    handler.setFormatter(LineFormatter())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
