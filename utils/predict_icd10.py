"""Code notes with a trained model.

`python -m utils.predict_icd10 --run RUN_DIR --notes N.jsonl --out P.jsonl`

The rows of --notes are documents of stays, as for `utils.prepare_icd10_data`: those of a stay are joined in the order
of their dates, and coded once; `--columns` names the columns. Without a column of the stay, each row is one, with its
`id` or its number; sex and age, where the table has them, are for the rules. Rows with `messages` are conversations,
answered from their last question. Each line of P.jsonl is
`{"id", "answer", "codes"}` with codes as `[{"role", "code", "label"}]`; P.csv has one line per code. Rows without a
note are listed in P.left_out.csv, and the exit code is 1. After an interruption, the same command continues.
With `--cim10`, answers have codes of the table and break no forbidding rule (`--rules FILE`: your own) as far as that
can be decided while they are written; `rules` of a line are those that the answer breaks, or that ask to check it.
Codes have a `probability` and, after `utils.calibrate_icd10`, a calibrated `confidence`; `--auto 0.98` marks each stay
`auto` or `to_review`, so that 98 % of the main diagnoses of `auto` stays are right.
P.about.json records the model and the settings; answers of different models are not mixed.

`--shard 2/4` answers the second of four shares of the rows, into P.2of4.jsonl; `torchrun -m utils.predict_icd10` gives
each of its processes one. The same command without it collects the answers, and gives those that are missing.

`--engine` runs the model in something else than this project: transformers or vLLM on an export, or a server with
OpenAI's API, `--engine server --server http://127.0.0.1:8000/v1`.
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli
from finetune.next_commands import next_commands
from model.errors import UserError
from utils.engines.choice import add_coding_options, add_shard_option, parse_coding_engine
from utils.icd10.mapping import read_mapping
from utils.tables.read_table import FILE_TYPES, add_encoding_option, read_table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=Path, required=True, metavar="FILE", help=f"notes or questions ({FILE_TYPES})")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="jsonl, or csv (written with a jsonl)")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="allow only codes of this CIM-10 table")
    add_encoding_option(parser)
    add_shard_option(parser)
    add_coding_options(parser)
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    choice = parse_coding_engine(options)
    from utils.engines.answer_file import answer_file, report_answered  # imports mistral_common
    from utils.engines.marking import open_marker
    from utils.engines.shards import parse_shard

    shard = parse_shard(options.shard)
    if shard and options.auto is not None:
        raise UserError("--auto is for the command without --shard, which collects the answers.")
    marker = open_marker(choice, options.calibration, options.auto)
    mapping = read_mapping(options.columns)
    answered = answer_file(choice, options.notes, options.out, options.encoding, mapping, shard=shard, marker=marker)
    if options.auto is not None:
        print(marker.summary())
    report_answered(answered)
    if shard:
        print("Once all shards are done, the same command without --shard collects them.")
    else:
        print(next_commands({"evaluate": _evaluation(options)}))


def _evaluation(options: argparse.Namespace) -> list[str | Path]:
    """Return the command that scores the answers; its gold is the file of notes, if its first row has an answer."""
    first = next((row for _, row in read_table(options.notes, options.encoding)), None)
    messages = first.get("messages") if isinstance(first, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    answered = isinstance(last, dict) and last.get("role") == "assistant"
    command = ["utils.evaluate_icd10", "--gold", options.notes if answered else "GOLD.jsonl"]
    command += ["--predictions", options.out, *(("--cim10", options.cim10) if options.cim10 else ())]
    command += ["--rules", options.rules] if options.rules else []
    return [*command, *(part for kind in ("json", "html") for part in (f"--{kind}", _scores(options.out, kind)))]


def _scores(out: Path, kind: str) -> Path:
    return out.with_suffix(f".scores.{kind}")


if __name__ == "__main__":
    run_cli(main)
