"""How commands fail. Imports nothing heavy, so that text tools start at once."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from model.errors import UserError


def run_cli(main: Callable[[], object]) -> None:
    """Runs a command; a user's mistake becomes one line on stderr and exit code 1, never a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _tell_torchrun(str(error))
        sys.exit(1)


def _tell_torchrun(message: str) -> None:
    """Has torchrun repeat the message at the end of its own report, which otherwise buries it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": report}), encoding="utf-8")
