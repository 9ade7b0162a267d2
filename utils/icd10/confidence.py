"""How sure a model is of each code of its answer: from the probabilities of the answer's tokens.

The probability of a code in its role is that of the path of tokens that was taken to it, given the answer before it.
For a code that follows another one of its role, this includes the decision not to end the list.

With a CIM-10 table the product ends where only one code can follow: from there, all spellings lead to it, and their
probabilities sum to 1. Before that point, other tokenizations of the same letters are not counted: the probability is a
lower bound. Without a table, all tokens of label and code count: it is the probability of this label, too.
"""

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from utils.icd10.answer_grammar import answer_grammar, item_texts
from utils.icd10.answers import Diagnosis, parse_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.prompts import CODE_ITEM
from utils.icd10.rules import RuleSet

_BETWEEN_CHARACTERS = r"[.\s]?"  # in codes that are not written as the table does


class Probabilities(NamedTuple):
    """Probabilities of an answer, from 0 to 1.

    Attributes:
        codes: of each diagnosis, in the order of `parse_answer`; None where it is not known.
        nothing_more: that the answer ends after its last code; None if it is not known or the answer was cut.
    """

    codes: list[float | None]
    nothing_more: float | None


class Item(NamedTuple):
    """Where a diagnosis is written, in bytes of the answer: from its label, None if not found, to its code's end."""

    start: int | None
    end: int


class ProbabilityReader:
    """Reads the probabilities of answers.

    Args:
        table: the table to whose codes the answers were restricted; None if they were not.
        rules: coding rules that the answers followed; None for those of the guide.
    """

    def __init__(self, table: Cim10Table | None, rules: RuleSet | None = None) -> None:
        texts = item_texts(answer_grammar(table, rules=rules)) if table is not None else {}
        self._items = {role: sorted(found) for role, found in texts.items()}

    def read(self, text: str, pieces: Sequence[bytes], log_probabilities: Sequence[float]) -> Probabilities:
        """Return the probabilities of an answer.

        Args:
            text: of the answer.
            pieces: bytes of its tokens; others may precede and follow the text.
            log_probabilities: of the tokens.
        """
        diagnoses = parse_answer(text)
        offset = b"".join(pieces).find(text.encode())
        if not pieces or len(pieces) != len(log_probabilities) or offset < 0:
            return Probabilities([None] * len(diagnoses), None)
        ends = list(itertools.accumulate(map(len, pieces), initial=-offset))
        path = list(zip(ends, ends[1:], log_probabilities))
        found: list[float | None] = []
        written, role = 0, None  # end of the code before, and its role
        for item, diagnosis in zip(locate(text, diagnoses), diagnoses):
            if item is None:
                found.append(None)
                continue
            start = written if item.start is None or diagnosis.role == role else item.start
            decided = item.end if item.start is None else min(item.end, item.start + self._decided_after(diagnosis))
            found.append(_product(path, written, decided, start))
            written, role = item.end, diagnosis.role
        ended = path[-1][0] >= len(text.encode())  # by a token of its own
        return Probabilities(found, _product(path, written, math.inf, written) if ended else None)

    def _decided_after(self, diagnosis: Diagnosis) -> float:
        """Return after how many bytes of an item the table leaves no other item of its role."""
        items = self._items.get(diagnosis.role or "", [])
        text = CODE_ITEM.format(label=diagnosis.label, code=diagnosis.code)
        place = bisect.bisect_left(items, text)
        if items[place : place + 1] != [text]:
            return math.inf
        neighbors = (*items[max(0, place - 1) : place], *items[place + 1 : place + 2])
        shared = max((_shared_prefix(text, other) for other in neighbors), default=-1)
        return len(text[: shared + 1].encode())


def _shared_prefix(first: str, second: str) -> int:
    """Return how many characters both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def _product(path: Sequence[tuple[int, int, float]], begin: int, end: float, label: int) -> float:
    """Return the probability of the tokens that begin in [begin, end), except those that end before `label`.

    Args:
        path: beginning, end and logarithm of the probability of each token.
        begin: the first byte of a token that counts.
        end: the first byte of a token that does not count any more.
        label: what ends at or before this byte is part of the layout.
    """
    chances = (chance for first, last, chance in path if begin <= first < end and max(last, first + 1) > label)
    return math.exp(min(0.0, sum(chances)))


def locate(text: str, diagnoses: Sequence[Diagnosis]) -> Iterator[Item | None]:
    """Yield where each diagnosis is written, or None where its code is not found in the text."""
    cursor = 0
    for diagnosis in diagnoses:
        item = CODE_ITEM.format(label=diagnosis.label, code=diagnosis.code)
        start = text.find(item, cursor) if diagnosis.label else -1
        if start >= 0:
            end = start + len(item) - 1  # without the parenthesis
        else:
            spelling = _BETWEEN_CHARACTERS.join(map(re.escape, diagnosis.code))
            written = re.compile(spelling, re.IGNORECASE).search(text, cursor)
            if written is None:
                yield None
                continue
            end = written.end()
        yield Item(len(text[:start].encode()) if start >= 0 else None, len(text[:end].encode()))
        cursor = end
