"""Read what a model is to answer: documents of stays, or conversations up to their last answer."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from finetune.data.conversation import parse_conversation
from finetune.data.exceptions import RowError
from model.errors import UserError
from utils.icd10.cells import WITHOUT_IDENTIFIER
from utils.icd10.mapping import NOTE_FIELDS, Columns, TableMapping, find_columns, read_mapping
from utils.icd10.note_text import note_text
from utils.icd10.prompts import prompt_messages
from utils.icd10.stays import DocumentPart, LeftOut, read_header, read_notes, require_used
from utils.tables.encodings import AUTO
from utils.tables.jsonl import SkippedRowError
from utils.tables.read_table import read_table

ID_COLUMNS = ("id", "visit_occurence_id")  # of conversations


class Prompt(NamedTuple):
    """A row without its answer.

    Attributes:
        id: of the stay or the conversation.
        row: its `messages`, and a conversation's other keys.
        documents: those of the note, if it was joined from a table's.
        person: `sex` and `age` of the patient, if known, for the rules.
    """

    id: str
    row: dict[str, Any]
    documents: tuple[DocumentPart, ...] = ()
    person: Mapping[str, Any] = MappingProxyType({})

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.row["messages"]


def read_prompts(
    path: Path, encoding: str = AUTO, mapping: TableMapping | None = None, numbered: bool = True
) -> tuple[list[Prompt], list[LeftOut]]:
    """Return the prompts of a file, and the rows that have none; print which columns of a table are used.

    A row has a document of a stay, as in `utils.prepare_icd10_data`: one prompt per stay; or the `messages` of a
    conversation, answered from its last question.

    Args:
        path: the file.
        encoding: of text formats.
        mapping: columns that the user gave.
        numbered: whether rows have their number as id where the file has no column of the stay, or no `id`.

    Raises:
        UserError: the file cannot be read, has no usable row or no column of the stay, or two conversations have the
            same id.
    """
    mapping = mapping or read_mapping(None)
    header = read_header(path, encoding)
    if not header:
        raise UserError(f"{path} has no rows; expected a header and a note or a question per row.")
    if "messages" in header:
        prompts, left_out = _conversations(path, encoding, numbered)
    else:
        columns = find_columns(path, "notes", header, mapping, rows_are_stays=True)
        if "stay" not in columns.names and not numbered:
            find_columns(path, "notes", header, mapping)  # raises the error that names the columns
        require_used(mapping, {path: columns}, NOTE_FIELDS)
        print(columns.describe(path), flush=True)
        prompts, left_out = _notes(path, columns, encoding, joined="stay" in mapping.of("notes"))
    if not prompts:
        raise UserError(f"{path} has no note or question that can be answered: {count_reasons(left_out)}.")
    return prompts, left_out


def _notes(path: Path, columns: Columns, encoding: str, joined: bool) -> tuple[list[Prompt], list[LeftOut]]:
    left_out: list[LeftOut] = []
    names = columns.names.get("stay")
    if names is None:
        print(
            f"warning: {path} has no column of the stay, so that each row is a stay, named by its number. "
            "Name the column with --columns stay=COLUMN.",
            file=sys.stderr,
        )
    notes = read_notes(path, columns, encoding, left_out, numbered=names is None or (names == ["id"] and not joined))
    if names == ["id"] and not joined:
        for row_id in notes:
            if notes.count_documents(row_id) > 1:
                raise UserError(
                    f"{path}: duplicate id {row_id}; give --columns stay=id to join the documents of an id."
                )
    stays = [stay for stay in notes if notes.has_text(stay)]
    people = {stay: notes.people.facts(stay, notes.discharges.get(stay)) for stay in stays}
    for warning in notes.people.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return [
        Prompt(stay, {"messages": prompt_messages(notes[stay])}, tuple(notes.documents(stay)), people[stay])
        for stay in stays
    ], left_out


def _conversations(path: Path, encoding: str, numbered: bool) -> tuple[list[Prompt], list[LeftOut]]:
    prompts: dict[str, Prompt] = {}
    left_out: list[LeftOut] = []
    for number, row in read_table(path, encoding):
        row_id = ""
        try:
            if not isinstance(row, dict):
                raise row
            row_id = str(next((row[key] for key in ID_COLUMNS if row.get(key) not in (None, "")), ""))
            if not row_id and not numbered:
                raise SkippedRowError(WITHOUT_IDENTIFIER)
            row_id = row_id or str(number)
            if row_id in prompts:
                raise UserError(f"{path}, row {number}: duplicate id {row_id}; each conversation needs its own.")
            person = {name: row[name] for name in ("sex", "age") if row.get(name) not in (None, "")}
            prompts[row_id] = Prompt(row_id, _question(row), person=person)
        except SkippedRowError as skip:
            left_out.append(LeftOut("row", skip.reason, row_id, where=f"{path}, row {number}"))
    return list(prompts.values()), left_out


def _question(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the messages before the last answer, or those of a note.

    Raises:
        SkippedRowError: the row has neither.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        if row.get("text") is None:
            raise SkippedRowError("neither `text` nor `messages`")
        return {"messages": prompt_messages(note_text(row["text"])[0])}
    try:
        parsed = parse_conversation(row).messages
    except RowError as error:
        raise SkippedRowError("not a conversation", str(error)) from error
    question = messages[:-1] if parsed[-1].role == "assistant" else messages
    if not question:
        raise SkippedRowError("an answer without a question")
    return row | {"messages": question}  # with its system prompt and tools


def count_reasons(left_out: Iterable[LeftOut]) -> str:
    """Return each reason with its number of rows."""
    counts = Counter(found.reason for found in left_out)
    return "; ".join(f"{reason}: {count}" for reason, count in counts.items()) or "no rows"
