"""Score predicted codes against gold codes.

`python -m utils.evaluate_icd10 --gold G (--predictions P | --run RUN_DIR) --json OUT.json`

Gold and predictions are jsonl or tables (csv, tsv, parquet, xlsx). Rows of jsonl: `id`, and `messages` whose last one,
the assistant's, contains the codes, or `answer`, or `codes` as `"I10"` or `{"role": "DAS", "code": "I10"}`; `codes`,
which a person may have edited, take precedence over `answer`. Tables: codes as `utils.prepare_icd10_data` reads them
and `utils.predict_icd10` writes them. Rows of jsonl without id are identified by their line number, from 1;
predictions may count from 0. A stay without a prediction counts as no codes.

Predictions with a `confidence` per code are scored on it, too: calibration, ranking, coding curve.

Options: `--cim10 TABLE` counts invalid and forbidden codes, `--train TRAIN.jsonl` groups the scores by frequency in the
training data, `--second F` gives the agreement with a second coder, `--cophe` depth-aware scores, `--html F` writes a
page with charts, `--csv F` a line per stay. Scores and keys of the JSON file: docs/evaluation.md.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from finetune.cli import run_cli
from finetune.next_commands import next_commands
from model.errors import UserError
from model.wording import counted
from utils.engines.choice import EngineChoice
from utils.icd10.agreement import agreement
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import Cim10Table, category
from utils.icd10.confidence_scores import confidence_scores
from utils.icd10.headline import headline, headline_ratios, labels, patient_index, resample
from utils.icd10.mapping import read_mapping
from utils.icd10.metrics import depth_aware, evaluate_codings, rule_rates
from utils.icd10.predictions import (
    Prediction,
    describe_origin,
    origin_path,
    read_gold,
    read_predictions,
    require_columns,
)
from utils.icd10.roles import parse_roles
from utils.icd10.rules import RuleSet, add_rules_option, guide_rules, parse_rules
from utils.icd10.rules_file import TO_CHECK
from utils.reports.evaluation_page import LEVEL_NAMES, html_page, optional_tables, score_rows, uncertainty, warnings
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import require_own_names, save
from utils.tables.read_table import add_encoding_option
from utils.tables.rows_by_id import match_ids

MAX_ERRORS = 15  # codes listed among the most often missed and added
STAY_FACTS = ("specialty", "year", "documents", "words")
UNKNOWN = "unknown"

_WORD_BANDS = (250, 500, 1000, 2000)
_EXAMPLES = 3  # ids that a message quotes


def evaluate(
    gold: Mapping[str, Prediction],
    predictions: Mapping[str, Prediction],
    table: Cim10Table | None = None,
    training: Sequence[Sequence[Diagnosis]] | None = None,
    seed: int = 0,
    second: Mapping[str, Prediction] | None = None,
    with_depth: bool = False,
    rules: RuleSet | None = None,
) -> dict[str, Any]:
    """Return the scores of predictions; docs/evaluation.md documents the keys.

    Args:
        gold: diagnoses by stay; their patients, if known, are what the bootstrap draws.
        predictions: predictions by stay; a missing one counts as no codes, an unknown id is ignored.
        table: needed for broken rules (empty without it) and the labels of `errors`.
        training: diagnoses of the training stays, for the frequency bands; None for the frequencies in gold.
        seed: seed of the bootstrap.
        second: diagnoses by stay of a second coder; None leaves `second_coder` out.
        with_depth: whether to add `cophe`, the depth-aware scores.
        rules: coding rules; None for those of the guide.
    """
    given = [predictions.get(stay, Prediction([])) for stay in gold]
    expected = [stay.diagnoses for stay in gold.values()]
    codings = [prediction.diagnoses for prediction in given]
    patients = [stay.facts.get("patient") for stay in gold.values()]
    weights = resample(len(gold), seed=seed, patient=patient_index(patients))
    optional: dict[str, Any] = {}
    if with_depth:
        optional["cophe"] = depth_aware(expected, codings, weights)
    if second is not None:
        both = {stay: coding for stay, coding in gold.items() if stay in second}
        optional["second_coder"] = agreement(
            {stay: coding.diagnoses for stay, coding in both.items()},
            {stay: second[stay].diagnoses for stay in both},
            [coding.facts.get("patient") for coding in both.values()],
            seed,
        )
    return {
        "counts": _counts(gold, predictions, given, training),
        "headline": headline(expected, codings, weights),
        **evaluate_codings(expected, codings, training, seed=seed, patients=patients),
        **optional,
        "confidence": confidence_scores(gold, predictions, weights),
        "by_stay": _by_stay(gold, codings, weights),
        **_rule_counts(gold, codings, table, rules or guide_rules()),
        "errors": _most_frequent_errors(expected, codings, table),
        "per_stay": _per_stay(gold, predictions),
    }


def _rule_counts(
    gold: Mapping[str, Prediction],
    codings: Sequence[Sequence[Diagnosis]],
    table: Cim10Table | None,
    rules: RuleSet,
) -> dict[str, Any]:
    """Return `rates` and `to_check` of the predictions, `gold_rates` and `gold_to_check`; empty without a table.

    `rules` has the version of the rules, and the title, with its reference, of each.
    """
    titles = {name: f"{rule.title} ({rule.reference})" for name, rule in rules.rules.items()}
    found: dict[str, Any] = {"rules": {"version": rules.version, "titles": titles}}
    to_check = rules.of_severity(TO_CHECK)
    facts = [stay.facts for stay in gold.values()]
    for prefix, coded in (("", codings), ("gold_", [stay.diagnoses for stay in gold.values()])):
        rates = rule_rates(coded, table, facts, rules) if table else {}
        found[f"{prefix}rates"] = {name: rate for name, rate in rates.items() if name not in to_check}
        found[f"{prefix}to_check"] = {name: rate for name, rate in rates.items() if name in to_check}
    return found


def _counts(
    gold: Mapping[str, Prediction],
    predictions: Mapping[str, Prediction],
    given: Sequence[Prediction],
    training: Sequence[Sequence[Diagnosis]] | None,
) -> dict[str, Any]:
    missing = [stay for stay in gold if stay not in predictions]
    known = [stay.facts["patient"] for stay in gold.values() if "patient" in stay.facts]
    return {
        "notes": len(gold),
        "patients": len(set(known)) if known else None,
        "notes_without_patient": len(gold) - len(known),
        "training_notes": None if training is None else len(training),
        "gold_codes_without_role": sum(item.role is None for stay in gold.values() for item in stay.diagnoses),
        "missing_predictions": len(missing),
        "answers_without_code": sum(not prediction.diagnoses for prediction in given) - len(missing),
        "edited_predictions": sum(prediction.edited for prediction in given),
        "codes_without_role": sum(item.role is None for prediction in given for item in prediction.diagnoses),
        "repeated_codes": sum(prediction.repeated for prediction in given),
        "unexpected_predictions": sum(stay not in gold for stay in predictions),
        "missing_ids": missing,
        "unexpected_ids": [stay for stay in predictions if stay not in gold],
    }


def _by_stay(
    gold: Mapping[str, Prediction], codings: Sequence[Sequence[Diagnosis]], weights: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return the headline of each group of stays, by each fact that gold has, with the number of `notes`."""
    tables: dict[str, dict[str, Any]] = {}
    for fact in STAY_FACTS:
        groups: dict[str, list[int]] = {}
        for index, stay in enumerate(gold.values()):
            groups.setdefault(_group(fact, stay.facts.get(fact)), []).append(index)
        if groups.keys() == {UNKNOWN}:
            continue
        stays = list(gold.values())
        tables[fact] = {
            name: {
                "notes": len(chosen),
                **headline(
                    [stays[index].diagnoses for index in chosen],
                    [codings[index] for index in chosen],
                    weights[:, chosen],
                ),
            }
            for name, chosen in sorted(groups.items(), key=lambda item: _natural_key(item[0]))
        }
    return tables


