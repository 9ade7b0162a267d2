"""Write csv files that spreadsheets open without executing a cell as a formula, and undo that when reading.

A string that begins like a formula gets a leading apostrophe, as OWASP recommends against CSV injection.
"""

import csv
import re
from collections.abc import Sequence
from typing import IO, Any

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # apostrophes included, so that reading restores every string


class CsvWriter:
    """Write the header and rows of a csv file that was opened with `newline=""`."""

    def __init__(self, file: IO[str], columns: Sequence[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._quoting_writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self._writer.writerow(columns)

    def write(self, *row: Any) -> None:
        # Python quotes a carriage return only if it is part of the line terminator.
        writer = self._quoting_writer if any("\r" in str(value) for value in row) else self._writer
        writer.writerow([_neutralized(value) for value in row])


def _neutralized(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def original(cell: str) -> str:
    """Return the string that `CsvWriter` was given for a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
