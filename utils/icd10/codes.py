"""The CIM-10 table that ATIH publishes each year, and what the PMSI lets each of its codes stand for.

A line is `code|type MCO/HAD|type SSR|type PSY|short label|long label`, codes padded with blanks. The type says where a
code may stand: 0 anywhere; 1 and 2 (external cause) not as DP nor DR; 3 nowhere (a category that has children, or a
closed code); 4 not as DP.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError

ROLES = ("DP", "DR", "DAS")
ALLOWED_TYPES = {"DP": frozenset({0}), "DR": frozenset({0, 4}), "DAS": frozenset({0, 1, 2, 4})}

# Without the dot; French extensions are digits, or `+` and digits: I10, E1198, C189+0, F03+00.
CODE_PATTERN = r"[A-Z]\d{2}\.?\d{0,3}(?:\+\d{1,2})?"

_CHAPTERS = (
    ("A00", "B99", "I"),
    ("C00", "D48", "II"),
    ("D50", "D89", "III"),
    ("E00", "E90", "IV"),
    ("F00", "F99", "V"),
    ("G00", "G99", "VI"),
    ("H00", "H59", "VII"),
    ("H60", "H95", "VIII"),
    ("I00", "I99", "IX"),
    ("J00", "J99", "X"),
    ("K00", "K93", "XI"),
    ("L00", "L99", "XII"),
    ("M00", "M99", "XIII"),
    ("N00", "N99", "XIV"),
    ("O00", "O99", "XV"),
    ("P00", "P96", "XVI"),
    ("Q00", "Q99", "XVII"),
    ("R00", "R99", "XVIII"),
    ("S00", "T98", "XIX"),
    ("V01", "Y98", "XX"),
    ("Z00", "Z99", "XXI"),
    ("U00", "U99", "XXII"),
)
_COLUMNS = "code, type MCO/HAD, type SSR, type PSY, short label, long label"


def normalise_code(text: str) -> str:
    """Upper case, without dot, blanks or the dagger and asterisk marks of the CIM-10: ` i50.1 ` -> `I501`."""
    return re.sub(r"[\s.]", "", text).rstrip("+*†").upper()


def category(code: str) -> str:
    """The 3-character category of a code."""
    return normalise_code(code)[:3]


def chapter(code: str) -> str | None:
    """The chapter of a code as a roman numeral, None outside the ranges of the 22 chapters."""
    found = category(code)
    return next((numeral for first, last, numeral in _CHAPTERS if first <= found <= last), None)


class Cim10Entry(NamedTuple):
    """One line of the table; `type` is the MCO/HAD one, `label` the long one."""

    code: str
    type: int
    label: str
    short_label: str = ""


class Cim10Table:
    """Codes of one year, in the order of the file. Every method takes codes as people write them."""

    def __init__(self, entries: Iterable[Cim10Entry]) -> None:
        self._entries = {entry.code: entry for entry in entries}
        self._children: dict[str, list[str]] = {}
        for code in self._entries:
            if parent := self.parent(code):
                self._children.setdefault(parent, []).append(code)

    @classmethod
    def from_file(cls, path: str | Path) -> "Cim10Table":
        """Reads ATIH's pipe-separated file or a tab-separated copy of it, UTF-8 or Latin-1.

        Raises:
            UserError: the file cannot be read or a line is not one of ATIH's table.
        """
        entries: dict[str, Cim10Entry] = {}
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            entry = _parse_line(line.rstrip("\r"), f"{path}, line {number}")
            if entry.code in entries:
                raise UserError(f"{path}, line {number}: code {entry.code} stands twice; expected each code once.")
            entries[entry.code] = entry
        if not entries:
            raise UserError(f"{path}: no line found; expected ATIH's CIM-10 table ({_COLUMNS}).")
        return cls(entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Cim10Entry]:
        return iter(self._entries.values())

    def __contains__(self, code: str) -> bool:
        return normalise_code(code) in self._entries

    def get(self, code: str) -> Cim10Entry | None:
        """The line of a code, None if the table does not have it."""
        return self._entries.get(normalise_code(code))

    def label(self, code: str) -> str | None:
        """The long label of a code, None if the table does not have it."""
        entry = self.get(code)
        return entry.label if entry else None

    def parent(self, code: str) -> str | None:
        """The nearest shorter code of the table that this one specialises: `C189+0` -> `C189` -> `C18` -> None."""
        code = normalise_code(code)
        prefixes = (code[:length] for length in range(len(code) - 1, 2, -1))
        return next((prefix for prefix in prefixes if prefix in self._entries), None)

    def ancestors(self, code: str) -> list[str]:
        """Parent, parent's parent and so on, up to the category."""
        parent = self.parent(code)
        return [parent, *self.ancestors(parent)] if parent else []

    def children(self, code: str) -> tuple[str, ...]:
        """The codes whose parent this one is."""
        return tuple(self._children.get(normalise_code(code), ()))

    def allows(self, role: str, code: str) -> bool:
        """Whether the PMSI accepts this code as DP, DR or DAS; False for a code that the table does not have."""
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
            f"({_COLUMNS}); use ATIH's file as it is published."
        )
    code, kind, _, _, short_label, label = columns
    if not re.fullmatch(CODE_PATTERN, code, re.IGNORECASE):
        raise UserError(
            f"{where}: found {code[:20]!r} as code, expected a CIM-10 code such as I10, E1198 or C189+0; "
            "remove a header line if there is one."
        )
    if kind not in {"0", "1", "2", "3", "4"}:
        raise UserError(f"{where}: found {kind[:20]!r} as type MCO/HAD of {code}, expected 0, 1, 2, 3 or 4.")
    if not label:
        raise UserError(f"{where}: code {code} has no long label; expected one in the sixth column.")
    return Cim10Entry(normalise_code(code), int(kind), label, short_label)
