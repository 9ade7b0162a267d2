"""Convert a jsonl file in place, row by row: the command line of `reformat_data` and `reformat_data_glaive`."""

import argparse
import codecs
import collections
import dataclasses
import itertools
import json
import random
import re
import shutil
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from finetune.data.keys import key_names
from model.atomic import replace_file, temporary_file
from model.errors import UserError
from model.file_kinds import looks_like
from utils.tables.jsonl import (
    LineReport,
    Row,
    SkippedRowError,
    dump_row,
    file_errors,
    load_row,
    read_lines,
    require_file,
)

NewId = Callable[[], str]
Warn = Callable[[str], None]
Convert = Callable[[Row, NewId, Warn], Row | None]  # None: a row that it does not know and that is kept

_BLANKS = re.compile(r"[ \t\r\n]*")  # JSON's white space
_IMPORT = '`python -m utils.import_data FILE --out DIR/ --user "{COLUMN}" --assistant "{COLUMN}"`'


@dataclasses.dataclass
class Rewriting:
    """The outcome of converting a file."""

    unit: str = "line"
    read: int = 0
    changed: int = 0
    unknown: LineReport = dataclasses.field(default_factory=LineReport)  # kept, but not understood
    skipped: LineReport = dataclasses.field(default_factory=LineReport)
    warnings: LineReport = dataclasses.field(default_factory=LineReport)  # about kept rows
    backup: Path | None = None

    def __post_init__(self) -> None:
        self.unknown, self.skipped, self.warnings = (LineReport(self.unit) for _ in range(3))

    def __str__(self) -> str:
        kept = self.read - self.skipped.count
        lines = [f"Rows read: {self.read:,}. Kept: {kept:,}, of which changed: {self.changed:,}."]
        if self.unit == "row":
            lines.append("The file was a JSON list; it is now jsonl, one row per line.")
        if self.warnings.count or self.unknown.count:
            lines += ["Warnings:", *filter(None, [str(self.unknown), str(self.warnings)])]
        if self.skipped.count:
            lines += [f"Skipped: {self.skipped.count:,} ({self.skipped.count / self.read:.2%}):", str(self.skipped)]
        if self.backup:
            lines.append(f"Backup of the original file: {self.backup}")
        return "\n".join(lines)


def call_ids(seed: int) -> NewId:
    """Return a seeded source of tool call ids: 9 alphanumerics, as Mistral's tokenizers require."""
    generator = random.Random(seed)
    return lambda: "".join(generator.choices(string.ascii_letters + string.digits, k=9))


def rewrite_jsonl(
    path: Path,
    convert: Convert,
    seed: int = 0,
    backup: bool = True,
    allow_skipped: bool = False,
    announce: Callable[[Rewriting], None] = lambda _: None,
) -> Rewriting:
    """Replace a file atomically by its converted rows, without those that `convert` skips.

    A row that needs no change keeps its line unchanged; a file that needs no change is not written.

    Args:
        path: the jsonl file, or a JSON list of rows; its original content is kept next to it under an unused `.bak`
            name.
        convert: returns the new row, None to keep a row that it does not know, or raises SkippedRowError; it must not
            modify its argument.
        seed: for the call ids.
        backup: whether to keep the original content.
        allow_skipped: whether rows may be skipped without a backup.
        announce: called with the result before the file is replaced, so that nothing changes without a report.

    Raises:
        UserError: the file is missing, not jsonl or cannot be replaced; no row is known or could be kept; or rows would
            be lost.
    """
    require_file(path)
    path = path.resolve()  # a link stays a link
    with file_errors(), temporary_file(path) as temporary:
        temporary.touch(mode=0o600)  # the rows may be notes
        unit, rows = _read_rows(path)
        result = _convert_rows(rows, temporary, convert, call_ids(seed), Rewriting(unit))
        _require_known_rows(path, result)
        if result.skipped.count and not backup and not allow_skipped:
            raise UserError(
                f"{result.skipped.count:,} of {result.read:,} rows of {path} would be lost; the file is unchanged. "
                f"Keep the backup, or give --allow_skipped.\n{result.skipped}"
            )
        is_new = bool(result.changed or result.skipped.count or unit == "row")
        if is_new and backup:
            result.backup = _keep_backup(path)
        announce(result)
        if is_new:
            shutil.copymode(path, temporary)
            replace_file(temporary, path)
    return result


def _read_rows(path: Path) -> tuple[str, Iterator[tuple[int, str]]]:
    """Return what is counted, lines or rows of a JSON list, and the rows with their numbers.

    Raises:
        UserError: the file is neither jsonl nor a JSON list.
    """
    with path.open("rb") as file:
        beginning = file.read(1 << 16)
    if kind := looks_like(beginning):
        raise _not_jsonl(path, f"begins like {kind}, not like jsonl", beginning)
    if b"\0" in beginning:
        raise _not_jsonl(path, "has NUL bytes, so it is binary or text in UTF-16 or UTF-32, not jsonl", beginning)
    if beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        try:
            return "row", iter([*enumerate(_list_items(text), start=1)])
        except (ValueError, RecursionError) as error:
            if not _is_json(next(_read_lines(path))[1]):  # it may be jsonl with a list in its first line
                raise _not_jsonl(path, f"begins like a JSON list but is not valid JSON ({error})", beginning) from error
    return "line", _checked_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield lines; bytes that are not UTF-8 must invalidate their own row only, so they become surrogate escapes."""
    return read_lines(path, errors="surrogateescape")


def _checked_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers.

    Raises:
        UserError: the first line and at least half of all lines are not rows, so that the file is something else.
    """
    read, invalid, reason = 0, 0, ""
    for _, line in _read_lines(path):
        read += 1
        try:
            load_row(line)
            if read == 1:
                break
        except SkippedRowError as skip:
            reason = reason or skip.detail
            invalid += 1
    if read > 1 and invalid * 2 >= read:
        raise _not_jsonl(path, f"is not jsonl: its first line and {invalid - 1:,} others are not rows ({reason})", b"")
    yield from _read_lines(path)


