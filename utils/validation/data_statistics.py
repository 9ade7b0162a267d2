"""Statistics of training data, and of a run on it."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, Self

from finetune.args import TrainArgs
from utils.validation.packing_forecast import BestFitForecast, ConcatForecast, PackedSample, PackingFigures

RECOMMENDED_EPOCHS = 3


class SourceStatistics:
    """Counts of one source's good rows, in memory that does not grow with the number of rows."""

    def __init__(self, seq_len: int) -> None:
        self.rows = 0
        self.tokens = 0  # of the complete rows, before packing
        self.trained = 0  # of these, the trained ones
        self.lengths: collections.Counter[int] = collections.Counter()  # tokens of a row -> rows
        self.chunks = 0  # shorter conversations made of rows with tools
        self._concat = ConcatForecast(seq_len)
        self._best_fit = BestFitForecast(seq_len)

    def add(self, samples: Iterable[PackedSample], chunks: Iterable[PackedSample]) -> None:
        """Count rows, and the shorter conversations made of them."""
        for sample in samples:
            self.rows += 1
            self.tokens += sample.positions + 1
            self.trained += sum(end - start for start, end in sample.trained)
            self.lengths[sample.positions + 1] += 1
            self._pack(sample)
        for sample in chunks:
            self.chunks += 1
            self._pack(sample)

    def _pack(self, sample: PackedSample) -> None:
        self._concat.add(sample)
        self._best_fit.add(sample)

    def packings(self) -> dict[str, PackingFigures]:
        """Return what each packing does to an epoch. Call it once, after the last row."""
        return {"concat": self._concat.figures(), "best_fit": self._best_fit.figures()}


@dataclasses.dataclass
class DataStatistics:
    """Counts of several sources in total."""

    rows: int
    chunks: int
    tokens: int
    trained: int
    lengths: collections.Counter[int]
    packings: dict[str, PackingFigures]

    @classmethod
    def of(cls, sources: list[SourceStatistics]) -> Self:
        figures = [source.packings() for source in sources]
        return cls(
            rows=sum(source.rows for source in sources),
            chunks=sum(source.chunks for source in sources),
            tokens=sum(source.tokens for source in sources),
            trained=sum(source.trained for source in sources),
            lengths=sum((source.lengths for source in sources), collections.Counter()),
            packings={name: sum((each[name] for each in figures), PackingFigures()) for name in figures[0]},
        )

    def percentile(self, share: float) -> int:
        """Return the length in tokens that a share of the rows does not exceed."""
        lengths = sorted(self.lengths)
        reached = list(itertools.accumulate(self.lengths[length] for length in lengths))
        rank = math.ceil(share * self.rows)
        return next(length for length, rows in zip(lengths, reached, strict=True) if rows >= rank)

    def document_lengths(self, seq_len: int) -> collections.Counter[int]:
        """Return the number of rows of each length in tokens, none longer than a sequence."""
        lengths: collections.Counter[int] = collections.Counter()
        for length, rows in self.lengths.items():
            lengths[min(length, seq_len)] += rows
        return lengths

    def longer_than(self, tokens: int) -> int:
        """Return the number of rows with more tokens."""
        return sum(rows for length, rows in self.lengths.items() if length > tokens)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How much of the data a run trains on."""

    args: TrainArgs
    num_gpus: int

    @property
    def sequences_per_step(self) -> int:
        return self.args.batch_size * self.args.num_microbatches * self.num_gpus

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.args.seq_len

    def counted(self, statistics: DataStatistics) -> Self:
        """Return the plan with the number of steps that `epochs`, if set, amounts to."""
        if self.args.epochs is None:
            return self
        max_steps = self.steps_of(self.args.epochs, statistics)
        return dataclasses.replace(self, args=dataclasses.replace(self.args, max_steps=max_steps))

    @property
    def train_tokens(self) -> int:
        return self.args.max_steps * self.tokens_per_step

    def epochs_of(self, max_steps: int, statistics: DataStatistics) -> float:
        """Return the number of passes over the packed data in `max_steps` steps."""
        return max_steps * self.sequences_per_step / self._sequences(statistics)

    def steps_of(self, epochs: float, statistics: DataStatistics) -> int:
        """Return the number of steps for at least `epochs` passes over the packed data."""
        return max(1, math.ceil(epochs * self._sequences(statistics) / self.sequences_per_step))

    def _sequences(self, statistics: DataStatistics) -> float:
        return statistics.packings[self.args.data.packing].sequences

    def expected(self, tokens: dict[str, int], weights: dict[str, float], eta: str) -> dict[str, Any]:
        """Return mistral-finetune's estimate of the run, with its keys and formats.

        Args:
            tokens: of each training source.
            weights: of each training source; they need not sum to 1.
            eta: duration of the run.
        """
        data_tokens = sum(tokens.values())
        in_all = sum(weights.values())
        trained = {name: self.train_tokens * weight / in_all for name, weight in weights.items()}
        return {
            "expected": {
                "eta": eta,
                "data_tokens": data_tokens,
                "train_tokens": self.train_tokens,
                "epochs": f"{self.train_tokens / data_tokens:.2f}",
                "max_steps": self.args.max_steps,
                "data_tokens_per_dataset": {name: f"{count:.1f}" for name, count in tokens.items()},
                "train_tokens_per_dataset": {name: f"{count:.1f}" for name, count in trained.items()},
                "epochs_per_dataset": {name: f"{trained[name] / count:.1f}" for name, count in tokens.items()},
            }
        }
