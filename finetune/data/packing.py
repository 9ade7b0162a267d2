"""Samples -> sequences of a fixed number of tokens."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

from .tokenize import TokenSample

Cursor = TypeVar("Cursor")  # whatever the caller uses to find a sample again


@dataclasses.dataclass
class Sequence:
    """`seq_len` tokens to read, the tokens to predict, and the documents they belong to."""

    x: np.ndarray  # [L] int64
    y: np.ndarray  # [L] int64, the next token of each
    mask: np.ndarray  # [L] bool, true where the prediction is trained
    sizes: list[int]  # document lengths in order; their sum is L


@dataclasses.dataclass(frozen=True)
class Resume(Generic[Cursor]):
    """Where packing goes on after a sequence: at this token of this sample."""

    cursor: Cursor
    offset: int


class SequenceBuffer:
    """A sequence being filled."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self._x: list[int] = []
        self._y: list[int] = []
        self._mask: list[bool] = []
        self._sizes: list[int] = []

    @property
    def room(self) -> int:
        return self.seq_len - len(self._x)

    def __len__(self) -> int:
        return len(self._x)

    def add(self, x: list[int], y: list[int], mask: list[bool]) -> None:
        """Appends a document of at most `room` tokens."""
        self._x += x
        self._y += y
        self._mask += mask
        self._sizes.append(len(x))

    def flush(self) -> Sequence:
        """Hands out the sequence, padded with a document of zeros that trains nothing, and starts a new one."""
        if padding := self.room:
            self.add([0] * padding, [0] * padding, [False] * padding)
        sequence = Sequence(
            np.array(self._x, dtype=np.int64),
            np.array(self._y, dtype=np.int64),
            np.array(self._mask, dtype=bool),
            self._sizes,
        )
        self._x, self._y, self._mask, self._sizes = [], [], [], []
        return sequence


def concat(
    samples: Iterable[tuple[Cursor, TokenSample]], seq_len: int, offset: int = 0
) -> Iterator[tuple[Sequence, Resume[Cursor]]]:
    """Packs samples one behind the other, as mistral-finetune does.

    A sample that does not fit goes on in the next sequence as a new document whose positions start at 0. A piece
    without a single trained token is left out, so the head of a long prompt can be lost: `best_fit` never does that.

    Args:
        samples: what to pack, each with the cursor it can be found again by.
        seq_len: tokens per sequence.
        offset: tokens of the first sample that are already packed.

    Yields:
        Full sequences, each with where to go on; at the end the padded remainder, if any.
    """
    buffer = SequenceBuffer(seq_len)
    cursor = None
    for cursor, sample in samples:
        x, y, mask = sample.tokens[:-1], sample.tokens[1:], sample.masks[1:]
        start, offset = offset, 0
        while start < len(x):
            end = start + min(buffer.room, len(x) - start)
            if any(mask[start:end]):
                buffer.add(x[start:end], y[start:end], mask[start:end])
            start = end
            if not buffer.room:
                yield buffer.flush(), Resume(cursor, start)
    if cursor is not None and len(buffer):
        yield buffer.flush(), Resume(cursor, start)
