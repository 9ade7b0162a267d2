"""Convert a hospital's notes and codes to training files.

`python -m utils.prepare_icd10_data --text text.csv --codes codes.csv --cim10 TABLE --out DIR`

The notes have a row per document, the codes a row per code, or per stay or unit with columns for DP, DR and DAS. Common
column names are recognized and printed; name others with `--columns stay=NDA,text=CR,code=DIAG,role=TYPE`, or with a
YAML file of such entries. Fields: stay, text, code, role, patient, date and kind (of a document), unit (RUM), main
(marks the stay's DP), discharge (date), sex and age or birth (date), which some coding rules need, and dp, dr, das for
columns of roles; `notes.stay` and `codes.stay` where the tables differ. TABLE is ATIH's CIM-10 table, or several with
the years of discharge: `2024=TABLE 2025=TABLE`.

Files in DIR: `*_instruct.jsonl` (conversations) and `*_text.jsonl` (pretraining texts) for train, val and test;
`report.json`, which accounts for every stay and code; `left_out.csv`, which names those left out; `rules.csv`, which
names the stays whose codes break coding rules (`--rules FILE`: your own; `--repair` leaves out codes until no
forbidding rule is broken). Stays of the same patient, or with the same text, are in the same split;
splits are stratified by the chapter of the main diagnosis.
"""

import argparse
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.cli import run_cli
from finetune.next_commands import next_commands
from model.errors import UserError
from model.wording import counted
from utils.icd10.answers import build_answer, code_list, list_codes
from utils.icd10.codes import Cim10Table, chapter
from utils.icd10.corpus import FIRST, LAST, OF_DROPPED_STAY, TWO_PATIENTS, CodedStay, Corpus, build_corpus, repair
from utils.icd10.mapping import TableMapping, read_mapping
from utils.icd10.near_duplicates import Survey, find_near_duplicates, survey
from utils.icd10.note_text import quoted_codes, quotes_label
from utils.icd10.prompts import instruct_row, pretrain_row
from utils.icd10.roles import parse_roles
from utils.icd10.rule_kinds import Case
from utils.icd10.rule_report import BrokenRule, check_stays, summarize_rules
from utils.icd10.rules import RuleSet, add_rules_option, parse_rules
from utils.icd10.splits import SPLITS, split_stays
from utils.icd10.stays import (
    CodeRow,
    LeftOut,
    StayFacts,
    StayNotes,
    read_codes,
    read_notes,
    recognize,
    require_same_names,
    require_used,
)
from utils.icd10.table_years import TableYears
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import dump_row, require_own_names
from utils.tables.output_folder import new_outputs
from utils.tables.read_table import FILE_TYPES, add_encoding_option
from utils.tables.splits import parse_fractions

REPORT, LEFT_OUT, BROKEN_RULES = "report.json", "left_out.csv", "rules.csv"
MAX_EXAMPLES = 20  # of codes, rows and near-duplicates in a report
SENTENCE, LIST = "sentence", "list"  # formats of the answer


class Source(NamedTuple):
    """What the tables of a hospital have."""

    notes: StayNotes
    codes: dict[str, list[CodeRow]]
    facts: StayFacts  # of the table of codes
    left_out: list[LeftOut]
    warnings: list[str]
    changes: list[str]  # what was read otherwise than it is written

    def patient(self, stay: str) -> str | None:
        """Return the patient of a stay, by the table of notes where it has one."""
        names = self.notes.patients.get(stay) or self.facts.patients.get(stay) or {}
        return next(iter(names), None)

    def known_facts(self, stay: str) -> dict[str, str | int]:
        """Return what evaluation needs: patient, sex, age, year of discharge and number of documents."""
        facts: dict[str, str | int] = {}
        if patient := self.patient(stay):
            facts["patient"] = patient
        date = self.notes.discharges.get(stay)
        if date:
            facts["year"] = date[:4]
        if self.notes.has_documents:
            facts["documents"] = self.notes.count_documents(stay)
        return facts | self.notes.people.facts(stay, date)