def _group(fact: str, value: str | None) -> str:
    if value is None:
        return UNKNOWN
    if fact != "words":
        return value
    end = next((end for end in _WORD_BANDS if int(value) <= end), None)
    return f"up to {end}" if end else f"more than {_WORD_BANDS[-1]}"


def _natural_key(name: str) -> tuple[bool, bool, int, str]:
    """Sort by the number in a name, if any; UNKNOWN is last."""
    digits = "".join(filter(str.isdecimal, name))
    return name == UNKNOWN, name.startswith("more"), int(digits or 0), name


def _per_stay(gold: Mapping[str, Prediction], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """Return what a paired comparison needs: sums of each stay in the order of the ids, without ids and codes."""
    stays = sorted(gold)
    content = json.dumps([(stay, sorted(labels(gold[stay].diagnoses))) for stay in stays])
    ratios = headline_ratios(
        [gold[stay].diagnoses for stay in stays],
        [predictions[stay].diagnoses if stay in predictions else [] for stay in stays],
    )
    patients = [gold[stay].facts.get("patient") for stay in stays]
    return {
        "gold_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "patient": patient_index(patients).tolist() if any(patients) else None,
        "scores": {name: [part.tolist() for part in ratio] for name, ratio in ratios.items()},
    }


def _most_frequent_errors(
    gold: Sequence[Sequence[Diagnosis]], predicted: Sequence[Sequence[Diagnosis]], table: Cim10Table | None
) -> dict[str, list[dict[str, Any]]]:
    counts: dict[str, Counter[str]] = {"missed": Counter(), "added": Counter()}
    for expected, given in zip(gold, predicted, strict=True):
        missed, added = _differences(expected, given)
        counts["missed"].update(missed)
        counts["added"].update(added)
    return {
        kind: [
            {"code": code, "label": (table and table.label(code)) or "", "notes": notes}
            for code, notes in found.most_common(MAX_ERRORS)
        ]
        for kind, found in counts.items()
    }


def _differences(gold: Sequence[Diagnosis], predicted: Sequence[Diagnosis]) -> tuple[list[str], list[str]]:
    """Return the missed codes (in gold only) and the added codes (predicted only), in their order."""
    expected, given = (dict.fromkeys(item.code for item in items) for items in (gold, predicted))
    return [code for code in expected if code not in given], [code for code in given if code not in expected]


def note_rows(
    gold: Mapping[str, Prediction],
    predictions: Mapping[str, Prediction],
    table: Cim10Table | None = None,
    rules: RuleSet | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the codes and scores of each gold note, without its text; with a table, the rules that they break, too."""
    rules = rules or guide_rules()
    for note_id, stay in gold.items():
        expected = stay.diagnoses
        given = predictions[note_id].diagnoses if note_id in predictions else []
        missed, added = _differences(expected, given)
        codes, found = {item.code for item in expected}, {item.code for item in given}
        precision, recall, f1 = _note_scores(codes, found)
        _, _, f1_category = _note_scores({category(code) for code in codes}, {category(code) for code in found})
        ratios = headline_ratios([expected], [given])
        in_roles = {name: None if ratio.score is None else round(ratio.score, 4) for name, ratio in ratios.items()}
        yield {
            "id": note_id,
            "gold": _with_roles(expected),
            "predicted": _with_roles(given),
            "missed": " ".join(missed),
            "added": " ".join(added),
            "dp_correct": in_roles["dp_accuracy"],
            "dp_category_correct": in_roles["dp_category_accuracy"],
            "role_f1": in_roles["role_micro_f1"],
            "dr_f1": in_roles["dr_f1"],
            "das_f1": in_roles["das_f1"],
            "role_exact_match": in_roles["role_exact_match"],
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1_category": f1_category,
            "exact_match": int(codes == found),
            **(
                {
                    f"{side}rules": _broken(coding, stay, table, rules)
                    for side, coding in (("gold_", expected), ("", given))
                }
                if table
                else {}
            ),
        }


def _broken(coding: Sequence[Diagnosis], stay: Prediction, table: Cim10Table, rules: RuleSet) -> str:
    """Return the names of the rules that a coding of a stay breaks."""
    return " ".join(name for name, rate in rule_rates([coding], table, [stay.facts], rules).items() if rate["count"])


def _with_roles(diagnoses: Sequence[Diagnosis]) -> str:
    return " ".join(f"{item.role or '?'}:{item.code}" for item in diagnoses)


def _note_scores(gold: set[str], predicted: set[str]) -> tuple[float, ...]:
    """Return precision, recall and F1 of a note; `gold` is not empty."""
    correct = len(gold & predicted)
    scores = correct / max(1, len(predicted)), correct / len(gold), 2 * correct / (len(gold) + len(predicted))
    return tuple(round(score, 4) for score in scores)


def summarize(result: Mapping[str, Any]) -> str:
    """Return a table of the main scores, the tables of optional scores, and the warnings."""
    blocks = [uncertainty(result), _aligned([("", *LEVEL_NAMES.values()), *score_rows(result)])]
    for table in optional_tables(result):
        blocks += [f"{table['title']}:", _aligned([table["header"], *table["rows"]])]
    return "\n".join([*blocks, *warnings(result)])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = StringIO()
    first, *others = rows
    writer = CsvWriter(buffer, list(first))
    for row in (first, *others):
        writer.write(*row.values())
    return buffer.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", type=Path, required=True, metavar="FILE", help="instruct rows or codes (jsonl, csv)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", type=Path, metavar="FILE", help="answers or codes (jsonl, csv)")
    source.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run; its latest checkpoint answers --gold first")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="write all scores to this file")
    parser.add_argument("--html", type=Path, metavar="F", help="write a page with charts")
    parser.add_argument("--csv", type=Path, metavar="F", help="write one line per note")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="ATIH's table; count invalid and forbidden codes")
    add_rules_option(parser)
    parser.add_argument("--train", type=Path, metavar="FILE", help="training rows (jsonl), to score by code frequency")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    parser.add_argument("--second", type=Path, metavar="FILE", help="a second coder's codes (jsonl, csv): agreement")
    parser.add_argument("--cophe", action="store_true", help="add depth-aware scores, which count codes by category")
    parser.add_argument("--ignore_extra", action="store_true", help="leave out predictions of stays that gold lacks")
    parser.add_argument("--columns", metavar="MAPPING", help="of tables, as in utils.prepare_icd10_data: stay=NDA,...")
    parser.add_argument("--roles", metavar="STATUS=ROLE,...", help="DP, DR, DAS or ignore for other statuses of tables")
    add_encoding_option(parser)
    return parser.parse_args()


def require_same_ids(gold: Mapping[str, Any], predictions: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if both gold and predictions have ids that the other lacks: the same stay may have two names."""
    unknown = [stay for stay in predictions if stay not in gold]
    missing = [stay for stay in gold if stay not in predictions]
    if unknown and missing:
        shown, others = (", ".join(map(repr, ids[:_EXAMPLES])) for ids in (unknown, missing))
        given = counted(len(predictions), "prediction")
        lacking = counted(len(missing), "gold stay has", "gold stays have")
        raise UserError(
            f"{path}: {len(unknown):,} of {given} with an id that gold does not have, "
            f"such as {shown}, and {lacking} no prediction, such as {others}. Ids are compared as text: give both "
            "files the same ones, or --ignore_extra if these predictions are of other stays."
        )


def _json_text(result: Mapping[str, Any]) -> str:
    """Return the result as JSON, with lists of whole numbers in one line."""
    text = json.dumps(result, ensure_ascii=False, indent=2)
    return re.sub(r"\[\s+(?:\d+,\s+)*\d+\s+\]", lambda found: re.sub(r"\s+", "", found[0]), text) + "\n"


def main() -> None:
    args = _arguments()
    outputs = (args.json, args.html, args.csv)
    require_own_names(outputs, (args.gold, args.predictions, args.cim10, args.train, args.second, args.rules))
    rules = parse_rules(args.rules)
    if args.run:
        from utils.engines.answer_file import answers_to_gold  # imports mistral_common
        from utils.engines.marking import open_marker

        choice = EngineChoice(folder=args.run)
        args.predictions = answers_to_gold(choice, args.gold, marker=open_marker(choice))
    require_own_names(outputs, (args.predictions, origin_path(args.predictions)))
    table = Cim10Table.from_file(args.cim10) if args.cim10 else None
    training = [stay.diagnoses for stay in read_gold(args.train).values()] if args.train else None
    mapping = read_mapping(args.columns)
    mapping.roles.update(parse_roles(args.roles))
    require_columns(mapping, [path for path in (args.gold, args.predictions, args.second) if path], args.encoding)
    gold = read_gold(args.gold, args.encoding, mapping)
    predictions = match_ids(gold, read_predictions(args.predictions, args.encoding, mapping))
    second = match_ids(gold, read_predictions(args.second, args.encoding, mapping)) if args.second else None
    if not args.ignore_extra:
        require_same_ids(gold, predictions, args.predictions)
        require_same_ids(gold, second or gold, args.second)
    result = evaluate(gold, predictions, table, training, args.seed, second, args.cophe, rules)
    contents = {args.json: _json_text(result)}
    if args.html:
        about = {"Predictions": args.predictions.name, "Gold": args.gold.name, **describe_origin(args.predictions)}
        about |= {"Coding rules": rules.version} if table else {}
        contents[args.html] = html_page(result, about | {"Evaluated": f"{datetime.now():%Y-%m-%d %H:%M}"})
    if args.csv:
        contents[args.csv] = _csv_text(note_rows(gold, predictions, table, rules))
    save(contents)
    print(summarize(result))
    print(next_commands({"compare": ("utils.compare_icd10", "other=OTHER.json", f"this={args.json}")}))


if __name__ == "__main__":
    run_cli(main)
