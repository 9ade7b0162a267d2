"""Read a hospital's tables of notes and codes by stay; the one reader of `prepare_icd10_data` and `predict_icd10`.

A stay's documents are joined in the order of their dates, each under its kind. Identifiers are compared as texts.
"""

import contextlib
import functools
import itertools
import re
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from model.errors import UserError
from model.wording import counted
from utils.icd10.cells import identifier, optional_text, sortable_date
from utils.icd10.codes import split_codes
from utils.icd10.mapping import WIDE, Columns, TableMapping, find_columns
from utils.icd10.note_text import note_text
from utils.icd10.people import PERSON_FIELDS, People
from utils.icd10.roles import read_statuses
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.read_table import counts_lines, has_fixed_columns, read_table

_BETWEEN_DOCUMENTS = "\n\n"
_IN_MEMORY = 64 << 20  # bytes of notes before they go to a temporary file
_HEADER_ROWS = 200  # of a file whose rows may have different columns
_EXAMPLES = 5
_NO_CODE = ("", "-", "--", ".", "/", "aucun", "néant", "neant", "n/a")  # cells of codes


WITHOUT_CODE = "without a code"


class LeftOut(NamedTuple):
    """Something that is not used, and why. `what` is "row", "document", "code" or "stay"."""

    what: str
    reason: str
    stay: str = ""
    role: str = ""
    code: str = ""
    where: str = ""


class Document(NamedTuple):
    """One document of a stay; empty strings for what its table does not say. `date` sorts as text."""

    stay: str
    text: str
    date: str = ""
    kind: str = ""
    patient: str = ""
    discharge: str = ""
    converted: str | None = None
    person: Mapping[str, str] = MappingProxyType({})


class DocumentPart(NamedTuple):
    """A document in the note of its stay: its characters [start, end), and kind and date, "" if unknown."""

    start: int
    end: int
    kind: str
    date: str


class CodeRow(NamedTuple):
    """A code of a stay as its table has it.

    Attributes:
        role: DP, DR, DAS or another value of `roles`.
        code: normalized.
        unit: unit stay (RUM), "" if unknown.
        main: what the table says on whether this is the stay's DP: a flag or the DP's code.
        line: line or row of the table.
    """

    role: str
    code: str
    unit: str = ""
    main: str = ""
    line: int = 0


def read_header(path: Path, encoding: str) -> list[str]:
    """Return the columns of a file, those of its first rows where rows can differ; [] if it has no rows."""
    rows = (row for _, row in read_table(path, encoding) if isinstance(row, dict))
    return list(
        dict.fromkeys(
            key for row in itertools.islice(rows, 1 if has_fixed_columns(path) else _HEADER_ROWS) for key in row
        )
    )


def recognize(path: Path, table: str, mapping: TableMapping, encoding: str) -> Columns:
    """Return the columns of a table of "notes" or "codes".

    Raises:
        UserError: the table cannot be read, is empty, or lacks a column.
    """
    header = read_header(path, encoding)
    if not header:
        raise UserError(f"{path} has no rows; expected a row per {'document' if table == 'notes' else 'code or stay'}.")
    return find_columns(path, table, header, mapping)


def require_used(mapping: TableMapping, tables: Mapping[Path, Columns], fields: Iterable[str]) -> None:
    """Raise UserError if a column that the user gave for both tables is in none of them."""
    for field in fields:
        pattern = mapping.both.get(field)
        if pattern and not any(columns.has_given(field, pattern) for columns in tables.values()):
            raise UserError(f"--columns: no column {pattern!r} for {field} in {' or '.join(map(str, tables))}.")


