"""Generate fictional French discharge notes with their PMSI codes: offline and seeded, or with Mistral's API.

`python -m utils.generate_notes --out DIR --n 1000 [--seed 0] [--length short|long] [--cim10 TABLE] [--wordings train]`

Files in DIR: `text.csv` (visit_occurence_id, text) and `codes.csv` (visit_occurence_id, condition_status_source_value,
concept_code, concept_name), like exports of a hospital's data warehouse; `cim10.tsv`, the codes in use in the layout of
ATIH's table, unless --cim10 is given; and instruct rows ready for training: `notes_instruct.jsonl` with all notes,
`train_instruct.jsonl` and `eval_instruct.jsonl` with the fractions of --split.

`--writer mistral [--model NAME] [--dry-run]` lets a model of Mistral's API write the notes of the same fictional stays,
with the key in the environment variable MISTRAL_API_KEY. Notes are saved to `api_notes.jsonl` on arrival; after an
interruption, the same command continues. `--dry-run` only writes `prompts.jsonl`.
"""

import argparse
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from tqdm import tqdm

from finetune.cli import run_cli
from model.errors import UserError
from utils.fictional_notes.api_notes import (
    DEFAULT_MODEL,
    NoteRequest,
    connect,
    note_requests,
    save_prompts,
    write_api_notes,
)
from utils.fictional_notes.catalogue import Catalogue, load_catalogue
from utils.fictional_notes.note_writer import WORDINGS
from utils.fictional_notes.notes import LENGTHS, FictionalNote, write_notes
from utils.icd10.answers import build_answer
from utils.icd10.codes import Cim10Entry, Cim10Table, category
from utils.icd10.prompts import instruct_row
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import dump_row, file_errors, require_own_names
from utils.tables.output_folder import new_outputs
from utils.tables.splits import SPLIT_NAMES, parse_fractions, split_rows

JOURNAL, PROMPTS = "api_notes.jsonl", "prompts.jsonl"
TEXT, CODES, TABLE, ALL_ROWS = "text.csv", "codes.csv", "cim10.tsv", "notes_instruct.jsonl"
SPLIT_FILES = tuple(f"{name}_instruct.jsonl" for name in SPLIT_NAMES)
TEXT_COLUMNS = ("visit_occurence_id", "text")
CODE_COLUMNS = ("visit_occurence_id", "condition_status_source_value", "concept_code", "concept_name")


def save_notes(
    notes: Iterable[FictionalNote],
    out: Path,
    splits: Sequence[int],
    table: Cim10Table | None = None,
    overwrite: bool = False,
) -> None:
    """Write the files listed in the module docstring to `out`, all of them or none.

    Args:
        notes: one note per element of `splits`.
        out: output folder, created if missing.
        splits: index of the split of each note in SPLIT_NAMES.
        table: written to `cim10.tsv` if given.
        overwrite: replace the files of an earlier call, and delete its splits that are not written again.

    Raises:
        UserError: a file exists and `overwrite` is false, or a file cannot be written.
    """
    names = [TEXT, CODES, ALL_ROWS, *SPLIT_FILES[: max(splits) + 1], *([TABLE] if table else [])]
    stale = [name for name in (*SPLIT_FILES, TABLE) if name not in names]
    with new_outputs(out, names, stale, overwrite) as temporaries, ExitStack() as opened:
        files = {
            name: opened.enter_context(temporary.open("w", encoding="utf-8", newline=""))
            for name, temporary in temporaries.items()
        }
        _write_rows(notes, files, [SPLIT_FILES[split] for split in splits])
        if table:
            files[TABLE].writelines(_table_lines(table))


def _write_rows(notes: Iterable[FictionalNote], files: Mapping[str, IO[str]], split_of: Sequence[str]) -> None:
    texts, codes = CsvWriter(files[TEXT], TEXT_COLUMNS), CsvWriter(files[CODES], CODE_COLUMNS)
    for note, split in zip(tqdm(notes, total=len(split_of), unit=" notes", disable=None), split_of, strict=True):
        texts.write(note.id, note.text)
        for diagnosis in note.diagnoses:
            codes.write(note.id, *diagnosis)
        row = dump_row(instruct_row(note.text, build_answer(note.diagnoses), note.id)) + "\n"
        files[ALL_ROWS].write(row)
        files[split].write(row)


