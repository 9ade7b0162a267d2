"""Sequences -> batches, made ahead of the step that needs them."""

import copy
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from tqdm import tqdm

from model.errors import UserError

from .args import DataArgs
from .dataset import EvalStream, MixedStream, build_eval_stream, build_training_stream
from .packing import PackingCounts, Sequence
from .tokenize import SampleEncoder

_BATCHES_AHEAD = 4


@dataclasses.dataclass
class Batch:
    """`batch_size` packed sequences laid flat. T = batch_size * seq_len."""

    x: np.ndarray  # [T] int64, tokens to read
    y: np.ndarray  # [T] int64, tokens to predict
    sizes: list[int]  # document lengths over all sequences; their sum is T
    y_mask: np.ndarray | None = None  # [T] bool, true where trained; None where every position is. Where a message has
    # a weight between 0 and 1: [T] float, how much each position counts
    rows: list[str] = dataclasses.field(default_factory=list)  # FILE:LINE of each document, padding left out

    @property
    def trained_tokens(self) -> int:
        """Positions that carry loss."""
        return len(self.x) if self.y_mask is None else np.count_nonzero(self.y_mask)

    @property
    def loss_weight(self) -> float:
        """What the trained positions count together: as many as they are, unless messages have weights."""
        return len(self.x) if self.y_mask is None else self.y_mask.sum().item()

    @classmethod
    def collate(cls, sequences: list[Sequence]) -> "Batch":
        mask = np.concatenate([sequence.mask for sequence in sequences])
        return cls(
            x=np.concatenate([sequence.x for sequence in sequences]),
            y=np.concatenate([sequence.y for sequence in sequences]),
            sizes=[size for sequence in sequences for size in sequence.sizes],
            y_mask=None if mask.dtype == bool and mask.all() else mask,
            rows=[row for sequence in sequences for row in sequence.origins],
        )


def _batches(stream: MixedStream | EvalStream, batch_size: int) -> Iterator[Batch]:
    sequences: list[Sequence] = []
    for sequence in stream:
        sequences.append(sequence)
        if len(sequences) == batch_size:
            yield Batch.collate(sequences)
            sequences = []
    if sequences:
        yield Batch.collate(sequences)


class EvalLoader:
    """All evaluation batches of a rank, anew at each iteration; nothing is kept in memory."""

    def __init__(self, stream: EvalStream, batch_size: int) -> None:
        self._stream = stream
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self._stream, self._batch_size)


_Item = tuple[Batch, dict[str, Any]] | Exception  # a batch with the state behind it, or why there is none


class TrainLoader:
    """Endless training batches. A background thread tokenises and packs some of them ahead.

    `state_dict` is the place behind the last batch handed out, whatever has been prepared beyond it.
    """

    def __init__(self, stream: MixedStream, batch_size: int) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._state = copy.deepcopy(stream.state_dict())
        self._ready: queue.Queue[_Item] = queue.Queue(_BATCHES_AHEAD)
        self._first: _Item | None = None  # taken from the queue, not yet handed out
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        """Raises whatever the worker met, at the batch where it met it."""
        self.wait_for_first()
        item, self._first = self._first, None
        if isinstance(item, Exception):
            self._first = item  # asked again, it fails again
            raise item
        batch, self._state = item
        return batch

    def wait_for_first(self) -> "TrainLoader":
        """Starts the worker and waits until the next batch is there, so that bad data is known before training.

        Raises:
            UserError: what is wrong with the data.
        """
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="data loader", daemon=True)
            self._worker.start()
        if self._first is None:
            self._first = self._ready.get()
        if isinstance(self._first, UserError):
            raise self._first
        return self

    def _work(self) -> None:
        try:
            for batch in _batches(self._stream, self._batch_size):
                self._put((batch, self._stream.state_dict()))
                if self._stop.is_set():
                    return
        except Exception as error:
            self._put(error)

    def _put(self, item: _Item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    @property
    def counts(self) -> PackingCounts:
        """What was read and packed for the batches handed out, from the first one on."""
        return sum((PackingCounts(**source["counts"]) for source in self._state["sources"]), PackingCounts())

    def count_epoch(self, show_progress: bool) -> int:
        """Positions that it takes to pack every sample of this rank once. Call it before the first batch.

        Raises:
            BadRowError: a row that cannot be trained on.
        """
        assert self._worker is None, "the loader has already started"
        hidden = None if show_progress else True
        with tqdm(desc="Counting an epoch", total=len(self._stream), unit=" samples", disable=hidden) as progress:
            return self._stream.count_epoch(progress)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; nothing of the texts."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch after which `state` was taken. Call it before the first batch."""
        assert self._worker is None, "the loader has already started"
        self._stream.load_state_dict(state)
        self._state = copy.deepcopy(state)

    def close(self) -> None:
        """Ends the background thread."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()


def build_data_loader(
    instruct_tokenizer: InstructTokenizerBase,
    args: DataArgs,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    rank: int,
    world_size: int,
    is_eval: bool,
) -> TrainLoader | EvalLoader:
    """Builds a rank's loader: endless batches for training, one pass for evaluation (where `seed` is not used).

    Raises:
        UserError: bad sources, a bad seed, or nothing for this rank to train on.
    """
    encoder = SampleEncoder(instruct_tokenizer)
    if is_eval:
        return EvalLoader(build_eval_stream(encoder, args, seq_len, rank, world_size), batch_size)
    assert seed is not None, "training needs a seed"
    return TrainLoader(build_training_stream(encoder, args, seq_len, seed, rank, world_size), batch_size)
