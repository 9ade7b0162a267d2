"""Code this week's stays: a worklist to review, and a journal of what was proposed and decided.

`python -m utils.code_stays --run RUN --stays EXPORT --out WORKLIST --cim10 TABLE [--auto 0.98]`

EXPORT has a row per document, as for `utils.predict_icd10`. Only stays that are new, or whose notes changed, are coded;
after an interruption, the same command continues. WORKLIST is a folder, for all weeks:

    journal.jsonl       each proposal and each review, with time, hash of the note, and versions; only appended to
    worklist.csv        the proposals for stays of EXPORT that are not reviewed yet, a line per code
    review.html         the same stays, to accept, refuse and replace codes in a browser; it downloads decisions.csv
    drift.html          with --train: confidence, acceptance and codes by week, compared with the training stays
    worklist.left_out.csv  rows of EXPORT that cannot be coded, and why; the exit code is then 1

`--evidence` adds the sentences that support each code, as `utils.explain_icd10` finds them.
`--decisions decisions.csv` takes what was reviewed into the journal, and adds the reviewed stays of EXPORT to
corrections.jsonl, rows to train on. Nothing is written outside of WORKLIST.
"""

import argparse
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.cli import run_cli
from model.atomic import remove_temporaries
from model.errors import UserError
from model.wording import counted
from utils.engines.choice import EngineChoice, add_coding_options, parse_coding_engine
from utils.icd10.codes import Cim10Table
from utils.icd10.confidence import ProbabilityReader
from utils.icd10.decisions import (
    ADDED,
    Review,
    add_corrections,
    count_decisions,
    describe_counts,
    final_codes,
    is_earlier,
    plain_code,
    read_reviews,
)
from utils.icd10.drift import Training, by_week, coded_once, reference, shifts
from utils.icd10.journal import CODED, EXPLAINED, JOURNAL, MARKED, REVIEWED, Journal, Key, note_hash, open_journal
from utils.icd10.mapping import read_mapping
from utils.icd10.predictions import NOTHING_MORE, read_gold
from utils.icd10.prompts import note_of
from utils.icd10.review_items import Item, StayToReview, doubt, proposals
from utils.icd10.rules import RuleSet
from utils.icd10.stays import LeftOut
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import Row, SkippedRowError, require_own_names, save
from utils.tables.read_table import FILE_TYPES, add_encoding_option

WORKLIST, PAGE, CORRECTIONS, DRIFT = "worklist.csv", "review.html", "corrections.jsonl", "drift.html"
COLUMNS = ("stay", "note", "decision", "reason", "rules", "role", "code", "label", "confidence", "evidence")


def code_new(
    choice: EngineChoice, marker: Any, export: Mapping[Key, Any], journal: Journal, versions: Row
) -> list[LeftOut]:
    """Code the stays that the journal does not have with their present note; return those without an answer.

    Args:
        choice: the engine and its settings.
        marker: the `Marker` of its answers.
        export: prompts by stay and note.
        journal: receives an event for each stay.
        versions: of what the answers depend on.
    """
    from utils.engines.answer_file import answered_rows  # imports mistral_common

    to_do = [prompt for key, prompt in export.items() if key not in journal.coded]
    if not to_do:
        return []
    keys = {prompt.id: key for key, prompt in export.items()}
    print(f"Coding {len(to_do)} of {counted(len(export), 'stay')} with {choice.model} ...", flush=True)
    left_out = []
    for prompt, row in answered_rows(
        choice.open(), to_do, ProbabilityReader(choice.table, choice.rules), choice.broken_rules
    ):
        if isinstance(row, SkippedRowError):
            left_out.append(LeftOut("row", row.reason, prompt.id))
        else:
            facts = {name: value for name, value in marker.mark(row).items() if name != "id"}
            journal.append(CODED, keys[prompt.id], {"versions": versions} | facts)
    return left_out


def waiting(keys: Iterable[Key], journal: Journal) -> list[Key]:
    """Return the stays, each with its note, that are coded and not reviewed."""
    return [key for key in keys if key in journal.coded and key not in journal.reviewed]