def to_document(row: Row, columns: Columns, number: int | None = None) -> Document:
    """Return the document of a row; a row without identifier of a stay has its number, if that is given.

    Raises:
        SkippedRowError: the row has no note or no identifier.
    """
    stay = _stay_of(row, columns, number)
    text, converted = note_text(columns.get(row, "text"))
    date, discharge = (sortable_date(columns.get(row, field)) for field in ("date", "discharge"))
    kind, patient = (optional_text(columns.get(row, field)) for field in ("kind", "patient"))
    return Document(stay, text, date, kind, patient, discharge, converted, _person_of(row, columns))


def _person_of(row: Row, columns: Columns) -> dict[str, str]:
    """Return what a row says about the patient, by field."""
    if columns.names.keys().isdisjoint(PERSON_FIELDS):
        return {}
    cells = {field: optional_text(columns.get(row, field)) for field in PERSON_FIELDS if field in columns.names}
    return {field: text for field, text in cells.items() if text}


class StayNotes(Mapping[str, str]):
    """The note of each stay: its documents, joined. Stays are in the order in which they were first added.

    The texts of a large corpus are in a temporary file without a name.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  (closed with the object)
        self._documents: dict[str, list[tuple[str, int, str, int]]] = {}  # date, place and length in the file, kind
        self._end = 0
        self.patients: defaultdict[str, dict[str, None]] = defaultdict(dict)  # of each stay, an ordered set
        self.discharges: dict[str, str] = {}
        self.people = People()
        self.converted: Counter[str] = Counter()

    def add_stay(self, stay: str) -> None:
        """Add a stay, at first without documents."""
        self._documents.setdefault(stay, [])

    def add(self, document: Document) -> None:
        """Add a document to its stay."""
        content = document.text.encode("utf-8")
        self._file.seek(self._end)
        self._file.write(content)
        kind = sys.intern(document.kind)
        self._documents.setdefault(document.stay, []).append((document.date, self._end, kind, len(content)))
        self._end += len(content)
        if document.patient:
            self.patients[document.stay][document.patient] = None
        if document.discharge:
            self.discharges[document.stay] = max(document.discharge, self.discharges.get(document.stay, ""))
        self.people.add(document.stay, document.person)
        if document.converted:
            self.converted[document.converted] += 1

    def __getitem__(self, stay: str) -> str:
        return _BETWEEN_DOCUMENTS.join(self._parts(stay))

    def _parts(self, stay: str) -> dict[str, tuple[str, str]]:
        """Return the texts of a stay's documents, in order, with kind and date of each."""
        parts: dict[str, tuple[str, str]] = {}  # a document that is there twice is kept once
        # Documents without a date follow the dated ones, in the file's order.
        for date, start, kind, length in sorted(self._documents[stay], key=lambda found: (found[0] or "9", found[1])):
            self._file.seek(start)
            text = self._file.read(length).decode("utf-8")
            parts.setdefault(f"## {kind}\n\n{text}" if kind else text, (kind, date))
        return parts

    def documents(self, stay: str) -> list[DocumentPart]:
        """Return where in the note of a stay each of its documents is."""
        found, start = [], 0
        for text, (kind, date) in self._parts(stay).items():
            found.append(DocumentPart(start, start + len(text), kind, date))
            start += len(text) + len(_BETWEEN_DOCUMENTS)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __contains__(self, stay: object) -> bool:
        return stay in self._documents

    @functools.cached_property
    def has_documents(self) -> bool:
        """Whether any stay has several documents; asked for once all are added."""
        return any(len(found) > 1 for found in self._documents.values())

    def count_documents(self, stay: str) -> int:
        """Return the number of documents of a stay."""
        return len(self._documents.get(stay, ()))

    def has_text(self, stay: str) -> bool:
        """Return whether the stay has a document."""
        return bool(self._documents.get(stay))

    def count_undated(self) -> int:
        """Return the number of stays with several documents that are not all dated."""
        return sum(len(found) > 1 and not all(date for date, *_ in found) for found in self._documents.values())


def _stay_of(row: Row, columns: Columns, number: int | None) -> str:
    value = columns.get(row, "stay")
    return str(number) if number is not None and value in (None, "") else identifier(value)


