"""Sequences -> batches, prepared ahead of the step that needs them."""

import copy
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

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
    """`batch_size` packed sequences, concatenated. T = batch_size * seq_len."""

    x: np.ndarray  # [T] int64, input tokens
    y: np.ndarray  # [T] int64, tokens to predict
    sizes: list[int]  # document lengths of all sequences; their sum is T
    # [T] bool, true where trained; None if every position is. If a message has a weight between 0 and 1: [T] float,
    # the loss weight of each position.
    y_mask: np.ndarray | None = None
    rows: list[str] = dataclasses.field(default_factory=list)  # FILE:LINE of each document, padding left out
    prepared: Any = dataclasses.field(default=None, repr=False, compare=False)  # by `prepare` of the loader

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a loss."""
        return len(self.x) if self.y_mask is None else int(np.count_nonzero(self.y_mask))

    @property
    def loss_weight(self) -> float:
        """Sum of the loss weights of all positions: `trained_tokens`, unless messages have weights."""
        return len(self.x) if self.y_mask is None else self.y_mask.sum().item()

    @classmethod
    def collate(cls, sequences: list[Sequence]) -> "Batch":
        mask = np.concatenate([sequence.mask for sequence in sequences])
        return cls(
            x=np.concatenate([sequence.x for sequence in sequences]),
            y=np.concatenate([sequence.y for sequence in sequences]),
            sizes=[size for sequence in sequences for size in sequence.sizes],
            y_mask=None if mask.dtype == bool and mask.all() else mask,
            rows=[row for sequence in sequences for row in sequence.rows],
        )


Prepare = Callable[[Batch], None]  # makes what a step needs of a batch, ahead of it


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
    """All evaluation batches of a rank. Each iteration reads them again; nothing is kept in memory."""

    def __init__(self, stream: EvalStream, batch_size: int) -> None:
        self._stream = stream
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self._stream, self._batch_size)


_Item = tuple[Batch, dict[str, Any]] | Exception  # a batch and the state after it, or why there is none
_LOOK_S = 1.0  # between two looks at whether the background thread is alive


class TrainLoader:
    """Endless training batches. A background thread tokenizes and packs some of them ahead.

    `state_dict` is the position after the last batch returned, however many are prepared beyond it.
    """

    def __init__(self, stream: MixedStream, batch_size: int, prepare: Prepare | None = None) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._prepare = prepare
        self._state = copy.deepcopy(stream.state_dict())
        self._ready: queue.Queue[_Item] = queue.Queue(_BATCHES_AHEAD)
        self._first: _Item | None = None  # taken from the queue, not yet returned
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        """Return the next batch, or raise the error that the background thread met at this batch, every time."""
        item = self._wait()
        if isinstance(item, Exception):
            raise item
        batch, self._state = item
        self._first = None
        return batch

    def wait_for_first(self) -> "TrainLoader":
        """Start the background thread and wait for the next batch, so that bad data is reported before training.

        Raises:
            UserError: what is wrong with the data.
        """
        if isinstance(item := self._wait(), UserError):
            raise item
        return self

    def _wait(self) -> _Item:
        if self._worker is None:
            self._worker = threading.Thread(target=self._fill_queue, name="data loader", daemon=True)
            self._worker.start()
        while self._first is None:
            alive = self._worker.is_alive()  # asked first: a thread that has just ended may have left an item
            try:
                self._first = self._ready.get(timeout=_LOOK_S if alive else 0)
            except queue.Empty:
                if not alive:
                    self._first = RuntimeError("The data loader's thread has ended without a batch or an error.")
        return self._first

    def _fill_queue(self) -> None:
        try:
            for batch in _batches(self._stream, self._batch_size):
                if self._prepare is not None:
                    self._prepare(batch)
                self._put((batch, self._stream.state_dict()))
                if self._stop.is_set():
                    return
        except Exception as error:
            self._put(error)
        except BaseException as error:  # a panic of a Rust library, SystemExit: must end the run, and not as a success
            failure = RuntimeError(f"The data loader's thread has ended with {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._put(failure)

    def _put(self, item: _Item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    @property
    def counts(self) -> PackingCounts:
        """The counts of all batches returned so far, including those before a resume."""
        return sum((PackingCounts(**source["counts"]) for source in self._state["sources"]), PackingCounts())

    def count_epoch(self, show_progress: bool) -> int:
        """Count the positions that packing every sample of this rank once takes. Call it before the first batch.

        Raises:
            BadRowError: a row that cannot be trained on.
        """
        assert self._worker is None, "the loader has already started"
        hidden = None if show_progress else True
        with tqdm(desc="Counting an epoch", total=len(self._stream), unit=" samples", disable=hidden) as progress:
            return self._stream.count_epoch(progress)

    def fingerprints(self) -> dict[str, str]:
        """Return the hash of each data file's content, by path; the same on every rank."""
        return self._stream.fingerprints()

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain numbers and lists, without any text of the data."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was saved. Call it before the first batch."""
        assert self._worker is None, "the loader has already started"
        self._stream.load_state_dict(state)
        self._state = copy.deepcopy(state)

    def close(self) -> None:
        """Stop the background thread."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()


@overload
def build_data_loader(
    instruct_tokenizer: InstructTokenizerBase,
    args: DataArgs,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    rank: int,
    world_size: int,
    is_eval: Literal[False],
    prepare: Prepare | None = None,
) -> TrainLoader: ...


@overload
def build_data_loader(
    instruct_tokenizer: InstructTokenizerBase,
    args: DataArgs,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    rank: int,
    world_size: int,
    is_eval: Literal[True],
) -> EvalLoader: ...


def build_data_loader(
    instruct_tokenizer: InstructTokenizerBase,
    args: DataArgs,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    rank: int,
    world_size: int,
    is_eval: bool,
    prepare: Prepare | None = None,
) -> TrainLoader | EvalLoader:
    """Build a rank's loader: endless batches for training, one pass for evaluation (which does not use `seed`).

    The background thread calls `prepare` for each training batch.

    Raises:
        UserError: bad sources, a bad seed, or nothing for this rank to train on.
    """
    encoder = SampleEncoder(instruct_tokenizer)
    if is_eval:
        return EvalLoader(build_eval_stream(encoder, args, seq_len, rank, world_size), batch_size)
    assert seed is not None, "training needs a seed"
    return TrainLoader(build_training_stream(encoder, args, seq_len, seed, rank, world_size), batch_size, prepare)
