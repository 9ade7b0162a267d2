"""jsonl files -> an endless, seeded, resumable stream of packed sequences.

Only line offsets are kept in memory. A row is read and tokenized when it is needed, and the position in the stream is
a few integers: resuming reads no earlier row again, and only replays the shuffles of earlier epochs.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
import os
import time
import zlib
from array import array
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from model.errors import UserError

from .args import DataArgs, Source, parse_sources, training_sources
from .conversation import chunk_ends, parse_conversation
from .exceptions import BadRowError, RowError
from .packing import LOOKAHEAD, PACKERS, LocatedSample, Packer, PackingCounts, Sequence, pack
from .rows import MAX_ROW_BYTES, line_offsets, parse_row, read_line, require_row_size
from .shorten import FittingEncoder
from .tokenize import SampleEncoder, SampleType, TokenSample

logger = logging.getLogger("data")

Encoder = SampleEncoder | FittingEncoder

_WORDS_OF_TOOLS = (b"tools", b"only_last")  # in each row with shorter conversations
_ALL_MESSAGES = 0  # an entry that is the complete row, not a shorter conversation
_SETTLED_NS = 50_000_000  # a file written more recently may be written again without a new modification time
_Stamp = tuple[int, int, int, int]


class _Places:
    """The offsets at which words begin in a file that is read block by block."""

    def __init__(self, words: tuple[bytes, ...]) -> None:
        self.found = array("q")
        self._words = words
        self._kept = max(map(len, words)) - 1
        self._read, self._end = 0, b""  # bytes read, and the last of them, in which a word may begin

    def look_at(self, block: bytes) -> None:
        """Search the next block."""
        data, start = self._end + block, self._read - len(self._end)
        for word in self._words:
            place = data.find(word)
            while place >= 0:
                self.found.append(start + place)
                place = data.find(word, place + 1)
        self._read += len(block)
        self._end = data[max(0, len(data) - self._kept) :]


class JsonlFile:
    """The rows of one file that one rank reads: row i belongs to rank i mod world_size.

    Args:
        path: the jsonl file.
        sample_type: what its rows are.
        chunk: whether to add the shorter conversations of rows with tools.
        rank: this process.
        world_size: number of processes.

    Attributes:
        fingerprint: SHA-256 of the file's content.

    Raises:
        UserError: the file cannot be read.
        BadRowError: with `chunk`, a row with tools that cannot be trained on.
    """

    def __init__(self, path: Path, sample_type: SampleType, chunk: bool, rank: int, world_size: int) -> None:
        self.path = path
        self.sample_type = sample_type
        self._stamp = _stamp(path)
        digest, of_tools = hashlib.sha256(), _Places(_WORDS_OF_TOOLS)
        offsets = line_offsets(path, digest.update, *([of_tools.look_at] if chunk else []))
        self.fingerprint = digest.hexdigest()
        self.total_rows = len(offsets) - 1
        self.checksum = zlib.crc32(offsets.tobytes())  # changes if rows are added, removed or change their lengths
        self._rows = np.arange(rank, self.total_rows, world_size, dtype=np.int64)
        self._starts, self._ends = offsets[self._rows], offsets[self._rows + 1]
        # An entry is (index into _rows, messages to keep); the rank's rows first, then the shorter conversations.
        whole = np.stack([np.arange(len(self._rows)), np.full(len(self._rows), _ALL_MESSAGES)], axis=1)
        has_tools = np.isin(self._rows, np.searchsorted(offsets, of_tools.found, side="right") - 1)
        self.entries = np.concatenate([whole, self._chunks(has_tools)]) if chunk else whole

    def __len__(self) -> int:
        return len(self.entries)

    def _chunks(self, has_tools: np.ndarray) -> np.ndarray:
        """Return the entries of shorter conversations, given which rows may have tools: parsing the others is slow."""
        is_too_long = self._ends - self._starts > MAX_ROW_BYTES  # reading the row reports it
        found = []
        with self.open() as file:
            for index in np.flatnonzero(has_tools | is_too_long).tolist():
                found += [(index, keep) for keep in self._chunk_ends(file, index)]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def _chunk_ends(self, file: BufferedReader, index: int) -> list[int]:
        try:
            line = read_line(file, self._starts[index], self._ends[index])  # read again, and checked, for training
            return chunk_ends(parse_conversation(parse_row(line)))
        except RowError as error:
            raise self._bad_row(index, error) from error

    @contextlib.contextmanager
    def open(self) -> Iterator[BufferedReader]:
        """Open the file for `encode`.

        Raises:
            UserError: it cannot be opened or read any more.
        """
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read any more: {error.strerror}. Restore it and start again; data files must "
                "stay in place while they are in use."
            ) from error

    def _read(self, file: BufferedReader, index: int) -> bytes:
        line = read_line(file, self._starts[index], self._ends[index])
        stamp = _stamp(file.fileno())
        if stamp is None or stamp != self._stamp:
            self._require_same_content(file, stamp)
        return line

    def _require_same_content(self, file: BufferedReader, stamp: _Stamp | None) -> None:
        """Raise UserError if the open `file` is not what was indexed; another modification time alone is accepted."""
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != self.fingerprint:
            raise UserError(
                f"{self.path} has changed since this command started to read it, so its rows are no longer known. "
                "Restore the file and start again; do not change data files while they are in use."
            )
        self._stamp = stamp

    def require_row_sizes(self) -> None:
        """Raise BadRowError if the longest line is too long for a row; read nothing."""
        if not len(self._rows):
            return
        sizes = self._ends - self._starts
        longest = int(sizes.argmax())
        try:
            require_row_size(int(sizes[longest]))
        except RowError as error:
            raise self._bad_row(longest, error) from error

    def _bad_row(self, index: int, error: RowError) -> BadRowError:
        return BadRowError(self.path, int(self._rows[index]) + 1, error)

    def line(self, entry: int) -> int:
        """Return the line number of an entry's row, counted from 1."""
        return int(self._rows[self.entries[entry][0]]) + 1

    def encode(self, file: BufferedReader, entry: int, encoder: Encoder) -> TokenSample:
        """Read and tokenize one entry through the open `file`.

        Raises:
            BadRowError: the row cannot be trained on.
        """
        index, keep = self.entries[entry]
        try:
            row = parse_row(self._read(file, index))
            if keep == _ALL_MESSAGES:
                return encoder.encode(row, self.sample_type)
            return encoder.encode_conversation(parse_conversation(row).up_to(keep))
        except RowError as error:
            raise self._bad_row(index, error) from error


