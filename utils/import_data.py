"""Convert a table to training files: `python -m utils.import_data SOURCE --out DIR/ --user T --assistant T`.

SOURCE is a csv, tsv, parquet, jsonl or json file. Templates name its columns in braces:
  --user "{instruction}{context:\\n\\nContext: }" --assistant "{response}"     conversations, as for dolly-15k
  --text "{note}"                                                           plain text for pretraining
{column.key} and {column.0} index into objects and lists; {column:before} inserts "before" if the value is not empty.
"""

import argparse
import dataclasses
import os
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from finetune.cli import run_cli
from model.errors import UserError
from utils.tables.jsonl import LineReport, SkippedRowError, dump_row, require_file, require_own_names
from utils.tables.output_folder import new_outputs
from utils.tables.read_table import add_encoding_option, counts_lines, has_fixed_columns, read_table
from utils.tables.splits import SPLIT_NAMES, parse_fractions, split_rows
from utils.tables.templates import Recipe, Template


@dataclasses.dataclass
class Imported:
    """The outcome of an import."""

    read: int
    dropped: LineReport
    files: dict[Path, int]  # rows per written file

    def __str__(self) -> str:
        kept = self.read - self.dropped.count
        lines = [f"Rows read: {self.read:,}. Kept: {kept:,}. Dropped: {self.dropped.count:,}."]
        if self.dropped.count:
            lines.append(str(self.dropped))
        return "\n".join(lines + [f"{path}: {rows:,} rows" for path, rows in self.files.items()])


def import_table(
    source: Path,
    out: str,
    recipe: Recipe,
    fractions: Sequence[float] = (0.9, 0.1),
    seed: int = 0,
    encoding: str = "utf-8",
    overwrite: bool = False,
) -> Imported:
    """Convert a table and split it into train, eval and test files, written atomically.

    Rows keep the order of the source within each file. Memory: about 100 bytes per row, and the names of groups.

    Args:
        source: see `read_table`.
        out: a folder (it exists, or the name ends in a slash), or a prefix: `data/dolly` writes
            `data/dolly_train.jsonl`.
        recipe: how a row is converted.
        fractions: shares of train, eval and test in this order; one to three numbers that sum to 1.
        seed: of the split.
        encoding: of a text source.
        overwrite: replace the files of an earlier import, and remove its splits that are not written again.

    Raises:
        UserError: see `read_table`; a template names an unknown column, output files exist, or a split has no row.
    """
    require_file(source)
    paths = _output_paths(out)
    require_own_names(paths, [source])
    folder, names = paths[0].parent, [path.name for path in paths]
    used, stale = names[: len(fractions)], names[len(fractions) :]
    with (
        new_outputs(folder, used, stale, overwrite) as temporaries,
        tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n", dir=folder) as rows,
    ):
        units, read, dropped = _convert_rows(source, encoding, recipe, rows)
        recipe.require_found(source)
        if not units:
            raise UserError(f"No row of {source} could be used.\n{dropped}".rstrip())
        splits = split_rows(units, fractions, seed)
        _distribute(rows, splits, [temporaries[name] for name in used])
    return Imported(read, dropped, {path: splits.count(number) for number, path in enumerate(paths[: len(used)])})


def _output_paths(out: str) -> list[Path]:
    """Return one path per split name."""
    if out.endswith(("/", os.sep)) or Path(out).is_dir():
        return [Path(out) / f"{name}.jsonl" for name in SPLIT_NAMES]
    return [Path(f"{out}_{name}.jsonl") for name in SPLIT_NAMES]


def _convert_rows(source: Path, encoding: str, recipe: Recipe, out: TextIO) -> tuple[array, int, LineReport]:
    """Write usable rows to `out`; return their units, the number of rows read, and the dropped ones."""
    dropped = LineReport("line" if counts_lines(source) else "row")
    units = array("L")
    groups: dict[str, int] = {}
    read = 0
    fixed = has_fixed_columns(source)
    for number, row in tqdm(read_table(source, encoding), unit=" rows", disable=None):
        if fixed and recipe.missing:
            recipe.require_found(source)
        read += 1
        try:
            if isinstance(row, SkippedRowError):
                raise row
            converted, group = recipe.convert(row)
            line = dump_row(converted)
        except SkippedRowError as skip:
            dropped.add(number, skip.reason, skip.detail)
            continue
        units.append(len(units) if group is None else groups.setdefault(group, len(groups)))
        out.write(line + "\n")
    return units, read, dropped


def _distribute(rows: TextIO, splits: bytearray, paths: list[Path]) -> None:
    rows.seek(0)
    with ExitStack() as opened:
        files = [opened.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
        for line, split in zip(rows, splits, strict=True):
            files[split].write(line)


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.text is not None and (args.user is not None or args.assistant is not None or args.system is not None):
        raise UserError(
            "--text writes pretraining rows; give it alone, or give --user, --assistant and --system instead."
        )
    if args.text is None and (args.user is None or args.assistant is None):
        raise UserError("Give --user and --assistant for conversations, or --text for pretraining.")
    given = {name: getattr(args, name) for name in ("user", "assistant", "system", "text")}
    parsed = {name: Template.parse(text, f"--{name}") for name, text in given.items() if text is not None}
    for name, template in parsed.items():
        if name != "system" and not template.fields:
            raise UserError(f"--{name} {given[name]!r} names no column; put columns in braces: '{{{given[name]}}}'.")
    return Recipe(
        user=parsed.get("user"),
        assistant=parsed.get("assistant"),
        system=parsed.get("system"),
        text=parsed.get("text"),
        group=args.group,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="table to convert")
    parser.add_argument("--out", required=True, help="output folder (ending in /), or prefix of the file names")
    parser.add_argument("--user", help="template for the user's message")
    parser.add_argument("--assistant", help="template for the answer")
    parser.add_argument("--system", help="template for the system prompt")
    parser.add_argument("--text", help="template for a pretraining document")
    parser.add_argument("--split", default="0.9,0.1", help="fractions of train, eval and test (default: 0.9,0.1)")
    parser.add_argument("--group", metavar="COLUMN", help="rows with the same value share a split, such as a patient's")
    parser.add_argument("--seed", type=int, default=0, help="seed for the split (default: 0)")
    add_encoding_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier import")
    args = parser.parse_args()
    fractions = parse_fractions(args.split)
    recipe = _recipe(args)
    print(import_table(args.source, args.out, recipe, fractions, args.seed, args.encoding, args.overwrite))


if __name__ == "__main__":
    run_cli(main)
