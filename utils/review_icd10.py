"""Second reading: compare coded stays with a model's predictions, and review where they disagree.

`python -m utils.review_icd10 --coded CODES --predictions P --out FOLDER [--notes NOTES] [--cim10 TABLE]`

CODES is a table of codes, one DP per stay, as for `utils.evaluate_icd10`; P is what `utils.predict_icd10` wrote for the
same stays. FOLDER gets

    disagreements.csv   a line per correction that the model proposes, by confidence x effect: the DP first, then DAS by
                        their level in --complications
    review.html         the same stays, with their notes if --notes are given, to accept, refuse and replace corrections
                        in a browser; it downloads decisions.csv

Both have the specialty, the month of discharge and the coder where CODES does; --by names other columns.
`--decisions decisions.csv` counts what was accepted and refused, and adds the reviewed stays to corrections.jsonl, rows
to train on, which leave the page; it needs --notes and --cim10.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.cli import run_cli
from model.errors import UserError
from model.wording import counted
from utils.icd10.codes import ROLES, Cim10Table
from utils.icd10.decisions import (
    ACCEPTED,
    Review,
    add_corrections,
    count_decisions,
    describe_counts,
    final_codes,
    plain_code,
    read_reviews,
)
from utils.icd10.journal import JOURNAL, Key, note_hash
from utils.icd10.mapping import read_mapping
from utils.icd10.predictions import Prediction, read_gold, read_predictions
from utils.icd10.prompts import note_of
from utils.icd10.review_items import Evidence, Item, StayToReview, evidence_of
from utils.icd10.rules import add_rules_option, parse_rules
from utils.icd10.second_reading import SecondReader, agreed, count_by_fact, read_complications, read_facts, score
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import Row, SkippedRowError, require_own_names, save
from utils.tables.read_table import FILE_TYPES, add_encoding_option, has_fixed_columns
from utils.tables.rows_by_id import match_ids, read_by_id

DISAGREEMENTS, PAGE, CORRECTIONS = "disagreements.csv", "review.html", "corrections.jsonl"
_COLUMNS = ("role", "coded", "proposed", "label", "confidence", "effect", "score")
_COUNTED = ("stays", "with a disagreement", *ROLES)


def compare(
    coded: Mapping[str, Prediction],
    predicted: Mapping[str, Prediction],
    reader: SecondReader,
    facts: Mapping[str, Mapping[str, str]],
    notes: Mapping[str, str],
    evidence: Mapping[str, Mapping[str, tuple[Evidence, ...]]],
) -> list[StayToReview]:
    """Return the stays on which coder and model disagree, by their most important disagreement."""
    stays = []
    for stay in coded.keys() & predicted.keys():
        quoted = evidence.get(stay, {})
        found = reader.disagreements(coded[stay], predicted[stay])
        items = [item._replace(evidence=quoted.get(item.proposed, ())) for item in found]
        if items:
            text = notes.get(stay, "")
            known = (agreed(coded[stay], items), predicted[stay].decision or "", "", facts.get(stay, {}))
            stays.append(StayToReview(stay, note_hash(text) if text else "", text, score(items[0]), items, *known))
    return sorted(stays, key=lambda found: (-found.priority, -found.items[0].effect, found.stay))


def disagreements_csv(stays: Sequence[StayToReview]) -> str:
    """Return a line per disagreement, by confidence x effect."""
    facts = sorted({name for found in stays for name in found.facts})
    lines: list[tuple[StayToReview, Item]] = [(found, item) for found in stays for item in found.items]
    buffer = io.StringIO()
    writer = CsvWriter(buffer, ("stay", *facts, *_COLUMNS))
    for found, item in sorted(lines, key=lambda line: (-score(line[1]), -line[1].effect, line[0].stay)):
        about = (found.stay, *(found.facts.get(name, "") for name in facts))
        what = (item.role, item.coded, item.proposed, item.label, item.confidence, item.effect)
        writer.write(*about, *what, "" if item.confidence is None else round(score(item), 4))
    return buffer.getvalue()


def read_evidence(predictions: Path) -> dict[str, dict[str, tuple[Evidence, ...]]]:
    """Return the sentences that support each code of each stay, where `utils.explain_icd10` wrote the predictions."""
    return {} if has_fixed_columns(predictions) else read_by_id(predictions, _evidence_row)


def _evidence_row(row: Row) -> dict[str, tuple[Evidence, ...]]:
    codes = row.get("codes")
    try:
        return {plain_code(item["code"]): evidence_of(item) for item in codes or () if isinstance(item, dict)}
    except (AttributeError, KeyError, TypeError):
        raise SkippedRowError("`evidence` that is not a list of sentences as utils.explain_icd10 writes them") from None


def _read_notes(options: argparse.Namespace) -> dict[str, str]:
    if options.notes is None:
        return {}
    from utils.engines.prompts import read_prompts  # imports mistral_common

    prompts, _ = read_prompts(options.notes, options.encoding, read_mapping(options.columns))
    return {prompt.id: note_of(prompt.messages) for prompt in prompts}


def _require_same_codes(reviews: Mapping[Key, Review], coded: Mapping[str, Prediction], path: Path) -> None:
    """Raise UserError if a decision is about a stay, or a code of it, that the coder's table does not have."""
    for key, review in reviews.items():
        if key.stay not in coded:
            raise UserError(f"--decisions: stay {key.stay!r} is not in {path}; give the file of its page.")
        codes = {(item.role or "DAS", item.code) for item in coded[key.stay].diagnoses}
        for found in review.decisions:
            if found.coded and (found.role, found.coded) not in codes:
                raise UserError(
                    f"--decisions: stay {key.stay!r} has no {found.role} {found.coded} in {path}; give the file of a "
                    "page of these codes."
                )


