"""Packing: no token invented or lost, best_fit splits no sample, resumable anywhere. Tokens encode their sample."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data import packing
from finetune.data.args import DataArgs, InstructArgs
from finetune.data.dataset import MixedStream, build_eval_stream, build_training_stream
from finetune.data.packing import BestFit, Concat, LocatedSample, PackingCounts, Sequence, pack
from finetune.data.tokenize import SampleEncoder, TokenSample
from finetune.monitoring.summary import summary
from tests.support.tiny_tekken import load_tiny_tekken

SEQ_LEN = 16
WIDTH = 1000  # token = sample * WIDTH + position in the sample + 1, so that no token is 0 and each is unique


class Place(NamedTuple):
    """A cursor like those of dataset.py."""

    epoch: int
    index: int


Stream = list[LocatedSample[Place]]


def sample(index: int, masks: list[bool]) -> TokenSample:
    return TokenSample([index * WIDTH + place + 1 for place in range(len(masks))], masks)


def stream_of(all_masks: Iterable[list[bool]], epochs: int = 1) -> Stream:
    """The samples once per epoch, distinguished by cursor and tokens."""
    rows = list(enumerate(itertools.chain.from_iterable([list(all_masks)] * epochs)))
    per_epoch = max(len(rows) // epochs, 1)
    return [LocatedSample(Place(index // per_epoch, index), sample(index, masks)) for index, masks in rows]


def documents(sequence: Sequence) -> list[tuple[list[int], list[int], list[bool]]]:
    """(x, y, mask) of each document, without padding."""
    ends = np.cumsum(sequence.sizes).tolist()
    parts = [
        tuple(array[start:end].tolist() for array in (sequence.x, sequence.y, sequence.mask))
        for start, end in zip([0, *ends], ends)
    ]
    return parts[:-1] if sequence.padding else parts


def assert_valid(sequence: Sequence, seq_len: int) -> None:
    """Check shapes, and that padding is a separate, masked document of zeros."""
    assert len(sequence.x) == len(sequence.y) == len(sequence.mask) == sum(sequence.sizes) == seq_len
    assert (sequence.x.dtype, sequence.y.dtype, sequence.mask.dtype) == (np.int64, np.int64, bool)
    assert min(sequence.sizes) > 0
    filled = seq_len - sequence.padding
    assert sequence.x[:filled].all() and not sequence.x[filled:].any() and not sequence.y[filled:].any()
    assert not sequence.mask[filled:].any()
    assert not sequence.padding or sequence.sizes[-1] == sequence.padding


def as_lists(sequence: Sequence) -> tuple:
    return sequence.x.tolist(), sequence.y.tolist(), sequence.mask.tolist(), sequence.sizes, sequence.padding


class Resume(NamedTuple):
    """Where packing continues after a sequence."""

    cursor: Place
    offset: int
    waiting: tuple[Place, ...]


def sequences_of(packer: type[BestFit] | type[Concat], stream: Iterable, seq_len: int = SEQ_LEN) -> Iterator[Sequence]:
    return (sequence for sequence, _ in resumable(packer(seq_len), stream, seq_len))


def resumable(packer: BestFit | Concat, stream: Iterable, seq_len: int = SEQ_LEN) -> Iterator[tuple[Sequence, Resume]]:
    for packed in pack(packer, stream):
        resume = Resume(packed.last.cursor, packed.offset, tuple(item.cursor for item in packed.waiting))
        yield Sequence.of(packed.pieces, seq_len), resume


def resumed(packer: type[BestFit] | type[Concat], stream: Stream, resume: Resume) -> Iterator[tuple[Sequence, Resume]]:
    """Resume as dataset.py does: from the cursor's sample on, with the waiting ones read again."""
    known = {item.cursor: item for item in stream}
    start = [item.cursor for item in stream].index(resume.cursor)
    waiting = tuple(known[cursor] for cursor in resume.waiting)
    return resumable(packer(SEQ_LEN, resume.offset, waiting), stream[start:])


def masks_up_to(tokens: int) -> st.SearchStrategy[list[bool]]:
    """Prompt then answer, like our rows, or any mask; a dropped sample has an empty one."""
    share = st.integers(0, tokens)
    prompt_then_answer = st.tuples(share, share).map(lambda n: ([False] * n[0] + [True] * n[1])[:tokens])
    return st.one_of(prompt_then_answer, st.lists(st.booleans(), max_size=tokens))


