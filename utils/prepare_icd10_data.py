"""Convert a hospital's notes and codes to training files.

`python -m utils.prepare_icd10_data --text text.csv --codes codes.csv --cim10 TABLE --out DIR [--patient COLUMN]`

Columns of text.csv: visit_occurence_id, text (a stay's notes are joined). Columns of codes.csv: visit_occurence_id,
condition_status_source_value (DP, DR, DAS), concept_code. TABLE is ATIH's CIM-10 table of the year.

Files in DIR: `*_instruct.jsonl` (conversations) and `*_text.jsonl` (pretraining texts) for train, val and test, and
`report.json`, which accounts for every stay and code. Stays of the same patient, or with the same text, are in the same
split; splits are stratified by the chapter of the main diagnosis.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.cli import run_cli
from model.errors import UserError
from utils.icd10.answers import build_answer, list_codes
from utils.icd10.codes import Cim10Table, chapter
from utils.icd10.corpus import CodedStay, CodeRow, Corpus, Dropped, build_corpus
from utils.icd10.near_duplicates import find_near_duplicates, normalize_text
from utils.icd10.prompts import instruct_row, pretrain_row
from utils.icd10.splits import SPLITS, split_stays
from utils.tables.jsonl import SkippedRowError, dump_row, require_own_names
from utils.tables.output_folder import new_outputs
from utils.tables.read_table import FILE_TYPES, add_encoding_option, counts_lines, read_table
from utils.tables.splits import parse_fractions

STAY, TEXT, STATUS, CODE = "visit_occurence_id", "text", "condition_status_source_value", "concept_code"
REPORT = "report.json"
MAX_EXAMPLES = 20  # of dropped codes, dropped rows and near-duplicates in a report


def read_texts(
    path: Path, patient: str | None, encoding: str, dropped_rows: Dropped
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the text of each stay, its notes joined by a blank line, and the patient of each stay where known.

    Args:
        path: table with the columns STAY and TEXT.
        patient: column of the patient; None if there is none.
        encoding: encoding of text formats.
        dropped_rows: receives the rows that cannot be used, by reason.

    Raises:
        UserError: the file cannot be read, or a column is missing.
    """
    notes: defaultdict[str, dict[str, None]] = defaultdict(dict)  # an ordered set: duplicate notes are kept once
    patients: dict[str, str] = {}
    columns = (STAY, TEXT) if patient is None else (STAY, TEXT, patient)
    for stay, text, *person in _read_columns(path, columns, encoding, dropped_rows):
        notes[stay][text.strip()] = None
        if person and person[0].strip():
            patients.setdefault(stay, person[0].strip())
    return {stay: "\n\n".join(filter(None, found)) for stay, found in notes.items()}, patients


def read_codes(path: Path, encoding: str, dropped_rows: Dropped) -> dict[str, list[CodeRow]]:
    """Return the (status, code) rows of each stay; arguments and errors as for `read_texts`."""
    codes: defaultdict[str, list[CodeRow]] = defaultdict(list)
    for stay, status, code in _read_columns(path, (STAY, STATUS, CODE), encoding, dropped_rows):
        codes[stay].append((status, code))
    return dict(codes)


def _read_columns(
    path: Path, columns: Sequence[str], encoding: str, dropped_rows: Dropped
) -> Iterator[tuple[str, ...]]:
    """Yield the values of these columns for each row; rows without a value in the first column are dropped."""
    unit = "line" if counts_lines(path) else "row"
    empty = True
    for number, row in read_table(path, encoding):
        empty = False
        where = f"{path}, {unit} {number}"
        if isinstance(row, SkippedRowError):
            dropped_rows[row.reason].append(f"{where}: {row.detail}" if row.detail else where)
            continue
        if missing := [column for column in columns if column not in row]:
            raise UserError(
                f"{where}: no column {' and no column '.join(map(repr, missing))}; found "
                f"{', '.join(map(repr, row))}. Rename the columns of the file, or give another file."
            )
        values = tuple("" if row[column] is None else str(row[column]) for column in columns)
        if values[0].strip():
            yield values[0].strip(), *values[1:]
        else:
            dropped_rows[f"without {columns[0]}"].append(where)
    if empty:
        raise UserError(f"{path} has no rows; expected the columns {', '.join(columns)} and one row per note or code.")


def describe(
    corpus: Corpus, dropped_rows: Dropped, patients: dict[str, str], texts: Sequence[str], splits: Sequence[int]
) -> dict[str, Any]:
    """Return the report: stays and codes kept and dropped, contents of each split, near-duplicates across splits."""
    kept_codes = sum(len(stay.diagnoses) for stay in corpus.stays)
    duplicates = list(find_near_duplicates(texts, splits))
    return {
        "stays": {
            "read": len(corpus.stays) + sum(map(len, corpus.dropped_stays.values())),
            "kept": len(corpus.stays),
            "dropped": dict(corpus.dropped_stays),
        },
        "codes": {
            "read": kept_codes + sum(map(len, corpus.dropped_codes.values())),
            "kept": kept_codes,
            "dropped": _examples(corpus.dropped_codes),
        },
        "unreadable_rows": _examples(dropped_rows),
        "splits": {
            name: _describe_split([stay for stay, split in zip(corpus.stays, splits) if split == number], patients)
            for number, name in enumerate(SPLITS[: max(splits) + 1])
        },
        "duplicates": {
            "stays_with_the_text_of_another": sum(count for count in Counter(texts).values() if count > 1),
            "near_identical_across_splits": len(duplicates),
            "examples": [
                {
                    SPLITS[splits[found.note]]: corpus.stays[found.note].id,
                    SPLITS[splits[found.other]]: corpus.stays[found.other].id,
                    "similarity": round(found.similarity, 3),
                }
                for found in duplicates[:MAX_EXAMPLES]
            ],
        },
    }