def table_of(catalogue: Catalogue) -> Cim10Table:
    """Return a table of the common codes and their categories (type 3: not usable as a code)."""
    common = catalogue.common.values()
    entries = {item.code: Cim10Entry(item.code, item.type, item.label, item.label.upper()) for item in common}
    for code in list(entries):
        parent = category(code)
        entries.setdefault(parent, Cim10Entry(parent, 3, f"Catégorie {parent}", f"CATEGORIE {parent}"))
    return Cim10Table(entries[code] for code in sorted(entries))


def _table_lines(table: Cim10Table) -> Iterable[str]:
    for entry in table:
        restricted = "NNNN" if entry.type == 3 else "NOOO"
        yield f"{entry.code:<6}\t{entry.type}\t{restricted}\t{entry.type}\t{entry.short_label}\t{entry.label}\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--n", type=int, required=True, help="number of notes")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same stays (default: %(default)s)")
    parser.add_argument(
        "--length", choices=LENGTHS, default="long", help="about 100, or 600 to 1500 tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--wordings",
        choices=tuple(WORDINGS),
        default="all",
        help="names of diseases: `train`, `unseen` (never used by `train`) or both (default: %(default)s)",
    )
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="use ATIH's labels, types and additional codes")
    parser.add_argument("--split", default="0.9,0.1", help="fractions of train, eval and test (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    api = parser.add_argument_group("notes written by Mistral's API")
    api.add_argument(
        "--writer", choices=("templates", "mistral"), default="templates", help="default: %(default)s, offline"
    )
    api.add_argument("--model", default=DEFAULT_MODEL, help="name of the model (default: %(default)s)")
    api.add_argument("--server", metavar="URL", help="another server with the same API (default: Mistral's)")
    api.add_argument("--dry-run", action="store_true", help="write and count the prompts, send nothing")
    return parser.parse_args()


def _notes(args: argparse.Namespace, catalogue: Catalogue) -> Iterable[FictionalNote]:
    if args.writer == "templates":
        return write_notes(args.n, args.seed, catalogue, args.length, args.wordings)
    return write_api_notes(_requests(args, catalogue), connect(args.model, args.server), args.out / JOURNAL)


def _requests(args: argparse.Namespace, catalogue: Catalogue) -> Iterable[NoteRequest]:
    return note_requests(args.n, args.seed, catalogue, args.length, args.model)


def _check(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise UserError(f"--n {args.n}: expected at least 1 note.")
    if args.writer == "mistral" and args.wordings != "all":
        raise UserError(f"--wordings {args.wordings} requires --writer templates: a model chooses its own wordings.")
    if args.writer == "templates" and args.dry_run:
        raise UserError("--dry-run requires --writer mistral: templates send nothing.")


def main() -> None:
    args = _arguments()
    _check(args)
    require_own_names(
        [args.out / name for name in (JOURNAL, PROMPTS, TEXT, CODES, TABLE, ALL_ROWS, *SPLIT_FILES)], [args.cim10]
    )
    catalogue = load_catalogue(Cim10Table.from_file(args.cim10) if args.cim10 else None)
    if args.dry_run:
        with file_errors():
            args.out.mkdir(parents=True, exist_ok=True)
            print(save_prompts(_requests(args, catalogue), args.out / JOURNAL, args.out / PROMPTS))
        return
    splits = split_rows(array("L", range(args.n)), parse_fractions(args.split), args.seed)
    table = None if args.cim10 else table_of(catalogue)
    save_notes(_notes(args, catalogue), args.out, splits, table, args.overwrite)
    print(f"Wrote {args.n:,} fictional notes with their codes to {args.out}")


if __name__ == "__main__":
    run_cli(main)