FITTING = st.lists(masks_up_to(SEQ_LEN + 1), max_size=40)
ANY = st.lists(masks_up_to(3 * SEQ_LEN), max_size=25)
LOOKAHEADS = st.sampled_from([1, 2, 3, 8, 256])
a_few = settings(max_examples=150, deadline=None)


# ---- best_fit


@given(FITTING, LOOKAHEADS)
@example([[True] * (SEQ_LEN + 1)] * 3, 2)  # exact fits: no padding
@example([[True, False]], 1)  # no trained position: the first token is never predicted
@a_few
def test_best_fit_packs_every_sample_whole_and_once(all_masks, lookahead):
    with mock.patch.object(packing, "LOOKAHEAD", lookahead):
        sequences = list(sequences_of(BestFit, stream_of(all_masks)))
    for sequence in sequences:
        assert_valid(sequence, SEQ_LEN)
    packed = sorted(document for sequence in sequences for document in documents(sequence))
    assert packed == [
        (one.tokens[:-1], one.tokens[1:], one.masks[1:]) for _, one in stream_of(all_masks) if any(one.masks[1:])
    ]


@given(FITTING, LOOKAHEADS, st.integers(1, 3))
@a_few
def test_best_fit_resumes_after_any_sequence(all_masks, lookahead, epochs):
    stream = stream_of(all_masks, epochs)
    with mock.patch.object(packing, "LOOKAHEAD", lookahead):
        whole = [(as_lists(sequence), resume) for sequence, resume in resumable(BestFit(SEQ_LEN), stream)]
        for done, (_, resume) in enumerate(whole, start=1):
            assert resume.offset > 0  # the cursor's sample has been read, and counted
            rest = [(as_lists(sequence), resume) for sequence, resume in resumed(BestFit, stream, resume)]
            assert rest == whole[done:]


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=60), LOOKAHEADS)
@a_few
def test_best_fit_packs_every_sample_in_bounded_time(lengths, lookahead):
    """Each sequence starts with the sample that has waited longest: sample n is packed after n + 1 sequences."""
    stream = stream_of([[True] * (length + 1) for length in lengths])
    packed = 0
    with mock.patch.object(packing, "LOOKAHEAD", lookahead):
        for number, sequence in enumerate(sequences_of(BestFit, stream)):
            taken = {(x[0] - 1) // WIDTH for x, _, _ in documents(sequence)}
            assert number <= min(taken) == (sequence.x[0] - 1) // WIDTH
            assert max(taken) < packed + lookahead  # nothing beyond the look-ahead
            packed += len(taken)


def test_best_fit_packs_a_sample_that_never_fills_a_gap():
    """A sample of 9 of 16 positions never fills a gap: samples of 8 always come in pairs."""
    endless = (
        LocatedSample(Place(0, index), sample(index, [True] * (10 if index == 1 else 9))) for index in itertools.count()
    )
    with mock.patch.object(packing, "LOOKAHEAD", 8):
        sequences = list(itertools.islice(sequences_of(BestFit, endless), 4))
    assert any((x[0] - 1) // WIDTH == 1 for sequence in sequences for x, _, _ in documents(sequence))


def test_best_fit_packs_the_oldest_then_the_longest_that_fits():
    lengths = [6, 9, 4, 10, 3, 10]
    first, second, third = sequences_of(BestFit, stream_of([[True] * (n + 1) for n in lengths]))
    assert [sequence.sizes for sequence in (first, second, third)] == [[6, 10], [9, 4, 3], [10, 6]]
    assert (first.x[6] - 1) // WIDTH == 3  # of equal ones the first
    assert (first.padding, second.padding, third.padding) == (0, 0, 6)


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=30), st.integers(1, 6), st.randoms())
@a_few
def test_best_fit_sees_all_rows_about_equally_often_in_small_files(lengths, epochs, shuffle):
    """The look-ahead reaches over many epochs of a small file; no row may be seen much more often than another."""
    seen = Counter(dict.fromkeys(range(len(lengths)), 0))
    order = list(range(len(lengths)))
    stream = []
    for epoch in range(epochs):
        shuffle.shuffle(order)
        stream += [LocatedSample(Place(epoch, row), sample(row, [True] * (lengths[row] + 1))) for row in order]
    for sequence, resume in resumable(BestFit(SEQ_LEN), stream):
        seen.update((x[0] - 1) // WIDTH for x, _, _ in documents(sequence))
        assert max(seen.values()) - min(seen.values()) <= 2
        assert not resume.waiting or min(seen.values()) >= min(cursor.epoch for cursor in resume.waiting)
    assert set(seen.values()) == {epochs}


def test_best_fit_splits_no_icd_like_note_and_pads_little():
    """Notes of 1,500 tokens in the median, 6 % of them trained, in sequences of 8,192 (concat splits many of them)."""
    draw = random.Random(0)
    lengths = [min(max(int(draw.lognormvariate(np.log(1500), 0.5)), 200), 8193) for _ in range(1500)]
    assert 1400 < np.median(lengths) < 1600
    all_samples = [TokenSample([1] * n, [False] * (n - n // 16) + [True] * (n // 16)) for n in lengths]
    stream = [LocatedSample(Place(0, index), one) for index, one in enumerate(all_samples)]
    counts, documents_packed, split = PackingCounts(), [], 0
    for sequence in sequences_of(BestFit, stream, 8192):
        counts = counts.with_sequence(sequence)
        documents_packed += sequence.sizes[:-1] if sequence.padding else sequence.sizes
    for sequence in sequences_of(Concat, stream, 8192):
        split += len(Counter(sequence.sizes) - Counter(n - 1 for n in lengths))
    assert sorted(documents_packed) == sorted(n - 1 for n in lengths)
    assert counts.filled / counts.positions >= 0.97
    assert split > 100


# ---- concat


@given(ANY)
@a_few
def test_concat_loses_no_trained_token_and_only_whole_untrained_pieces(all_masks):
    """SPEC §4: samples are concatenated and split at sequence ends; a piece without trained positions is dropped."""
    stream = stream_of(all_masks)
    sequences = list(sequences_of(Concat, stream))
    for index, sequence in enumerate(sequences):
        assert_valid(sequence, SEQ_LEN)
        assert not sequence.padding or index == len(sequences) - 1  # only the remainder is padded
    trained = [y for sequence in sequences for y in sequence.y[sequence.mask].tolist()]
    assert trained == [
        token for _, one in stream for token, is_trained in zip(one.tokens[1:], one.masks[1:]) if is_trained
    ]  # all of them, once, in order
    for sequence in sequences:
        for x, y, mask in documents(sequence):
            assert any(mask)
            assert x == list(range(x[0], x[0] + len(x))) and y == [token + 1 for token in x]  # a run of one sample
        for x, _, _ in documents(sequence)[:-1]:
            tokens = stream[(x[0] - 1) // WIDTH].sample.tokens
            assert x[-1] == tokens[-2]  # only the end of a sequence splits a sample


def test_concat_skips_pieces_without_trained_positions():
    """Two rows of 11 untrained and 3 trained positions: the second's first 10 are skipped, two at a time."""
    stream = stream_of([[False] * 12 + [True] * 3] * 2)
    first, second = sequences_of(Concat, stream)
    assert first.sizes == [14, 2] and first.x[14:].tolist() == [WIDTH + 11, WIDTH + 12]
    assert first.mask.tolist() == [False] * 11 + [True] * 3 + [False, True]
    assert second.sizes == [2, 14] and second.x[:2].tolist() == [WIDTH + 13, WIDTH + 14] and second.padding == 14


@given(ANY, st.integers(1, 2))
@a_few
def test_concat_resumes_after_any_sequence(all_masks, epochs):
    stream = stream_of(all_masks, epochs)
    whole = [(as_lists(sequence), resume) for sequence, resume in resumable(Concat(SEQ_LEN), stream)]
    for done, (_, resume) in enumerate(whole, start=1):
        rest = [(as_lists(sequence), resume) for sequence, resume in resumed(Concat, stream, resume)]
        assert rest == whole[done:]


# ---- through files, ranks and epochs

ROWS = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> InstructTokenizerBase:
    return load_tiny_tekken(tmp_path_factory.mktemp("tekken"), "v3").instruct_tokenizer


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that contain their number: a note of random length, an answer."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            messages = [
                {"role": "user", "content": f"<{row}>" + "n" * draw.randrange(5, 150)},
                {"role": "assistant", "content": "a" * draw.randrange(1, 20)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def stream_from(
    path: Path, tokenizer: InstructTokenizerBase, seed: int = 0, rank: int = 0, world_size: int = 1, seq_len: int = 256
) -> MixedStream:
    args = DataArgs(instruct_data=str(path), packing="best_fit", instruct=InstructArgs(True, False))
    return build_training_stream(SampleEncoder(tokenizer), args, seq_len, seed, rank, world_size)


def rows_in(sequence: Sequence, tokenizer: InstructTokenizerBase) -> list[int]:
    """The numbers of the rows in a sequence; asserts that each is whole."""
    rows = []
    for x, y, _ in documents(sequence):
        text = tokenizer.tokenizer.decode([*x, y[-1]])
        assert text.count("<") == 1
        assert (x[0], y[-1]) == (tokenizer.tokenizer.bos_id, tokenizer.tokenizer.eos_id)
        rows.append(int(text[text.index("<") + 1 : text.index(">")]))
    return rows


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_a_rank_sees_each_of_its_rows_once_per_epoch_and_no_other(rows_file, tiny, rank, world_size):
    sequences = iter(stream_from(rows_file, tiny, rank=rank, world_size=world_size))
    own = range(rank, ROWS, world_size)
    seen = Counter(dict.fromkeys(own, 0))
    while min(seen.values()) < 3:
        sequence = next(sequences)
        assert_valid(sequence, 256)
        seen.update(rows_in(sequence, tiny))
        assert set(seen) == set(own)
        assert max(seen.values()) - min(seen.values()) <= 2


def test_one_epoch_is_every_row_once(rows_file, tiny):
    args = DataArgs(eval_instruct_data=str(rows_file), packing="best_fit")
    stream = build_eval_stream(SampleEncoder(tiny), args, 256, rank=0, world_size=1)
    assert sorted(row for sequence in stream for row in rows_in(sequence, tiny)) == list(range(ROWS))


def test_the_seed_determines_the_order(rows_file, tiny):
    def order(seed: int) -> list[int]:
        first = itertools.islice(stream_from(rows_file, tiny, seed), 20)
        return [row for sequence in first for row in rows_in(sequence, tiny)]

    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("taken", [1, 7, 30])
def test_a_stream_resumes_from_its_state_with_the_same_counts(rows_file, tiny, taken):
    whole = stream_from(rows_file, tiny)
    expected = []
    for sequence in itertools.islice(whole, taken + 10):
        expected.append((as_lists(sequence), whole.state_dict()))
    other = stream_from(rows_file, tiny)
    other.load_state_dict(json.loads(json.dumps(expected[taken - 1][1])))
    rest = [(as_lists(sequence), other.state_dict()) for sequence in itertools.islice(other, 10)]
    assert rest == expected[taken:]


# ---- counts


def test_counts_add_up():
    fitting, shortened = sample(0, [True] * 5), dataclasses.replace(sample(1, [True] * 6), removed=3)
    dropped = TokenSample([], [], removed=40)
    counts = PackingCounts()
    for one in (fitting, shortened, dropped, fitting):
        counts = counts.with_sample(one)
    stream = [LocatedSample(Place(0, 0), fitting), LocatedSample(Place(0, 1), shortened)]
    for sequence in sequences_of(BestFit, stream, 10):
        counts = counts.with_sequence(sequence)
    assert counts == PackingCounts(samples=4, shortened=1, dropped=1, removed_tokens=43, positions=10, filled=9)
    assert counts + counts == PackingCounts(8, 2, 2, 86, 20, 18)


def test_the_summary_reports_fill_and_removed_tokens():
    facts = dict.fromkeys(("steps", "max_steps", "skipped_steps", "tokens", "trained_tokens", "peak_bytes"), 0)
    facts |= dict.fromkeys(("wall_seconds", "train_seconds"), 0.0)
    facts |= {"first_loss": None, "last_loss": None, "eval_losses": {}, "checkpoint": None}

    def line(**counts: int) -> str:
        text = summary(**facts, packing=dataclasses.asdict(PackingCounts(**counts)))
        return next((line for line in text.splitlines() if line.startswith("  packing")), "").removeprefix("  packing")

    assert line(samples=4, positions=2000, filled=1962).strip() == "98.1% of positions filled"
    assert (
        line(samples=1234, shortened=12, dropped=1, removed_tokens=56789, positions=100, filled=100).strip()
        == "12 of 1,234 samples shortened, 1 dropped (56,789 tokens removed)"
    )
    assert line(samples=4, positions=100, filled=100) == line() == ""
