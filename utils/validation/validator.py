"""Validate the data that a training YAML names, and describe it: what `utils.validate_data` does."""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.args import TrainArgs, read_train_args
from finetune.data.rows import line_offsets
from finetune.data.tokenizer_files import V3_VOCABULARY, load_instruct_tokenizer, tokenizer_warnings
from finetune.data.word_cache import cache_words
from model.args import ModelArgs, load_model_args
from model.atomic import new_file
from model.errors import Problem, UserError
from utils.models.known_models import known_shapes
from utils.tables.jsonl import file_errors, require_own_names
from utils.validation.check_datasets import CheckedFile, Validation, list_datasets
from utils.validation.data_report import describe_data, describe_expected, describe_packing, describe_run, title
from utils.validation.data_statistics import DataStatistics, RunPlan
from utils.validation.findings import Findings
from utils.validation.length_plot import plot_lengths
from utils.validation.throughput import Speed, eta, run_speeds, visible_gpus

_COPIED_AT_ONCE = 1 << 24  # bytes


def load_args(path: Path, overrides: Sequence[str] = ()) -> TrainArgs:
    """Load a YAML like `finetune.args.load_train_args`, but allow the model's folder to be missing.

    Raises:
        UserError: the file cannot be read, or all its problems.
    """

    def find_problems(args: TrainArgs) -> list[Problem]:
        may_be_missing = {"model_id_or_path"} if args.model_id_or_path.strip() else set()
        return [problem for problem in args.problems() if problem.key not in may_be_missing]

    return read_train_args(path, find_problems, overrides)


def load_tokenizer(args: TrainArgs) -> tuple[InstructTokenizerBase, ModelArgs | None]:
    """Return the model's tokenizer and its shapes, if they are known.

    Without the model's folder, mistral-common's v3 tokenizer is used instead.

    Raises:
        UserError: the files in the model's folder cannot be used.
    """
    folder = Path(args.model_id_or_path)
    if folder.is_dir():
        model_args = load_model_args(folder)
        return load_instruct_tokenizer(folder, model_args.vocab_size), model_args
    return load_instruct_tokenizer(folder, V3_VOCABULARY), known_shapes(args.model_id_or_path)


def report_settings(args: TrainArgs, tokenizer: InstructTokenizerBase, model: ModelArgs | None) -> None:
    """Print warnings about the settings and the model's tokenizer."""
    warnings = args.warnings()
    if Path(args.model_id_or_path).is_dir() and model:
        warnings += tokenizer_warnings(Path(args.model_id_or_path), tokenizer, model.vocab_size)
    else:
        warnings.append(
            f"`model_id_or_path`: the folder {args.model_id_or_path} does not exist; training needs it. "
            "Tokens were counted with mistral-common's v3 tokenizer; the counts differ if the model has another one."
        )
    for warning in warnings:
        print(f"\nWarning: {warning}")


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Write a file atomically."""
    with file_errors(), new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    print(f"Saved {path}.")


def _corrected_path(path: Path) -> Path:
    """Return the name of a data file's corrected version."""
    return path.with_name(f"{path.name}.corrected")


def write_corrected(file: CheckedFile) -> None:
    """Write the valid rows of a file with invalid ones, byte for byte, to `NAME.corrected` next to it."""
    path = file.rows.path
    if not file.bad_rows:
        print(f"{path} has no errors; it needs no corrected version.")
        return
    if len(file.bad_rows) == len(file.rows):
        print(f"{path} has no valid row; no corrected version was written.")
        return
    target = _corrected_path(path)
    with (
        file_errors(),
        new_file(target, private=True) as temporary,
        path.open("rb") as source,
        temporary.open("wb") as out,
    ):
        for start, end in _good_ranges(file):
            source.seek(start)
            while block := source.read(min(end - source.tell(), _COPIED_AT_ONCE)):
                out.write(block)
    print(f"Saved {target}.")


def _good_ranges(file: CheckedFile) -> Iterator[tuple[int, int]]:
    """Yield the bytes [start, end) between invalid rows."""
    offsets = line_offsets(file.rows.path)
    start = 0
    for row in file.bad_rows:
        yield start, int(offsets[row])
        start = int(offsets[row + 1])
    yield start, int(offsets[-1])


