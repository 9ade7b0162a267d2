"""Rows of jsonl files: where they start, and what JSON is accepted. Imports nothing heavy."""

import collections
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from model.errors import UserError
from model.file_kinds import looks_like

from .exceptions import BadRowError, JsonError, RowError

if TYPE_CHECKING:
    import numpy as np

MAX_ROW_BYTES = 1 << 24  # the longest notes have about 100 kB; more is a file without line ends
_MAX_DEPTH = 100  # nesting of objects and lists: far below the recursion limit of Python's own functions
_TOO_DEEP = f"Its JSON is nested too deeply, more than {_MAX_DEPTH} levels."
_IDENTIFIER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}")
_LINE_END = re.compile(rb"\r\n?|\n")
_BLOCK = 1 << 20  # bytes read at a time while searching for line ends: fits into a core's cache


def line_offsets(path: Path, *look_at: Callable[[bytes], object]) -> "np.ndarray":
    """Return the byte offsets [rows + 1] int64 at which rows start, and the end of the file.

    CR, LF and CRLF end a row. Each function of `look_at` is called with the file's content, block by block.

    Raises:
        UserError: the file cannot be read.
    """
    import numpy as np  # slow to import; commands that only parse rows do not need it

    starts = [np.zeros(1, dtype=np.int64)]
    position, after_cr = 0, False
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                for function in look_at:
                    function(block)
                if after_cr and block.startswith(b"\n"):
                    starts[-1] = starts[-1][:-1]  # the CR before the block did not end the row, this LF does
                starts.append(np.array(_line_ends(block), dtype=np.int64) + position)
                after_cr = block.endswith(b"\r")
                position += len(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    offsets = np.concatenate(starts)
    return offsets if offsets[-1] == position else np.append(offsets, position)


def _line_ends(block: bytes) -> list[int]:
    """Return the offsets after the line ends of a block. `find` is several times as fast as comparing each byte."""
    if b"\r" in block:
        return [match.end() for match in _LINE_END.finditer(block)]
    ends, end = [], block.find(b"\n") + 1
    while end:
        ends.append(end)
        end = block.find(b"\n", end) + 1
    return ends


def read_line(file: BinaryIO, start: int, end: int) -> bytes:
    """Return bytes [start, end) without the line end and the file's byte order mark.

    Raises:
        JsonError: the line is too long.
    """
    require_row_size(int(end - start))
    file.seek(start)
    line = file.read(end - start).rstrip(b"\r\n")
    return line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line


def read_rows(path: Path, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the first rows of a file with their line numbers, counted from 1.

    Raises:
        UserError: the file cannot be read.
        BadRowError: a line is not a JSON object.
    """
    offsets = line_offsets(path)
    with path.open("rb") as file:
        for index in range(min(count, len(offsets) - 1)):
            try:
                yield index + 1, parse_row(read_line(file, offsets[index], offsets[index + 1]))
            except RowError as error:
                raise BadRowError(path, index + 1, error) from error


def parse_row(line: bytes) -> dict[str, Any]:
    """Parse one line of a jsonl file.

    Raises:
        JsonError: the line is not UTF-8, not JSON, not an object, too long, nested too deeply or repeats a key.
    """
    require_row_size(len(line))
    try:
        text = line.decode("utf-8")
        if not text.strip():
            raise JsonError("The line is blank.")
        row = json.loads(text, object_pairs_hook=unique_keys)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # raises for unpaired surrogates
    except UnicodeDecodeError as error:
        raise _not_json(line, f"Byte {error.start + 1} is not valid UTF-8 ({error.reason}).") from error
    except UnicodeEncodeError as error:
        raise JsonError("It contains an unpaired surrogate (\\ud800 to \\udfff), which is not a character.") from error
    except RecursionError as error:
        raise JsonError(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise _not_json(line, str(error)) from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError("It contains an integer with too many digits.") from error
    if not isinstance(row, dict):
        raise JsonError(f"Expected a JSON object, found {json_type(row)}.")
    if line.count(b"{") + line.count(b"[") > _MAX_DEPTH and _depth(row) > _MAX_DEPTH:
        raise JsonError(_TOO_DEEP)
    return row


def require_row_size(size: int) -> None:
    """Raise JsonError if a line of `size` bytes is too long for a row."""
    if size > MAX_ROW_BYTES:
        raise JsonError(
            f"It has {size:,} bytes; a row has at most {MAX_ROW_BYTES:,}. Is there a line end after each row?"
        )


def json_type(value: Any) -> str:
    """Return the name of a value's JSON type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def is_identifier(text: str) -> bool:
    """Return whether a string is short and looks like a name: messages quote no others, which may be text of a note."""
    return _IDENTIFIER.fullmatch(text) is not None


def shown(value: Any, quote: str = "'") -> str:
    """Return a value for a message: an identifier in quotes, of anything else only what it is."""
    if not isinstance(value, str):
        return json_type(value)
    return f"{quote}{value}{quote}" if is_identifier(value) else f"a string of {len(value):,} characters"


def _not_json(line: bytes, reason: str) -> JsonError:
    kind = looks_like(line)
    return JsonError(f"It begins like {kind}, not like a row of jsonl." if kind else reason)


def _depth(value: Any) -> int:
    """Return how deeply objects and lists are nested; without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise JsonError if a key is repeated."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise JsonError(f"The key {shown(repeated)} is repeated.")
    return unique
