"""What a training run will see of its data, and for how long."""

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
    """Counts of one source's good rows. Its size does not grow with their number."""

    def __init__(self, seq_len: int) -> None:
        self.rows = 0
        self.tokens = 0  # of the rows as they stand
        self.trained = 0  # of these, the ones that are learnt
        self.lengths: collections.Counter[int] = collections.Counter()  # tokens of a row -> rows
        self.chunks = 0  # shorter conversations made of rows with tools
        self._concat = ConcatForecast(seq_len)
        self._best_fit = BestFitForecast(seq_len)

    def add(self, samples: Iterable[PackedSample], chunks: Iterable[PackedSample]) -> None:
        """Counts rows, and the shorter conversations that train beside them."""
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
        """What each packing makes of an epoch; call it after the last row."""
        return {"concat": self._concat.figures(), "best_fit": self._best_fit.figures()}


@dataclasses.dataclass
class DataStatistics:
    """Counts of several sources together."""

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
        """Length in tokens that a share of the rows do not exceed."""
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
        """Rows of more tokens."""
        return sum(rows for length, rows in self.lengths.items() if length > tokens)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How much of the data a run takes."""

    args: TrainArgs
    num_gpus: int

    @property
    def sequences_per_step(self) -> int:
        return self.args.batch_size * self.args.num_microbatches * self.num_gpus

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.args.seq_len

    def counted(self, statistics: DataStatistics) -> Self:
        """The same with the steps that `epochs`, if they are given, come to."""
        if self.args.epochs is None:
            return self
        max_steps = self.steps_of(self.args.epochs, statistics)
        return dataclasses.replace(self, args=dataclasses.replace(self.args, max_steps=max_steps))

    @property
    def train_tokens(self) -> int:
        return self.args.max_steps * self.tokens_per_step

    def epochs_of(self, max_steps: int, statistics: DataStatistics) -> float:
        """Times that so many steps go through the data, as it is packed."""
        return max_steps * self.sequences_per_step / self._sequences(statistics)

    def steps_of(self, epochs: float, statistics: DataStatistics) -> int:
        """Steps that go through the data at least so many times."""
        return max(1, math.ceil(epochs * self._sequences(statistics) / self.sequences_per_step))

    def _sequences(self, statistics: DataStatistics) -> float:
        return statistics.packings[self.args.data.packing].sequences

    def expected(self, tokens: dict[str, int], weights: dict[str, float], eta: str) -> dict[str, Any]:
        """mistral-finetune's estimate of the run, in its own keys and formats.

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