def report_findings(errors: Findings, warnings: Findings, report: Path | None) -> None:
    """Print the first errors and warnings of each kind; write all of them to `report`, if given."""
    if warnings:
        print(f"\n{title('Warnings')}\n{warnings.summary()}")
    if errors:
        print(f"\n{title('Data error report')}\nThe data has errors. Fix them before training.\n\n{errors.summary()}\n")
    if report is not None and (errors or warnings):
        write_text(report, itertools.chain(errors.lines(), warnings.lines()))


def report_statistics(
    validation: Validation, statistics: DataStatistics, plan: RunPlan, speeds: list[Speed], options: argparse.Namespace
) -> None:
    """Print statistics of the data and the estimated duration of the run; write the files that the options name.

    Args:
        validation: of all datasets.
        statistics: of the training data.
        plan: of the run.
        speeds: of the run; the first one is used for the JSON.
        options: of the command line.
    """
    args = plan.args
    training = [dataset for dataset in validation.datasets if not dataset.is_eval]
    eval_sources = [dataset.statistics for dataset in validation.datasets if dataset.is_eval]
    evaluation = DataStatistics.of(eval_sources) if eval_sources else None
    expected = plan.expected(
        tokens={dataset.name: dataset.statistics.tokens for dataset in training},
        weights={dataset.name: dataset.source.weight for dataset in training},
        eta=eta(plan.train_tokens, speeds[0]),
    )
    blocks = [
        "No errors! Data is correctly formatted!",
        describe_expected(expected),
        describe_data("Training data", statistics, args.seq_len),
        *([] if evaluation is None else [describe_data("Evaluation data", evaluation, args.seq_len)]),
        describe_packing(statistics, args.data.packing, args.seq_len),
        describe_run(plan, statistics, speeds),
    ]
    print("\n" + "\n\n".join(blocks))
    if options.train_stats_json is not None:
        write_text(options.train_stats_json, [json.dumps(expected, indent=4, ensure_ascii=False)])
    if options.plot is not None:
        with file_errors(), new_file(options.plot) as temporary:
            plot_lengths(statistics, evaluation, args.seq_len, temporary)
        print(f"Saved {options.plot}.")


def validate(options: argparse.Namespace) -> bool:
    """Run the command; return whether the data has no errors."""
    args = load_args(options.config, options.overrides)
    _require_own_names(args, options)
    tokenizer, model = load_tokenizer(args)
    is_good = validate_rows(args, options, tokenizer, model)
    report_settings(args, tokenizer, model)
    return is_good


def _require_own_names(args: TrainArgs, options: argparse.Namespace) -> None:
    """Raise UserError if a file to write would replace the YAML, a data file or a file of the model."""
    files = {path.resolve() for dataset in list_datasets(args) for path in dataset.source.files()}
    corrected = map(_corrected_path, files) if options.create_corrected else []
    outputs = [options.error_report_txt, options.train_stats_json, options.plot, *corrected]
    require_own_names(outputs, [options.config, *files, *Path(args.model_id_or_path).glob("*")])


def validate_rows(
    args: TrainArgs, options: argparse.Namespace, tokenizer: InstructTokenizerBase, model: ModelArgs | None
) -> bool:
    """Check all rows and report on them; return whether they have no errors."""
    for path in filter(None, (options.error_report_txt, options.train_stats_json, options.plot)):
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: the folder {path.parent} does not exist.")
    cache_words(tokenizer)
    with Findings() as errors, Findings() as warnings, file_errors():
        validation = Validation(list_datasets(args), errors, warnings)
        validation.check_rows(args, tokenizer, options.num_workers)
        gpus = visible_gpus()  # starts CUDA, so only after the last fork
        num_gpus = options.num_gpus or len(gpus) or 1
        validation.check_sizes(num_gpus)
        if options.create_corrected:
            for file in filter(lambda file: file.reported, validation.files):
                write_corrected(file)
        for sentence in validation.unread_keys():
            print(f"\n{sentence}")
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