def read_notes(
    path: Path, columns: Columns, encoding: str, left_out: list[LeftOut], numbered: bool = False
) -> StayNotes:
    """Return the notes of a table by stay.

    Args:
        path: table with a row per document.
        columns: its columns.
        encoding: of text formats.
        left_out: receives the rows and documents that cannot be used.
        numbered: whether a row without identifier is a stay of its own, named by its number.

    Raises:
        UserError: the file cannot be read, or identifiers have lost digits.
    """
    notes = StayNotes()
    for line, row in read_table(path, encoding):
        try:
            if isinstance(row, SkippedRowError):
                raise row
            notes.add(to_document(row, columns, line if numbered else None))
        except SkippedRowError as skip:
            left_out.append(describe_row(path, line, row, columns, skip, numbered))
            if left_out[-1].stay:
                notes.add_stay(left_out[-1].stay)
    require_identifiers(path, left_out)
    return notes


def describe_row(
    path: Path,
    line: int,
    row: Row | SkippedRowError,
    columns: Columns,
    skip: SkippedRowError,
    numbered: bool = False,
) -> LeftOut:
    """Return the record of a row that cannot be used."""
    where = f"{path}, {'line' if counts_lines(path) else 'row'} {line}"
    stay = ""
    if isinstance(row, dict):
        with contextlib.suppress(SkippedRowError):
            stay = _stay_of(row, columns, line if numbered else None)
    detail = f": {skip.detail}" if skip.detail else ""
    return LeftOut("document" if stay else "row", skip.reason, stay, where=where + detail)


def require_identifiers(path: Path, left_out: Iterable[LeftOut]) -> None:
    """Raise UserError if identifiers of a table have lost digits: rows of several stays would be one."""
    lost = [found for found in left_out if "lost digits" in found.reason and found.where.startswith(f"{path},")]
    if lost:
        first = lost[0].where.removeprefix(f"{path}, ")
        raise UserError(
            f"{path}: {counted(len(lost), 'row has', 'rows have')} {lost[0].reason} (e.g. {first}). "
            "Export the column of the stay as text; in Excel, format it as text before the data is pasted."
        )


class StayFacts(NamedTuple):
    """Patients (an ordered set), their sex and age, and date of discharge of stays, where known."""

    patients: dict[str, dict[str, None]]
    discharges: dict[str, str]
    people: People

    def add(self, stay: str, patient: str, discharge: str, person: Mapping[str, str]) -> None:
        if patient:
            self.patients.setdefault(stay, {})[patient] = None
        if discharge:
            self.discharges[stay] = max(discharge, self.discharges.get(stay, ""))
        self.people.add(stay, person)


def read_codes(
    path: Path,
    columns: Columns,
    roles: Mapping[str, str],
    encoding: str,
    left_out: list[LeftOut],
    people: People,
) -> tuple[dict[str, list[CodeRow]], dict[str, str], StayFacts]:
    """Return the codes of each stay in the file's order, the role of each status, and the stays' patients and dates.

    Args:
        path: table with a row per code, or per stay or unit.
        columns: its columns.
        roles: roles that the user gave, by status.
        encoding: of text formats.
        left_out: receives the rows that cannot be used.
        people: receives the sex and the age of the stays' patients.

    Raises:
        UserError: the file cannot be read, or a status is not known.
    """
    written: defaultdict[str, list[CodeRow]] = defaultdict(list)  # with the status in place of the role
    facts = StayFacts({}, {}, people)
    for line, row in read_table(path, encoding):
        try:
            if isinstance(row, SkippedRowError):
                raise row
            stay = identifier(columns.get(row, "stay"))
            rows = list(_codes_of_row(row, columns, line))
            written[stay] += rows
            if not rows and not columns.is_wide:
                raise SkippedRowError(WITHOUT_CODE)
            patient, discharge = (columns.get(row, field) for field in ("patient", "discharge"))
            facts.add(stay, optional_text(patient), sortable_date(discharge), _person_of(row, columns))
        except SkippedRowError as skip:
            found = describe_row(path, line, row, columns, skip)
            left_out.append(found._replace(what="row"))
    require_identifiers(path, left_out)
    statuses = Counter(row.role for rows in written.values() for row in rows)
    read = dict(zip(WIDE.values(), WIDE.values())) if columns.is_wide else {}
    if not columns.is_wide:
        read = read_statuses(statuses, roles, _numbers_are_roles(statuses, written.values()))
    codes = {stay: [row._replace(role=read[row.role]) for row in rows] for stay, rows in written.items()}
    return codes, {status: read[status] for status in statuses}, facts


