"""Code notes with a trained model.

`python -m utils.predict_icd10 --run RUN_DIR --notes N.jsonl --out P.jsonl`

The rows of --notes are documents of stays, as for `utils.prepare_icd10_data`: those of a stay are joined in the order
of their dates, and coded once; `--columns` names the columns. Without a column of the stay, each row is one, with its
`id` or its number. Rows with `messages` are conversations, answered from their last question. Each line of P.jsonl is
`{"id", "answer", "codes"}` with codes as `[{"role", "code", "label"}]`; P.csv has one line per code. Rows without a
note are listed in P.left_out.csv, and the exit code is 1. After an interruption, the same command continues.
P.about.json records the model and the settings; answers of different models are not mixed.
"""

import argparse
from pathlib import Path

from finetune.cli import add_step_option, run_cli
from finetune.next_commands import next_commands
from model.errors import UserError
from utils.icd10.codes import Cim10Table
from utils.icd10.mapping import read_mapping
from utils.tables.read_table import FILE_TYPES, add_encoding_option


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a run, a checkpoint or a model")
    parser.add_argument("--notes", type=Path, required=True, metavar="FILE", help=f"notes or questions ({FILE_TYPES})")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="jsonl, or csv (written with a jsonl)")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="allow only codes of this CIM-10 table")
    parser.add_argument("--columns", metavar="MAPPING", help="FIELD=COLUMN,... or a YAML file")
    add_step_option(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="rows per batch (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, default=512, help="maximum answer length (default: %(default)s)")
    add_encoding_option(parser)
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    if options.batch_size < 1 or options.max_tokens < 1:
        raise UserError("--batch_size and --max_tokens must be at least 1.")
    table = Cim10Table.from_file(options.cim10) if options.cim10 else None
    from utils.models.predictor import predict_file  # imports torch

    answered = predict_file(
        options.run,
        options.notes,
        options.out,
        table,
        options.step,
        options.batch_size,
        options.max_tokens,
        options.encoding,
        read_mapping(options.columns),
    )
    print(answered.summary)
    if answered.warning and answered.complete:
        print(f"warning: {answered.warning}")
    elif answered.warning:
        raise UserError(answered.warning)
    scores = ("--json", options.out.with_suffix(".scores.json"), "--html", options.out.with_suffix(".scores.html"))
    evaluate = ("utils.evaluate_icd10", "--gold", "GOLD.jsonl", "--predictions", options.out, *scores)
    print(next_commands({"evaluate": evaluate}))


if __name__ == "__main__":
    run_cli(main)
