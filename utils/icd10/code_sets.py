"""Sets of CIM-10 codes as rules write them: `A34 C51-C58 E11?0`."""

import functools
import re

from utils.icd10.codes import CODE_PATTERN, Cim10Table

_PART = re.compile(r"([A-Z][\d?]{2}[\d?+]{0,5})(?:-([A-Z]\d{2}\d{0,3}))?")


class CodeSet:
    """The codes that begin like a part of a text, or are in a range of it; `?` is any character.

    A malformed code is in no set.
    """

    def __init__(self, text: str) -> None:
        """Parse the text.

        Raises:
            ValueError: with the part that is not a code or a range; the text is blank.
        """
        self._text = " ".join(text.split())
        self._ranges: list[tuple[str, str]] = []
        patterns = []
        for part in self._text.split() or [""]:
            found = _PART.fullmatch(part)
            if not found or ("?" in part and found[2]) or (found[2] and found[2] < found[1]):
                raise ValueError(part)
            if "?" in part:
                patterns.append(re.escape(part).replace(r"\?", "."))
            else:
                self._ranges.append((found[1], found[2] or found[1]))
        self._pattern = re.compile("|".join(patterns)) if patterns else None
        ends = [*((first, last) for first, last in self._ranges), *((part, part) for part in self._text.split())]
        self._letters = {chr(letter) for first, last in ends for letter in range(ord(first[0]), ord(last[0]) + 1)}
        self._known: dict[str, bool] = {}

    def __contains__(self, code: str) -> bool:
        if code[:1] not in self._letters:
            return False
        if code not in self._known:
            self._known[code] = re.fullmatch(CODE_PATTERN, code) is not None and (
                any(first <= code[: len(first)] and code[: len(last)] <= last for first, last in self._ranges)
                or (self._pattern is not None and self._pattern.match(code) is not None)
            )
        return self._known[code]

    def __repr__(self) -> str:
        return f"CodeSet({self._text!r})"


@functools.lru_cache(maxsize=256)
def codes_in(table: Cim10Table, codes: CodeSet) -> tuple[str, ...]:
    """Return the codes of a table that are in a set."""
    return tuple(entry.code for entry in table if entry.code in codes)
