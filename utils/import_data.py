"""Makes training files of a table: `python -m utils.import_data SOURCE --out DIR --user TEMPLATE --assistant TEMPLATE`.

SOURCE is a csv, tsv, parquet, jsonl or json file. Templates name its columns in braces:
  --user "{instruction}{context:\\n\\nContext: }" --assistant "{response}"     conversations, as dolly-15k wants
  --text "{note}"                                                           plain texts to pretrain on
{column.key} and {column.0} reach into objects and lists; {column:before} writes "before" only in front of a value.
"""

import argparse
import dataclasses
import difflib
import itertools
import os
import random
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from finetune.utils import run_cli
from model.errors import UserError
from utils.jsonl import LineReport, Row, SkipRow, aside, dump_row, require_file
from utils.tables import counts_lines, read_table
from utils.templates import MissingKeyError, Template, as_text, look_up

SPLIT_NAMES = ("train", "eval", "test")


@dataclasses.dataclass
class Recipe:
    """How a row of the source becomes a row of ours: `user` and `assistant`, or `text` alone."""

    user: Template | None = None
    assistant: Template | None = None
    system: Template | None = None
    text: Template | None = None
    group: str | None = None  # the field whose equal values stay in one split
    found: set[str] = dataclasses.field(default_factory=set)  # fields that some row had
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # field: what its first row had instead

    def templates(self) -> dict[str, Template]:
        """The given templates by their option, the ones a row must fill first."""
        named = {"--user": self.user, "--assistant": self.assistant, "--text": self.text, "--system": self.system}
        return {option: template for option, template in named.items() if template is not None}

    def convert(self, row: Row) -> tuple[Row, str | None]:
        """The new row, and its group if there are groups.

        Raises:
            SkipRow: what has to be learnt or said is empty, or the group is.
        """
        templates = self.templates()
        fields = itertools.chain.from_iterable(template.fields for template in templates.values())
        values = {field: self._value(row, field) for field in fields}
        texts = {option: template.render(values) for option, template in templates.items()}
        for option, text in texts.items():
            if not text and option != "--system":
                raise SkipRow(f"{option} is empty")
        group = None if self.group is None else self._value(row, self.group).strip()
        if group == "":
            raise SkipRow(f"the group {self.group!r} is empty, so its split cannot be chosen")
        if "--text" in texts:
            return {"text": texts["--text"]}, group
        roles = {"system": texts.get("--system"), "user": texts["--user"], "assistant": texts["--assistant"]}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items() if text]}, group

    def _value(self, row: Row, field: str) -> str:
        try:
            value = as_text(look_up(row, field))
        except MissingKeyError as error:
            self.missing.setdefault(field, error.available)
            return ""
        self.found.add(field)
        return value

    def require_found(self, path: Path) -> None:
        """Raises UserError for the fields that no row had: names that are mistaken."""
        problems = []
        for field, available in self.missing.items():
            if field not in self.found:
                close = difflib.get_close_matches(field.split(".")[-1], available, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}? " if close else ""
                problems.append(f"  {{{field}}}: {hint}There is: {', '.join(map(repr, available)) or 'nothing'}.")
        if problems:
            raise UserError(f"No row of {path} has what is asked for:\n" + "\n".join(problems))


def assign_splits(sizes: Sequence[int], fractions: Sequence[float], seed: int) -> bytearray:
    """Gives each unit (a row, or all rows of a group) a split, so that the rows divide as `fractions` do.

    The largest units come first, in seeded order among equals; each goes where it overfills least (d'Hondt's rule). For
    rows without groups the counts are exact wherever they can be.

    Args:
        sizes: rows per unit.
        fractions: of all rows, per split; they sum to 1.
        seed: of the order.

    Returns:
        The number of a split per unit.
    """
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda unit: -sizes[unit])
    filled = [0] * len(fractions)
    splits = bytearray(len(sizes))
    for unit in order:
        size = sizes[unit]
        split = min(range(len(fractions)), key=lambda split: (filled[split] + size) / fractions[split])
        filled[split] += size
        splits[unit] = split
    return splits


