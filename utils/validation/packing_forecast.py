"""What packing does to the samples of an epoch, computed by training's own algorithms from lengths alone."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, Self

from finetune.data.packing import BestFit, Concat, Packed

Span = tuple[int, int]  # positions [start, end)


class PackedSample(NamedTuple):
    """An item to pack: the lengths of a sample. A sample of n tokens has n - 1 positions."""

    positions: int
    trained: tuple[Span, ...]  # trained positions, in order
    fitted: int  # positions that best_fit keeps: fewer if it shortens the sample, 0 if it drops it
    epoch: int = 0

    def trains(self, start: int, end: int) -> bool:
        return any(begin < end and stop > start for begin, stop in self.trained)

    def count_trained(self, start: int, end: int) -> int:
        """Return how many positions of [start, end) are trained."""
        return sum(max(0, min(stop, end) - max(begin, start)) for begin, stop in self.trained)


@dataclasses.dataclass
class PackingFigures:
    """What packing does to an epoch's samples."""

    samples: int = 0  # with trained positions
    positions: int = 0  # of all samples
    trained: int = 0
    split_samples: int = 0  # samples with an answer that does not see its complete prompt
    truncated_context_tokens: int = 0  # trained positions that see less than half of what precedes them
    shortened: int = 0
    dropped: int = 0
    lost: int = 0  # positions that are in no sequence
    sequences: float = 0.0  # filled by an epoch
    filled: float = 0.0  # of these, the part that is not padding

    def __add__(self, other: Self) -> Self:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return type(self)(*map(sum, zip(mine, others, strict=True)))

    def count(self, sample: PackedSample) -> None:
        self.samples += bool(sample.trained)
        self.positions += sample.positions
        self.trained += sample.count_trained(0, sample.positions)

    @property
    def fill(self) -> float:
        """Share of the sequences' positions that is not padding."""
        return self.filled / self.sequences if self.sequences else 0.0


class ConcatForecast:
    """Figures of `concat`, which continues a sample in the next sequence."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._packer: Concat[PackedSample] = Concat(seq_len)
        self._figures = PackingFigures()
        self._kept = 0
        self._last_split: PackedSample | None = None

    def add(self, sample: PackedSample) -> None:
        self._figures.count(sample)
        self._count_pieces(self._packer.add(sample))

    def figures(self) -> PackingFigures:
        """Return the figures of all samples. The next epoch continues the last sequence, so it counts as a fraction."""
        self._count_pieces(self._packer.finish())
        sequences = self._kept / self._seq_len
        lost = self._figures.positions - self._kept
        return dataclasses.replace(self._figures, lost=lost, sequences=sequences, filled=sequences)

    def _count_pieces(self, sequences: Iterable[Packed[PackedSample]]) -> None:
        for packed in sequences:
            for sample, start, end in packed.pieces:
                self._kept += end - start
                has_prompt = sample.trained[0][0] > 0
                if start and has_prompt:
                    self._figures.split_samples += sample is not self._last_split
                    self._last_split = sample
                    sees_half = 2 * start - 1  # the first position that sees half of what precedes it
                    self._figures.truncated_context_tokens += sample.count_trained(start, min(end, sees_half))


class BestFitForecast:
    """Figures of `best_fit`, which packs whole samples."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._packer: BestFit[PackedSample] = BestFit(seq_len)
        self._figures = PackingFigures()
        self._kept = 0
        self._sequences = 0
        self._last_size = 0  # positions in the last sequence

    def add(self, sample: PackedSample) -> None:
        self._figures.count(sample)
        if not sample.trained:
            return
        self._figures.dropped += not sample.fitted
        self._figures.shortened += 0 < sample.fitted < sample.positions
        if sample.fitted:
            fitted = PackedSample(sample.fitted, trained=((0, sample.fitted),), fitted=sample.fitted)
            self._count_sequences(self._packer.add(fitted))

    def figures(self) -> PackingFigures:
        """Return the figures of all samples; nothing can be added afterwards.

        The next epoch continues the last sequence, so it counts as a fraction of an average one.
        """
        self._count_sequences(self._packer.finish())
        lost = self._figures.positions - self._kept
        filled = self._kept / self._seq_len
        full, complete = self._kept - self._last_size, self._sequences - 1
        fill = full / complete / self._seq_len if complete > 0 else filled
        return dataclasses.replace(self._figures, lost=lost, sequences=filled / fill if fill else 0.0, filled=filled)

    def _count_sequences(self, sequences: Iterable[Packed[PackedSample]]) -> None:
        for packed in sequences:
            self._last_size = sum(end - start for _, start, end in packed.pieces)
            self._kept += self._last_size
            self._sequences += 1
