"""Notes that are the same, or nearly: a test note whose twin was trained on tests memory.

Likeness is the Jaccard index of the notes' runs of three words; candidates come from MinHash signatures cut in bands
(Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), so no two notes are compared
in vain. Notes of 300 words that differ in ten of them have an index of about 0.8.
"""

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

NEAR_IDENTICAL = 0.8

_RUN = 3  # words
_BANDS, _ROWS = 10, 4  # a pair of likeness 0.8 shares a band with probability 0.995, one of 0.3 with 0.08
_WORD = re.compile(r"\w+")


class Twin(NamedTuple):
    """Two near-identical notes by number; `likeness` is 1 where they have the same runs of words."""

    note: int
    twin: int
    likeness: float


def normalise_text(text: str) -> str:
    """The words alone: without case, accents, punctuation or layout."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(_WORD.findall("".join(char for char in decomposed if not unicodedata.combining(char))))


def find_near_duplicates(texts: Sequence[str], splits: Sequence[int]) -> Iterator[Twin]:
    """For each note, the first found near-identical one in a split of a lower number, if there is one.

    Args:
        texts: as `normalise_text` gives them.
        splits: number of the split of each note.
    """
    signatures = [_signature(_runs(text)) for text in tqdm(texts, unit=" notes", desc="comparing", disable=None)]
    known: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    for split in sorted(set(splits)):
        members = [number for number, found in enumerate(splits) if found == split]
        for number in members:
            candidates = dict.fromkeys(twin for band in signatures[number] for twin in known.get(band, ()))
            if twin := _first_twin(number, candidates, texts):
                yield twin
        for number in members:
            for band in signatures[number]:
                known[band].append(number)


def _first_twin(number: int, candidates: Iterable[int], texts: Sequence[str]) -> Twin | None:
    runs = _runs(texts[number])
    for candidate in candidates:
        others = _runs(texts[candidate])
        shared = len(np.intersect1d(runs, others, assume_unique=True))
        likeness = shared / (len(runs) + len(others) - shared)
        if likeness >= NEAR_IDENTICAL:
            return Twin(number, candidate, likeness)
    return None


def _runs(text: str) -> np.ndarray:
    """Hashes of the text's distinct runs of words, uint64; a text shorter than a run is one run."""
    words = np.array([zlib.crc32(word.encode()) for word in text.split()] or [0], dtype=np.uint64)
    length = min(_RUN, len(words))
    hashes = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _MIXER + words[offset : offset + len(hashes)]
    return np.unique(hashes * _MIXER)


_MIXER = np.uint64(0x9E3779B97F4A7C15)  # odd, so no bit is lost; 2**64 over the golden ratio
_FACTORS = np.random.default_rng(0).integers(2**63, size=_BANDS * _ROWS, dtype=np.uint64) | np.uint64(1)


def _signature(runs: np.ndarray) -> list[tuple[int, bytes]]:
    """The bands of a MinHash signature, each with its number."""
    mixed = runs ^ (runs >> np.uint64(29))
    smallest = np.array([(mixed * factor >> np.uint64(32)).min() for factor in _FACTORS], dtype=np.uint32)
    return [(band, rows.tobytes()) for band, rows in enumerate(smallest.reshape(_BANDS, _ROWS))]
