"""The forecasts match what training packs."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.packing import LOOKAHEAD, BestFit, Concat, LocatedSample, Sequence, pack
from finetune.data.tokenize import TokenSample
from utils.validation.packing_forecast import BestFitForecast, ConcatForecast, PackedSample

SEQ_LEN = 16
_MANY = 10_000  # more than any sample has positions


@dataclasses.dataclass(frozen=True)
class Cursor:
    epoch: int = 0


@st.composite
def masks(draw, longest: int) -> list[bool]:
    """Prompts alternating with answers, some of them empty."""
    spans = draw(st.lists(st.tuples(st.integers(0, longest), st.integers(0, 6)), min_size=1, max_size=3))
    mask = [trained for prompt, answer in spans for trained in [False] * prompt + [True] * answer]
    return mask or [False]


def sample_of(mask: list[bool]) -> PackedSample:
    """Return the sample of a mask, with spans found naively."""
    edges = [i for i, (a, b) in enumerate(zip([False, *mask], [*mask, False])) if a != b]
    return PackedSample(len(mask), tuple(zip(edges[::2], edges[1::2])), len(mask))


def tokens_of(number: int, mask: list[bool]) -> TokenSample:
    """Return a sample whose tokens encode their position: position p of sample n reads n * _MANY + p."""
    return TokenSample([number * _MANY + position for position in range(len(mask) + 1)], [False, *mask])


def packed_positions(samples: list[list[bool]], packer):
    """Return (sample, position, positions before it in its document, trained) of all that training keeps."""
    found, fills = [], []
    items = [LocatedSample(Cursor(), tokens_of(n, mask)) for n, mask in enumerate(samples)]
    for packed in pack(packer(SEQ_LEN), items):
        sequence = Sequence.of(packed.pieces, SEQ_LEN)
        fills.append(SEQ_LEN - sequence.padding)
        start = 0
        for size in sequence.sizes:
            for place in range(start, start + size):
                if place < SEQ_LEN - sequence.padding:
                    number, position = divmod(int(sequence.x[place]), _MANY)
                    found.append((number, position, place - start, bool(sequence.mask[place])))
            start += size
    return found, fills


@settings(max_examples=300, deadline=None)
@given(samples=st.lists(masks(longest=40), min_size=1, max_size=20))
def test_concat_forecast_matches_packing(samples):
    forecast = ConcatForecast(SEQ_LEN)
    for mask in samples:
        forecast.add(sample_of(mask))
    figures = forecast.figures()
    kept, _ = packed_positions(samples, Concat)
    prompted = {number for number, mask in enumerate(samples) if not mask[0]}
    answers = [row for row in kept if row[3] and row[0] in prompted]
    assert figures.samples == sum(any(mask) for mask in samples)
    assert figures.positions == sum(map(len, samples))
    assert figures.trained == sum(map(sum, samples))
    assert figures.lost == figures.positions - len(kept)
    assert figures.split_samples == len({number for number, position, seen, _ in answers if seen < position})
    assert figures.truncated_context_tokens == sum(seen + 1 < (position + 1) / 2 for _, position, seen, _ in answers)
    assert figures.sequences == pytest.approx(len(kept) / SEQ_LEN)
    assert figures.fill == 1 or not kept


@settings(max_examples=300, deadline=None)
@given(samples=st.lists(masks(longest=3).filter(lambda mask: len(mask) <= SEQ_LEN), min_size=1, max_size=60))
def test_best_fit_forecast_matches_packing(samples):
    with pytest.MonkeyPatch.context() as patch:  # a short look-ahead, so that short lists reach it
        patch.setattr("finetune.data.packing.LOOKAHEAD", 5)
        forecast = BestFitForecast(SEQ_LEN)
        for mask in samples:
            forecast.add(sample_of(mask))
        figures = forecast.figures()
        kept, fills = packed_positions(samples, BestFit)
    assert figures.split_samples == figures.truncated_context_tokens == 0
    assert figures.lost == figures.positions - len(kept)
    assert figures.filled == pytest.approx(sum(fills) / SEQ_LEN)
    counted = fills[:-1] or fills  # the next epoch continues the last one
    assert figures.fill == pytest.approx(sum(counted) / len(counted) / SEQ_LEN if fills else 0)


def test_best_fit_counts_shortened_and_dropped_samples():
    forecast = BestFitForecast(SEQ_LEN)
    forecast.add(PackedSample(20, ((18, 20),), SEQ_LEN))  # shortened
    forecast.add(PackedSample(30, ((28, 30),), 0))  # left out
    forecast.add(PackedSample(10, (), 10))  # not trained
    figures = forecast.figures()
    assert (figures.shortened, figures.dropped, figures.lost) == (1, 1, 4 + 30 + 10)
    assert figures.samples == 2


def test_best_fit_fills_sequences_of_icd_like_notes_and_concat_splits_them():
    chance = random.Random(0)
    forecasts = ConcatForecast(8192), BestFitForecast(8192)
    for _ in range(20 * LOOKAHEAD):
        prompt = min(int(chance.lognormvariate(7.3, 0.5)), 8000)  # median 1500 tokens
        sample = PackedSample(prompt + 80, ((prompt, prompt + 80),), prompt + 80)
        for forecast in forecasts:
            forecast.add(sample)
    concat_figures, best_fit_figures = (forecast.figures() for forecast in forecasts)
    assert best_fit_figures.split_samples == best_fit_figures.lost == 0
    assert best_fit_figures.fill >= 0.97
    assert concat_figures.split_samples > 0.15 * concat_figures.samples


def test_figures_add_up():
    forecast = ConcatForecast(SEQ_LEN)
    forecast.add(PackedSample(12, ((10, 12),), 12))
    once = forecast.figures()
    assert once + once == dataclasses.replace(once, samples=2, positions=24, trained=4, sequences=1.5, filled=1.5)
