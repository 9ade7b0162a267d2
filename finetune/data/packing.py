"""Packing: samples -> sequences of a fixed number of tokens.

The two algorithms, `Concat` and `BestFit`, only need to know how many positions an item has and which of them are
trained, so `utils.validate_data` runs them on lengths alone. Training runs them on tokenized samples.

A position is a prediction: a sample of n tokens has n - 1 of them.
"""

import bisect
import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from .tokenize import TokenSample

LOOKAHEAD = 256  # samples from which best_fit chooses


class Item(Protocol):
    """Anything that can be packed."""

    @property
    def epoch(self) -> int: ...

    @property
    def positions(self) -> int: ...

    def trains(self, start: int, end: int) -> bool:
        """Return whether any position of [start, end) is trained."""


ItemT = TypeVar("ItemT", bound=Item)


class Piece(NamedTuple, Generic[ItemT]):
    """A document of a sequence: positions [start, end) of an item."""

    item: ItemT
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Packed(Generic[ItemT]):
    """A sequence as a list of pieces, and where packing continues after it."""

    pieces: list[Piece[ItemT]]
    last: ItemT  # the item added last
    offset: int  # how much of `last` has been used: positions (Concat); 1, all of it (BestFit)
    waiting: tuple[ItemT, ...] = ()  # items added and not yet packed, in order


class Packer(Protocol[ItemT]):
    """A packing algorithm."""

    def add(self, item: ItemT) -> Iterator[Packed[ItemT]]:
        """Add an item. Yield the sequences that it completes."""
        ...

    def finish(self) -> Iterator[Packed[ItemT]]:
        """Yield the sequences of the items that are left."""
        ...


def pack(packer: Packer[ItemT], items: Iterable[ItemT]) -> Iterator[Packed[ItemT]]:
    """Yield the sequences of all items; the last ones may not be full."""
    for item in items:
        yield from packer.add(item)
    yield from packer.finish()


class Concat(Generic[ItemT]):
    """Concatenate samples and split them at sequence boundaries, as mistral-finetune does.

    A sample that does not fit continues in the next sequence as a new document whose positions start at 0. A piece
    without a trained position is dropped, so the start of a long prompt can be lost; `BestFit` prevents that.

    Args:
        seq_len: positions per sequence.
        offset: positions of the first item that are already used.
        waiting: always empty; for `BestFit` only.
    """

    def __init__(self, seq_len: int, offset: int = 0, waiting: tuple[ItemT, ...] = ()) -> None:
        assert not waiting, "concat keeps no sample waiting"
        self._seq_len = seq_len
        self._room = seq_len
        self._first_offset = offset
        self._pieces: list[Piece[ItemT]] = []
        self._last: ItemT
        self._offset: int  # positions of the last item that are packed or dropped

    def add(self, item: ItemT) -> Iterator[Packed[ItemT]]:
        self._last = item
        self._offset, self._first_offset = self._first_offset, 0
        while self._offset < item.positions:
            piece = Piece(item, self._offset, min(self._offset + self._room, item.positions))
            self._offset = piece.end
            if item.trains(piece.start, piece.end):
                self._pieces.append(piece)
                self._room -= piece.end - piece.start
            if not self._room:
                yield from self.finish()

    def finish(self) -> Iterator[Packed[ItemT]]:
        if self._pieces:
            pieces, self._pieces, self._room = self._pieces, [], self._seq_len
            yield Packed(pieces, self._last, self._offset)