def read_source(text: Path, codes: Path, mapping: TableMapping, encoding: str) -> Source:
    """Read both tables, after printing which columns are used.

    Raises:
        UserError: a table cannot be read, or stays cannot be matched.
    """
    tables = {
        "notes": recognize(text, "notes", mapping, encoding),
        "codes": recognize(codes, "codes", mapping, encoding),
    }
    require_used(mapping, {text: tables["notes"], codes: tables["codes"]}, mapping.both)
    print(f"{tables['notes'].describe(text)}\n{tables['codes'].describe(codes)}", flush=True)
    left_out: list[LeftOut] = []
    notes = read_notes(text, tables["notes"], encoding, left_out)
    found, statuses, facts = read_codes(codes, tables["codes"], mapping.roles, encoding, left_out, notes.people)
    warnings = [*require_same_names(notes, found, text, codes), *notes.people.warnings()]
    for stay, date in facts.discharges.items():
        notes.discharges.setdefault(stay, date)
    if undated := notes.count_undated():
        stays = counted(undated, "stay has", "stays have")
        warnings.append(f"{stays} documents without a date; these follow the dated ones in the file's order")
    changes = [f"Documents converted from {form} to text: {count:,}." for form, count in notes.converted.items()]
    if renamed := {status: role for status, role in statuses.items() if status.upper() != role}:
        changes.append(f"Statuses: {', '.join(f'{status!r} is {role}' for status, role in renamed.items())}.")
    return Source(notes, found, facts, left_out, warnings, changes)


def stays_of_two_patients(source: Source) -> dict[str, str]:
    """Return the reason to leave out each stay that has two patients, in a table or in one table and the other.

    Tables that never agree name patients in two ways; the names of the notes are used then.
    """
    notes, codes = source.notes.patients, source.facts.patients
    both = [stay for stay in notes if stay in codes]
    differing = {stay for stay in both if notes[stay].keys().isdisjoint(codes[stay])}
    if differing and len(differing) == len(both):
        stay = both[0]
        source.warnings.append(
            f"the tables name patients in two ways, and those of the notes are used (stay {stay}: "
            f"{next(iter(notes[stay]))} and {next(iter(codes[stay]))})"
        )
        differing = set()
    found = [stay for stay in {**notes, **codes} if max(len(notes.get(stay, ())), len(codes.get(stay, ()))) > 1]
    found += [stay for stay in both if stay in differing and stay not in found]
    if found:
        examples = "; ".join(
            f"{stay}: {' and '.join(list(notes.get(stay, {}) | codes.get(stay, {}))[:3])}" for stay in found[:3]
        )
        source.warnings.append(f"{counted(len(found), 'stay')} with two patients left out ({examples})")
    return dict.fromkeys(found, TWO_PATIENTS)


