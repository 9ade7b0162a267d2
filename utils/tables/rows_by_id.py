"""Match the rows of two jsonl files, such as questions and answers, by the first of ID_KEYS.

The id of a row without one is its line number, from 1; in a file of answers, numbers may start at 0.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from finetune.data.exceptions import RowError
from model.errors import UserError
from utils.tables.jsonl import Row, SkippedRowError, load_row, read_lines, require_file

ID_KEYS = ("id", "visit_occurence_id")

_T = TypeVar("_T")


def read_by_id(path: Path, convert: Callable[[Row], _T]) -> dict[str, _T]:
    """Return `convert(row)` of each row by row id.

    Raises:
        UserError: `convert` raises SkippedRowError for a row, an id appears twice, or there are no rows.
    """
    require_file(path)
    rows: dict[str, _T] = {}
    for number, line in read_lines(path):
        try:
            row = load_row(line)
            row_id = str(next((row[key] for key in ID_KEYS if row.get(key) is not None), number))
            if row_id in rows:
                raise SkippedRowError(f"duplicate id {row_id!r}; each row needs its own")
            rows[row_id] = convert(row)
        except SkippedRowError as skip:
            detail = f" ({skip.detail})" if skip.detail else ""
            raise UserError(f"{path}, line {number}: {skip.reason}{detail}.") from None
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows


def last_answer(row: Row) -> str:
    """Return the text of the last message of an instruct row if it is the assistant's, otherwise "".

    Raises:
        SkippedRowError: the row is not a valid instruct row.
    """
    from finetune.data.conversation import message_text, parse_conversation  # imports mistral_common

    try:
        messages = parse_conversation(row).messages
    except RowError as error:
        raise SkippedRowError("not an instruct row", str(error)) from error
    return message_text(messages[-1]) if messages and messages[-1].role == "assistant" else ""


def match_ids(gold: Mapping[str, Any], predictions: Mapping[str, _T]) -> dict[str, _T]:
    """Return the predictions with the ids of gold: numbers from 0 are changed to start at 1 if gold has 1, 2, 3, ...

    Raises:
        UserError: the files have no id in common.
    """
    numbered = gold.keys() == set(map(str, range(1, len(gold) + 1)))
    if numbered and "0" in predictions and str(len(gold)) not in predictions:
        predictions = {str(int(row_id) + 1) if row_id.isdecimal() else row_id: p for row_id, p in predictions.items()}
    if not gold.keys() & predictions.keys():
        raise UserError(
            f"No prediction has the id of a gold row: the first prediction has {next(iter(predictions))!r}, the first "
            f"gold row {next(iter(gold))!r}. Give both files the same ids."
        )
    return dict(predictions)