def mark_again(marker: Any, keys: Iterable[Key], journal: Journal, versions: Row) -> None:
    """Mark stays that an earlier call coded with this call's calibration and share, if the same model coded them."""
    for key in waiting(keys, journal):
        if not _same_model(journal.coded[key], versions):
            continue
        before = journal.proposal(key)
        after = marker.mark(before)
        names = [name for name in ("codes", NOTHING_MORE, "decision", "reason") if before.get(name) != after.get(name)]
        if names:
            facts = {"codes": after["codes"]} | {name: after.get(name) for name in names}
            journal.append(MARKED, key, {"versions": versions} | facts)


def coded_otherwise(export: Mapping[Key, Any], journal: Journal, versions: Row) -> str | None:
    """Return a sentence on stays to review whose proposals are not those of this call's model and files, if any."""
    others = [key for key in waiting(export, journal) if not _same_model(journal.coded[key], versions)]
    if not others:
        return None
    return (
        f"{counted(len(others), 'stay')} to review: coded before with another model, CIM-10 table or rules file "
        "or with other options, and not coded again. For proposals of the present ones, choose another --out."
    )


def _same_model(coded: Row, versions: Row) -> bool:
    return _without_calibration(coded.get("versions") or {}) == _without_calibration(versions)


def _without_calibration(versions: Row) -> Row:
    return {name: value for name, value in versions.items() if name != "calibrated"}


def explain_new(choice: EngineChoice, export: Mapping[Key, Any], journal: Journal) -> None:
    """Find the sentences that support the codes of stays to review, unless the journal has them, by their places."""
    to_do = [key for key in waiting(export, journal) if key not in journal.explained]
    if not to_do:
        return
    assert choice.folder is not None, "checked by the command"
    from utils.engines.evidence import EvidenceFinder  # imports torch
    from utils.explain_icd10 import explain

    print(f"Finding the evidence of {counted(len(to_do), 'stay')} ...", flush=True)
    finder = EvidenceFinder(choice.folder)
    for key in to_do:
        try:
            codes = explain(finder, export[key], journal.coded[key])["codes"]
        except SkippedRowError:  # codes that are not one answer
            codes = []
        places = [[_without_text(row) for row in code["evidence"]] for code in codes]
        found = [{"code": code["code"], "evidence": rows} for code, rows in zip(codes, places)]
        journal.append(EXPLAINED, key, {"codes": found})


def _without_text(sentence: Row) -> Row:
    return {name: value for name, value in sentence.items() if name != "sentence"}


def _with_evidence(key: Key, text: str, journal: Journal) -> list[Row]:
    """Return the codes of a stay, with the sentences that the journal has by their places in the note."""
    places = {code["code"]: code["evidence"] for code in journal.explained.get(key, {"codes": []})["codes"]}
    return [
        code
        | {"evidence": [row | {"sentence": text[row["start"] : row["end"]]} for row in places.get(code["code"], ())]}
        for code in journal.proposal(key)["codes"]
    ]


def to_review(export: Mapping[Key, Any], journal: Journal) -> list[StayToReview]:
    """Return the stays of the export that are coded and not reviewed, the least sure main diagnosis first."""
    stays = []
    for key in waiting(export, journal):
        coded = journal.proposal(key)
        text = note_of(export[key].messages)
        items = proposals(_with_evidence(key, text, journal))
        decision, reason = coded.get("decision") or "", coded.get("reason") or ""
        broken = tuple(coded.get("rules", ()))
        stays.append(StayToReview(*key, text, doubt(items), items, decision=decision, reason=reason, broken=broken))
    return sorted(stays, key=lambda found: (-found.priority, found.stay))


def _quoted(item: Item) -> str:
    return " | ".join(sentence.text for sentence in item.evidence)


def worklist_csv(stays: Iterable[StayToReview]) -> str:
    """Return the lines of the worklist; a stay without a code has one, too."""
    buffer = io.StringIO()
    writer = CsvWriter(buffer, COLUMNS)
    for found in stays:
        about = (found.stay, found.note, found.decision, found.reason, ", ".join(found.broken))
        for item in found.items:
            writer.write(*about, item.role, item.proposed, item.label, item.confidence, _quoted(item))
        if not found.items:
            writer.write(*about, *[""] * (len(COLUMNS) - len(about)))
    return buffer.getvalue()


