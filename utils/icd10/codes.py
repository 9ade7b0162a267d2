"""The CIM-10 table that ATIH publishes each year.

A line is `code|type MCO/HAD|type SSR|type PSY|short label|long label`; codes are padded with spaces. The same table is
passed on as csv or xlsx, with a header and fewer or more columns. The type says in which roles the PMSI accepts a code
(`guide_rules.toml`); codes of type 3, categories with children and closed codes, have none.
"""

import csv
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError
from model.file_kinds import looks_like
from utils.tables.encodings import detect_encoding
from utils.tables.read_table import xlsx_cells

ROLES = ("DP", "DR", "DAS")

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
_CLOSED = re.compile(r"\*+\s*SU\s*(\d{2})\s*\*+")
_TYPES = ("0", "1", "2", "3", "4")
_COLUMNS = "code, type MCO/HAD, type SSR, type PSY, short label, long label"


# Full-width characters, spaces that do not break a line, and invisible characters.
_CHARACTERS: dict[int, int | None] = {0xFF01 + offset: 0x21 + offset for offset in range(94)}
_CHARACTERS |= dict.fromkeys(map(ord, "\xa0\u2007\u2009\u202f"), ord(" "))
_CHARACTERS |= dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\xad"))
# Cyrillic and Greek letters that look like Latin ones.
_LOOKALIKES = str.maketrans("АВСЕНІЈКМОРЅТХУΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ABCEHIJKMOPSTXYABEZHIKMNOPTYX")
_LOOKALIKE = re.compile(r"[Α-ΡΤ-ΧА-ХЅІЈ](?=[ .]?\d)")
CODE_PREFIX = r"\b(?:(?:code\s{1,3})?(?:cim|icd)[\s-]{0,3}(?:10)?(?:[\s-]{0,3}fr)?|code)\b(?:\s*[:=|])?\s*"
MARKS = "+*†‡"  # of the dagger and asterisk system
_AROUND = " \t\r\n\"'`«»()[]{}<>,;:.|"
# What is written inside or around a code: spaces, `.+`, quotes, two pairs of brackets, a label glued on with a dash.
_ITEM_BEGINS = r"(?:^|(?<=[(\[:;,|=\n])|(?<=[(\[:;,|=\n-] ))"
_ITEM_ENDS = rf"(?=[ {MARKS}]*(?:[)\]\}};,|\n\"'»]|\.?\s*\Z|\.\s))"
_RESPELLED = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"{_ITEM_BEGINS}([A-Z]) (\d\d\.?\d{{0,3}}(?:\+\d{{1,2}})?){_ITEM_ENDS}", r"\1\2"),  # I 10
        (rf"\b([A-Z]\d\d(?:\.?\d{{0,2}})?) (\d{{1,2}}|[A-Z]){_ITEM_ENDS}", r"\1\2"),  # I50.1 0
        (rf"\b([A-Z]\d\d(?:\.?\d{{1,3}})?)(?: ?\.)? ?\+ ?(\d{{1,2}}){_ITEM_ENDS}", r"\1+\2"),  # C189 + 0
        (rf"[\"'`«]\s*([A-Z]\d[\w.+-]{{1,12}}[{MARKS}]*)\s*[\"'`»]", r"\1"),
        (rf"[(\[]\s*([(\[][A-Z]\d[\w.+-]{{1,12}}[{MARKS}]*[)\]])\s*[)\]]", r"\1"),
        (r"(?<![\w.])([A-Z]\d\d\.?\d{0,3}(?:\+\d{1,2})?)[-_=:](?=[^\W\d_]{2})", r"\1 : "),
    )
)
# ATIH's list of codes with dashes writes the 5th character before the 4th, or the 6th before the 5th.
_DASH_NOTATIONS = (
    (re.compile(r"([A-Z]\d{2})\.?-(\d)\.(\d)"), r"\1\3\2"),  # O04.-0.9 is O0490
    (re.compile(r"([A-Z]\d{2}\.?\d)-(\d)(\d)"), r"\1\3\2"),  # M62.8-01 is M62810
)
_COMPACT = re.compile(r"[A-Z]\d{2,5}(?:\+\d{1,2})?")
_CODE_LIKE = re.compile(rf"[A-Z]\d[A-Z\d.+-]*[{MARKS}]*")
_PREFIX = re.compile(CODE_PREFIX, re.IGNORECASE)


def respell(text: str) -> str:
    """Return a text of codes with each written without spaces, quotes and letters of other alphabets; labels stay.

    Cells and answers are read after this, so that each spelling is known in one place.
    """
    text = _LOOKALIKE.sub(lambda letter: letter[0].translate(_LOOKALIKES), text.translate(_CHARACTERS))
    for pattern, replacement in _RESPELLED:
        text = pattern.sub(replacement, text)
    return text