def describe(
    corpus: Corpus,
    source: Source,
    patients: Mapping[str, str],
    texts: Sequence[str],
    surveyed: Survey,
    splits: Sequence[int],
    version: str,
    rules: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report: stays and codes kept and left out, broken rules, splits, near-duplicates across splits."""
    kept_codes = sum(len(stay.diagnoses) for stay in corpus.stays)
    by_kind: dict[str, defaultdict[str, list[str]]] = {what: defaultdict(list) for what in ("stay", "code", "row")}
    for found in (*source.left_out, *corpus.left_out):
        name = found.stay if found.what == "stay" else found.where or f"{found.role} {found.code} of stay {found.stay}"
        by_kind["row" if found.what == "document" else found.what][found.reason].append(name)
    duplicates = list(find_near_duplicates(surveyed.signatures, texts, splits))
    return {
        "stays": {
            "read": len(corpus.stays) + sum(map(len, by_kind["stay"].values())),
            "kept": len(corpus.stays),
            "dropped": dict(by_kind["stay"]),
        },
        "codes": {
            "read": kept_codes + sum(map(len, by_kind["code"].values())),
            "kept": kept_codes,
            "dropped": _examples(by_kind["code"]),
            "moved": _examples(corpus.moved),
        },
        "unreadable_rows": _examples(by_kind["row"]),
        "changes": source.changes,
        "warnings": source.warnings,
        "rules_version": version,
        "rules": rules,
        "splits": {
            name: _describe_split([stay for stay, split in zip(corpus.stays, splits) if split == number], patients)
            for number, name in enumerate(SPLITS[: max(splits) + 1])
        },
        "duplicates": {
            "stays_with_the_text_of_another": sum(count for count in Counter(surveyed.digests).values() if count > 1),
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


def _examples(dropped: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {reason: {"count": len(found), "examples": list(found[:MAX_EXAMPLES])} for reason, found in dropped.items()}


def _describe_split(stays: Sequence[CodedStay], patients: Mapping[str, str]) -> dict[str, Any]:
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
    lines += [f"  dropped, {reason}: {len(found):,} (e.g. {found[0]})" for reason, found in stays["dropped"].items()]
    lines.append(f"Codes of these stays: {codes['read']:,}. Kept: {codes['kept']:,}.")
    lines += [_line("dropped, ", reason, found) for reason, found in codes["dropped"].items()]
    lines += [_line("", reason, found) for reason, found in codes["moved"].items()]
    if report["unreadable_rows"]:
        lines.append("Unusable rows and documents:")
        lines += [_line("dropped, ", reason, found) for reason, found in report["unreadable_rows"].items()]
    lines += report["changes"]
    lines += [*summarize_rules(report["rules"]), *(f"warning: {warning}." for warning in report["warnings"])]
    for name, split in report["splits"].items():
        patients = f" of {counted(split['patients'], 'patient')}" if split["patients"] is not None else ""
        roles = ", ".join(f"{role} {count:,}" for role, count in split["codes"].items())
        chapters = ", ".join(f"{found} {count:,}" for found, count in split["chapters_of_dp"].items())
        lines.append(f"{name}: {counted(split['stays'], 'stay')}{patients}; {roles}; chapters of the DP: {chapters}")
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


def _line(what: str, reason: str, found: dict[str, Any]) -> str:
    return f"  {what}{reason}: {found['count']:,} (e.g. {found['examples'][0]})"


class NoteSequence(Sequence[str]):
    """The note of each stay, read when it is asked for: a large corpus may not fit in memory."""

    def __init__(self, notes: StayNotes, stays: Sequence[CodedStay]) -> None:
        self._notes, self._stays = notes, stays

    def __len__(self) -> int:
        return len(self._stays)

    def __getitem__(self, index: Any) -> Any:
        return self._notes[self._stays[index].id]


def leave_out_leaks(corpus: Corpus, source: Source, keep: bool) -> Corpus:
    """Count notes that quote their own codes or labels, as letters written after coding do.

    Args:
        corpus: coded stays.
        source: their notes; receives the warnings.
        keep: whether the stays whose notes quote codes stay in the corpus.
    """
    codes, labels = set(), []
    for stay in corpus.stays:
        note = source.notes[stay.id]
        if quoted_codes(note, {item.code for item in stay.diagnoses}):
            codes.add(stay.id)
        if quotes_label(note, [item.label for item in stay.diagnoses]):
            labels.append(stay.id)
    if labels:
        source.warnings.append(
            f"{counted(len(labels), 'note quotes', 'notes quote')} a long label of the stay's codes word for word "
            f"(e.g. {labels[0]}): scores are too good there if labels come from coding"
        )
    if codes:
        advice = "a model copies them, and its scores say nothing; --leaks drop leaves out such stays"
        examples = ", ".join(sorted(codes)[:3])
        notes = counted(len(codes), "note quotes", "notes quote")
        source.warnings.append(f"{notes} codes of the stay ({examples}): {advice if keep else 'left out'}")
    if keep or not codes:
        return corpus
    left_out = list(corpus.left_out)
    for stay in corpus.stays:
        if stay.id in codes:
            left_out.append(LeftOut("stay", "whose note quotes its codes", stay.id))
            left_out += [LeftOut("code", OF_DROPPED_STAY, stay.id, str(role), code) for role, code, _ in stay.diagnoses]
    return corpus._replace(stays=[stay for stay in corpus.stays if stay.id not in codes], left_out=left_out)


class YearRules:
    """The CIM-10 table and the coding rules of each stay, by its date of discharge."""

    def __init__(self, tables: TableYears, rules: RuleSet, source: Source) -> None:
        self._tables, self._rules, self._source = tables, rules, source

    def table(self, stay: str) -> Cim10Table | str:
        """Return the table of a stay, or why there is none."""
        return self._tables.of(stay, self._source.notes.discharges)

    def rules(self, stay: str) -> RuleSet:
        """Return the rules of a stay."""
        return self._rules.in_year(self._source.notes.discharges.get(stay, "")[:4])

    def check(self, stays: Sequence[CodedStay]) -> tuple[dict[str, Any], list[BrokenRule]]:
        """Return the counts of the rules that stays break, and the broken rules."""

        def cases() -> Iterator[tuple[str, RuleSet, Case]]:
            for stay in stays:
                table = self.table(stay.id)
                assert isinstance(table, Cim10Table)  # other stays are not in the corpus
                case = Case.build(stay.diagnoses, table, self._source.known_facts(stay.id))
                yield stay.id, self.rules(stay.id), case

        return check_stays(cases(), self._rules)


class Outputs(NamedTuple):
    """Where and how the files are written."""

    folder: Path
    format: str
    overwrite: bool


def save(
    stays: Sequence[CodedStay],
    source: Source,
    splits: Sequence[int],
    outputs: Outputs,
    report: dict[str, Any],
    lists: Mapping[str, Sequence[tuple[str, ...]]],
) -> None:
    """Write the files listed in the module docstring, all of them or none.

    Args:
        stays: usable stays.
        source: their notes.
        splits: number of the split of each stay.
        outputs: where and how.
        report: content of the report.
        lists: rows of each csv file by its name.

    Raises:
        UserError: a file exists and is not to be replaced, or a file cannot be written.
    """
    used = _FILES[: len(_LINES) * (max(splits) + 1)]
    with new_outputs(outputs.folder, [*used, REPORT, *_LISTS], _FILES[len(used) :], outputs.overwrite) as temporaries:
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(temporaries[name].open("w", encoding="utf-8", newline="\n")) for name in used
            }
            for stay, split in zip(stays, splits):
                note = source.notes[stay.id]
                for kind, line_of in _LINES.items():
                    files[f"{SPLITS[split]}_{kind}.jsonl"].write(line_of(stay, note, source, outputs.format))
        temporaries[REPORT].write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        for name, columns in _LISTS.items():
            with temporaries[name].open("w", encoding="utf-8", newline="") as file:
                writer = CsvWriter(file, columns)
                for found in lists[name]:
                    writer.write(*found)


def _instruct_line(stay: CodedStay, note: str, source: Source, form: str) -> str:
    answer = code_list(stay.diagnoses) if form == LIST else build_answer(stay.diagnoses)
    row = instruct_row(note, answer, stay.id)
    return dump_row(row | source.known_facts(stay.id)) + "\n"


def _text_line(stay: CodedStay, note: str, source: Source, form: str) -> str:
    return dump_row(pretrain_row(note, list_codes(stay.diagnoses))) + "\n"


_LINES = {"instruct": _instruct_line, "text": _text_line}
_LISTS = {LEFT_OUT: LeftOut._fields, BROKEN_RULES: BrokenRule._fields}
_FILES = [f"{split}_{kind}.jsonl" for split in SPLITS for kind in _LINES]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help=f"table of notes ({FILE_TYPES})")
    parser.add_argument("--codes", type=Path, required=True, help=f"table of codes ({FILE_TYPES})")
    parser.add_argument(
        "--cim10", required=True, nargs="+", metavar="TABLE", help="ATIH's CIM-10 table, or YEAR=TABLE ..."
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--columns", metavar="MAPPING", help="FIELD=COLUMN,... or a YAML file")
    parser.add_argument("--roles", metavar="STATUS=ROLE,...", help="DP, DR, DAS or ignore for other statuses")
    parser.add_argument("--several_dp", choices=(FIRST, LAST), help="unit (RUM) whose DP and DR are the stay's")
    parser.add_argument("--patient", metavar="COLUMN", help="as --columns patient=COLUMN; a patient is in one split")
    parser.add_argument("--ratios", default="0.8,0.1,0.1", help="fractions of train, val, test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    parser.add_argument("--format", choices=(SENTENCE, LIST), default=SENTENCE, help="of answers; list: [C509, I10]")
    parser.add_argument("--leaks", choices=("keep", "drop"), default="keep", help="notes that quote their own codes")
    add_rules_option(parser)
    parser.add_argument("--repair", action="store_true", help="leave out codes that break forbidding rules")
    add_encoding_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser.parse_args()


def _mapping(args: argparse.Namespace) -> TableMapping:
    mapping = read_mapping(args.columns)
    if args.patient:
        mapping.notes["patient"] = args.patient
    mapping.roles.update(parse_roles(args.roles))
    return mapping


def _next_steps(folder: Path, has_val: bool) -> str:
    rows = {"instruct_data": "train_instruct.jsonl"} | ({"eval_instruct_data": "val_instruct.jsonl"} if has_val else {})
    settings = " and ".join(f"`data.{key}: {folder / name}`" for key, name in rows.items())
    commands = {"validate": ("utils.validate_data", "CONFIG.yaml"), "train": ("train", "CONFIG.yaml")}
    return f"Set {settings} in a YAML such as example/instruct_icd_v1.yaml.\n{next_commands(commands)}"


def main() -> None:
    args = _arguments()
    fractions = parse_fractions(args.ratios, "--ratios")
    tables, rules = TableYears(args.cim10), parse_rules(args.rules)
    inputs = [args.text, args.codes, *tables.paths, args.rules]
    require_own_names([args.out / name for name in (*_FILES, REPORT, *_LISTS)], inputs)
    source = read_source(args.text, args.codes, _mapping(args), args.encoding)
    of_year = YearRules(tables, rules, source)
    refused = stays_of_two_patients(source)
    corpus = build_corpus(source.notes, source.codes, of_year.table, args.several_dp, refused, of_year.rules)
    if args.repair:
        corpus = repair(corpus, of_year.table, of_year.rules, source.known_facts)
    corpus = leave_out_leaks(corpus, source, args.leaks == "keep")
    if not corpus.stays:
        counts = Counter(found.reason for found in corpus.left_out)
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in counts.items())
        raise UserError(f"No stay of {args.text} and {args.codes} is usable with {' '.join(args.cim10)} ({reasons}).")
    rule_counts, broken = of_year.check(corpus.stays)
    known = {stay.id: patient for stay in corpus.stays if (patient := source.patient(stay.id))}
    texts = NoteSequence(source.notes, corpus.stays)
    surveyed = survey(texts)
    splits = split_stays(corpus.stays, known, surveyed.digests, fractions, args.seed)
    if not known and max(splits):
        source.warnings.append(
            "the tables do not name patients: a patient's stays may be in train and in test, and scores too good; "
            "--patient COLUMN keeps them together"
        )
    report = describe(corpus, source, known, texts, surveyed, splits, rules.version, rule_counts)
    outputs = Outputs(args.out, args.format, args.overwrite)
    save(
        corpus.stays,
        source,
        splits,
        outputs,
        report,
        {LEFT_OUT: [*source.left_out, *corpus.left_out], BROKEN_RULES: broken},
    )
    print(summarize(report))
    print(_next_steps(args.out, has_val=1 in splits))


if __name__ == "__main__":
    run_cli(main)
