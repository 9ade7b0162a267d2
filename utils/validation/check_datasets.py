"""Checks all the data of a run: rows, files, and whether they suffice."""

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
from utils.validation.data_report import Findings
from utils.validation.data_statistics import SourceStatistics

_DATASET_ERRORS = ("Dataset errors", "A dataset needs rows, at least one for each GPU, and something to learn in them.")
_WARNINGS = ("Look at these", "They can be trained on; make sure that they are what you mean.")


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
    """One file of a dataset, and what was found in it."""

    dataset: Dataset
    rows: JsonlFile
    reported: bool  # what is wrong with it; false where another dataset has told already
    training: int = 0  # rows that train something
    bad_rows: "array[int]" = dataclasses.field(default_factory=lambda: array("Q"))  # counted from 0


def list_datasets(args: TrainArgs) -> list[Dataset]:
    """The sources to check: those of the training first."""
    data = args.data
    pretrain, instruct = training_sources(data)
    chunk = data.instruct.dynamic_chunk_fn_call
    roles = [(source, SampleType.PRETRAIN, False, False) for source in pretrain]
    roles += [(source, SampleType.INSTRUCT, False, chunk) for source in instruct]
    roles += [(source, SampleType.INSTRUCT, True, False) for source in parse_sources(data.eval_instruct_data)]
    return [Dataset(*role, SourceStatistics(args.seq_len)) for role in roles]


class Validation:
    """Checks datasets and keeps what is to be said about them.

    Args:
        datasets: training data first.
        errors, warnings: take what is found.
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
            twice = "both trained and evaluated on" if dataset.is_eval else "in two datasets: its rows train twice"
            self.warnings.add(*_WARNINGS, f"{path} is {twice}.")
        rows = JsonlFile(path, dataset.sample_type, chunk=False, rank=0, world_size=1)
        told = any(other.sample_type is dataset.sample_type for other in others)
        self.files.append(CheckedFile(dataset, rows, reported=not told))
        others.append(dataset)

    def check_rows(self, args: TrainArgs, tokenizer: InstructTokenizerBase, workers: int) -> None:
        """Reads all rows of all files."""
        for dataset in self.datasets:
            print(f"Validating {dataset.name} ...", flush=True)
        files = [FileToCheck(file.rows, file.dataset.chunk) for file in self.files]
        checker = RowChecker(files, tokenizer, args.data, args.seq_len)
        tqdm.monitor_interval = 0  # no thread beside those that fork
        with tqdm(total=sum(len(file.rows) for file in self.files), unit=" rows", disable=None) as progress:
            for checked in checker.check_all(workers):
                self._take(checked)
                progress.update(checked.count)

    def _take(self, checked: CheckedRows) -> None:
        file = self.files[checked.file]
        path = file.rows.path
        file.dataset.statistics.add(checked.samples, checked.chunks)
        file.training += checked.training
        file.bad_rows.extend(line - 1 for line, _ in checked.errors)
        if file.reported:
            for line, error in checked.errors:
                self.errors.add(error.kind, error.hint, str(BadRowError(path, line, error)))
            for line, remark in checked.warnings:
                self.warnings.add(*_WARNINGS, f"The data in line {line} of dataset {path}: {remark}")

    def check_sizes(self, num_gpus: int) -> None:
        """Says which files and datasets cannot be trained on for lack of rows; call it after `check_rows`."""
        for file in filter(lambda file: file.reported, self.files):
            if not len(file.rows):
                self.errors.add(*_DATASET_ERRORS, f"The dataset {file.rows.path} contains no rows.")
            elif not file.training and not file.bad_rows:
                self.errors.add(*_DATASET_ERRORS, f"Not one row of the dataset {file.rows.path} trains anything.")
        for dataset in self.datasets:
            rows = sum(len(file.rows) for file in self.files if file.dataset is dataset)
            if not dataset.is_eval and 0 < rows < num_gpus:
                sentence = f"The dataset {dataset.name} has {rows} rows, too few for {num_gpus} GPUs to have one each."
                self.errors.add(*_DATASET_ERRORS, sentence)