@functools.lru_cache(1 << 16)
def normalize_code(text: str) -> str:
    """Return a code in upper case, without dots, spaces, quotes and dagger or asterisk: ` i50.1 ` -> `I501`.

    A malformed code stays malformed: it is never shortened to a valid one.
    """
    if _COMPACT.fullmatch(text):
        return text
    code = _PREFIX.sub("", respell(text).upper()).strip(_AROUND)
    for pattern, replacement in _DASH_NOTATIONS:
        if pattern.fullmatch(code):
            code = pattern.sub(replacement, code)
    return re.sub(r"[\s.]", "", code).rstrip(MARKS)


def split_codes(text: str) -> list[str]:
    """Return the normalized codes of a cell: one or several, with or without labels, malformed ones included.

    A cell without anything like a code is returned as one malformed code.
    """
    if _COMPACT.fullmatch(text):
        return [text]
    cell = _PREFIX.sub("", respell(text).upper())
    found = [code for part in re.split(r"[;|\n\t]", cell) for code in _codes_of_part(part)]
    malformed = normalize_code(text)
    return found or ([malformed] if malformed else [])


def _codes_of_part(part: str) -> list[str]:
    """Return the codes that begin a part, or else those after its label: in brackets, after a comma, at its end."""
    words = [word for word in (word.strip(_AROUND) for word in re.split(r"[\s,/]+", part)) if word]
    found = list(itertools.takewhile(_CODE_LIKE.fullmatch, words))
    labels = words[len(found) :]
    if not found:  # the label comes first; a reference inside it is not at its end
        found = re.findall(rf"[(\[]\s*({CODE_PATTERN}[{MARKS}]*)\s*[)\]]\s*(?:$|,)", part)
        found = found or [word for word in words[-1:] if re.fullmatch(CODE_PATTERN, word)]
    elif labels:  # "I489 Fibrillation, I10 HTA"
        items = (item.split()[0].strip(_AROUND) for item in part.split(",")[1:] if item.strip())
        found += [word for word in items if re.fullmatch(rf"{CODE_PATTERN}[{MARKS}]*", word) and word not in found]
    return [normalize_code(word) for word in found]


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

    @property
    def closed_in(self) -> int | None:
        """The year in which ATIH closed the code, by the mark `*** SU19 ***` of its label."""
        mark = _CLOSED.match(self.label)
        return 2000 + int(mark[1]) if mark else None


class Cim10Table:
    """The codes of one year, in file order. Methods accept codes in any spelling (`i50.1`, ` I501 `)."""

    def __init__(self, entries: Iterable[Cim10Entry]) -> None:
        self._entries = {entry.code: entry for entry in entries}
        self._parents = {code: self._longest_prefix(code) for code in self._entries}
        self._children: dict[str, list[str]] = {}
        for code, parent in self._parents.items():
            if parent:
                self._children.setdefault(parent, []).append(code)

    @classmethod
    def from_file(cls, path: str | Path) -> "Cim10Table":
        """Load ATIH's file: pipes, tabs or csv, in any encoding of French files, or xlsx; with a header or without.

        Raises:
            UserError: the file cannot be read, or a line does not have the columns of ATIH's table.
        """
        entries: dict[str, Cim10Entry] = {}
        for where, entry in _read_entries(Path(path)):
            if entry.code in entries:
                raise UserError(f"{where}: duplicate code {entry.code}; expected each code once.")
            entries[entry.code] = entry
        if not entries:
            raise UserError(f"{path} is empty; expected ATIH's CIM-10 table ({_COLUMNS}).")
        return cls(entries.values())

    def as_of(self, year: int) -> "Cim10Table":
        """Return the table with the codes that were closed after this year, in any role: their types are not kept."""
        reopened = {
            code: entry._replace(type=0, label=_CLOSED.sub("", entry.label).strip())
            for code, entry in self._entries.items()
            if entry.closed_in and entry.closed_in > year
        }
        return Cim10Table((self._entries | reopened).values()) if reopened else self

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
        return self._parents[code] if code in self._parents else self._longest_prefix(code)

    def _longest_prefix(self, code: str) -> str | None:
        prefixes = (code[:length] for length in range(len(code) - 1, 2, -1))
        return next((prefix for prefix in prefixes if prefix in self._entries), None)

    def ancestors(self, code: str) -> list[str]:
        """Return the parent, its parent and so on, up to the category."""
        parent = self.parent(code)
        return [parent, *self.ancestors(parent)] if parent else []

    def children(self, code: str) -> tuple[str, ...]:
        """Return the codes whose parent is this code."""
        return tuple(self._children.get(normalize_code(code), ()))


