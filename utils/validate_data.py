"""Checks the data a training YAML names, and says what a run will see of it and how long it will take.

`python -m utils.validate_data --train_yaml CONFIG.yaml [--create_corrected] [--save_reports] [--num_gpus N]`

Rows are read, tokenised and packed as in training. Every faulty row of every file is reported, and the exit code is
then 1; rows that train, though hardly as they were meant to, are listed as warnings.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.args import TrainArgs, read_train_args
from finetune.cli import run_cli
from finetune.data.rows import line_offsets
from finetune.data.tokenize import V3_VOCABULARY, load_instruct_tokenizer
from model.args import ModelArgs, load_model_args
from model.atomic import new_file
from model.errors import Problem, UserError
from utils.models.known_models import known_shapes
from utils.tables.jsonl import file_errors
from utils.validation.check_datasets import CheckedFile, Validation, list_datasets
from utils.validation.data_report import (
    Findings,
    describe_data,
    describe_expected,
    describe_packing,
    describe_run,
    plot_lengths,
    title,
)
from utils.validation.data_statistics import DataStatistics, RunPlan
from utils.validation.throughput import Speed, eta, run_speeds, visible_gpus
from utils.validation.word_cache import cache_words

ERROR_REPORT, TRAIN_STATS = "data_errors.txt", "train_stats.json"  # names that --save_reports takes
_COPIED_AT_ONCE = 1 << 24  # bytes


def load_args(path: Path) -> TrainArgs:
    """As `finetune.args.load_train_args`, except that the model's folder need not be there yet.

    Raises:
        UserError: the file cannot be read, or everything that is wrong with it.
    """

    def find_problems(args: TrainArgs) -> list[Problem]:
        may_be_missing = {"model_id_or_path"} if args.model_id_or_path.strip() else set()
        return [problem for problem in args.problems() if problem.key not in may_be_missing]

    return read_train_args(path, find_problems)


def load_tokenizer(args: TrainArgs) -> tuple[InstructTokenizerBase, ModelArgs | None]:
    """Return the model's tokenizer and its shapes, if they are known.

    Without the model's folder, mistral-common's v3 tokenizer stands in for its own.

    Raises:
        UserError: what is in the model's folder cannot be used.
    """
    folder = Path(args.model_id_or_path)
    if folder.is_dir():
        model_args = load_model_args(folder)
        return load_instruct_tokenizer(folder, model_args.vocab_size), model_args
    return load_instruct_tokenizer(folder, V3_VOCABULARY), known_shapes(args.model_id_or_path)


def report_settings(args: TrainArgs) -> None:
    """Prints what the YAML says that is no fault of the data, though hardly meant."""
    warnings = args.warnings()
    if not Path(args.model_id_or_path).is_dir():
        warnings.append(
            f"`model_id_or_path`: the folder {args.model_id_or_path} does not exist, and training will refuse it. "
            "Tokens were counted with mistral-common's v3 tokenizer; they differ if the model has another one."
        )
    for warning in warnings:
        print(f"\nWarning: {warning}")


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Writes a file whole or not at all."""
    with file_errors(), new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    print(f"Saved {path}.")


def write_corrected(file: CheckedFile) -> None:
    """Writes the good rows, byte for byte, to `NAME.corrected` beside a file that has bad ones."""
    path = file.rows.path
    if not file.bad_rows:
        print(f"No error in {path} - no need to create a corrected version.")
        return
    if len(file.bad_rows) == len(file.rows):
        print(f"Not one row of {path} is good - there is no corrected version to create.")
        return
    target = path.with_name(f"{path.name}.corrected")
    with file_errors(), new_file(target) as temporary, path.open("rb") as source, temporary.open("wb") as out:
        for start, end in _good_ranges(file):
            source.seek(start)
            while block := source.read(min(end - source.tell(), _COPIED_AT_ONCE)):
                out.write(block)
    print(f"Saved {target}.")


def _good_ranges(file: CheckedFile) -> Iterator[tuple[int, int]]:
    """Bytes [start, end) of the rows between bad ones."""
    offsets = line_offsets(file.rows.path)
    start = 0
    for row in file.bad_rows:
        yield start, int(offsets[row])
        start = int(offsets[row + 1])
    yield start, int(offsets[-1])


def report_findings(errors: Findings, warnings: Findings, report: Path | None) -> None:
    """Prints the first errors and warnings of each kind; all of them go to `report`, if any."""
    if warnings:
        print(f"\n{title('Warnings')}\n{warnings.summary()}")
    if errors:
        print(
            f"\n{title('Data error report')}\nThe passed datasets contain errors as listed below. "
            f"Please make sure to fix these errors in order to start training.\n\n{errors.summary()}\n"
        )
    if report is not None and (errors or warnings):
        write_text(report, itertools.chain(errors.lines(), warnings.lines()))


