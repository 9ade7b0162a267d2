"""Find the sentences of the notes that support predicted codes.

`python -m utils.explain_icd10 --run RUN_DIR --notes N.jsonl --predictions P.jsonl --out E.jsonl`

The notes are read as `utils.predict_icd10` reads them, and the predictions are its jsonl. Each line of E.jsonl is a
line of P.jsonl whose codes have `evidence`: up to --most sentences without which the model finds the code less likely,
the most important first, each with its document and date, `start` and `end` in the note, `drop` (of the natural
logarithm of the code's probability) and `marks`: "negation", "family" or "past" where the sentence has such a cue next
to this diagnosis.

The model runs once per sentence. After an interruption, the same command continues. E.jsonl quotes notes: only its
owner can read it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.cli import add_step_option, run_cli
from finetune.run_dir import find_checkpoint
from model.atomic import owner_only
from model.errors import UserError
from model.wording import counted
from utils.engines.choice import fingerprint, sha256
from utils.icd10.answers import Diagnosis, build_answer, parse_answer
from utils.icd10.mapping import read_mapping
from utils.icd10.predictions import origin_path
from utils.tables.encodings import AUTO
from utils.tables.jsonl import Row, SkippedRowError, file_errors, read_journal, require_own_names, save
from utils.tables.read_table import FILE_TYPES, add_encoding_option, has_fixed_columns
from utils.tables.rows_by_id import read_by_id

if TYPE_CHECKING:
    from utils.engines.evidence import EvidenceFinder
    from utils.engines.prompts import Prompt

MOST = 3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a run, a checkpoint or a model")
    parser.add_argument("--notes", type=Path, required=True, metavar="FILE", help=f"the notes ({FILE_TYPES})")
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="codes of the notes (jsonl)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="jsonl")
    parser.add_argument("--most", type=int, default=MOST, help="sentences per code (default: %(default)s)")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="computed at once (default: %(default)s)")
    parser.add_argument("--columns", metavar="MAPPING", help="FIELD=COLUMN,... or a YAML file")
    add_encoding_option(parser)
    add_step_option(parser)
    return parser.parse_args()


def explain(finder: "EvidenceFinder", prompt: "Prompt", row: Row, most: int = MOST) -> Row:
    """Return a row of predictions with the evidence of each code.

    Raises:
        SkippedRowError: the codes are not those of one answer, or the note cannot be encoded.
    """
    from utils.engines.evidence import supporting

    diagnoses = [Diagnosis(item.get("role"), item["code"], item.get("label") or "") for item in row["codes"]]
    answer = row.get("answer")
    if not isinstance(answer, str) or parse_answer(answer) != diagnoses:  # edited
        try:
            answer = build_answer(diagnoses)
        except ValueError:
            raise SkippedRowError("the codes are not one DP, at most one DR and DAS") from None
    effects = finder.effects(prompt, answer, diagnoses)
    codes = [
        item | {"evidence": supporting(effects, prompt, index, diagnoses[index].label, most)}
        for index, item in enumerate(row["codes"])
    ]
    return row | {"codes": codes}


def main() -> None:
    options = _arguments()
    if options.most < 1 or options.batch_tokens < 1:
        raise UserError("--most and --batch_tokens must be at least 1.")
    if options.out.suffix != ".jsonl":
        raise UserError(f"{options.out}: expected a name that ends in .jsonl.")
    if has_fixed_columns(options.predictions):
        raise UserError(
            f"{options.predictions}: expected the jsonl that utils.predict_icd10 wrote; that of a csv is next to it, "
            f"{options.predictions.with_suffix('.jsonl').name}."
        )
    inputs = [options.notes, options.predictions]
    require_own_names([options.out, origin_path(options.out)], [*inputs, origin_path(options.predictions)])
    checkpoint = find_checkpoint(options.run, options.step)
    from utils.engines.answer_file import require_same_origin  # imports mistral_common
    from utils.engines.prompts import read_prompts

    prompts, _ = read_prompts(options.notes, options.encoding or AUTO, read_mapping(options.columns))
    rows = read_by_id(options.predictions, _predicted)
    identity = {"run": fingerprint(checkpoint), "most": options.most}
    identity |= {name: sha256(path.read_bytes()) for name, path in zip(("notes", "predictions"), inputs)}
    to_do = {prompt.id: prompt for prompt in prompts if prompt.id in rows}
    if not to_do:
        raise UserError(f"{options.predictions} has no id of {options.notes}: give the notes that were answered.")
    with file_errors():
        if done := read_journal(options.out):
            require_same_origin(options.out, identity)
        save({origin_path(options.out): json.dumps(identity, indent=1)})
        skipped = _write(checkpoint, options, [each for name, each in to_do.items() if name not in done], rows)
    print(f"Evidence for the codes of {counted(len(to_do) - len(skipped), 'stay')}: {options.out}")
    if skipped:
        reasons = ", ".join(dict.fromkeys(skip.reason for skip in skipped.values()))
        print(f"warning: {counted(len(skipped), 'stay')} without ({', '.join(list(skipped)[:5])}): {reasons}")


def _predicted(row: Mapping[str, Any]) -> Row:
    codes = row.get("codes")
    if not isinstance(codes, list) or not all(map(_is_code, codes)):
        raise SkippedRowError("no `codes`; expected a line of utils.predict_icd10")
    return dict(row)


def _is_code(item: Any) -> bool:
    texts = (item.get("code"), item.get("label") or "") if isinstance(item, dict) else (None,)
    return all(isinstance(text, str) for text in texts)


def _write(
    checkpoint: Path, options: argparse.Namespace, prompts: Sequence["Prompt"], rows: Mapping[str, Row]
) -> dict[str, SkippedRowError]:
    """Append the rows with evidence to the output as they are found; return the stays that have none."""
    if not prompts:
        return {}
    from utils.engines.evidence import EvidenceFinder

    finder = EvidenceFinder(checkpoint, options.batch_tokens)
    print(f"Explaining {counted(len(prompts), 'stay')} ...", file=sys.stderr, flush=True)
    skipped = {}
    with open(options.out, "a", encoding="utf-8", opener=owner_only) as file:
        for prompt in tqdm(prompts, unit="stay", disable=None):
            try:
                row = {"id": prompt.id} | explain(finder, prompt, rows[prompt.id], options.most)
            except SkippedRowError as skip:
                skipped[prompt.id] = skip
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    return skipped


if __name__ == "__main__":
    run_cli(main)
