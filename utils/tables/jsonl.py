"""Read jsonl files row by row, write files atomically, and report skipped rows."""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.data.exceptions import JsonError
from finetune.data.rows import MAX_ROW_BYTES, parse_row
from model.atomic import new_files
from model.errors import UserError

Row = dict[str, Any]

SHOWN_LINES = 20  # line numbers that a report lists per reason
_MAX_REASONS = 100  # of a report; further reasons are counted together
_OTHER_REASONS = "other reasons"


class SkippedRowError(Exception):
    """A row that cannot be converted.

    Args:
        reason: the kind of problem, by which a report groups lines.
        detail: specific to this row; a report quotes the first one of each reason.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass
class _Group:
    lines: list[int] = dataclasses.field(default_factory=list)  # the first SHOWN_LINES of them
    count: int = 0
    times: int = 0  # at least once per line
    example: str = ""


class LineReport:
    """Lines of a file, grouped by reason, in memory that does not grow with their number."""

    def __init__(self, unit: str = "line") -> None:
        self.count = 0
        self._unit = unit
        self._groups: dict[str, _Group] = {}

    def add(self, line: int, reason: str, detail: str = "", times: int = 1) -> None:
        if len(self._groups) >= _MAX_REASONS and reason not in self._groups:
            reason, detail = _OTHER_REASONS, reason
        group = self._groups.setdefault(reason, _Group(example=detail))
        if len(group.lines) < SHOWN_LINES:
            group.lines.append(line)
        group.count += 1
        group.times += times
        self.count += 1

    def __str__(self) -> str:
        ordered = sorted(self._groups.items(), key=lambda item: -item[1].count)
        return "\n".join(self._describe(reason, group) for reason, group in ordered)

    def _describe(self, reason: str, group: _Group) -> str:
        numbers = ", ".join(map(str, group.lines))
        if group.count > len(group.lines):
            numbers += f" and {group.count - len(group.lines):,} more"
        unit = self._unit if group.count == 1 else f"{self._unit}s"
        example = f" ({self._unit} {group.lines[0]}: {group.example})" if group.example else ""
        times = f" ({group.times:,} in total)" if group.times > group.count else ""
        return f"  {reason}: {unit} {numbers}{example}{times}"


def require_file(path: Path) -> None:
    """Raise UserError unless `path` is a file."""
    if not path.is_file():
        raise UserError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}.")


def read_lines(path: Path, encoding: str = "utf-8-sig", errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Yield non-blank lines with their numbers, counted from 1. CR, LF and CRLF end a line, U+2028 does not.

    Raises:
        UserError: a line is too long for a row.
    """
    with path.open(encoding=encoding, errors=errors, newline=None) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_ROW_BYTES + 1)
            if len(line) > MAX_ROW_BYTES:
                too_long = f"Line {number} of {path} has over {MAX_ROW_BYTES:,} characters"
                raise UserError(f"{too_long}; is there a line end after each row?")
            if not line:
                return
            if line.strip():
                yield number, line.rstrip("\n")


def load_row(line: str) -> Row:
    """Parse a line, in which bytes that are not UTF-8 are Python's surrogate escapes.

    Raises:
        SkippedRowError: the line is not a JSON object.
    """
    try:
        return parse_row(line.encode("utf-8", "surrogateescape"))
    except JsonError as error:
        raise SkippedRowError("not a valid JSON object", str(error)) from error


def dump_row(row: Row) -> str:
    """Return a row as a line of jsonl; accents are not escaped.

    Raises:
        SkippedRowError: the row cannot be written in UTF-8.
    """
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SkippedRowError("an unpaired surrogate, which is not a character") from error
    return line


def read_journal(path: Path) -> dict[str, Row]:
    """Return the rows, by their first key `id`, that an interrupted command wrote to its output.

    An incomplete last line is removed from the file.

    Raises:
        UserError: the file is not such an output; it is not changed.
    """
    rows: dict[str, Row] = {}
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") and b'{"id"'.startswith(line[:5]):
            os.truncate(path, len(content) - len(line))
            break
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} exists and is not an output of this command; choose another file.") from None
    return rows


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Turn errors of the operating system (no permission, disk full) into UserErrors."""
    try:
        yield
    except BrokenPipeError:  # of stdout, see run_cli
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}." if error.filename else f"{error}.") from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the operating system name a file: those of writing, such as that of a full disk, do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def save(contents: Mapping[Path, str]) -> None:
    """Write files, all or none; new ones can be read by their owner only."""
    with file_errors(), new_files(contents) as temporaries:
        for path, content in contents.items():
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporaries[path].write_text(content, encoding="utf-8", newline="")


def require_own_names(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise UserError if an output would replace an input or another output, whatever the spelling or link.

    Options that were not given are None.
    """
    written = [path for path in outputs if path is not None]
    identities = [_identity(path) for path in written]
    taken = {_identity(path) for path in inputs if path is not None}
    for path, identity in zip(written, identities):
        if identity in taken or identities.count(identity) > 1:
            raise UserError(f"{path} is an output and also another file of this command; choose another name.")


def _identity(path: Path) -> tuple[int, int] | Path:
    """Return what all names of a file have in common; hard links and other upper and lower case included."""
    with contextlib.suppress(OSError):
        status = path.stat()
        if status.st_ino:  # some network file systems have none
            return status.st_dev, status.st_ino
    return path.resolve()
