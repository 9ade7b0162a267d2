"""Converting a jsonl file in place, row by row: the command around `reformat_data` and `reformat_data_glaive`."""

import argparse
import dataclasses
import filecmp
import itertools
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from model.atomic import replace_file, temporary_file
from model.errors import UserError
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
Note = Callable[[str], None]
Convert = Callable[[Row, NewId, Note], Row]


@dataclasses.dataclass
class Rewriting:
    """What became of a file's rows."""

    read: int = 0
    changed: int = 0
    skipped: LineReport = dataclasses.field(default_factory=LineReport)
    notes: LineReport = dataclasses.field(default_factory=LineReport)  # kept rows that lost or hold something odd
    backup: Path | None = None

    def __str__(self) -> str:
        kept = self.read - self.skipped.count
        lines = [f"Rows read: {self.read:,}. Kept: {kept:,}, of which changed: {self.changed:,}."]
        if self.notes.count:
            lines += ["Please note:", str(self.notes)]
        if self.skipped.count:
            lines += [f"Skipped: {self.skipped.count:,} ({self.skipped.count / self.read:.2%}):", str(self.skipped)]
        if self.backup:
            lines.append(f"The file as it was: {self.backup}")
        return "\n".join(lines)


def call_ids(seed: int) -> NewId:
    """A seeded source of tool call ids: 9 alphanumerics, as Mistral's tokenizers want them."""
    generator = random.Random(seed)
    return lambda: "".join(generator.choices(string.ascii_letters + string.digits, k=9))


def rewrite_jsonl(path: Path, convert: Convert, seed: int = 0, backup: bool = True) -> Rewriting:
    """Replaces a file by its converted rows, at once and only after the last row, without those that `convert` skips.

    A row that needs no change keeps its line to the letter, and a file that needs none is not touched.

    Args:
        path: the jsonl file; its old content stays beside it, under a `.bak` name that is still free.
        convert: gives the new row, or raises SkippedRowError; it must not edit the row it is given.
        seed: of the call ids.
        backup: whether to keep the old content.

    Raises:
        UserError: the file is missing or cannot be replaced, or not one row of it could be kept.
    """
    require_file(path)
    path = path.resolve()  # a link stays a link
    with file_errors(), temporary_file(path) as temporary:
        result = _convert_rows(path, temporary, convert, call_ids(seed))
        if result.read == result.skipped.count:
            reasons = f"\n{result.skipped}" if result.read else " it holds none."
            raise UserError(f"No row of {path} could be kept; the file stays as it was:{reasons}")
        if not filecmp.cmp(path, temporary, shallow=False):
            shutil.copymode(path, temporary)
            if backup:
                result.backup = _keep_backup(path)
            replace_file(temporary, path)
    return result


def _convert_rows(source: Path, target: Path, convert: Convert, new_id: NewId) -> Rewriting:
    result = Rewriting()
    with target.open("w", encoding="utf-8", newline="\n") as out:
        # Bytes that are no UTF-8 must cost their own row, not the file: they pass as surrogate escapes.
        for number, line in tqdm(read_lines(source, errors="surrogateescape"), unit=" rows", disable=None):
            result.read += 1
            try:
                row = load_row(line)
                remarks: list[str] = []
                converted = convert(row, new_id, remarks.append)
                written = line if converted == row else dump_row(converted)
            except SkippedRowError as skip:
                result.skipped.add(number, skip.reason, skip.detail)
                continue
            for remark in dict.fromkeys(remarks):
                result.notes.add(number, remark)
            result.changed += converted != row
            out.write(written + "\n")
    return result


def _keep_backup(path: Path) -> Path:
    """Copies the file to the first free of NAME.bak, NAME.bak1, ...: an earlier backup may be the only original."""
    suffixes = itertools.chain([""], itertools.count(1))
    names = (path.with_name(f"{path.name}.bak{suffix}") for suffix in suffixes)
    backup = next(name for name in names if not name.exists())
    shutil.copy2(path, backup)
    return backup


def rewrite_command(description: str, convert: Convert) -> None:
    """The command line `FILE.jsonl [--no_backup] [--seed N]` around `rewrite_jsonl`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path, help="jsonl file, replaced by the converted one")
    parser.add_argument("--no_backup", action="store_true", help="do not keep the old file as FILE.jsonl.bak")
    parser.add_argument("--seed", type=int, default=0, help="seed of the call ids (default: 0)")
    args = parser.parse_args()
    print(rewrite_jsonl(args.file, convert, seed=args.seed, backup=not args.no_backup))
