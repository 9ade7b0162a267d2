"""How long tests wait for what must happen: PATIENCE_S, the same everywhere.

The rule: a limit only turns a hang into a failure that says what did not happen. It is over ten times what the slowest
test needs on two idle cores, so that a machine four times as slow, or a busy one, passes; no test takes longer when all
is well. What must be prompt is asserted by what happened, not by the clock: which process ended first, how many steps
or batches were still computed, or how much CPU time was used.
"""

import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 900.0  # half of pytest's limit (pyproject.toml), which ends a test without saying why


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds.

    Args:
        what: what did not happen, for the message of the AssertionError.
    """
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def wait_for_line(path: Path) -> None:
    """Wait until a file has a line."""
    wait_until(lambda: path.exists() and b"\n" in path.read_bytes(), f"{path} was not written")
