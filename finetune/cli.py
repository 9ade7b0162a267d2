"""How commands fail. Imports nothing heavy, so that text tools start at once."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from model.errors import UserError

from .redaction import redacted


def run_cli(main: Callable[[], object]) -> None:
    """Runs a command; a user's mistake becomes one line on stderr and exit code 1, never a traceback.

    No secret is printed, not even in the traceback of a defect.
    """
    one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    code = 0
    try:
        main()
    except UserError as error:
        message = redacted(str(error))
        print(f"error: {message}", file=sys.stderr)
        _tell_torchrun(message)
        code = 1
    except SystemExit as exit:
        if not one_of_several:
            raise
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    except Exception:
        report = redacted(traceback.format_exc())
        print(report, end="", file=sys.stderr)
        _tell_torchrun(report.splitlines()[-1])
        code = 1
    if one_of_several:
        _leave_at_once(code)
    if code:
        sys.exit(code)


def _leave_at_once(code: int) -> None:
    """Ends one of several processes without Python's shutdown.

    gloo's threads outlive the process group while a sharded model refers to it; one that wants the interpreter while
    that shuts down aborts the process (torch 2.13), and a finished run would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell_torchrun(message: str) -> None:
    """Has torchrun repeat the message at the end of its own report, which otherwise buries it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": report}), encoding="utf-8")