def _not_jsonl(path: Path, what: str, beginning: bytes) -> UserError:
    advice = "Training files are jsonl in UTF-8: one JSON object per line, and each row on one line."
    if path.suffix.lower() in (".csv", ".tsv", ".parquet") or beginning.startswith(b"PAR1"):
        advice = f"{_IMPORT} reads csv, tsv and parquet tables."
    elif looks_like(beginning) == "text in UTF-16" or b"\0" in beginning:
        advice = "Save it as UTF-8."
    return UserError(f"{path} {what}; it is unchanged. {advice}")


def _list_items(text: str) -> Iterator[str]:
    """Yield the JSON text of each item of a list.

    Raises:
        ValueError: the text is not a list in JSON.
    """
    decoder = json.JSONDecoder(parse_int=len, parse_float=len)  # values are parsed again, row by row

    def skip_blanks(start: int) -> int:
        blanks = _BLANKS.match(text, start)
        return blanks.end() if blanks else start

    position = skip_blanks(skip_blanks(0) + 1)
    separator = "," if text[position : position + 1] != "]" else "]"
    while separator == ",":
        _, end = decoder.raw_decode(text, position)
        yield text[position:end]
        position = skip_blanks(end)
        separator = text[position : position + 1]
        if separator == ",":
            position = skip_blanks(position + 1)
    if separator != "]" or skip_blanks(position + 1) < len(text):
        raise json.JSONDecodeError("Expecting ',' or the end of the list", text, position)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _convert_rows(
    rows: Iterable[tuple[int, str]], target: Path, convert: Convert, new_id: NewId, result: Rewriting
) -> Rewriting:
    with target.open("w", encoding="utf-8", newline="\n") as out:
        for number, line in tqdm(rows, unit=" rows", disable=None):
            result.read += 1
            warnings: list[str] = []
            try:
                row = load_row(line)
                converted = convert(row, new_id, warnings.append)
                is_changed = converted is not None and converted != row
                written = dump_row(converted or row) if is_changed or "\n" in line else line
            except SkippedRowError as skip:
                result.skipped.add(number, skip.reason, skip.detail)
                continue
            if converted is None:
                result.unknown.add(number, "no layout that is known, kept as it is", f"its keys: {key_names(row)}")
            for warning, times in collections.Counter(warnings).items():
                result.warnings.add(number, warning, times=times)
            result.changed += is_changed
            out.write(written + "\n")
    return result


def _require_known_rows(path: Path, result: Rewriting) -> None:
    """Raise UserError if no row is kept, or none that is understood."""
    if not result.read:
        raise UserError(f"No row of {path} could be kept; the file is unchanged: it has no rows.")
    if result.read == result.skipped.count:
        raise UserError(f"No row of {path} could be kept; the file is unchanged:\n{result.skipped}")
    if result.read == result.skipped.count + result.unknown.count:
        reasons = "\n".join(filter(None, [str(result.unknown), str(result.skipped)]))
        raise UserError(
            f"No row of {path} has a layout that this command knows; the file is unchanged:\n{reasons}\n"
            f"{_IMPORT} makes conversations of any columns."
        )


def _keep_backup(path: Path) -> Path:
    """Copy the file to the first unused of NAME.bak, NAME.bak1, ...: an earlier backup may be the only original."""
    suffixes = itertools.chain([""], itertools.count(1))
    names = (path.with_name(f"{path.name}.bak{suffix}") for suffix in suffixes)
    backup = next(name for name in names if not name.exists())
    shutil.copy2(path, backup)
    return backup


def rewrite_command(description: str | None, convert: Convert) -> None:
    """Run `rewrite_jsonl` with the command line `FILE.jsonl [--no_backup] [--allow_skipped] [--seed N]`.

    Raises:
        UserError: see `rewrite_jsonl`; or rows were left out, and `--allow_skipped` is not given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="jsonl file, replaced by the converted one")
    parser.add_argument("--no_backup", action="store_true", help="do not keep the original file as FILE.jsonl.bak")
    parser.add_argument("--allow_skipped", action="store_true", help="exit with code 0 although rows are left out")
    parser.add_argument("--seed", type=int, default=0, help="seed for the call ids (default: 0)")
    args = parser.parse_args()

    def report(result: Rewriting) -> None:
        print(result, flush=True)

    result = rewrite_jsonl(args.file, convert, args.seed, not args.no_backup, args.allow_skipped, report)
    if result.skipped.count and not args.allow_skipped:
        raise UserError(
            f"{result.skipped.count:,} of {result.read:,} rows were left out of {args.file}, as listed above. The "
            f"original is {result.backup}. To accept this, give --allow_skipped."
        )
