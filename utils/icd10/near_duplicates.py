"""Find near-duplicate notes: a test note that is almost identical to a training note measures memorization.

Similarity is the Jaccard index of the notes' 3-word shingles. Candidates come from banded MinHash signatures (Broder
1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), which avoids comparing all pairs. Two
notes of 300 words that differ in ten of them have an index of about 0.8.
"""

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

MIN_SIMILARITY = 0.8

_SHINGLE = 3  # words
_BANDS, _ROWS = 10, 4  # two notes share a band with probability 0.995 at similarity 0.8, and 0.08 at 0.3
_WORD = re.compile(r"\w+")


class NearDuplicate(NamedTuple):
    """A note and a near-duplicate of it in another split, by index; `similarity` is 1 if their shingles are equal."""

    note: int
    other: int
    similarity: float


def normalize_text(text: str) -> str:
    """Return the words only: without case, accents, punctuation and layout."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(_WORD.findall("".join(char for char in decomposed if not unicodedata.combining(char))))


def find_near_duplicates(texts: Sequence[str], splits: Sequence[int]) -> Iterator[NearDuplicate]:
    """Yield, for each note that has one, the first near-duplicate in a split with a lower number.

    Args:
        texts: notes as returned by `normalize_text`.
        splits: number of the split of each note.
    """
    signatures = [_signature(_shingles(text)) for text in tqdm(texts, unit=" notes", desc="comparing", disable=None)]
    earlier: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)  # notes of lower splits, by band
    for split in sorted(set(splits)):
        members = [index for index, found in enumerate(splits) if found == split]
        for index in members:
            candidates = dict.fromkeys(other for band in signatures[index] for other in earlier.get(band, ()))
            if duplicate := _first_duplicate(index, candidates, texts):
                yield duplicate
        for index in members:
            for band in signatures[index]:
                earlier[band].append(index)


def _first_duplicate(index: int, candidates: Iterable[int], texts: Sequence[str]) -> NearDuplicate | None:
    shingles = _shingles(texts[index])
    for candidate in candidates:
        others = _shingles(texts[candidate])
        shared = len(np.intersect1d(shingles, others, assume_unique=True))
        similarity = shared / (len(shingles) + len(others) - shared)
        if similarity >= MIN_SIMILARITY:
            return NearDuplicate(index, candidate, similarity)
    return None


def _shingles(text: str) -> np.ndarray:
    """Return the sorted hashes of the distinct shingles, uint64; a shorter text is a single shingle."""
    words = np.array([zlib.crc32(word.encode()) for word in text.split()] or [0], dtype=np.uint64)
    length = min(_SHINGLE, len(words))
    hashes = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _MIXER + words[offset : offset + len(hashes)]
    return np.unique(hashes * _MIXER)


_MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio; odd, so multiplication is a bijection
_FACTORS = np.random.default_rng(0).integers(2**63, size=_BANDS * _ROWS, dtype=np.uint64) | np.uint64(1)


def _signature(shingles: np.ndarray) -> list[tuple[int, bytes]]:
    """Return the bands of a MinHash signature, each with its number."""
    mixed = shingles ^ (shingles >> np.uint64(29))
    smallest = np.array([(mixed * factor >> np.uint64(32)).min() for factor in _FACTORS], dtype=np.uint32)
    return [(band, rows.tobytes()) for band, rows in enumerate(smallest.reshape(_BANDS, _ROWS))]
