"""Read rows exactly as training does, on all cores; collect their lengths, errors and warnings."""

import collections
import dataclasses
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.args import DataArgs
from finetune.data.conversation import Conversation, chunk_ends, message_text, parse_conversation, pretrain_text
from finetune.data.dataset import JsonlFile
from finetune.data.exceptions import BadRowError, RowError
from finetune.data.rows import shown
from finetune.data.shorten import FittingEncoder
from finetune.data.tokenize import SampleEncoder, SampleType, TokenSample
from finetune.data.tools import read_arguments
from model.errors import UserError
from utils.icd10.predictions import FACT_COLUMNS
from utils.validation.packing_forecast import PackedSample

_ROWS_AT_ONCE = 128
_TASKS_AHEAD = 8  # per process; results are returned in order, so more would only use memory
_SMALL = 1 << 20  # bytes; reading fewer takes less time than starting processes
# A forked process is ready at once; a spawned one imports everything again.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_OF_PREPARATION = frozenset(("id", *FACT_COLUMNS))  # keys that utils.prepare_icd10_data writes for evaluation
_TRAINED = re.compile(b"\x01+")


class Task(NamedTuple):
    """Rows [first, last) of a file."""

    file: int  # index in the list of files
    first: int
    last: int


class FileToCheck(NamedTuple):
    """A file whose rows are checked."""

    rows: JsonlFile
    chunk: bool = False  # whether rows with tools also train shorter conversations


@dataclasses.dataclass
class CheckedRows:
    """What was found in some rows of a file. Lines are counted from 1."""

    file: int  # index in the list of files
    count: int  # rows, including bad ones
    training: int = 0  # rows with trained tokens
    samples: list[PackedSample] = dataclasses.field(default_factory=list)  # of the good rows
    chunks: list[PackedSample] = dataclasses.field(default_factory=list)  # shorter conversations made of them
    errors: list[tuple[int, RowError]] = dataclasses.field(default_factory=list)
    warnings: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    with_unread_keys: int = 0  # good rows
    unread: set[str] = dataclasses.field(default_factory=set)  # names of their keys that are not read


class RecordingEncoder(SampleEncoder):
    """Encode rows as in training, and record their lengths and warnings.

    Args:
        instruct_tokenizer: of the model.
        data: packing, and the treatment of samples longer than a sequence.
        seq_len: positions of a sequence.
        chunk: whether rows with tools also train shorter conversations.
    """

    def __init__(self, instruct_tokenizer: InstructTokenizerBase, data: DataArgs, seq_len: int, chunk: bool) -> None:
        super().__init__(instruct_tokenizer)
        self._seq_len = seq_len
        self._chunk = chunk
        self._packs_whole = data.packing == "best_fit"
        self._drops = data.overlong == "drop"
        self._fitting = FittingEncoder(self, seq_len, data.overlong, data.keep_sections)
        self.training = 0
        self.samples: list[PackedSample] = []
        self.chunks: list[PackedSample] = []
        self.warnings: list[str] = []  # about the last row
        self.with_unread_keys = 0
        self.unread: set[str] = set()

    def encode(self, row: dict[str, Any], sample_type: SampleType) -> TokenSample:
        """Encode a row like `SampleEncoder.encode`. Nothing is recorded of a row that raises an error."""
        chunks: list[PackedSample] = []
        unread: set[str] = set()
        self.warnings = []
        if sample_type is SampleType.PRETRAIN:
            sample = self.encode_text(pretrain_text(row, unread))
            packed = self._packed(sample, lambda: self._fitting.encode(row, sample_type))
        else:
            conversation = parse_conversation(row)
            sample = self.encode_conversation(conversation)
            packed = self._packed(sample, lambda: self._fitting.encode_conversation(conversation))
            if self._chunk:
                chunks = [self._packed_chunk(conversation, keep) for keep in chunk_ends(conversation)]
            self.warnings = find_warnings(conversation)
            unread = conversation.unread - _OF_PREPARATION
        if not packed.trained:
            self.warnings.append("It has no trained token: each answer that would be trained has `weight` 0.")
        elif self._packs_whole and not packed.fitted:
            reason = f"It is dropped: its {len(sample.tokens):,} tokens do not fit in `seq_len`"
            if self._drops:
                self.warnings.append(f"{reason}. Increase `seq_len`, or set `data.overlong: shorten`.")
            else:
                self.warnings.append(f"{reason}, even with its note shortened. Increase `seq_len` or edit the row.")
        else:
            self.training += 1
        self.samples.append(packed)
        self.chunks += chunks
        self.with_unread_keys += bool(unread)
        self.unread |= unread
        return sample

    def _packed_chunk(self, conversation: Conversation, keep: int) -> PackedSample:
        shorter = conversation.up_to(keep)
        sample = self.encode_conversation(shorter)
        return self._packed(sample, lambda: self._fitting.encode_conversation(shorter))

    def _packed(self, sample: TokenSample, fit: Callable[[], TokenSample]) -> PackedSample:
        positions = fitted = len(sample.tokens) - 1
        if positions > self._seq_len:
            if self._packs_whole:
                fitted = max(len(fit().tokens) - 1, 0)
            else:  # concat splits it; for comparison, an estimate of what best_fit would keep
                fitted = 0 if self._drops else self._seq_len
        trained = tuple(match.span() for match in _TRAINED.finditer(_as_bytes(sample.masks[1:])))
        return PackedSample(positions, trained, fitted)