def _codes_of_row(row: Row, columns: Columns, line: int) -> Iterator[CodeRow]:
    """Yield the codes of a row with their status in place of the role."""
    unit, main = (sys.intern(optional_text(columns.get(row, field))) for field in ("unit", "main"))
    if columns.is_wide:
        cells = [(role, column) for field, role in WIDE.items() for column in columns.names.get(field, ())]
    else:
        cells = [(sys.intern(optional_text(columns.get(row, "role"))), column) for column in columns.names["code"]]
    for status, column in cells:
        cell = optional_text(row.get(column))
        for code in split_codes(cell) if cell.casefold() not in _NO_CODE else ():
            yield CodeRow(status, sys.intern(code), unit, main, line)


def _numbers_are_roles(statuses: Mapping[str, int], stays: Iterable[list[CodeRow]]) -> bool:
    """Return whether 1, 2 and 3 are roles: as ranks of a stay's codes, no number would repeat within a stay."""
    if not set(statuses) <= {"1", "2", "3"}:
        return False
    repeats = dict.fromkeys(statuses, 0)
    for rows in stays:
        for status, count in Counter(row.role for row in rows).items():
            repeats[status] = max(repeats[status], count)
    return repeats.get("3", 0) > 1 >= repeats.get("1", 0)


def _bare(name: str) -> str:
    """Return an identifier without what exports change: case, separators, leading zeros, the `.0` of a float."""
    text = re.sub(r"[.,]0+$", "", unicodedata.normalize("NFKC", name).casefold())
    return re.sub(r"[\W_]", "", text).lstrip("0")


def require_same_names(notes: StayNotes, codes: Mapping[str, Any], notes_path: Path, codes_path: Path) -> list[str]:
    """Return warnings about stays whose identifiers differ only in zeros, case or separators; these stay apart.

    Raises:
        UserError: no stay has both a note and codes, or stays are named in two ways, so that parts of them do not meet.
    """
    if notes and codes and not any(stay in notes for stay in codes):
        raise UserError(
            f"No stay of {notes_path} has codes in {codes_path}: the first stays are {next(iter(notes))!r} and "
            f"{next(iter(codes))!r}. Identifiers are compared as texts, zeros included: write them alike in both files."
        )
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for stay in dict.fromkeys(itertools.chain(notes, codes)):
        spellings[_bare(stay)].append(stay)
    several = [found for bare, found in spellings.items() if bare and len(found) > 1]
    apart = [found for found in several if any(not (stay in notes and stay in codes) for stay in found)]
    if apart:
        examples = "; ".join(" and ".join(map(repr, found[:3])) for found in apart[:_EXAMPLES])
        stays = counted(len(apart), "stay")
        raise UserError(
            f"{stays} of {notes_path} and {codes_path} with two names: {examples}. Identifiers are compared as texts: "
            "write each stay alike in both files (exports lose leading zeros when read as numbers)."
        )
    if several:
        examples = "; ".join(" and ".join(map(repr, found[:3])) for found in several[:_EXAMPLES])
        stays = counted(len(several), "identifier has", "identifiers have")
        return [
            f"{stays} other spellings that differ only in zeros, case or separators; they are kept apart: {examples}"
        ]
    return []