_Places = tuple[int, int, int, int]  # of code, type MCO, short label (-1: none) and long label among the columns
_ATIH = (0, 1, 4, 5)
_HEADERS = (  # names of these columns, without case and punctuation
    "code icdcode codecim10 codecim cim10 cim conceptcode diag",
    "typemcohad typemco mcohad mco autmco autorisationmco type",
    "libellecourt libcourt shortlabel icdcodedescriptionshort court",
    "libellelong liblong longlabel libelle label lib icdcodedescription conceptname long",
)


def _read_entries(path: Path) -> Iterator[tuple[str, Cim10Entry]]:
    """Yield the place and the content of each line of a table."""
    places: _Places | None = None
    unit = "row" if path.suffix.lower() == ".xlsx" else "line"
    for number, columns in _read_columns(path):
        where = f"{path}, {unit} {number}"
        if places is None:
            places = _header_places(columns)
            if places is not None:
                continue
            places = _ATIH if len(columns) == 6 else _guess_places(columns)
        if places is None or len(columns) <= max(places):
            raise UserError(
                f"{where}: found {len(columns)} column(s) in {' '.join(columns)[:60]!r}, expected 6 separated by '|' "
                f"or tabs ({_COLUMNS}), or a header with these names; use ATIH's file as published."
            )
        code, kind, short, label = (columns[place] if place >= 0 else "" for place in places)
        yield where, _parse_entry(code, kind, short, label, where)


def _read_columns(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the stripped cells of each line that is not blank."""
    try:
        if path.suffix.lower() in (".xlsx", ".xlsm"):
            for number, cells in xlsx_cells(path):
                yield number, ["" if cell is None else str(cell).removesuffix(".0").strip() for cell in cells]
            return
        with path.open("rb") as file:
            kind = looks_like(file.read(256))
        if kind and not kind.startswith("text"):
            hint = " Excel's files are zip archives: name it .xlsx." if "zip" in kind else ""
            raise UserError(f"{path} is {kind}; expected ATIH's CIM-10 table ({_COLUMNS}).{hint}")
        with path.open(encoding=detect_encoding(path)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, [column.strip() for column in _split_line(line)]
    except OSError as error:
        raise UserError(f"{path}: cannot read the CIM-10 table ({error.strerror}); check the path.") from None
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path}: cannot read the CIM-10 table ({error}).") from None


def _split_line(line: str) -> list[str]:
    """Return the columns of a line: pipes or tabs as ATIH writes them, with quotes inside labels, or csv."""
    for separator in "|\t":
        if separator in line:
            return line.split(separator)
    return next(csv.reader([line], delimiter=max(";,", key=line.count)))


def _header_places(columns: Sequence[str]) -> _Places | None:
    """Return the places that a header names, None if the line is not a header."""
    names = [re.sub(r"[\W_]", "", column).casefold() for column in columns]
    names = ["".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)) for name in names]
    found = [next((names.index(name) for name in known.split() if name in names), -1) for known in _HEADERS]
    code, kind, short, label = found
    return (code, kind, short, label) if min(code, kind, label) >= 0 else None


def _guess_places(columns: Sequence[str]) -> _Places | None:
    """Return the places in a line without header: the code, the first type after it, the last label."""
    codes = [place for place, cell in enumerate(columns) if re.fullmatch(CODE_PATTERN, cell, re.IGNORECASE)]
    types = [place for place, cell in enumerate(columns) if codes and place > codes[0] and cell in _TYPES]
    labels = [place for place, cell in enumerate(columns) if types and place > types[0] and len(cell) > 4]
    return (codes[0], types[0], labels[0] if len(labels) > 1 else -1, labels[-1]) if labels else None


def _parse_entry(code: str, kind: str, short_label: str, label: str, where: str) -> Cim10Entry:
    if not re.fullmatch(CODE_PATTERN, code, re.IGNORECASE):
        raise UserError(
            f"{where}: found {code[:20]!r} in the code column, expected a CIM-10 code such as I10, E1198 or C189+0; "
            "remove the header line if there is one."
        )
    if kind not in _TYPES:
        raise UserError(f"{where}: found {kind[:20]!r} as type MCO/HAD of {code}, expected 0, 1, 2, 3 or 4.")
    if not label:
        raise UserError(f"{where}: code {code} has no long label; expected one in the last column.")
    return Cim10Entry(normalize_code(code), int(kind), label, short_label)