def _stamp(file: Path | int) -> _Stamp | None:
    """Return what changes if a file is replaced or written; None if it was written too recently to rely on that."""
    try:
        facts = os.stat(file)
    except OSError:
        return None  # reading the file reports the error
    is_settled = time.time_ns() - facts.st_mtime_ns > _SETTLED_NS
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns) if is_settled else None


@dataclasses.dataclass(frozen=True)
class Cursor:
    """The position of a sample in a source's endless stream."""

    epoch: int
    file: int  # index in the source's list of files
    place: int  # position in the file's order of this epoch
    entry: int  # index of the file's entry, whatever the order


# The beginning of a source's stream. `waiting` lists (epoch, file, entry) of samples read ahead and not yet packed.
_START: dict[str, Any] = {
    "epoch": 0,
    "file": 0,
    "place": 0,
    "offset": 0,
    "waiting": [],
    "counts": dataclasses.asdict(PackingCounts()),
}


class SourceStream:
    """One source: its files one after the other, endlessly or once, packed into sequences.

    Args:
        source: file or folder.
        sample_type: what its rows are.
        encoder: tokenizes rows.
        packing: a key of PACKERS.
        seq_len: positions per sequence.
        rank: this process.
        world_size: number of processes.
        shuffle_seed: seed of the row order of each epoch; None keeps the order of the files.
        chunk: whether to add the shorter conversations of rows with tools.
        repeat: endless if true, else one epoch.

    Raises:
        UserError: there is nothing for this rank to read.
    """

    def __init__(
        self,
        source: Source,
        sample_type: SampleType,
        *,
        encoder: Encoder,
        packing: str,
        seq_len: int,
        rank: int,
        world_size: int,
        shuffle_seed: int | None = None,
        chunk: bool = False,
        repeat: bool = True,
    ) -> None:
        self.source = source
        self._encoder = encoder
        self._packer = PACKERS[packing]
        self._seq_len = seq_len
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
        """Return the samples of an epoch."""
        return sum(map(len, self._files))

    def once(self) -> Self:
        """Return a stream of the first epoch's samples in the same order; this stream's position does not change."""
        stream = copy.copy(self)
        stream._repeat, stream._warned = False, True
        stream.rewind()
        return stream

    def count_positions(self, progress: tqdm) -> int:
        """Count the positions of all sequences, of the last one only as far as it is filled.

        Call it on a stream that does not repeat, see `once`; the position does not change.

        Args:
            progress: updated with the samples read.

        Raises:
            BadRowError: a row that cannot be trained on.
        """
        packer: Packer[LocatedSample[Cursor]] = self._packer(self._seq_len)
        self._counts, before = PackingCounts(), progress.n
        positions = padding = 0
        for packed in pack(packer, self._samples(self.state)):
            padding = self._seq_len - sum(piece.end - piece.start for piece in packed.pieces)
            positions += self._seq_len
            progress.update(before + self._counts.samples - progress.n)
        return positions - padding

    def checksums(self) -> list[int]:
        """Return a number per file that changes if its rows are added, removed or change their lengths."""
        return [file.checksum for file in self._files]

    def fingerprints(self) -> dict[str, str]:
        """Return the hash of each file's content, by path."""
        return {str(file.path): file.fingerprint for file in self._files}

    def rewind(self) -> None:
        """Return to the first row."""
        self.state = dict(_START)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved `state` with the next iteration.

        Raises:
            UserError: the state is not a position of this stream.
        """
        if state != _START and not self._is_position(state):
            raise UserError(f"The saved position in {self.source.path} is not valid: the checkpoint is corrupt.")
        self.state = dict(state)

    def _is_position(self, state: dict[str, Any]) -> bool:
        """Return whether a state whose numbers are whole and not negative belongs to this stream."""
        epoch, file, place, waiting = (state[key] for key in ("epoch", "file", "place", "waiting"))
        if file >= len(self._files) or place >= len(self._files[file]):
            return False
        if len(waiting) >= LOOKAHEAD or (waiting and self._packer is not PACKERS["best_fit"]):
            return False
        if any(e > epoch or f >= len(self._files) or entry >= len(self._files[f]) for e, f, entry in waiting):
            return False
        counts = PackingCounts(**state["counts"])
        read = epoch * len(self) + sum(map(len, self._files[:file])) + place + 1
        # Two epochs have a trained position at least, see _samples: this bounds the shuffles to replay.
        return counts.samples == read and epoch <= 2 * (counts.positions + LOOKAHEAD)

    def __iter__(self) -> Iterator[Sequence]:
        """Yield sequences from `state` on; `state` is always the position after the last one."""
        waiting = tuple(self._waiting_sample(*position) for position in self.state["waiting"])
        packer = self._packer(self._seq_len, self.state["offset"], waiting)
        self._counts = PackingCounts(**self.state["counts"])
        for packed in pack(packer, self._samples(self.state)):
            rows = [self._locate(piece.item.cursor) for piece in packed.pieces]
            sequence = Sequence.of(packed.pieces, self._seq_len, rows)
            self._counts = self._counts.with_sequence(sequence)
            last = packed.last.cursor
            self.state = {
                "epoch": last.epoch,
                "file": last.file,
                "place": last.place,
                "offset": packed.offset,
                "waiting": [[cursor.epoch, cursor.file, cursor.entry] for cursor, _ in packed.waiting],
                "counts": dataclasses.asdict(self._counts),
            }
            yield sequence

    def _locate(self, cursor: Cursor) -> str:
        """Return FILE:LINE."""
        file = self._files[cursor.file]
        return f"{file.path}:{file.line(cursor.entry)}"

    def _waiting_sample(self, epoch: int, file: int, entry: int) -> LocatedSample[Cursor]:
        with self._files[file].open() as handle:
            sample = self._files[file].encode(handle, entry, self._encoder)
        return LocatedSample(Cursor(epoch, file, 0, entry), sample)

    def _samples(self, start: dict[str, Any]) -> Iterator[LocatedSample[Cursor]]:
        idle = 0  # consecutive samples without a trained token
        counted = start["offset"] > 0  # the first sample, before the interruption
        for epoch, index, order in self._orders(start["epoch"]):
            if epoch == start["epoch"] and index < start["file"]:
                continue
            first = start["place"] if (epoch, index) == (start["epoch"], start["file"]) else 0
            file = self._files[index]
            with file.open() as handle:
                for place, entry in enumerate(order[first:].tolist(), first):
                    sample = file.encode(handle, entry, self._encoder)
                    if counted and start["offset"] > max(1, len(sample.tokens) - 1):
                        raise UserError(f"The saved position in {file.path} is not valid: the checkpoint is corrupt.")
                    if not counted:
                        self._count(sample, file, entry)
                    counted = False
                    idle = 0 if any(sample.masks[1:]) else idle + 1
                    yield LocatedSample(Cursor(epoch, index, place, entry), sample)
            if self._repeat and idle >= len(self):
                raise UserError(
                    f"No row of {self.source.path} assigned to this process has a trainable token: "
                    "is every assistant message's `weight` 0, or every sample longer than `seq_len`?"
                )

    def _count(self, sample: TokenSample, file: JsonlFile, entry: int) -> None:
        self._counts = self._counts.with_sample(sample)
        if sample.removed and not self._warned:
            self._warned = True
            what = f"{sample.removed:,} tokens inside its longest text were" if sample.tokens else "it was"
            logger.warning(
                "The sample in line %s of %s is longer than `seq_len`: %s left out. Further ones are only counted.",
                file.line(entry),
                file.path,
                what,
            )

    def _orders(self, first_epoch: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (epoch, file, order of its entries).

        Each epoch shuffles the order of the previous one in place, so the shuffles of earlier epochs are replayed:
        index arithmetic only, no row is read.
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
        return f"{path} contains no rows; a jsonl file has one JSON object per line."
    return (
        f"{path} has too few rows ({rows}) for {world_size} processes: process {rank} has none to read. "
        f"Start at most {rows} processes (--nproc-per-node) or add rows."
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
        """Return the samples of an epoch."""
        return sum(map(len, self._streams))

    def count_epoch(self, progress: tqdm) -> int:
        """Count the positions that packing every sample once takes; the stream's position does not change.

        The last sequence of each source, which the next epoch continues, counts only as far as it is filled.

        Args:
            progress: updated with the samples read.

        Raises:
            BadRowError: a row that cannot be trained on.
        """
        return sum(stream.once().count_positions(progress) for stream in self._streams)

    def fingerprints(self) -> dict[str, str]:
        """Return the hash of each file's content, by path."""
        return {path: digest for stream in self._streams for path, digest in stream.fingerprints().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream as plain numbers and lists."""
        state = self._random.get_state(legacy=False)
        keys, position = state["state"]["key"].tolist(), state["state"]["pos"]
        return {
            "sources": [dict(stream.state) for stream in self._streams],
            "layouts": [stream.checksums() for stream in self._streams],
            "random": [state["bit_generator"], keys, position, state["has_gauss"], state["gauss"]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` with the next iteration.

        Raises:
            UserError: the files have changed since `state` was saved, or it is not a position in them.
        """
        if not len(state["sources"]) == len(state["layouts"]) == len(self._streams):
            raise UserError(f"The checkpoint has positions of {len(state['sources'])} sources, not of these.")
        for stream, source_state, checksums in zip(self._streams, state["sources"], state["layouts"], strict=True):
            if stream.checksums() != checksums:
                raise UserError(
                    f"{stream.source.path} has changed since the checkpoint was saved, so the position in it is no "
                    "longer valid. Restore the file, or start a new run with another `run_dir`."
                )
            stream.load_state_dict(source_state)
        self._random.set_state(tuple(state["random"]))


class EvalStream:
    """All rows once, one source after the other; each source ends with a padded sequence."""

    def __init__(self, streams: list[SourceStream]) -> None:
        self._streams = streams

    def __iter__(self) -> Iterator[Sequence]:
        for stream in self._streams:
            stream.rewind()
            yield from stream


def build_training_stream(
    encoder: SampleEncoder, args: DataArgs, seq_len: int, seed: int, rank: int, world_size: int
) -> MixedStream:
    """Build the stream that a rank trains on: pretrain sources first, then instruct sources, mixed by weight.

    Raises:
        UserError: bad sources, a seed that numpy does not accept, or a source with nothing for this rank.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"`seed` is {seed}; it must lie between 0 and 2**32 - 1.")
    pretrain, instruct = training_sources(args)
    if not pretrain and not instruct:
        raise UserError("`data.instruct_data` and `data.data` are both empty: name at least one training source.")
    build = _stream_builder(encoder, args, seq_len, rank, world_size)
    pretrain_seed = seed if args.shuffle else None
    instruct_seed = seed if args.instruct.shuffle else None
    chunk = args.instruct.dynamic_chunk_fn_call
    streams = [build(source, SampleType.PRETRAIN, shuffle_seed=pretrain_seed) for source in pretrain]
    streams += [build(source, SampleType.INSTRUCT, shuffle_seed=instruct_seed, chunk=chunk) for source in instruct]
    return MixedStream(streams, seed, rank)


def build_eval_stream(encoder: SampleEncoder, args: DataArgs, seq_len: int, rank: int, world_size: int) -> EvalStream:
    """Build the stream that a rank evaluates on.

    Raises:
        UserError: bad sources or none.
    """
    sources = parse_sources(args.eval_instruct_data)
    if not sources:
        raise UserError("`data.eval_instruct_data` is empty: name evaluation data or set `no_eval: true`.")
    build = _stream_builder(encoder, args, seq_len, rank, world_size)
    return EvalStream([build(source, SampleType.INSTRUCT, repeat=False) for source in sources])


def _stream_builder(
    encoder: SampleEncoder, args: DataArgs, seq_len: int, rank: int, world_size: int
) -> "functools.partial[SourceStream]":
    row_encoder: Encoder = encoder
    if args.packing == "best_fit":  # packs whole samples only
        row_encoder = FittingEncoder(encoder, seq_len, args.overlong, args.keep_sections)
    return functools.partial(
        SourceStream, encoder=row_encoder, packing=args.packing, seq_len=seq_len, rank=rank, world_size=world_size
    )