def _page(
    stays: Sequence[StayToReview], export: Mapping[Key, Any], journal: Journal, choice: EngineChoice, table: Cim10Table
) -> str:
    from utils.reports.review_page import WORKLIST as KIND
    from utils.reports.review_page import review_page  # loads matplotlib and jinja2

    reviewed = len(export.keys() & journal.reviewed.keys())
    about = {"Model": choice.model, "Stays of the export": f"{len(export):,}, {reviewed:,} of them reviewed"}
    titles = {name: f"{name}: {rule.title} ({rule.reference})" for name, rule in choice.rules.rules.items()}
    shown = [found._replace(broken=tuple(titles.get(name, name) for name in found.broken)) for found in stays]
    return review_page("Stays to review", KIND, shown, about, table)


def _drift(journal: Journal, options: argparse.Namespace, known: Mapping[str, float], table: Cim10Table) -> str:
    """Return the page that compares the weeks of the journal with the training stays.

    Raises:
        UserError: the training rows cannot be read.
    """
    from utils.reports.drift_page import drift_page  # loads matplotlib and jinja2

    trained = read_gold(options.train).values()
    diagnoses = [coding.diagnoses for coding in trained]
    mains = [next((item.code for item in found if item.role == "DP"), None) for found in diagnoses]
    training = Training.of((dp, [item.code for item in found]) for dp, found in zip(mains, diagnoses))
    stays = coded_once(journal)
    about = {"Journal": str(options.out / JOURNAL), "Training": str(options.train)}
    return drift_page(by_week(stays, training), reference(training, known), shifts(stays, training), about, table)


def take_reviews(reviews: Mapping[Key, Review], journal: Journal) -> int:
    """Append reviews to the journal, except those that it has; return the number of new ones.

    Raises:
        UserError: a review is of a stay or a note that the journal does not have, or not of the codes proposed for it.
    """
    if unknown := [key for key in reviews if key not in journal.coded]:
        stay, note = unknown[0]
        raise UserError(
            f"Decisions on {counted(len(unknown), 'stay')} that {JOURNAL} does not have with this note (stay {stay!r}, "
            f"note {note!r}): give the decisions of this folder's page, as it downloaded them. A spreadsheet that "
            "saves them changes identifiers: 000121 becomes 121."
        )
    for key, review in reviews.items():
        _require_whole(key, review, journal.coded[key])
    new = {}
    for key, review in reviews.items():
        facts, known = review.facts(), journal.reviewed.get(key, {})
        if any(known.get(name) != value for name, value in facts.items()):
            new[key] = facts
    for key, facts in new.items():
        journal.append(REVIEWED, key, facts)
    return len(new)


def _require_whole(key: Key, review: Review, coded: Row) -> None:
    """Raise UserError unless a review has one decision on each proposed code: a lost line would drop its code."""
    proposed = Counter((code["role"] or "", "", plain_code(code["code"])) for code in coded["codes"])
    decided = Counter(found.subject for found in review.decisions if found.decision != ADDED)
    if decided != proposed:
        found, expected = (
            ", ".join(sorted(" ".join(filter(None, subject)) for subject in subjects)) or "none"
            for subjects in (decided, proposed)
        )
        raise UserError(
            f"Decisions on stay {key.stay!r}, note {key.note!r}: found decisions on {found}; expected one on each of "
            f"{expected}. Give the file as the page downloaded it."
        )


def _take_decisions(
    options: argparse.Namespace, journal: Journal, export: Mapping[Key, Any], table: Cim10Table, rules: RuleSet
) -> None:
    """Take the files of decisions into the journal and into the corrections, and print what they are."""
    given = read_reviews(options.decisions, options.encoding, table)
    reviews = {key: found for key, found in given.items() if not _is_outdated(found, journal.reviewed.get(key))}
    new = take_reviews(reviews, journal)
    print(f"{counted(new, 'new review')} of {counted(len(reviews), 'stay')}:")
    print(*describe_counts(count_decisions(review.decisions for review in reviews.values())), sep="\n")
    if outdated := len(given) - len(reviews):
        print(f"warning: {counted(outdated, 'review')} not taken: {JOURNAL} has a later one of the same note")
    # Of a stay that was reviewed with two notes, the codes are those of the export's note.
    codes = {key.stay: final_codes(reviews[key].decisions) for key in sorted(reviews, key=lambda key: key in export)}
    notes = {key.stay: note_of(prompt.messages) for key, prompt in export.items() if key in reviews}
    print(add_corrections(options.out / CORRECTIONS, codes, notes, table, rules))


