"""Read rows of csv, tsv, parquet, jsonl and json files as dicts by column, one at a time."""

import argparse
import codecs
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from model.errors import UserError
from utils.tables.csv_cells import original
from utils.tables.jsonl import Row, SkippedRowError, load_row, read_lines, require_file

NumberedRows = Iterator[tuple[int, Row | SkippedRowError]]  # an unreadable row is a SkippedRowError

FILE_TYPES = "csv, tsv, parquet, jsonl or json"

_FIELD_LIMIT = 2**31 - 1  # characters in a csv field; the csv module's own limit of 128 KiB is shorter than a long note
_BATCH_ROWS = 256  # parquet rows held at once


def add_encoding_option(parser: argparse.ArgumentParser) -> None:
    """Add `--encoding`, which the messages of `read_table` recommend."""
    parser.add_argument(
        "--encoding", default="utf-8", help="of csv, tsv, jsonl and json files, e.g. cp1252 (default: %(default)s)"
    )


def counts_lines(path: Path) -> bool:
    """Return whether the numbers of `read_table` count lines of the file, not rows."""
    return path.suffix.lower() in (".csv", ".tsv") or (path.suffix.lower() == ".jsonl" and not _begins_like_list(path))


def _begins_like_list(path: Path) -> bool:
    """Return whether the first character is `[`, in UTF-8 or UTF-16."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")


def has_fixed_columns(path: Path) -> bool:
    """Return whether every row has the same columns."""
    return path.suffix.lower() in (".csv", ".tsv", ".parquet")


def read_table(path: Path, encoding: str = "utf-8") -> NumberedRows:
    """Yield the rows of a file, whose suffix determines its format. Only a JSON list is loaded into memory as a whole.

    Args:
        path: .csv (separated by commas, semicolons or tabs), .tsv, .parquet, .jsonl or .json.
        encoding: of text formats; a UTF-8 byte order mark is skipped.

    Raises:
        UserError: the file does not exist, or its format or encoding is wrong.
    """
    require_file(path)
    match path.suffix.lower():
        case ".csv" | ".tsv":
            rows = _read_csv(path, _with_bom(encoding))
        case ".jsonl" | ".json":
            rows = _read_json(path, _with_bom(encoding))
        case ".parquet":
            rows = _read_parquet(path)
        case suffix:
            raise UserError(f"{path} ends in {suffix!r}; expected .csv, .tsv, .parquet, .jsonl or .json.")
    with _decoding(path, encoding):
        yield from rows


def _with_bom(encoding: str) -> str:
    try:
        return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    except LookupError as error:
        raise UserError(f"Unknown encoding {encoding!r}; try utf-8, cp1252 or utf-16.") from error


@contextmanager
def _decoding(path: Path, encoding: str) -> Iterator[None]:
    """Report where a file does not have the encoding: Python's own error counts from the start of a buffer."""
    try:
        yield
    except UnicodeError as error:
        raise UserError(f"{path} is not {encoding}: {_first_wrong_byte(path, encoding)}") from error


def _first_wrong_byte(path: Path, encoding: str) -> str:
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and codecs.lookup(encoding).name == "utf-8":
            return "it begins as utf-16 does; give --encoding utf-16."
        for number, line in enumerate(file, start=1):
            try:
                decoder.decode(line)
            except UnicodeDecodeError as error:
                found = f"byte 0x{error.object[error.start]:02x} in line {number}, column {error.start + 1}"
                return f"{found}; give --encoding (cp1252 in older exports)."
            except UnicodeError as error:
                return f"{error}."
    return "it ends within a character."


def _read_csv(path: Path, encoding: str) -> NumberedRows:
    csv.field_size_limit(_FIELD_LIMIT)
    with path.open(encoding=encoding, newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _csv_delimiter(path, file)
        file.seek(0)
        # strict: an unclosed quote would otherwise silently swallow the rows after it.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            columns = next(reader, [])
            _require_unique(path, columns)
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield line, _csv_row(columns, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}, row beginning in line {line}: {error}. Double each quote inside a quoted field, "
                "and close every quote."
            ) from error


def _csv_delimiter(path: Path, file: TextIO) -> str:
    """Return the separator that yields the most columns in the header."""

    def width(delimiter: str) -> int:
        file.seek(0)
        try:
            return len(next(csv.reader(file, delimiter=delimiter), []))
        except csv.Error as error:
            raise UserError(f"{path}: the header cannot be read: {error}.") from error

    return max(",;\t", key=width)


def _require_unique(path: Path, columns: list[str]) -> None:
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise UserError(f"{path} has columns with the same name: {', '.join(map(repr, repeated))}; rename them.")


def _csv_row(columns: list[str], fields: list[str]) -> Row | SkippedRowError:
    if len(fields) != len(columns):
        return SkippedRowError("number of fields differs from the header", f"{len(fields)} instead of {len(columns)}")
    return dict(zip(columns, map(original, fields)))


def _read_jsonl(path: Path, encoding: str) -> NumberedRows:
    for number, line in read_lines(path, encoding):
        try:
            yield number, load_row(line)
        except SkippedRowError as skip:
            yield number, skip


def _read_json(path: Path, encoding: str) -> NumberedRows:
    """Read jsonl or a list of rows, the format of HotpotQA, each of them also under the suffix of the other."""
    with path.open(encoding=encoding) as file:
        if file.read(1024).lstrip()[:1] != "[":
            yield from _read_jsonl(path, encoding)
            return
        file.seek(0)
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeError):
                raise
            raise UserError(f"{path} is not valid JSON: {error}.") from error
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else SkippedRowError("not a JSON object")


def _read_parquet(path: Path) -> NumberedRows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: `pip install -e ".[parquet]"`.') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_BATCH_ROWS)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
