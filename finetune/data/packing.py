"""Samples -> sequences of a fixed number of tokens."""

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from .tokenize import TokenSample

PACKINGS = ("concat", "best_fit")
LOOKAHEAD = 256  # samples among which best_fit chooses


class HasEpoch(Protocol):
    @property
    def epoch(self) -> int: ...


Cursor = TypeVar("Cursor", bound=HasEpoch)  # whatever the caller uses to find a sample again


@dataclasses.dataclass
class Sequence:
    """`seq_len` tokens to read, the tokens to predict, and the documents they belong to."""

    x: np.ndarray  # [L] int64
    y: np.ndarray  # [L] int64, the next token of each
    mask: np.ndarray  # [L] bool, true where the prediction is trained; or float, how much it counts
    sizes: list[int]  # document lengths in order; their sum is L
    padding: int = 0  # positions at the end that hold no sample, as a document of their own
    origins: list[Any] = dataclasses.field(default_factory=list)  # cursor of the sample behind each document


@dataclasses.dataclass(frozen=True)
class Resume(Generic[Cursor]):
    """Where packing goes on after a sequence: at this token of this sample, with these samples still waiting."""

    cursor: Cursor
    offset: int
    waiting: tuple[Cursor, ...] = ()


PackedSequences = Iterator[tuple[Sequence, Resume[Cursor]]]


@dataclasses.dataclass(frozen=True)
class PackingCounts:
    """What became of a number of samples, and how full the sequences were that hold them."""

    samples: int = 0  # read from the source, dropped ones and those still waiting included
    shortened: int = 0
    dropped: int = 0  # longer than a sequence and left out
    removed_tokens: int = 0  # of the shortened and the dropped samples
    positions: int = 0  # of the sequences
    filled: int = 0  # positions that are not padding

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(operator.add, vars(self).values(), vars(other).values()))

    def with_sample(self, sample: TokenSample) -> Self:
        """Counts a sample read."""
        removed = sample.removed > 0
        kept = bool(sample.tokens)
        return self + type(self)(1, removed and kept, removed and not kept, sample.removed)

    def with_sequence(self, sequence: Sequence) -> Self:
        """Counts a sequence handed out."""
        positions = len(sequence.x)
        return self + type(self)(positions=positions, filled=positions - sequence.padding)


class SequenceBuffer:
    """A sequence being filled."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self._x: list[int] = []
        self._y: list[int] = []
        self._mask: list[bool | float] = []
        self._sizes: list[int] = []
        self._origins: list[Any] = []

    @property
    def room(self) -> int:
        return self.seq_len - len(self._x)

    def __len__(self) -> int:
        return len(self._x)

    def add(self, x: list[int], y: list[int], mask: list[bool | float], origin: Any = None) -> None:
        """Appends a document of at most `room` tokens, which is or is part of the sample that `origin` points at."""
        self._x += x
        self._y += y
        self._mask += mask
        self._sizes.append(len(x))
        self._origins += [] if origin is None else [origin]

    def flush(self) -> Sequence:
        """Hands out the sequence, padded with a document of zeros that trains nothing, and starts a new one."""
        if padding := self.room:
            self.add([0] * padding, [0] * padding, [False] * padding)
        sequence = Sequence(
            np.array(self._x, dtype=np.int64),
            np.array(self._y, dtype=np.int64),
            np.array(self._mask),
            self._sizes,
            padding,
            self._origins,
        )
        self._x, self._y, self._mask, self._sizes, self._origins = [], [], [], [], []
        return sequence


def concat(
    samples: Iterable[tuple[Cursor, TokenSample]],
    seq_len: int,
    offset: int = 0,
    waiting: Iterable[tuple[Cursor, TokenSample]] = (),
) -> PackedSequences[Cursor]:
    """Packs samples one behind the other, as mistral-finetune does.

    A sample that does not fit goes on in the next sequence as a new document whose positions start at 0. A piece
    without a single trained token is left out, so the head of a long prompt can be lost: `best_fit` never does that.

    Args:
        samples: what to pack, each with the cursor it can be found again by.
        seq_len: tokens per sequence.
        offset: tokens of the first sample that are already packed.
        waiting: none; only `best_fit` lets samples wait.

    Yields:
        Full sequences, each with where to go on; at the end the padded remainder, if any.
    """
    assert not waiting, "concat keeps nothing waiting"
    buffer = SequenceBuffer(seq_len)
    cursor = None
    for cursor, sample in samples:
        x, y, mask = sample.tokens[:-1], sample.tokens[1:], sample.masks[1:]
        start, offset = offset, 0
        while start < len(x):
            end = start + min(buffer.room, len(x) - start)
            if any(mask[start:end]):
                buffer.add(x[start:end], y[start:end], mask[start:end], cursor)
            start = end
            if not buffer.room:
                yield buffer.flush(), Resume(cursor, start)
    if cursor is not None and len(buffer):
        yield buffer.flush(), Resume(cursor, start)


def best_fit(
    samples: Iterable[tuple[Cursor, TokenSample]],
    seq_len: int,
    offset: int = 0,
    waiting: Iterable[tuple[Cursor, TokenSample]] = (),
) -> PackedSequences[Cursor]:
    """Packs whole samples: no prompt is separated from its answer, what stays free at the end is padding.

    Each sequence starts with the sample that has waited longest, so none waits for ever, and goes on with the longest
    one that still fits, among a bounded number of samples read ahead. None is packed more than one epoch before
    another's turn, so that in a small file no row is seen much more often than the others. Samples that train nothing
    are left out.

    Args:
        samples: what to pack, each with the cursor it can be found again by; none takes more than `seq_len` positions.
        seq_len: tokens per sequence.
        offset: 1 where the first sample has already been taken, else 0.
        waiting: samples taken and not yet packed, in order.

    Yields:
        Sequences, each with where to go on.
    """
    queue = list(waiting)
    source = iter(samples)
    taken = next(source, None) if offset else None
    buffer = SequenceBuffer(seq_len)
    while True:
        while len(queue) < LOOKAHEAD and (item := next(source, None)) is not None:
            taken = item
            if any(item[1].masks[1:]):
                queue.append(item)
        if not queue:
            return
        last_epoch = queue[0][0].epoch + 1
        chosen: int | None = 0
        while chosen is not None:
            cursor, sample = queue.pop(chosen)
            buffer.add(sample.tokens[:-1], sample.tokens[1:], sample.masks[1:], cursor)
            chosen = _longest_fitting(queue, buffer.room, last_epoch)
        yield buffer.flush(), Resume(taken[0], 1, tuple(cursor for cursor, _ in queue))


def _longest_fitting(queue: list[tuple[Cursor, TokenSample]], room: int, last_epoch: int) -> int | None:
    """Index of the longest sample that fits, of equal ones the first; None if none does."""
    fitting = [
        index
        for index, (cursor, sample) in enumerate(queue)
        if len(sample.tokens) - 1 <= room and cursor.epoch <= last_epoch
    ]
    return max(fitting, key=lambda index: len(queue[index][1].tokens), default=None)
