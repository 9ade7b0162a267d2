"""Read rows of csv, tsv, parquet, xlsx, jsonl and json files as dicts by column, one at a time."""

import argparse
import codecs
import csv
import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from model.errors import UserError
from model.file_kinds import looks_like
from utils.tables.csv_cells import original
from utils.tables.encodings import AUTO, encoding_of
from utils.tables.jsonl import Row, SkippedRowError, load_row, read_lines, require_file

NumberedRows = Iterator[tuple[int, Row | SkippedRowError]]  # an unreadable row is a SkippedRowError

FILE_TYPES = "csv, tsv, txt, parquet, xlsx, jsonl or json"

_DELIMITED = (".csv", ".tsv", ".txt")

_FIELD_LIMIT = 2**31 - 1  # characters in a csv field; the csv module's own limit of 128 KiB is shorter than a long note
_BATCH_ROWS = 256  # parquet rows held at once


def add_encoding_option(parser: argparse.ArgumentParser) -> None:
    """Add `--encoding`, which the messages of `read_table` recommend."""
    parser.add_argument(
        "--encoding", default=AUTO, help="of csv, tsv, jsonl and json files, e.g. cp1252 (default: decided per file)"
    )


def counts_lines(path: Path) -> bool:
    """Return whether the numbers of `read_table` count lines of the file, not rows."""
    return path.suffix.lower() in _DELIMITED or (path.suffix.lower() == ".jsonl" and not _begins_like_list(path))


def _begins_like_list(path: Path) -> bool:
    """Return whether the first character is `[`, in UTF-8 or UTF-16."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")


def has_fixed_columns(path: Path) -> bool:
    """Return whether every row has the same columns."""
    return path.suffix.lower() in (*_DELIMITED, ".parquet", ".xlsx")


def read_table(path: Path, encoding: str = AUTO) -> NumberedRows:
    """Yield the rows of a file, whose suffix determines its format. Only a JSON list is loaded into memory as a whole.

    Args:
        path: .csv or .txt (separated by commas, semicolons, tabs or pipes), .tsv, .parquet, .xlsx, .jsonl or .json.
        encoding: of text formats; "auto" decides by the bytes of the file. A byte order mark is skipped.

    Raises:
        UserError: the file does not exist, or its format or encoding is wrong.
    """
    require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix in (".xlsx", ".xlsm"):
        yield from _read_xlsx(path)
    elif suffix in (*_DELIMITED, ".jsonl", ".json"):
        _require_text(path)
        encoding = encoding_of(path, _checked(encoding))
        read = _read_csv if suffix in _DELIMITED else _read_json
        with _decoding(path, encoding):
            yield from read(path, _with_bom(encoding))
    else:
        remedy = " Save it as .xlsx or as csv." if suffix in (".xls", ".ods") else ""
        raise UserError(f"{path} ends in {path.suffix!r}; expected .{FILE_TYPES.replace(', ', ', .')}.{remedy}")


def _require_text(path: Path) -> None:
    """Raise UserError if the content of a file with the suffix of a text format is something else."""
    with path.open("rb") as file:
        kind = looks_like(file.read(256))
    if kind and not kind.startswith("text"):
        hint = " Excel's files are zip archives: name it .xlsx, or save it as csv." if "zip" in kind else ""
        raise UserError(f"{path} ends in {path.suffix!r} but is {kind}.{hint}")


def _checked(encoding: str) -> str:
    try:
        "é".encode("utf-8" if encoding == AUTO else encoding, "replace")
        return encoding if encoding == AUTO else codecs.lookup(encoding).name
    except (LookupError, UnicodeError) as error:
        raise UserError(f"Unknown encoding {encoding!r}; try utf-8, cp1252 or utf-16.") from error


def _with_bom(encoding: str) -> str:
    return "utf-8-sig" if encoding == "utf-8" else encoding


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
        # Excel's first line `sep=;` is not a header.
        first = file.readline()
        start = file.tell() if first.lower().startswith("sep=") else 0
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _csv_delimiter(path, file, start)
        file.seek(start)
        # strict: an unclosed quote would otherwise silently swallow the rows after it.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        skipped = 1 if start else 0
        line = 1 + skipped
        try:
            columns = [column.strip() for column in next(reader, [])]
            _require_unique(path, columns)
            line = reader.line_num + 1 + skipped
            for fields in reader:
                if fields:
                    yield line, _csv_row(columns, fields)
                line = reader.line_num + 1 + skipped
        except csv.Error as error:
            raise UserError(
                f"{path}, row beginning in line {line}: {error}. Double each quote inside a quoted field, "
                "and close every quote."
            ) from error


def _csv_delimiter(path: Path, file: TextIO, start: int) -> str:
    """Return the separator that yields the most columns in the header, which begins at `start`."""

    def width(delimiter: str) -> int:
        file.seek(start)
        try:
            return len(next(csv.reader(file, delimiter=delimiter), []))
        except csv.Error as error:
            raise UserError(f"{path}: the header cannot be read: {error}.") from error

    return max(",;\t|", key=width)


def _require_unique(path: Path, columns: list[str]) -> None:
    repeated = sorted({column for column in columns if column and columns.count(column) > 1})
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


def _read_xlsx(path: Path) -> NumberedRows:
    """Read the only sheet that has rows; its first row with content is the header."""
    columns: list[str] | None = None
    for number, cells in xlsx_cells(path):
        if columns is None:
            columns = ["" if cell is None else str(cell).strip() for cell in cells]
            _require_unique(path, columns)
        else:
            yield number, {column: cell for column, cell in zip(columns, cells) if column}


def xlsx_cells(path: Path) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number and the cells of each row with content of a workbook's only sheet.

    Raises:
        UserError: openpyxl is not installed, or this is not a workbook with one sheet.
    """
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise UserError(
            f'{path}: Excel files need openpyxl: `pip install -e ".[xlsx]"`, or save the file as csv.'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            for number, cells in enumerate(_only_sheet(path, book).iter_rows(values_only=True), start=1):
                if any(cell is not None for cell in cells):
                    yield number, tuple(map(_cell, cells))
        finally:
            book.close()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, InvalidFileException) as error:
        raise UserError(f"{path} is not an Excel workbook that can be read; save it as csv.") from error


def _cell(value: Any) -> Any:
    """Return the value of a cell; Excel keeps 15 digits of a number, so more are written as what they are, rounded."""
    rounded = isinstance(value, int | float) and abs(value) >= 10**15
    return f"{value:.6e}" if rounded else value


def _only_sheet(path: Path, book: Any) -> Any:
    filled = [
        sheet
        for sheet in book.worksheets
        if any(cell is not None for row in sheet.iter_rows(max_row=20, values_only=True) for cell in row)
    ]
    if len(filled) > 1:
        names = ", ".join(repr(sheet.title) for sheet in filled)
        raise UserError(f"{path} has {len(filled)} sheets with content ({names}); keep one, or save it as csv.")
    return (filled or book.worksheets)[0]
