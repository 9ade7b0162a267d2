"""Check all data of a run: its rows, and whether there are enough of them."""

import collections
import dataclasses
from array import array
from pathlib import Path

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from tqdm import tqdm

from finetune.args import TrainArgs
from finetune.data.args import Source, parse_sources, training_sources
from finetune.data.dataset import JsonlFile
from finetune.data.exceptions import BadRowError
from finetune.data.tokenize import SampleType
from utils.validation.check_rows import CheckedRows, FileToCheck, RowChecker
from utils.validation.data_statistics import SourceStatistics
from utils.validation.findings import Findings

_DATASET_ERRORS = ("Dataset errors", "A dataset needs at least one row for each GPU, and trained tokens.")
_KEYS_SHOWN = 10  # of the keys that are not read
_KEYS_KEPT = 1000  # keys may be different in each row
_WARNINGS = ("Check these", "They can be trained on, but may not be what you want.")


@dataclasses.dataclass
class Dataset:
    """A source of the YAML."""

    source: Source
    sample_type: SampleType
    is_eval: bool
    chunk: bool
    statistics: SourceStatistics

    @property
    def name(self) -> str:
        return str(self.source.path)


@dataclasses.dataclass
class CheckedFile:
    """A file of a dataset, and what was found in it."""

    dataset: Dataset
    rows: JsonlFile
    reported: bool  # whether its errors are reported here; false if another dataset reports them
    training: int = 0  # rows with trained tokens
    with_unread_keys: int = 0  # good rows
    unread: set[str] = dataclasses.field(default_factory=set)  # names of their keys that are not read
    bad_rows: "array[int]" = dataclasses.field(default_factory=lambda: array("Q"))  # counted from 0


def list_datasets(args: TrainArgs) -> list[Dataset]:
    """Return the sources to check, training data first."""
    data = args.data
    pretrain, instruct = training_sources(data)
    chunk = data.instruct.dynamic_chunk_fn_call
    roles = [(source, SampleType.PRETRAIN, False, False) for source in pretrain]
    roles += [(source, SampleType.INSTRUCT, False, chunk) for source in instruct]
    roles += [(source, SampleType.INSTRUCT, True, False) for source in parse_sources(data.eval_instruct_data)]
    return [Dataset(*role, SourceStatistics(args.seq_len)) for role in roles]


class Validation:
    """Check datasets and collect errors and warnings.

    Args:
        datasets: training data first.
        errors: receives the errors.
        warnings: receives the warnings.
    """

    def __init__(self, datasets: list[Dataset], errors: Findings, warnings: Findings) -> None:
        self.datasets = datasets
        self.errors = errors
        self.warnings = warnings
        self.files: list[CheckedFile] = []
        self._datasets_of: dict[Path, list[Dataset]] = collections.defaultdict(list)
        for dataset in datasets:
            for path in dataset.source.files():
                self._add_file(dataset, path)

    def _add_file(self, dataset: Dataset, path: Path) -> None:
        others = self._datasets_of[path.resolve()]
        if any(not other.is_eval for other in others):
            use = "used for both training and evaluation" if dataset.is_eval else "in two training datasets"
            self.warnings.add(*_WARNINGS, f"{path} is {use}.")
        rows = JsonlFile(path, dataset.sample_type, chunk=False, rank=0, world_size=1)
        reported = all(other.sample_type is not dataset.sample_type for other in others)
        self.files.append(CheckedFile(dataset, rows, reported))
        others.append(dataset)

    def check_rows(self, args: TrainArgs, tokenizer: InstructTokenizerBase, workers: int) -> None:
        """Check all rows of all files with `workers` processes."""
        for dataset in self.datasets:
            print(f"Validating {dataset.name} ...", flush=True)
        files = [FileToCheck(file.rows, file.dataset.chunk) for file in self.files]
        checker = RowChecker(files, tokenizer, args.data, args.seq_len)
        tqdm.monitor_interval = 0  # no other thread while processes fork
        with tqdm(total=sum(len(file.rows) for file in self.files), unit=" rows", disable=None) as progress:
            for checked in checker.check_all(workers):
                self._collect(checked)
                progress.update(checked.count)

    def _collect(self, checked: CheckedRows) -> None:
        file = self.files[checked.file]
        path = file.rows.path
        file.dataset.statistics.add(checked.samples, checked.chunks)
        file.training += checked.training
        file.with_unread_keys += checked.with_unread_keys
        if len(file.unread) < _KEYS_KEPT:
            file.unread |= checked.unread
        file.bad_rows.extend(line - 1 for line, _ in checked.errors)
        if file.reported:
            for line, error in checked.errors:
                self.errors.add(error.kind, error.hint, str(BadRowError(path, line, error)))
            for line, warning in checked.warnings:
                self.warnings.add(*_WARNINGS, f"The data in line {line} of dataset {path}: {warning}")

    def unread_keys(self) -> list[str]:
        """Return a sentence for each file whose rows have keys that are not read."""
        return [_unread_keys(file) for file in self.files if file.reported and file.unread]

    def check_sizes(self, num_gpus: int) -> None:
        """Report files and datasets with too few rows to train on. Call it after `check_rows`."""
        for file in filter(lambda file: file.reported, self.files):
            if not len(file.rows):
                self.errors.add(*_DATASET_ERRORS, f"The dataset {file.rows.path} contains no rows.")
            elif not file.training and not file.bad_rows:
                self.errors.add(*_DATASET_ERRORS, f"No row of the dataset {file.rows.path} has a trained token.")
        for dataset in self.datasets:
            rows = sum(len(file.rows) for file in self.files if file.dataset is dataset)
            if not dataset.is_eval and 0 < rows < num_gpus:
                message = f"The dataset {dataset.name} has {rows} rows, too few for one on each of {num_gpus} GPUs."
                self.errors.add(*_DATASET_ERRORS, message)


def _unread_keys(file: CheckedFile) -> str:
    names = [f"`{name}`" for name in sorted(file.unread)]
    more = [f"{len(names) - _KEYS_SHOWN:,} more"] if len(names) > _KEYS_SHOWN else []
    rows = f"{file.with_unread_keys:,} rows have" if file.with_unread_keys > 1 else "1 row has"
    return f"{file.rows.path}: {rows} keys that are not read: {', '.join(names[:_KEYS_SHOWN] + more)}."