class BestFit(Generic[ItemT]):
    """Pack whole samples, so that no answer is separated from its prompt. Free room at the end becomes padding.

    Each sequence starts with the sample that has waited longest, so no sample is delayed forever, and is filled with
    the longest samples that still fit, among a bounded number read ahead. No sample is packed more than one
    epoch early, so that in a small file all rows are seen about equally often. Samples without a trained position are
    left out.

    Args:
        seq_len: positions per sequence; no item may have more.
        offset: 1 if the first item is already used, else 0.
        waiting: items that were added and not yet packed, in order.
    """

    def __init__(self, seq_len: int, offset: int = 0, waiting: tuple[ItemT, ...] = ()) -> None:
        self._seq_len = seq_len
        self._skips_first = offset > 0
        self._waiting: dict[int, ItemT] = {}  # by number, counted in the order of arrival
        self._by_length: list[tuple[int, int]] = []  # (positions, -number) of the same items, sorted
        self._arrived = 0
        self._last: ItemT
        for item in waiting:
            self._insert(item)

    def add(self, item: ItemT) -> Iterator[Packed[ItemT]]:
        self._last = item
        skips, self._skips_first = self._skips_first, False
        if not skips and item.trains(0, item.positions):
            self._insert(item)
            if len(self._waiting) == LOOKAHEAD:
                yield self._fill_sequence()

    def finish(self) -> Iterator[Packed[ItemT]]:
        while self._waiting:
            yield self._fill_sequence()

    def _fill_sequence(self) -> Packed[ItemT]:
        oldest = next(iter(self._waiting))
        last_epoch = self._waiting[oldest].epoch + 1
        room = self._seq_len
        pieces: list[Piece[ItemT]] = []
        number: int | None = oldest
        while number is not None:
            item = self._remove(number)
            pieces.append(Piece(item, 0, item.positions))
            room -= item.positions
            number = self._longest_fitting(room, last_epoch)
        return Packed(pieces, self._last, 1, tuple(self._waiting.values()))

    def _longest_fitting(self, room: int, last_epoch: int) -> int | None:
        """Return the number of the longest item that fits, the oldest of equal ones; None if none fits."""
        fitting = self._by_length[: bisect.bisect_right(self._by_length, (room, 0))]
        numbers = (-negative for _, negative in reversed(fitting))
        return next((number for number in numbers if self._waiting[number].epoch <= last_epoch), None)

    def _insert(self, item: ItemT) -> None:
        self._waiting[self._arrived] = item
        bisect.insort(self._by_length, (item.positions, -self._arrived))
        self._arrived += 1

    def _remove(self, number: int) -> ItemT:
        item = self._waiting.pop(number)
        del self._by_length[bisect.bisect_left(self._by_length, (item.positions, -number))]
        return item


PACKERS: dict[str, type[Concat] | type[BestFit]] = {"concat": Concat, "best_fit": BestFit}


class HasEpoch(Protocol):
    @property
    def epoch(self) -> int: ...


CursorT = TypeVar("CursorT", bound=HasEpoch)


class LocatedSample(NamedTuple, Generic[CursorT]):
    """A tokenized sample and a cursor with which it can be read again: an item to pack."""

    cursor: CursorT
    sample: TokenSample

    @property
    def epoch(self) -> int:
        return self.cursor.epoch

    @property
    def positions(self) -> int:
        return len(self.sample.tokens) - 1

    def trains(self, start: int, end: int) -> bool:
        return any(self.sample.masks[start + 1 : end + 1])


@dataclasses.dataclass
class Sequence:
    """`seq_len` input tokens, the tokens to predict, and the documents they belong to."""

    x: np.ndarray  # [L] int64
    y: np.ndarray  # [L] int64, the next token of each
    mask: np.ndarray  # [L] bool, true where the prediction is trained; or float, its loss weight
    sizes: list[int]  # document lengths in order; their sum is L
    padding: int  # positions at the end without a sample, a document of zeros that trains nothing
    rows: list[str] = dataclasses.field(default_factory=list)  # FILE:LINE of each document, without padding

    @classmethod
    def of(cls, pieces: list[Piece[LocatedSample[CursorT]]], seq_len: int, rows: Iterable[str] = ()) -> Self:
        """Copy the tokens of all pieces into one sequence."""
        tokens: list[int] = []
        targets: list[int] = []
        mask: list[bool | float] = []
        for (_, sample), start, end in pieces:
            tokens += sample.tokens[start:end]
            targets += sample.tokens[start + 1 : end + 1]
            mask += sample.masks[start + 1 : end + 1]
        padding = seq_len - len(tokens)
        sizes = [end - start for _, start, end in pieces] + ([padding] if padding else [])
        return cls(
            np.array(tokens + [0] * padding, dtype=np.int64),
            np.array(targets + [0] * padding, dtype=np.int64),
            np.array(mask + [False] * padding),
            sizes,
            padding,
            list(rows),
        )


@dataclasses.dataclass(frozen=True)
class PackingCounts:
    """How many samples were read, shortened and dropped, and how full the sequences are."""

    samples: int = 0  # read from the source, including dropped and waiting ones
    shortened: int = 0
    dropped: int = 0  # longer than a sequence and left out
    removed_tokens: int = 0  # of the shortened and the dropped samples
    positions: int = 0  # of the sequences
    filled: int = 0  # positions that are not padding

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(operator.add, vars(self).values(), vars(other).values()))

    def with_sample(self, sample: TokenSample) -> Self:
        """Count a sample that was read."""
        removed = sample.removed > 0
        kept = bool(sample.tokens)
        return self + type(self)(1, removed and kept, removed and not kept, sample.removed)

    def with_sequence(self, sequence: Sequence) -> Self:
        """Count a packed sequence."""
        positions = len(sequence.x)
        return self + type(self)(positions=positions, filled=positions - sequence.padding)
