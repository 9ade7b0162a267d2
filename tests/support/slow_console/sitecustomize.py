"""Delay each write to stderr by a second on rank SLOW_RANK, as a log on a slow network disk does; see PYTHONPATH."""

import os
import sys
import time

DELAY_S = 1.0


def make_slow() -> None:
    """Delay the writes of this process."""
    write = sys.stderr.write

    def slow(text: str) -> int:
        time.sleep(DELAY_S)
        return write(text)

    sys.stderr.write = slow  # type: ignore[method-assign]


if "SLOW_RANK" in os.environ and os.environ.get("RANK") == os.environ["SLOW_RANK"]:
    make_slow()