def _as_bytes(masks: list[bool | float]) -> bytes:
    """Return 1 for each trained token and 0 for the others."""
    try:
        return bytes(masks)  # type: ignore[arg-type]  # of most rows: bools, which are integers
    except TypeError:  # a weight between 0 and 1
        return bytes(map(bool, masks))


def find_warnings(conversation: Conversation) -> list[str]:
    """Return what mistral-common accepts, but is probably a mistake."""
    declared = {tool.function.name for tool in conversation.tools or []}
    answers = (message for message in conversation.messages if isinstance(message, AssistantMessage))
    calls = [call for message in answers for call in message.tool_calls or []]
    called = {call.function.name for call in calls}
    undeclared = sorted(called - declared)
    found = [f"It calls the function {shown(name)}, which its tools do not declare." for name in undeclared]
    found += [warning for call in calls if (warning := _argument_warning(call.function.arguments))]
    found += _blank_messages(conversation)
    for before, message in zip(conversation.messages, conversation.messages[1:]):
        if isinstance(before, ToolMessage) and isinstance(message, UserMessage):
            found.append("A user message follows a tool message without an assistant message in between.")
    return found


def _argument_warning(arguments: str) -> str | None:
    """Return what is wrong with arguments that are accepted as context only."""
    try:
        read_arguments(arguments)
    except RowError as error:
        return str(error)
    return None


def _blank_messages(conversation: Conversation) -> list[str]:
    blank = [message for message in conversation.messages if not message_text(message).strip()]
    found = []
    if any(isinstance(message, UserMessage) for message in blank):
        found.append("A user message is empty or blank.")
    if any(isinstance(message, AssistantMessage) and not message.tool_calls for message in blank):
        found.append("An assistant message is blank: it trains an answer that says nothing.")
    return found


@dataclasses.dataclass(frozen=True)
class RowChecker:
    """Check the rows of a list of files."""

    files: list[FileToCheck]
    instruct_tokenizer: InstructTokenizerBase
    data: DataArgs
    seq_len: int

    def tasks(self) -> Iterator[Task]:
        """Yield all rows of all files, in order."""
        for index, file in enumerate(self.files):
            for first in range(0, len(file.rows), _ROWS_AT_ONCE):
                yield Task(index, first, min(first + _ROWS_AT_ONCE, len(file.rows)))

    def check(self, task: Task) -> CheckedRows:
        rows, chunk = self.files[task.file]
        encoder = RecordingEncoder(self.instruct_tokenizer, self.data, self.seq_len, chunk)
        checked = CheckedRows(task.file, task.last - task.first)
        with rows.path.open("rb") as handle:
            for entry in range(task.first, task.last):
                try:
                    rows.encode(handle, entry, encoder)
                    checked.warnings += [(entry + 1, warning) for warning in encoder.warnings]
                except BadRowError as bad:
                    checked.errors.append((bad.line, bad.error))
        return dataclasses.replace(
            checked,
            training=encoder.training,
            samples=encoder.samples,
            chunks=encoder.chunks,
            with_unread_keys=encoder.with_unread_keys,
            unread=encoder.unread,
        )

    def check_all(self, workers: int) -> Iterator[CheckedRows]:
        """Check all rows with `workers` processes; yield results in the order of the rows.

        Raises:
            UserError: a process was killed.
        """
        if workers == 1 or sum(file.rows.path.stat().st_size for file in self.files) < _SMALL:
            yield from map(self.check, self.tasks())
            return
        context = multiprocessing.get_context(_START_METHOD)
        with ProcessPoolExecutor(workers, context, _start_process, (self,)) as executor:
            try:
                yield from _in_order(executor, self.tasks(), workers * _TASKS_AHEAD)
            except BrokenProcessPool as error:
                raise UserError("A process was killed, perhaps for lack of memory; try --num_workers 1.") from error
            finally:
                executor.shutdown(cancel_futures=True)


def _in_order(executor: ProcessPoolExecutor, tasks: Iterator[Task], ahead: int) -> Iterator[CheckedRows]:
    waiting: collections.deque[Future[CheckedRows]] = collections.deque()
    for task in tasks:
        waiting.append(executor.submit(_check, task))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_checker: RowChecker  # of a worker process


def _start_process(checker: RowChecker) -> None:
    global _checker
    _checker = checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is killed: it cannot stop its workers, which would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker process"
    parent.join()
    os._exit(1)


def _check(task: Task) -> CheckedRows:
    return _checker.check(task)