def _examples(dropped: Dropped) -> dict[str, Any]:
    return {reason: {"count": len(found), "examples": found[:MAX_EXAMPLES]} for reason, found in dropped.items()}


def _describe_split(stays: Sequence[CodedStay], patients: dict[str, str]) -> dict[str, Any]:
    roles = Counter(item.role for stay in stays for item in stay.diagnoses)
    return {
        "stays": len(stays),
        "patients": len({patients.get(stay.id, f"of {stay.id}") for stay in stays}) if patients else None,
        "codes": dict(roles),
        "chapters_of_dp": dict(Counter(chapter(stay.diagnoses[0].code) or "none" for stay in stays).most_common()),
    }


def summarize(report: dict[str, Any]) -> str:
    """Return a summary of the report."""
    stays, codes, duplicates = report["stays"], report["codes"], report["duplicates"]
    lines = [f"Stays read: {stays['read']:,}. Kept: {stays['kept']:,}."]
    lines += [f"  dropped, {reason}: {len(found):,}" for reason, found in stays["dropped"].items()]
    lines.append(f"Codes of these stays: {codes['read']:,}. Kept: {codes['kept']:,}.")
    lines += [_dropped_line(reason, found) for reason, found in codes["dropped"].items()]
    if report["unreadable_rows"]:
        lines.append("Unusable rows:")
        lines += [_dropped_line(reason, found) for reason, found in report["unreadable_rows"].items()]
    for name, split in report["splits"].items():
        patients = f" of {split['patients']:,} patients" if split["patients"] is not None else ""
        roles = ", ".join(f"{role} {count:,}" for role, count in split["codes"].items())
        chapters = ", ".join(f"{found} {count:,}" for found, count in split["chapters_of_dp"].items())
        lines.append(f"{name}: {split['stays']:,} stays{patients}; {roles}; chapters of the DP: {chapters}")
    if shared := duplicates["stays_with_the_text_of_another"]:
        lines.append(f"Stays with the same text as another stay (kept in the same split): {shared:,}.")
    if leaks := duplicates["near_identical_across_splits"]:
        lines.append(
            f"warning: near-duplicates of stays in another split: {leaks:,} (see {REPORT}). They inflate the scores; "
            "give --patient if they belong to the same patient."
        )
    else:
        lines.append("No near-duplicates across splits.")
    return "\n".join(lines)


def _dropped_line(reason: str, found: dict[str, Any]) -> str:
    return f"  dropped, {reason}: {found['count']:,} (e.g. {found['examples'][0]})"


def save(stays: Sequence[CodedStay], splits: Sequence[int], report: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Write the files listed in the module docstring to `out`, all of them or none.

    Raises:
        UserError: a file exists and `overwrite` is false, or a file cannot be written.
    """
    used = _FILES[: len(_LINES) * (max(splits) + 1)]
    with new_outputs(out, [*used, REPORT], _FILES[len(used) :], overwrite) as temporaries:
        for number, split in enumerate(SPLITS[: max(splits) + 1]):
            for kind, line_of in _LINES.items():
                with temporaries[f"{split}_{kind}.jsonl"].open("w", encoding="utf-8", newline="\n") as file:
                    file.writelines(line_of(stay) for stay, found in zip(stays, splits) if found == number)
        temporaries[REPORT].write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _instruct_line(stay: CodedStay) -> str:
    return dump_row(instruct_row(stay.text, build_answer(stay.diagnoses), stay.id)) + "\n"


def _text_line(stay: CodedStay) -> str:
    return dump_row(pretrain_row(stay.text, list_codes(stay.diagnoses))) + "\n"


_LINES = {"instruct": _instruct_line, "text": _text_line}
_FILES = [f"{split}_{kind}.jsonl" for split in SPLITS for kind in _LINES]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help=f"table of notes ({FILE_TYPES})")
    parser.add_argument("--codes", type=Path, required=True, help=f"table of codes ({FILE_TYPES})")
    parser.add_argument("--cim10", type=Path, required=True, metavar="TABLE", help="ATIH's CIM-10 table")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--ratios", default="0.8,0.1,0.1", help="fractions of train, val, test (default: %(default)s)")
    parser.add_argument("--patient", metavar="COLUMN", help="column of --text; keeps a patient's stays in one split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    add_encoding_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    fractions = parse_fractions(args.ratios, "--ratios")
    require_own_names([args.out / name for name in (*_FILES, REPORT)], [args.text, args.codes, args.cim10])
    table = Cim10Table.from_file(args.cim10)
    dropped_rows: Dropped = defaultdict(list)
    texts, patients = read_texts(args.text, args.patient, args.encoding, dropped_rows)
    codes = read_codes(args.codes, args.encoding, dropped_rows)
    corpus = build_corpus(texts, codes, table)
    if not corpus.stays:
        reasons = {**corpus.dropped_stays, **corpus.dropped_codes}
        counts = "; ".join(f"{reason}: {len(found):,}" for reason, found in reasons.items())
        raise UserError(f"No stay of {args.text} and {args.codes} is usable with {args.cim10} ({counts}).")
    normalized = [normalize_text(stay.text) for stay in corpus.stays]
    splits = split_stays(corpus.stays, patients, normalized, fractions, args.seed)
    report = describe(corpus, dropped_rows, patients, normalized, splits)
    save(corpus.stays, splits, report, args.out, args.overwrite)
    print(summarize(report))


if __name__ == "__main__":
    run_cli(main)
