"""How commands fail. Imports nothing heavy, so that text tools start at once."""

import sys
from collections.abc import Callable

from model.errors import UserError


def run_cli(main: Callable[[], object]) -> None:
    """Runs a command; a user's mistake becomes one line on stderr and exit code 1, never a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
