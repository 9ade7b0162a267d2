"""Logging to stdout: format and levels per rank."""

import logging
import sys
import time
from datetime import timedelta

from tqdm import tqdm

from finetune.redaction import redacted


class RankFilter(logging.Filter):
    """Rank 0 logs INFO and above; other ranks log warnings and errors, prefixed with their rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._level = logging.INFO if rank == 0 else logging.WARNING
        self._prefix = "" if rank == 0 else f"[rank {rank}] "

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank_prefix = self._prefix
        return record.levelno >= self._level


class LineFormatter(logging.Formatter):
    """`2024-12-19 09:24:38 (CET) - 0:03:12 - train - INFO - message`: local time, then time since the start.

    Secrets are redacted, in tracebacks too.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s - %(elapsed)s - %(name)s - %(levelname)s - %(rank_prefix)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.elapsed = timedelta(seconds=int(record.relativeCreated / 1000))
        return redacted(super().format(record))

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S (%Z)", time.localtime(record.created))


class ConsoleHandler(logging.Handler):
    """Write to the current stdout, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # redirected to a full disk; a traceback per line would be of no use
            pass
        except Exception:
            self.handleError(record)


def set_up_logging(rank: int) -> None:
    """Configure the root logger for this rank; calling it again replaces the earlier configuration."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, ConsoleHandler)]:
        root.removeHandler(handler)
    handler = ConsoleHandler()
    handler.addFilter(RankFilter(rank))
    handler.setFormatter(LineFormatter())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
