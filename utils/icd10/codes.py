"""The CIM-10 table that ATIH publishes each year, and the roles in which the PMSI accepts each code.

A line is `code|type MCO/HAD|type SSR|type PSY|short label|long label`; codes are padded with spaces. The type restricts
the role of a code: 0 any role; 1 and 2 (external cause) neither DP nor DR; 3 none (a category with children, or a
closed code); 4 not DP.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError

ROLES = ("DP", "DR", "DAS")
ALLOWED_TYPES = {"DP": frozenset({0}), "DR": frozenset({0, 4}), "DAS": frozenset({0, 1, 2, 4})}

# The dot is optional. French extensions are digits, or `+` and digits: I10, E1198, C189+0, F03+00.
CODE_PATTERN = r"[A-Z]\d{2}\.?\d{0,3}(?:\+\d{1,2})?"

_CHAPTERS = (  # first category, last category, number, short name
    ("A00", "B99", "I", "Infectious and parasitic diseases"),
    ("C00", "D48", "II", "Neoplasms"),
    ("D50", "D89", "III", "Blood and immune mechanism"),
    ("E00", "E90", "IV", "Endocrine, nutrition, metabolism"),
    ("F00", "F99", "V", "Mental and behavioral disorders"),
    ("G00", "G99", "VI", "Nervous system"),
    ("H00", "H59", "VII", "Eye"),
    ("H60", "H95", "VIII", "Ear"),
    ("I00", "I99", "IX", "Circulatory system"),
    ("J00", "J99", "X", "Respiratory system"),
    ("K00", "K93", "XI", "Digestive system"),
    ("L00", "L99", "XII", "Skin"),
    ("M00", "M99", "XIII", "Musculoskeletal system"),
    ("N00", "N99", "XIV", "Genitourinary system"),
    ("O00", "O99", "XV", "Pregnancy and childbirth"),
    ("P00", "P96", "XVI", "Perinatal period"),
    ("Q00", "Q99", "XVII", "Congenital malformations"),
    ("R00", "R99", "XVIII", "Symptoms and abnormal findings"),
    ("S00", "T98", "XIX", "Injury and poisoning"),
    ("V01", "Y98", "XX", "External causes"),
    ("Z00", "Z99", "XXI", "Factors influencing health"),
    ("U00", "U99", "XXII", "Special purposes"),
)
CHAPTER_NAMES = {numeral: name for _, _, numeral, name in _CHAPTERS}
_COLUMNS = "code, type MCO/HAD, type SSR, type PSY, short label, long label"


def normalize_code(text: str) -> str:
    """Return the code in upper case, without dot, spaces and the CIM-10's dagger or asterisk: ` i50.1 ` -> `I501`."""
    return re.sub(r"[\s.]", "", text).rstrip("+*†").upper()


def category(code: str) -> str:
    """Return the 3-character category of a code."""
    return normalize_code(code)[:3]


def chapter(code: str) -> str | None:
    """Return the chapter of a code as a Roman numeral, or None if it is in none of the 22 chapters."""
    found = category(code)
    return next((numeral for first, last, numeral, _ in _CHAPTERS if first <= found <= last), None)


class Cim10Entry(NamedTuple):
    """One line of the table. `type` is the MCO/HAD type, `label` the long label."""

    code: str
    type: int
    label: str
    short_label: str = ""


class Cim10Table:
    """The codes of one year, in file order. Methods accept codes in any spelling (`i50.1`, ` I501 `)."""

    def __init__(self, entries: Iterable[Cim10Entry]) -> None:
        self._entries = {entry.code: entry for entry in entries}
        self._children: dict[str, list[str]] = {}
        for code in self._entries:
            if parent := self.parent(code):
                self._children.setdefault(parent, []).append(code)

    @classmethod
    def from_file(cls, path: str | Path) -> "Cim10Table":
        """Load ATIH's file, separated by pipes or tabs, in UTF-8 or Latin-1.

        Raises:
            UserError: the file cannot be read, or a line does not have the columns of ATIH's table.
        """
        entries: dict[str, Cim10Entry] = {}
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            entry = _parse_line(line.rstrip("\r"), f"{path}, line {number}")
            if entry.code in entries:
                raise UserError(f"{path}, line {number}: duplicate code {entry.code}; expected each code once.")
            entries[entry.code] = entry
        if not entries:
            raise UserError(f"{path} is empty; expected ATIH's CIM-10 table ({_COLUMNS}).")
        return cls(entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Cim10Entry]:
        return iter(self._entries.values())

    def __contains__(self, code: str) -> bool:
        return normalize_code(code) in self._entries

    def get(self, code: str) -> Cim10Entry | None:
        """Return the entry of a code, or None if it is not in the table."""
        return self._entries.get(normalize_code(code))

    def label(self, code: str) -> str | None:
        """Return the long label of a code, or None if it is not in the table."""
        entry = self.get(code)
        return entry.label if entry else None

    def parent(self, code: str) -> str | None:
        """Return the longest code of the table that is a prefix of this one: `C189+0` -> `C189` -> `C18` -> None."""
        code = normalize_code(code)
        prefixes = (code[:length] for length in range(len(code) - 1, 2, -1))
        return next((prefix for prefix in prefixes if prefix in self._entries), None)

    def ancestors(self, code: str) -> list[str]:
        """Return the parent, its parent and so on, up to the category."""
        parent = self.parent(code)
        return [parent, *self.ancestors(parent)] if parent else []

    def children(self, code: str) -> tuple[str, ...]:
        """Return the codes whose parent is this code."""
        return tuple(self._children.get(normalize_code(code), ()))

    def allows(self, role: str, code: str) -> bool:
        """Return whether the PMSI accepts this code as DP, DR or DAS; False if it is not in the table."""
        entry = self.get(code)
        return entry is not None and entry.type in ALLOWED_TYPES[role]


def _read_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the CIM-10 table ({error.strerror}); check the path.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _parse_line(line: str, where: str) -> Cim10Entry:
    columns = [column.strip() for column in line.split("|" if "|" in line else "\t")]
    if len(columns) != 6:
        raise UserError(
            f"{where}: found {len(columns)} column(s) in {line[:60]!r}, expected 6 separated by '|' or tabs "
            f"({_COLUMNS}); use ATIH's file as published."
        )
    code, kind, _, _, short_label, label = columns
    if not re.fullmatch(CODE_PATTERN, code, re.IGNORECASE):
        raise UserError(
            f"{where}: found {code[:20]!r} in the code column, expected a CIM-10 code such as I10, E1198 or C189+0; "
            "remove the header line if there is one."
        )
    if kind not in {"0", "1", "2", "3", "4"}:
        raise UserError(f"{where}: found {kind[:20]!r} as type MCO/HAD of {code}, expected 0, 1, 2, 3 or 4.")
    if not label:
        raise UserError(f"{where}: code {code} has no long label; expected one in the sixth column.")
    return Cim10Entry(normalize_code(code), int(kind), label, short_label)