@dataclasses.dataclass
class Imported:
    """What became of a table's rows."""

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
    """Converts a table and splits it into train, eval and test files; all of them appear at the end, or none.

    Rows keep the source's order within each file. Memory: a few bytes per row, and the names of the groups.

    Args:
        source: see `read_table`.
        out: a folder (it exists, or the name ends in a slash), or what the files' names begin with: `data/dolly` makes
            `data/dolly_train.jsonl`.
        recipe: how a row is converted.
        fractions: shares of train, eval and test in this order; one, two or three that sum to 1.
        seed: of the split.
        encoding: of a text source.
        overwrite: replace files of an earlier import, and remove the splits that are no longer made.

    Raises:
        UserError: see `read_table`; a template names no column of the source; files in the way; a split without rows.
    """
    require_file(source)
    paths = _output_paths(out)
    _require_free(paths, source, overwrite)
    with ExitStack() as stack:
        stack.enter_context(file_errors())
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        rows = stack.enter_context(_scratch_file(paths[0].parent))
        units, read, dropped = _convert_rows(source, encoding, recipe, rows)
        recipe.require_found(source)
        if not units:
            raise UserError(f"No row of {source} could be used.\n{dropped}".rstrip())
        sizes = array("L", [0]) * (max(units) + 1)
        for unit in units:
            sizes[unit] += 1
        splits = assign_splits(sizes, fractions, seed)
        counts = [0] * len(fractions)
        for unit in units:
            counts[splits[unit]] += 1
        if 0 in counts:
            raise UserError(
                f"{SPLIT_NAMES[counts.index(0)]} would have no row: {len(units)} rows in {len(sizes)} "
                f"{'groups' if recipe.group else 'units'} are too few for these shares; give --split other ones, or 1."
            )
        _distribute(rows, [splits[unit] for unit in units], paths[: len(fractions)])
    for stale in paths[len(fractions) :]:
        stale.unlink(missing_ok=True)  # it would hold rows that are now in another split
    return Imported(read, dropped, dict(zip(paths, counts)))


def _output_paths(out: str) -> list[Path]:
    """One path per split name."""
    if out.endswith(("/", os.sep)) or Path(out).is_dir():
        return [Path(out) / f"{name}.jsonl" for name in SPLIT_NAMES]
    return [Path(f"{out}_{name}.jsonl") for name in SPLIT_NAMES]


def _require_free(paths: list[Path], source: Path, overwrite: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if any(path.samefile(source) for path in existing):
        raise UserError(f"{source} is the source and would be an output too; give another --out.")
    if existing and not overwrite:
        names = ", ".join(map(str, existing))
        raise UserError(f"{names} exist already; give another --out, or --overwrite to replace the splits of --out.")


def _convert_rows(source: Path, encoding: str, recipe: Recipe, out: TextIO) -> tuple[array, int, LineReport]:
    """Writes the rows that can be used to `out`; gives their units, how many were read, and which were dropped."""
    dropped = LineReport("line" if counts_lines(source) else "row")
    units = array("L")
    groups: dict[str, int] = {}
    read = 0
    for number, row in tqdm(read_table(source, encoding), unit=" rows", disable=None):
        read += 1
        try:
            if isinstance(row, SkipRow):
                raise row
            converted, group = recipe.convert(row)
        except SkipRow as skip:
            dropped.add(number, skip.reason, skip.detail)
            continue
        units.append(len(units) if group is None else groups.setdefault(group, len(groups)))
        out.write(dump_row(converted) + "\n")
    return units, read, dropped


def _distribute(rows: TextIO, splits: list[int], paths: list[Path]) -> None:
    rows.seek(0)
    with ExitStack() as stack:
        temporaries = [stack.enter_context(aside(path)) for path in paths]
        with ExitStack() as open_files:
            files = [
                open_files.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))
                for temporary in temporaries
            ]
            for line, split in zip(rows, splits, strict=True):
                files[split].write(line)
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)


def parse_fractions(text: str) -> list[float]:
    """Reads "0.9,0.1".

    Raises:
        UserError: not one to three positive numbers that sum to 1.
    """
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if not 1 <= len(fractions) <= len(SPLIT_NAMES) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"--split {text!r}: expected the shares of train, eval and test (or fewer of them), which sum to 1, "
            "such as 0.9,0.1 or 0.8,0.1,0.1 or 1."
        )
    return fractions


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.text is not None and (args.user is not None or args.assistant is not None or args.system is not None):
        raise UserError("--text makes pretraining rows; leave it, or leave --user, --assistant and --system.")
    if args.text is None and (args.user is None or args.assistant is None):
        raise UserError("Give --user and --assistant for conversations, or --text for pretraining.")
    given = {name: getattr(args, name) for name in ("user", "assistant", "system", "text")}
    parsed = {name: Template.parse(text, f"--{name}") for name, text in given.items() if text is not None}
    for name, template in parsed.items():
        if name != "system" and not template.fields:
            raise UserError(f"--{name} {given[name]!r} names no column; columns stand in braces: '{{{given[name]}}}'.")
    return Recipe(**parsed, group=args.group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", required=True, help="folder (ending in /), or what the files' names begin with")
    parser.add_argument("--user", help="template of the user's message")
    parser.add_argument("--assistant", help="template of the answer")
    parser.add_argument("--system", help="template of the system prompt")
    parser.add_argument("--text", help="template of a pretraining text")
    parser.add_argument("--split", default="0.9,0.1", help="shares of train, eval and test (default: 0.9,0.1)")
    parser.add_argument("--group", metavar="COLUMN", help="rows of one value, such as a patient's, share a split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument("--encoding", default="utf-8", help="of csv, tsv and json files (default: utf-8)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier import")
    args = parser.parse_args()
    fractions = parse_fractions(args.split)
    recipe = _recipe(args)
    print(import_table(args.source, args.out, recipe, fractions, args.seed, args.encoding, args.overwrite))


if __name__ == "__main__":
    run_cli(main)