def _take_decisions(
    options: argparse.Namespace, coded: Mapping[str, Prediction], notes: Mapping[str, str], table: Cim10Table
) -> set[str]:
    """Print what was decided, write the reviewed stays as rows to train on, and return those with the same note."""
    reviews = read_reviews(options.decisions, options.encoding, table)
    _require_same_codes(reviews, coded, options.coded)
    counts = count_decisions(review.decisions for review in reviews.values())
    corrected = sum(of_role[ACCEPTED] for of_role in counts.values())
    print(f"Decisions on {counted(len(reviews), 'stay')}, {counted(corrected, 'correction')} accepted:")
    print(*describe_counts(counts), sep="\n")
    reviewed = {key: text for key in reviews if note_hash(text := notes.get(key.stay, "")) == key.note}
    # Of a stay that was reviewed with two notes, the codes are those of the present note.
    ordered = sorted(reviews, key=lambda key: key in reviewed)
    codes = {key.stay: final_codes(reviews[key].decisions, coded[key.stay].diagnoses) for key in ordered}
    texts = {key.stay: text for key, text in reviewed.items()}
    print(add_corrections(options.out / CORRECTIONS, codes, texts, table, parse_rules(options.rules)))
    return set(texts)


def _page(
    options: argparse.Namespace,
    stays: Sequence[StayToReview],
    reviewed: set[str],
    facts: Mapping[str, Mapping[str, str]],
    table: Cim10Table | None,
) -> str:
    from utils.reports.review_page import SECOND_READING, review_page  # loads matplotlib and jinja2

    about = {"Coded": str(options.coded), "Predictions": str(options.predictions)}
    shown = [found for found in stays if found.stay not in reviewed]
    done = f", {len(stays) - len(shown):,} of them reviewed" if reviewed else ""
    about |= {"Stays": f"{len(facts):,} compared, {len(stays):,} with a disagreement{done}"}
    groups = {f"By {fact}": (("", *_COUNTED), rows) for fact, rows in count_by_fact(stays, facts).items()}
    return review_page("Second reading", SECOND_READING, shown, about, table, groups)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coded", type=Path, required=True, metavar="CODES", help=f"the coders' codes ({FILE_TYPES})")
    parser.add_argument("--predictions", type=Path, required=True, metavar="P", help="of utils.predict_icd10")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--notes", type=Path, metavar="NOTES", help="to show on the page, and to train on")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="labels, and codes to choose from")
    add_rules_option(parser)
    parser.add_argument("--complications", type=Path, metavar="LIST", help="table of codes and levels 1 to 4 (CMA)")
    parser.add_argument("--by", nargs="+", default=[], metavar="COLUMN", help="count by these columns of CODES")
    parser.add_argument("--decisions", type=Path, nargs="+", default=[], metavar="CSV", help="of the review page")
    parser.add_argument("--columns", metavar="MAPPING", help="FIELD=COLUMN,... or a YAML file")
    add_encoding_option(parser)
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    if options.decisions and not (options.notes and options.cim10):
        raise UserError("--decisions needs --notes and --cim10: rows to train on have the note and the labels.")
    outputs = [options.out / name for name in (DISAGREEMENTS, PAGE, CORRECTIONS)]
    inputs = [options.coded, options.predictions, options.notes, options.cim10, options.rules, options.complications]
    require_own_names(outputs, [*inputs, *options.decisions])
    if (options.out / JOURNAL).exists():
        raise UserError(f"{options.out} is a worklist of utils.code_stays (it has {JOURNAL}): choose another --out.")
    table = Cim10Table.from_file(options.cim10) if options.cim10 else None
    complications = read_complications(options.complications, options.encoding) if options.complications else {}
    mapping = read_mapping(options.columns)
    coded = read_gold(options.coded, options.encoding, mapping)
    predicted = match_ids(coded, read_predictions(options.predictions, options.encoding))
    notes = _read_notes(options)
    known = read_facts(options.coded, options.encoding, mapping, options.by)
    facts = {stay: known.get(stay, {}) for stay in coded if stay in predicted}
    reviewed: set[str] = set()
    if options.decisions:
        assert table is not None, "checked above"
        reviewed = _take_decisions(options, coded, notes, table)
    stays = compare(
        coded, predicted, SecondReader(complications, table), facts, notes, read_evidence(options.predictions)
    )
    save({outputs[0]: disagreements_csv(stays), outputs[1]: _page(options, stays, reviewed, facts, table)})
    print(f"{counted(len(facts), 'stay')} compared, {len(stays):,} with a disagreement: {outputs[1]} and {outputs[0]}")
    roles = [item.role for found in stays for item in found.items]
    print("  " + ", ".join(f"{role} {roles.count(role):,}" for role in ROLES))
    if without := len(coded) - len(facts):
        print(f"warning: {counted(without, 'stay')} without a prediction, not compared")


if __name__ == "__main__":
    run_cli(main)
