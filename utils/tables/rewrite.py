"""Convert a jsonl file in place, row by row: the command line of `reformat_data` and `reformat_data_glaive`."""

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
Warn = Callable[[str], None]
Convert = Callable[[Row, NewId, Warn], Row]


@dataclasses.dataclass
class Rewriting:
    """The outcome of converting a file."""

    read: int = 0
    changed: int = 0
    skipped: LineReport = dataclasses.field(default_factory=LineReport)
    warnings: LineReport = dataclasses.field(default_factory=LineReport)  # about kept rows
    backup: Path | None = None

    def __str__(self) -> str:
        kept = self.read - self.skipped.count
        lines = [f"Rows read: {self.read:,}. Kept: {kept:,}, of which changed: {self.changed:,}."]
        if self.warnings.count:
            lines += ["Warnings:", str(self.warnings)]
        if self.skipped.count:
            lines += [f"Skipped: {self.skipped.count:,} ({self.skipped.count / self.read:.2%}):", str(self.skipped)]
        if self.backup:
            lines.append(f"Backup of the original file: {self.backup}")
        return "\n".join(lines)


def call_ids(seed: int) -> NewId:
    """Return a seeded source of tool call ids: 9 alphanumerics, as Mistral's tokenizers require."""
    generator = random.Random(seed)
    return lambda: "".join(generator.choices(string.ascii_letters + string.digits, k=9))


def rewrite_jsonl(path: Path, convert: Convert, seed: int = 0, backup: bool = True) -> Rewriting:
    """Replace a file atomically by its converted rows, without those that `convert` skips.

    A row that needs no change keeps its line unchanged; a file that needs no change is not written.

    Args:
        path: the jsonl file; its original content is kept next to it under an unused `.bak` name.
        convert: returns the new row or raises SkippedRowError; it must not modify its argument.
        seed: for the call ids.
        backup: whether to keep the original content.

    Raises:
        UserError: the file is missing or cannot be replaced, or no row could be kept.
    """
    require_file(path)
    path = path.resolve()  # a link stays a link
    with file_errors(), temporary_file(path) as temporary:
        result = _convert_rows(path, temporary, convert, call_ids(seed))
        if result.read == result.skipped.count:
            reasons = f"\n{result.skipped}" if result.read else " it has no rows."
            raise UserError(f"No row of {path} could be kept; the file is unchanged:{reasons}")
        if not filecmp.cmp(path, temporary, shallow=False):
            shutil.copymode(path, temporary)
            if backup:
                result.backup = _keep_backup(path)
            replace_file(temporary, path)
    return result


def _convert_rows(source: Path, target: Path, convert: Convert, new_id: NewId) -> Rewriting:
    result = Rewriting()
    with target.open("w", encoding="utf-8", newline="\n") as out:
        # Bytes that are not UTF-8 must invalidate their own row only, so they are read as surrogate escapes.
        for number, line in tqdm(read_lines(source, errors="surrogateescape"), unit=" rows", disable=None):
            result.read += 1
            try:
                row = load_row(line)
                warnings: list[str] = []
                converted = convert(row, new_id, warnings.append)
                written = line if converted == row else dump_row(converted)
            except SkippedRowError as skip:
                result.skipped.add(number, skip.reason, skip.detail)
                continue
            for warning in dict.fromkeys(warnings):
                result.warnings.add(number, warning)
            result.changed += converted != row
            out.write(written + "\n")
    return result


def _keep_backup(path: Path) -> Path:
    """Copy the file to the first unused of NAME.bak, NAME.bak1, ...: an earlier backup may be the only original."""
    suffixes = itertools.chain([""], itertools.count(1))
    names = (path.with_name(f"{path.name}.bak{suffix}") for suffix in suffixes)
    backup = next(name for name in names if not name.exists())
    shutil.copy2(path, backup)
    return backup


def rewrite_command(description: str, convert: Convert) -> None:
    """Run `rewrite_jsonl` with the command line `FILE.jsonl [--no_backup] [--seed N]`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="jsonl file, replaced by the converted one")
    parser.add_argument("--no_backup", action="store_true", help="do not keep the original file as FILE.jsonl.bak")
    parser.add_argument("--seed", type=int, default=0, help="seed for the call ids (default: 0)")
    args = parser.parse_args()
    print(rewrite_jsonl(args.file, convert, seed=args.seed, backup=not args.no_backup))
