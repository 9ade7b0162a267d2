"""Find near-duplicate notes: a test note that is almost identical to a training note measures memorization.

Similarity is the Jaccard index of the notes' 3-word shingles, without case, accents and punctuation. Candidates come
from banded MinHash signatures (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3),
which avoids comparing all pairs. Two notes of 300 words that differ in ten of them have an index of about 0.8.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

MIN_SIMILARITY = 0.8

_SHINGLE = 3  # words
_MAX_STRINGS = 1 << 17
_BANDS, _ROWS = 10, 4  # two notes share a band with probability 0.995 at similarity 0.8, and 0.08 at 0.3
_WORD = re.compile(r"\w+")
_MARKS = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")  # combining


class NearDuplicate(NamedTuple):
    """A note and a near-duplicate of it in another split, by index; `similarity` is 1 if their shingles are equal."""

    note: int
    other: int
    similarity: float


class Survey(NamedTuple):
    """What comparing the notes of a corpus needs: hashes of the notes' words, and MinHash signatures."""

    digests: list[str]
    signatures: np.ndarray


def normalize_text(text: str) -> str:
    """Return the words only: without case, accents, punctuation and layout."""
    return " ".join(_WORD.findall(_MARKS.sub("", unicodedata.normalize("NFKD", text.casefold()))))


def signature(text: str) -> np.ndarray:
    """Return the MinHash signature of a note: uint32 [bands x rows]."""
    return _signature(_word_hashes(text))


def _signature(word_hashes: bytes) -> np.ndarray:
    shingles = _shingle_hashes(word_hashes)
    mixed = shingles ^ (shingles >> np.uint64(29))
    return ((_FACTORS * mixed).min(axis=1) >> np.uint64(32)).astype(np.uint32)


def survey(texts: Sequence[str]) -> Survey:
    """Read each note once."""
    digests, signatures = [], []
    for text in tqdm(texts, unit=" notes", desc="comparing", disable=None):
        word_hashes = _word_hashes(text)
        digests.append(hashlib.blake2b(word_hashes, digest_size=16).hexdigest())
        signatures.append(_signature(word_hashes))
    return Survey(digests, np.stack(signatures))


def find_near_duplicates(
    signatures: np.ndarray, texts: Sequence[str], splits: Sequence[int]
) -> Iterator[NearDuplicate]:
    """Yield, for each note that has one, a near-duplicate in a split with a lower number.

    Args:
        signatures: of the notes, uint32 [notes, bands x rows].
        texts: notes; only those of candidates are asked for.
        splits: number of the split of each note.
    """
    numbers = np.asarray(splits)
    candidates: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    for band in range(_BANDS):
        keys = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS]).view(np.uint64)
        _, groups = np.unique(keys[:, 0] * _MIXER ^ keys[:, 1], return_inverse=True)
        order = np.argsort(groups, kind="stable")
        ends = np.flatnonzero(np.diff(groups[order])) + 1
        for members in np.split(order, ends) if len(ends) + 1 < len(order) else ():
            if len(members) > 1 and numbers[members].min() < numbers[members].max():
                for index in members:
                    if len(lower := members[numbers[members] < numbers[index]]):
                        candidates[int(index)].append(lower)
    for index in sorted(candidates, key=lambda index: (splits[index], index)):
        others = dict.fromkeys(int(other) for lower in candidates[index] for other in lower)
        if duplicate := _first_duplicate(index, others, texts):
            yield duplicate


def _first_duplicate(index: int, candidates: Iterable[int], texts: Sequence[str]) -> NearDuplicate | None:
    shingles = _shingles(texts[index])
    for candidate in candidates:
        others = _shingles(texts[candidate])
        shared = len(np.intersect1d(shingles, others, assume_unique=True))
        similarity = shared / (len(shingles) + len(others) - shared)
        if similarity >= MIN_SIMILARITY:
            return NearDuplicate(index, candidate, similarity)
    return None


class _WordHashes(dict[str, bytes]):
    """The hash, 8 bytes, of each word of a string without whitespace; forgotten when there are many strings."""

    def __missing__(self, text: str) -> bytes:
        if len(self) >= _MAX_STRINGS:
            self.clear()
        words = normalize_text(text).split()
        self[text] = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words)
        return self[text]


_hashes_of = _WordHashes().__getitem__


def _word_hashes(text: str) -> bytes:
    """Return the hashes of the words of a note, 8 bytes for each."""
    return b"".join(map(_hashes_of, text.split())) or bytes(8)


def _shingles(text: str) -> np.ndarray:
    """Return the sorted hashes of the distinct shingles, uint64."""
    return np.unique(_shingle_hashes(_word_hashes(text)))


def _shingle_hashes(word_hashes: bytes) -> np.ndarray:
    """Return the hashes of the shingles, uint64; a shorter text is a single shingle."""
    words = np.frombuffer(word_hashes, dtype="<u8")
    length = min(_SHINGLE, len(words))
    hashes = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _MIXER + words[offset : offset + len(hashes)]
    return hashes * _MIXER


_MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio; odd, so multiplication is a bijection
_FACTORS = np.random.default_rng(0).integers(2**63, size=(_BANDS * _ROWS, 1), dtype=np.uint64) | np.uint64(1)