def _is_outdated(review: Review, known: Row | None) -> bool:
    return known is not None and is_earlier(review.time, str(known.get("reviewed_at")))


def _require_own_folder(out: Path) -> None:
    """Raise UserError if the folder has files with our names that are not ours."""
    foreign = [name for name in (WORKLIST, PAGE, CORRECTIONS, DRIFT) if (out / name).exists()]
    if foreign and not (out / JOURNAL).exists():
        raise UserError(f"{out} has {', '.join(foreign)} but no {JOURNAL}: choose another --out.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=Path, required=True, metavar="EXPORT", help=f"this week's notes ({FILE_TYPES})")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the worklist, the same every week")
    parser.add_argument("--cim10", type=Path, required=True, metavar="TABLE", help="allow only codes of this table")
    parser.add_argument("--evidence", action="store_true", help="find the sentences that support each code")
    parser.add_argument("--decisions", type=Path, nargs="+", default=[], metavar="CSV", help="of the review page")
    parser.add_argument("--train", type=Path, metavar="JSONL", help="the rows that the model was trained on")
    add_encoding_option(parser)
    add_coding_options(parser)
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    if options.evidence and options.engine != "local":
        raise UserError(f"--evidence is for --engine local, which scores answers; found {options.engine}.")
    choice = parse_coding_engine(options)
    table = choice.table
    assert table is not None, "--cim10 is required"
    from utils.engines.answer_file import (  # imports mistral_common
        LEFT_OUT_SUFFIX,
        Answered,
        describe_left_out,
        report_answered,
        save_left_out,
    )
    from utils.engines.marking import open_marker
    from utils.engines.prompts import read_prompts

    marker = open_marker(choice, options.calibration, options.auto)
    worklist = options.out / WORKLIST
    listed = worklist.with_suffix(LEFT_OUT_SUFFIX)
    outputs = [options.out / name for name in (JOURNAL, WORKLIST, PAGE, CORRECTIONS, DRIFT)]
    require_own_names([*outputs, listed], [options.stays, options.cim10, options.train, *options.decisions])
    _require_own_folder(options.out)
    prompts, left_out = read_prompts(options.stays, options.encoding, read_mapping(options.columns), numbered=False)
    export = {Key(prompt.id, note_hash(note_of(prompt.messages))): prompt for prompt in prompts}
    versions = {"checkpoint": choice.model, **choice.identity(), "calibrated": marker.record()["calibrated"]}
    versions = {name: value for name, value in versions.items() if value is not None}
    with open_journal(options.out / JOURNAL) as journal:
        for path in (*outputs, listed):
            remove_temporaries(path)  # they may quote notes
        if options.decisions:
            _take_decisions(options, journal, export, table, choice.rules)
        earlier = [key for key in export if key in journal.coded]
        left_out += code_new(choice, marker, export, journal, versions)
        mark_again(marker, earlier, journal, versions)
        if others := coded_otherwise(export, journal, versions):
            print(f"warning: {others}")
        if options.auto is not None and marker.decisions:
            print(marker.summary())
        if options.evidence:
            explain_new(choice, export, journal)
        stays = to_review(export, journal)
        save({worklist: worklist_csv(stays), options.out / PAGE: _page(stays, export, journal, choice, table)})
        if options.train and journal.coded:
            save({options.out / DRIFT: _drift(journal, options, marker.reference(), table)})
        save_left_out(left_out, listed)
        coded = export.keys() & journal.coded.keys()
    now = counted(len(coded) - len(earlier), "stay")
    summary = f"{now} coded now, {len(earlier):,} before; {len(stays):,} to review: {worklist}"
    without = {found.stay for found in left_out} - {key.stay for key in coded}
    report_answered(Answered(summary, describe_left_out(left_out, worklist), not without))


if __name__ == "__main__":
    run_cli(main)
