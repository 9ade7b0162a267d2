"""The journal of a worklist: what a model proposed for each stay, why, and what was decided, in the order of time.

Each line of the jsonl file is an event, with the `time`, the `stay` and the hash of its `note`; no line has text of a
note. Lines are only appended, each in one piece and flushed to the disk. A line that a killed process left incomplete
is dropped: its stay is coded again. One process at a time writes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import UserError
from utils.icd10.codes import ROLES
from utils.tables.jsonl import Row, file_errors, naming

JOURNAL = "journal.jsonl"  # in the folder of a worklist
CODED, MARKED, EXPLAINED, REVIEWED = ("coded", "marked", "explained", "reviewed")
_HASH_LENGTH = 16  # hexadecimal digits
_LETTERS = str.maketrans("0123456789", "ghijklmnop")  # spreadsheets would read one hash in 800 as a number


class Key(NamedTuple):
    """A stay with one of its notes, by the note's hash."""

    stay: str
    note: str


def note_hash(note: str) -> str:
    """Return what tells a stay's notes apart: another hash, another note."""
    return hashlib.sha256(note.encode("utf-8", "replace")).hexdigest()[:_HASH_LENGTH].translate(_LETTERS)


class Journal:
    """An open journal; see `open_journal`.

    Attributes:
        events: every line, in the order of time.
        coded: the latest event CODED of each stay and note.
        marked: the latest event MARKED of each stay and note: other confidences and decisions about the same codes.
        explained: the latest event EXPLAINED of each stay and note.
        reviewed: the latest event REVIEWED of each stay and note.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self.events: list[Row] = []
        self.coded: dict[Key, Row] = {}
        self.marked: dict[Key, Row] = {}
        self.explained: dict[Key, Row] = {}
        self.reviewed: dict[Key, Row] = {}
        content = path.read_bytes()
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._remember(_event(path, number, line))
        if rest and (row := _parse(rest)):  # an editor, or a full disk, left out the line end
            self._write(b"\n")
            self._remember(row)
        elif rest:
            if not lines and not content.startswith(b'{"event"'[: len(content)]):
                raise _foreign(path, 1)
            os.ftruncate(descriptor, len(content) - len(rest))

    def proposal(self, key: Key) -> Row:
        """Return the event CODED of a stay and note, as it was marked last."""
        coded = self.coded[key]
        return coded | self.marked.get(key, {}) | {name: coded[name] for name in ("event", "time")}

    def append(self, event: str, key: Key, facts: Row) -> None:
        """Add an event; it is on the disk when this returns."""
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        row = {"event": event, "time": time, **key._asdict(), **facts}
        self._write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        self._remember(row)

    def _write(self, line: bytes) -> None:
        with naming(self._path):
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)

    def _remember(self, row: Row) -> None:
        self.events.append(row)
        latest = {CODED: self.coded, MARKED: self.marked, EXPLAINED: self.explained, REVIEWED: self.reviewed}
        latest[row["event"]][Key(row["stay"], row["note"])] = row


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open a journal, creating it and its folder if missing; no other process can open it meanwhile.

    Raises:
        UserError: the file is not a journal, is in use, or cannot be written.
    """
    with file_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _lock(descriptor, path)
            yield Journal(path, descriptor)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    import fcntl  # POSIX

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is in use by another process: wait until it has ended, or stop it.") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {path} cannot be locked ({error.strerror}): do not start this twice.", file=sys.stderr)


def _event(path: Path, number: int, line: bytes) -> Row:
    """Parse a line of a journal."""
    if row := _parse(line):
        return row
    raise _foreign(path, number)


def _parse(line: bytes) -> Row | None:
    """Return an event whose parts have the types that commands rely on, None for other lines."""
    try:
        row: Any = json.loads(line)
        read = _CODES[row["event"]]
        datetime.fromisoformat(row["time"])
        texts = (row["stay"], row["note"], *row.get("rules", ()), row.get("decision") or "", row.get("reason") or "")
        if all(isinstance(text, str) for text in texts) and all(map(read, row["codes"])):
            return row
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        pass
    return None


def _has_texts(row: Row, *names: str) -> bool:
    return all(isinstance(row[name], str) for name in names)


def _is_coded(code: Row) -> bool:
    chances = (code.get(name) or 0.0 for name in ("probability", "confidence"))
    return (
        _has_texts(code, "code", "label") and (code["role"] or ROLES[0]) in ROLES and all(0 <= p <= 1 for p in chances)
    )


def _is_explained(code: Row) -> bool:
    return _has_texts(code, "code") and all(
        _has_texts(found, "document", "date")
        and isinstance(found["start"], int)
        and 0 <= found["start"] <= found["end"]
        and all(isinstance(mark, str) for mark in found["marks"])
        for found in code["evidence"]
    )


def _is_reviewed(code: Row) -> bool:
    return _has_texts(code, "role", "coded", "proposed", "decision", "final")


# What an entry of an event's `codes` is.
_CODES = {CODED: _is_coded, MARKED: _is_coded, EXPLAINED: _is_explained, REVIEWED: _is_reviewed}


def _foreign(path: Path, number: int) -> UserError:
    return UserError(
        f"{path}, line {number}: expected an event of utils.code_stays; restore the file, or choose another --out."
    )
