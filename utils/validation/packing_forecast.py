"""What packing will do to the samples of an epoch, computed from lengths alone.

The forecasts go through the same steps as `finetune.data.packing` without touching a token, so that a corpus of any
size is judged in the time it takes to read it; the tests hold the two together.
"""

import bisect
import dataclasses
from typing import NamedTuple, Self

from finetune.data.packing import LOOKAHEAD

Span = tuple[int, int]  # positions [start, end)


class PackedSample(NamedTuple):
    """What packing needs to know of a sample. Positions are predictions: a sample of n tokens has n - 1."""

    positions: int
    trained: tuple[Span, ...]  # positions that are learnt, in order
    fitted: int  # positions that best_fit gives it: fewer where it is shortened, 0 where it is left out


@dataclasses.dataclass
class PackingFigures:
    """What became of an epoch's samples."""

    samples: int = 0  # with something to learn
    positions: int = 0  # of all samples
    trained: int = 0
    severed: int = 0  # samples with an answer that does not see (all of) what stands before it
    blind: int = 0  # trained positions that see less than half of what stands before them
    shortened: int = 0
    left_out: int = 0
    lost: int = 0  # positions that are in no sequence
    sequences: float = 0.0  # that an epoch fills
    filled: float = 0.0  # of these, the part that is not padding

    def __add__(self, other: Self) -> Self:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return type(self)(*map(sum, zip(mine, others, strict=True)))

    def count(self, sample: PackedSample) -> None:
        self.samples += bool(sample.trained)
        self.positions += sample.positions
        self.trained += sum(end - start for start, end in sample.trained)

    @property
    def fill(self) -> float:
        """Share of the sequences' positions that is not padding."""
        return self.filled / self.sequences if self.sequences else 0.0


class ConcatForecast:
    """Follows `concat`, the packing that goes on with a sample in the next sequence."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._room = seq_len
        self._kept = 0
        self._figures = PackingFigures()

    def add(self, sample: PackedSample) -> None:
        self._figures.count(sample)
        if not sample.trained:
            self._figures.lost += sample.positions
            return
        has_prompt = sample.trained[0][0] > 0
        severed, start, last_trained = False, 0, sample.trained[-1][1] - 1
        while start <= last_trained:
            # Pieces as long as the room that is left are thrown away until one holds something to learn.
            first = next(max(begin, start) for begin, end in sample.trained if end > start)
            skipped = (first - start) // self._room * self._room
            self._figures.lost += skipped
            start += skipped
            end = min(start + self._room, sample.positions)
            if has_prompt and start:
                severed = True
                self._figures.blind += _trained_before(sample.trained, start, min(end, 2 * start - 1))
            self._kept += end - start
            self._room = self._room - (end - start) or self._seq_len
            start = end
        self._figures.lost += sample.positions - start
        self._figures.severed += severed

    def figures(self) -> PackingFigures:
        """Of the samples so far. The sequence begun is filled by the next epoch's first samples."""
        sequences = self._kept / self._seq_len
        return dataclasses.replace(self._figures, sequences=sequences, filled=sequences)


def _trained_before(spans: tuple[Span, ...], start: int, stop: int) -> int:
    """How many positions of [start, stop) are trained."""
    return sum(max(0, min(end, stop) - max(begin, start)) for begin, end in spans)


class BestFitForecast:
    """Follows `best_fit`, the packing of whole samples."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._arrived = 0
        self._waiting: dict[int, int] = {}  # samples by number, with their positions
        self._by_length: list[tuple[int, int]] = []  # (positions, -number) of the same, sorted
        self._figures = PackingFigures()
        self._sequence_fills: list[int] = [0, 0]  # positions in all sequences but the last, and in the last
        self._sequences = 0

    def add(self, sample: PackedSample) -> None:
        self._figures.count(sample)
        if not sample.trained:
            self._figures.lost += sample.positions
            return
        self._figures.lost += sample.positions - sample.fitted
        if not sample.fitted:
            self._figures.left_out += 1
            return
        self._figures.shortened += sample.fitted < sample.positions
        self._waiting[self._arrived] = sample.fitted
        bisect.insort(self._by_length, (sample.fitted, -self._arrived))
        self._arrived += 1
        if len(self._waiting) == LOOKAHEAD:
            self._fill_sequence()

    def figures(self) -> PackingFigures:
        """Of all samples; there can be no more of them after this.

        The last sequence is filled by the next epoch's first samples, so it counts for as much as it would be filled.
        """
        while self._waiting:
            self._fill_sequence()
        before, last = self._sequence_fills
        fill = before / (self._sequences - 1) / self._seq_len if self._sequences > 1 else last / self._seq_len
        filled = (before + last) / self._seq_len
        return dataclasses.replace(self._figures, sequences=filled / fill if fill else 0.0, filled=filled)

    def _fill_sequence(self) -> None:
        number: int | None = next(iter(self._waiting))
        room = self._seq_len
        while number is not None:
            positions = self._waiting.pop(number)
            del self._by_length[bisect.bisect_left(self._by_length, (positions, -number))]
            room -= positions
            fitting = bisect.bisect_right(self._by_length, (room, 0))
            number = -self._by_length[fitting - 1][1] if fitting else None
        before, last = self._sequence_fills
        self._sequence_fills = [before + last, self._seq_len - room]
        self._sequences += 1
