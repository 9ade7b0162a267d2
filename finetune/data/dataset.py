"""jsonl files -> an endless, seeded, resumable stream of packed sequences.

Only line offsets are held in memory. A row is read and tokenised when its turn comes, and the place in the stream is a
handful of numbers: going on after an interruption reads no row again, and only replays the shuffles of past epochs.
"""

import copy
import dataclasses
import functools
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from tqdm import tqdm

from model.errors import UserError

from .args import DataArgs, Source, parse_sources, training_sources
from .exceptions import BadRowError, RowError
from .packing import PackedSequences, PackingCounts, Sequence, best_fit, concat
from .shorten import FittingEncoder
from .tokenize import (
    SampleEncoder,
    SampleType,
    TokenSample,
    chunk_ends,
    parse_conversation,
    parse_row,
    require_row_size,
)

logger = logging.getLogger("data")

Encoder = SampleEncoder | FittingEncoder
Packing = Callable[..., PackedSequences[Any]]  # concat or best_fit, told how long a sequence is

_BLOCK = 1 << 20  # bytes read at a time while looking for line ends: fits the cache of a core
_WHOLE = 0  # an entry that is the row as it stands, not a conversation cut short


def line_offsets(path: Path) -> np.ndarray:
    """Byte offsets [rows + 1] int64 at which rows start, and the end of the file. CR, LF and CRLF end a row.

    Raises:
        UserError: the file cannot be read.
    """
    starts = [np.zeros(1, dtype=np.int64)]
    position, after_cr = 0, False
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                data = np.frombuffer(block, dtype=np.uint8)
                is_lf, is_cr = data == 10, data == 13
                if after_cr and is_lf[0]:
                    starts[-1] = starts[-1][:-1]  # the CR before the block did not end the row, this LF does
                ends = is_lf | is_cr
                ends[:-1] &= ~(is_cr[:-1] & is_lf[1:])
                starts.append(np.flatnonzero(ends) + position + 1)
                after_cr = bool(is_cr[-1])
                position += len(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    offsets = np.concatenate(starts)
    return offsets if offsets[-1] == position else np.append(offsets, position)


def read_rows(path: Path, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first rows of a file, with their line numbers from 1.

    Raises:
        BadRowError: a line that is no JSON object.
    """
    offsets = line_offsets(path)
    with path.open("rb") as file:
        for index in range(min(count, len(offsets) - 1)):
            try:
                yield index + 1, parse_row(_read_line(file, offsets[index], offsets[index + 1]))
            except RowError as error:
                raise BadRowError(path, index + 1, error) from error


def _read_line(file: BinaryIO, start: int, end: int) -> bytes:
    """Bytes [start, end) without the line end and the file's byte order mark; raises JsonError if they are too many."""
    require_row_size(int(end - start))
    file.seek(start)
    line = file.read(end - start).rstrip(b"\r\n")
    return line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line


class JsonlFile:
    """The rows of one file that one rank reads: row i belongs to rank i mod world_size."""

    def __init__(self, path: Path, sample_type: SampleType, chunk: bool, rank: int, world_size: int) -> None:
        self.path = path
        self.sample_type = sample_type
        offsets = line_offsets(path)
        self.total_rows = len(offsets) - 1
        self.layout = zlib.crc32(offsets.tobytes())  # another where rows came, went or changed their lengths
        self._rows = np.arange(rank, self.total_rows, world_size, dtype=np.int64)
        self._starts, self._ends = offsets[self._rows], offsets[self._rows + 1]
        # An entry is (index into _rows, messages to keep); the rank's rows first, then the conversations cut short.
        whole = np.stack([np.arange(len(self._rows)), np.full(len(self._rows), _WHOLE)], axis=1)
        self.entries = np.concatenate([whole, self._chunks()]) if chunk else whole

    def __len__(self) -> int:
        return len(self.entries)

    def _chunks(self) -> np.ndarray:
        found = []
        with self.path.open("rb") as file:
            for index in range(len(self._rows)):
                found += [(index, keep) for keep in self._chunk_ends(file, index)]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def _chunk_ends(self, file: BinaryIO, index: int) -> list[int]:
        try:
            line = self._read(file, index)
            # Parsing is slow, and most rows have no tools.
            if b"tools" not in line and b"only_last" not in line:
                return []
            return chunk_ends(parse_conversation(parse_row(line)))
        except RowError as error:
            raise self._bad_row(index, error) from error

    def _read(self, file: BinaryIO, index: int) -> bytes:
        return _read_line(file, self._starts[index], self._ends[index])

    def require_row_sizes(self) -> None:
        """Raises BadRowError where the longest line is too long to be a row; reads nothing."""
        sizes = self._ends - self._starts
        longest = int(sizes.argmax()) if len(sizes) else None
        try:
            require_row_size(0 if longest is None else int(sizes[longest]))
        except RowError as error:
            raise self._bad_row(longest, error) from error

    def _bad_row(self, index: int, error: RowError) -> BadRowError:
        return BadRowError(self.path, self._line(index), error)

    def _line(self, index: int) -> int:
        return int(self._rows[index]) + 1

    def describe(self, entry: int) -> str:
        """Where an entry stands, for messages."""
        return f"line {self._line(self.entries[entry][0])} of {self.path}"

    def locate(self, entry: int) -> str:
        """Where an entry stands, as editors understand it."""
        return f"{self.path}:{self._line(self.entries[entry][0])}"

    def encode(self, file: Any, entry: int, encoder: Encoder) -> TokenSample:
        """Reads and tokenises one entry through the open binary `file`.

        Raises:
            BadRowError: the row cannot be trained on.
        """
        index, keep = self.entries[entry]
        try:
            row = parse_row(self._read(file, index))
            if keep == _WHOLE:
                return encoder.encode(row, self.sample_type)
            conversation = parse_conversation(row)
            return encoder.encode_conversation(dataclasses.replace(conversation, messages=conversation.messages[:keep]))
        except RowError as error:
            raise self._bad_row(index, error) from error


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A sample in a source's endless stream."""

    epoch: int
    file: int  # index in the source's list of files
    place: int  # in the file's order of this epoch
    entry: int  # of the file, whatever the order


# Where a source's stream begins. `waiting` holds (epoch, file, entry) of samples read ahead and not yet packed.
_START: dict[str, Any] = {
    "epoch": 0,
    "file": 0,
    "place": 0,
    "offset": 0,
    "waiting": [],
    "counts": dataclasses.asdict(PackingCounts()),
}


class SourceStream:
    """One source: its files one after the other, for ever or once, packed into sequences."""

    def __init__(
        self,
        source: Source,
        sample_type: SampleType,
        encoder: Encoder,
        packing: Packing,
        rank: int,
        world_size: int,
        shuffle_seed: int | None = None,
        chunk: bool = False,
        repeat: bool = True,
    ) -> None:
        """Indexes the source's files.

        Args:
            packing: makes sequences of samples.
            shuffle_seed: seed of the rows' order at each epoch; None keeps the files' order.
            chunk: add the shorter conversations of rows with tools.
            repeat: go on for ever; else once through.

        Raises:
            UserError: there is nothing for this rank to read.
        """
        self.source = source
        self._encoder = encoder
        self._packing = packing
        self._repeat = repeat
        self._files = [JsonlFile(path, sample_type, chunk, rank, world_size) for path in source.files()]
        for file in self._files:
            file.require_row_sizes()
        if repeat and not len(self):
            raise UserError(_too_few_rows(source.path, sum(file.total_rows for file in self._files), rank, world_size))
        self._shuffle_key = None if shuffle_seed is None else np.array((shuffle_seed, rank))
        self._warned = False
        self.rewind()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return sum(map(len, self._files))

    def once(self) -> Self:
        """The samples of the first epoch, in its order; the place in this stream stays what it is."""
        stream = copy.copy(self)
        stream._repeat, stream._warned = False, True
        stream.rewind()
        return stream

    def layouts(self) -> list[int]:
        """A number per file that tells whether it is still the same."""
        return [file.layout for file in self._files]

    def rewind(self) -> None:
        """Goes back to the first row."""
        self.state = dict(_START)

    def __iter__(self) -> Iterator[Sequence]:
        """Yields sequences from `state` on, which always says where the one after the last goes on."""
        waiting = [
            (Cursor(epoch, file, 0, entry), self._encode(file, entry)) for epoch, file, entry in self.state["waiting"]
        ]
        self._counts = PackingCounts(**self.state["counts"])
        for sequence, resume in self._packing(self._samples(self.state), offset=self.state["offset"], waiting=waiting):
            self._counts = self._counts.with_sequence(sequence)
            cursor = resume.cursor
            self.state = {
                "epoch": cursor.epoch,
                "file": cursor.file,
                "place": cursor.place,
                "offset": resume.offset,
                "waiting": [[other.epoch, other.file, other.entry] for other in resume.waiting],
                "counts": dataclasses.asdict(self._counts),
            }
            sequence.origins = [self._files[origin.file].locate(origin.entry) for origin in sequence.origins]
            yield sequence

    def _encode(self, file: int, entry: int) -> TokenSample:
        with self._files[file].path.open("rb") as handle:
            return self._files[file].encode(handle, entry, self._encoder)

    def _samples(self, start: dict[str, Any]) -> Iterator[tuple[Cursor, TokenSample]]:
        idle = 0  # samples without a trained token in a row
        counted = start["offset"] > 0  # the first sample, before the interruption
        for epoch, index, order in self._orders(start["epoch"]):
            if epoch == start["epoch"] and index < start["file"]:
                continue
            first = start["place"] if (epoch, index) == (start["epoch"], start["file"]) else 0
            file = self._files[index]
            with file.path.open("rb") as handle:
                for place, entry in enumerate(order[first:].tolist(), first):
                    sample = file.encode(handle, entry, self._encoder)
                    if not counted:
                        self._count(sample, file, entry)
                    counted = False
                    idle = 0 if any(sample.masks[1:]) else idle + 1
                    yield Cursor(epoch, index, place, entry), sample
            if self._repeat and idle >= len(self):
                raise UserError(
                    f"Not one of the rows of {self.source.path} that this process reads has a token to train on: "
                    "is every assistant message's `weight` 0, or every sample longer than `seq_len`?"
                )

    def _count(self, sample: TokenSample, file: JsonlFile, entry: int) -> None:
        self._counts = self._counts.with_sample(sample)
        if sample.removed and not self._warned:
            self._warned = True
            fate = f"{sample.removed:,} tokens inside its longest text were" if sample.tokens else "It was"
            logger.warning(
                "The sample in %s is longer than `seq_len`. %s left out; further ones are only counted.",
                file.describe(entry),
                fate,
            )

    def _orders(self, first_epoch: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (epoch, file, order of its entries).

        Each epoch shuffles in place what the one before left, so earlier epochs' shuffles are replayed: index
        arithmetic alone, no row is read.
        """
        orders = [np.arange(len(file)) for file in self._files]
        random = None if self._shuffle_key is None else np.random.RandomState(self._shuffle_key)
        epoch = 0
        while True:
            for index, order in enumerate(orders):
                if random is not None:
                    random.shuffle(order)
                if epoch >= first_epoch:
                    yield epoch, index, order
            epoch += 1
            if not self._repeat:
                return


def _too_few_rows(path: Path, rows: int, rank: int, world_size: int) -> str:
    if rows == 0:
        return f"{path} holds no rows; a jsonl file has one JSON object per line."
    return (
        f"{path} has too few rows ({rows}) for {world_size} processes: process {rank} has none to read. "
        f"Start at most {rows} (--nproc-per-node) or add rows."
    )


class MixedStream:
    """Several endless sources, interleaved sequence by sequence in proportion to their weights."""

    def __init__(self, streams: list[SourceStream], seed: int, rank: int) -> None:
        weights = np.array([stream.source.weight for stream in streams])
        self._streams = streams
        self._weights = weights / weights.sum()
        self._random = np.random.RandomState(np.array((seed, rank)))

    def __iter__(self) -> Iterator[Sequence]:
        iterators = [iter(stream) for stream in self._streams]
        while True:
            yield next(iterators[self._random.choice(len(iterators), p=self._weights)])

    def __len__(self) -> int:
        """Samples in an epoch."""
        return sum(map(len, self._streams))

    def count_epoch(self, progress: tqdm) -> int:
        """Positions that it takes to pack every sample once; the place in the stream stays what it is.

        Of each source's last sequence, which its next epoch goes on filling, only those taken so far are counted.

        Args:
            progress: told of the samples read.

        Raises:
            BadRowError: a row that cannot be trained on.
        """
        positions = 0
        for stream in self._streams:
            once, padding, before = stream.once(), 0, progress.n
            for sequence in once:
                positions, padding = positions + len(sequence.x), sequence.padding
                progress.update(before + once.state["counts"]["samples"] - progress.n)
            positions -= padding
        return positions

    def state_dict(self) -> dict[str, Any]:
        """Where the stream goes on: plain numbers and lists."""
        name, keys, position, *gauss = self._random.get_state(legacy=True)
        return {
            "sources": [dict(stream.state) for stream in self._streams],
            "layouts": [stream.layouts() for stream in self._streams],
            "random": [name, keys.tolist(), position, *gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; takes effect with the next iteration.

        Raises:
            UserError: the files are not those any more of which `state` tells the place.
        """
        for stream, source_state, layouts in zip(self._streams, state["sources"], state["layouts"], strict=True):
            if stream.layouts() != layouts:
                raise UserError(
                    f"{stream.source.path} has changed since the checkpoint was saved, so the place in it means "
                    "nothing any more. Put the file back as it was, or start a new run with another `run_dir`."
                )
            stream.state = dict(source_state)
        self._random.set_state(tuple(state["random"]))


class EvalStream:
    """All rows once, the sources one after the other; each ends with a padded sequence."""

    def __init__(self, streams: list[SourceStream]) -> None:
        self._streams = streams

    def __iter__(self) -> Iterator[Sequence]:
        for stream in self._streams:
            stream.rewind()
            yield from stream


def build_packing(encoder: SampleEncoder, args: DataArgs, seq_len: int) -> tuple[Encoder, Packing]:
    """What `data.packing` asks for: how rows are encoded and how samples become sequences."""
    if args.packing == "concat":
        return encoder, functools.partial(concat, seq_len=seq_len)
    fitting = FittingEncoder(encoder, seq_len, args.overlong, args.keep_sections)
    return fitting, functools.partial(best_fit, seq_len=seq_len)


def build_training_stream(
    encoder: SampleEncoder, args: DataArgs, seq_len: int, seed: int, rank: int, world_size: int
) -> MixedStream:
    """The stream a rank trains on: pretrain sources first, then instruct sources, mixed by weight.

    Raises:
        UserError: bad sources, a seed numpy refuses, or a source with nothing for this rank.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"`seed` is {seed}; it must lie between 0 and 2**32 - 1.")
    pretrain, instruct = training_sources(args)
    if not pretrain and not instruct:
        raise UserError("`data.instruct_data` and `data.data` are both empty: name at least one training source.")
    common = (*build_packing(encoder, args, seq_len), rank, world_size)
    pretrain_seed = seed if args.shuffle else None
    instruct_seed = seed if args.instruct.shuffle else None
    chunk = args.instruct.dynamic_chunk_fn_call
    return MixedStream(
        [SourceStream(source, SampleType.PRETRAIN, *common, pretrain_seed) for source in pretrain]
        + [SourceStream(source, SampleType.INSTRUCT, *common, instruct_seed, chunk) for source in instruct],
        seed,
        rank,
    )


def build_eval_stream(encoder: SampleEncoder, args: DataArgs, seq_len: int, rank: int, world_size: int) -> EvalStream:
    """The stream a rank evaluates on.

    Raises:
        UserError: bad sources or none.
    """
    sources = parse_sources(args.eval_instruct_data)
    if not sources:
        raise UserError("`data.eval_instruct_data` is empty: name evaluation data or set `no_eval: true`.")
    common = (*build_packing(encoder, args, seq_len), rank, world_size)
    return EvalStream([SourceStream(source, SampleType.INSTRUCT, *common, repeat=False) for source in sources])
