"""What all commands share: output streams, error handling, the --step option. Imports nothing heavy."""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from model.errors import UserError, first_line, full_memory

from .redaction import redacted

_BROKEN_PIPE = 141  # exit code of a shell's command that SIGPIPE ends


def run_cli(main: Callable[[], object]) -> None:
    """Run a command; a UserError becomes one line on stderr and exit code 1, without a traceback.

    Where stdout is a pipe that is closed early (`| head`), the command ends silently.

    Secrets are redacted, in tracebacks of bugs too. Characters that an output stream cannot encode are escaped.
    """
    _escape_what_cannot_be_printed()
    _require_posix()
    one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    code = 0
    try:
        main()
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
    except SystemExit as exit:
        if not one_of_several:
            raise
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    except BaseException as error:  # also what is not an Exception, such as a panic of a Rust library
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _exit_immediately(_BROKEN_PIPE)
        report = failure_report(error)
        print(report.text, end="", file=sys.stderr)
        report_to_torchrun(report.summary)
        code = 1
    if one_of_several:
        _exit_immediately(code)
    if code:
        sys.exit(code)


def _reader_is_gone() -> bool:
    """Return whether stdout is a pipe that nothing reads any more, as after `| head`."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (OSError, TypeError, ValueError):  # closed, or not a file: in notebooks
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _require_posix() -> None:
    """End the command on native Windows, where files are not flushed, renamed, locked and linked as on POSIX."""
    if sys.platform == "win32":
        sys.exit("error: Native Windows is not supported: use WSL2 (`wsl --install`), and run this command there.")


def _escape_what_cannot_be_printed() -> None:
    """Write `\\u20ac` for a character outside the stream's encoding: cp1252 in files that Windows redirects to."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and tests replace the streams
            stream.reconfigure(errors="backslashreplace")


@dataclasses.dataclass(frozen=True)
class FailureReport:
    """Why a command fails."""

    text: str  # for stderr: one line, or a traceback
    summary: str  # without the traceback


def failure_report(error: BaseException, where: str = "") -> FailureReport:
    """Return what to print about an error, which `where`, such as "[rank 1] ", starts. Secrets are redacted."""
    if message := str(error) if isinstance(error, UserError) else _no_space(error):
        message = where + redacted(message)
        return FailureReport(f"error: {message}\n", message)
    text = redacted("".join(traceback.format_exception(error)))
    return FailureReport(where + text, where + text.splitlines()[-1])


def _no_space(error: BaseException) -> str | None:
    """Return what to say about a full disk or memory, which is not a defect; None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        file = error.filename or "A file"
        return f"{file} cannot be written: {error.strerror}. Free some space and try again."
    if full := full_memory(error):
        memory = "GPU memory" if full == "gpu" else "memory"
        return f"Out of {memory}: {first_line(error).removesuffix('.')}. Use a smaller batch or model."
    return None


def parse_config_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse a command line with one training YAML, by position or as `--train_yaml`, and settings that replace its own.

    Returns:
        The options; `config` is the YAML, `overrides` the list of `KEY=VALUE` arguments.
    """
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="the training YAML")
    overrides_help = "settings that replace those of the YAML, such as run_dir=runs/b optim.lr=1e-4"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    parser.add_argument("--train_yaml", metavar="CONFIG.yaml", help="the training YAML, by name")
    options, unknown = parser.parse_known_intermixed_args()
    positional = [options.config, *options.overrides] if options.config else options.overrides
    try:
        options.config, options.overrides = config_and_overrides(positional, options.train_yaml, unknown)
    except UserError as error:
        parser.error(str(error))
    return options


def config_and_overrides(
    positional: Sequence[str], by_name: str | None, flags: Sequence[str]
) -> tuple[Path, list[str]]:
    """Return the training YAML and the `KEY=VALUE` arguments of a command line.

    Args:
        positional: arguments that are not flags.
        by_name: the YAML, if it was given by a flag.
        flags: those that are not known.

    Raises:
        UserError: a flag is not known, an argument is not `KEY=VALUE`, or there is no YAML or several.
    """
    if flags:
        flag = flags[0].partition("=")[0]  # its value may be an API key
        raise UserError(f"unexpected argument {flag}{_instead(flag)}")
    files = [by_name] if by_name else list(positional[:1])
    overrides = list(positional if by_name else positional[1:])
    if not files or (by_name and overrides and "=" not in overrides[0]):
        raise UserError("give one training YAML: CONFIG.yaml or --train_yaml CONFIG.yaml")
    if extra := [argument for argument in overrides if "=" not in argument]:
        raise UserError(f"unexpected argument {extra[0]}; settings are written as KEY=VALUE, such as optim.lr=1e-4")
    return Path(files[0]), overrides


def _instead(flag: str) -> str:
    """Return how to write a setting that was given as a flag."""
    from .args import known_settings  # imports pydantic, which most commands do not need
    from .translations import find_translation

    name = flag.lstrip("-")
    translation = find_translation(name.split("."), exact=False)
    keys = [name] if name in known_settings() else translation.ours[:1] if translation else []
    return f"; write {keys[0]}=VALUE" if keys else ""


def add_step_option(parser: argparse._ActionsContainer) -> None:
    """Add `--step`, which selects a checkpoint of a run: an int, "best", or None."""
    parser.add_argument("--step", type=_parse_step, help="checkpoint of a run: step number or best (default: latest)")


def _parse_step(value: str) -> int | str:
    from .run_dir import BEST_NAME  # imports yaml and pydantic, which most commands do not need

    if value != BEST_NAME and not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is neither a step number nor `{BEST_NAME}`")
    return value if value == BEST_NAME else int(value)


def _exit_immediately(code: int) -> None:
    """End a process without Python's shutdown, which would write to a broken pipe once more.

    gloo's threads outlive the process group as long as a sharded model refers to it. A thread that requests the
    interpreter during shutdown aborts the process (torch 2.13), and a finished run would count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def report_to_torchrun(message: str) -> None:
    """Make torchrun repeat the message at the end of its own report, which would otherwise hide it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": report}), encoding="utf-8")