def report_statistics(
    validation: Validation, statistics: DataStatistics, plan: RunPlan, speeds: list[Speed], options: argparse.Namespace
) -> None:
    """Print what is in the data and how long the run will take.

    Args:
        validation: of all datasets.
        statistics: of the training data.
        plan: of the run.
        speeds: of the run, the first of which counts.
        options: names the files to write.
    """
    args = plan.args
    training = [dataset for dataset in validation.datasets if not dataset.is_eval]
    evaluation = [dataset.statistics for dataset in validation.datasets if dataset.is_eval]
    expected = plan.expected(
        tokens={dataset.name: dataset.statistics.tokens for dataset in training},
        weights={dataset.name: dataset.source.weight for dataset in training},
        eta=eta(plan.train_tokens, speeds[0]),
    )
    blocks = [
        "No errors! Data is correctly formatted!",
        describe_expected(expected),
        describe_data("Training data", statistics, args.seq_len),
        *([describe_data("Evaluation data", DataStatistics.of(evaluation), args.seq_len)] if evaluation else []),
        describe_packing(statistics, args.data.packing, args.seq_len),
        describe_run(plan, statistics, speeds),
    ]
    print("\n" + "\n\n".join(blocks))
    if options.train_stats_json is not None:
        write_text(options.train_stats_json, [json.dumps(expected, indent=4, ensure_ascii=False)])
    if options.plot is not None:
        with file_errors(), new_file(options.plot) as temporary:
            plot_lengths(statistics.lengths, args.seq_len, temporary)
        print(f"Saved {options.plot}.")


def validate(options: argparse.Namespace) -> bool:
    """Runs the command; says whether the data is free of errors."""
    args = load_args(options.train_yaml)
    is_good = validate_rows(args, options)
    report_settings(args)
    return is_good


def validate_rows(args: TrainArgs, options: argparse.Namespace) -> bool:
    """Checks all rows and reports on them; says whether they are free of errors."""
    for path in filter(None, (options.error_report_txt, options.train_stats_json, options.plot)):
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: the folder {path.parent} does not exist.")
    tokenizer, model = load_tokenizer(args)
    cache_words(tokenizer)
    with Findings() as errors, Findings() as warnings, file_errors():
        validation = Validation(list_datasets(args), errors, warnings)
        validation.check_rows(args, tokenizer, options.num_workers)
        gpus = visible_gpus()  # now that no process is to be forked any more, CUDA may start
        num_gpus = options.num_gpus or len(gpus) or 1
        validation.check_sizes(num_gpus)
        if options.create_corrected:
            for file in filter(lambda file: file.reported, validation.files):
                write_corrected(file)
        report_findings(errors, warnings, options.error_report_txt)
        if errors:
            return False
    training = [dataset.statistics for dataset in validation.datasets if not dataset.is_eval]
    statistics = DataStatistics.of(training)
    speeds = [Speed(f"{options.wps:,.0f} tokens/s", options.wps)] if options.wps else []
    speeds = speeds or run_speeds(args, model, statistics, num_gpus, gpus)
    plan = RunPlan(args, num_gpus).counted(statistics)
    report_statistics(validation, statistics, plan, speeds, options)
    return True


def main() -> None:
    options = _options()
    try:
        is_good = validate(options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    if not is_good:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_yaml", type=Path, required=True, help="configuration of the training")
    add("--create_corrected", action="store_true", help="write FILE.corrected with the good rows of each bad file")
    add("--save_reports", action="store_true", help=f"write {ERROR_REPORT} and {TRAIN_STATS}, unless named otherwise")
    add("--error_report_txt", type=Path, metavar="F", help="file for all errors and warnings")
    add("--train_stats_json", type=Path, metavar="F", help="file for the run's estimate")
    add("--num_gpus", type=_at_least_one, metavar="N", help="GPUs of the run (default: those visible here)")
    add("--wps", type=_positive, help="the run's speed in tokens per second, words_per_second in a training's log")
    add("--plot", type=Path, metavar="F.png", help="picture of the rows' lengths")
    add(
        "--num_workers",
        type=_at_least_one,
        metavar="K",
        default=_cores(),
        help="processes (default: one for each core)",
    )
    options = parser.parse_args()
    if options.save_reports:
        options.error_report_txt = options.error_report_txt or Path(ERROR_REPORT)
        options.train_stats_json = options.train_stats_json or Path(TRAIN_STATS)
    return options


def _cores() -> int:
    """Cores this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


if __name__ == "__main__":
    run_cli(main)
