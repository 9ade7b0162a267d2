"""Files whose rows carry names, so that two of them can be matched: questions and what was answered.

Rows without `id` are named by their line, from 1; those of answers may count from 0 instead.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from finetune.data.conversation import parse_conversation
from finetune.data.exceptions import RowError
from model.errors import UserError
from utils.tables.jsonl import Row, SkippedRowError, load_row, read_lines, require_file

_T = TypeVar("_T")


def read_named_rows(path: Path, convert: Callable[[Row], _T]) -> dict[str, _T]:
    """What `convert` makes of each row, by the row's name.

    Raises:
        UserError: a row for which `convert` raises SkippedRowError, a name that stands twice, or no rows.
    """
    require_file(path)
    rows: dict[str, _T] = {}
    for number, line in read_lines(path):
        try:
            row = load_row(line)
            name = str(number if row.get("id") is None else row["id"])
            if name in rows:
                raise SkippedRowError(f"the id {name!r} stands twice; each row needs its own")
            rows[name] = convert(row)
        except SkippedRowError as skip:
            detail = f" ({skip.detail})" if skip.detail else ""
            raise UserError(f"{path}, line {number}: {skip.reason}{detail}.") from None
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows


def last_answer(row: Row) -> str:
    """The text of the assistant's message that an instruct row ends with; empty where it ends otherwise.

    Raises:
        SkippedRowError: no instruct row.
    """
    try:
        messages = parse_conversation(row).messages
    except RowError as error:
        raise SkippedRowError("not an instruct row", str(error)) from error
    last = messages[-1] if messages else None
    content = last.content if last and last.role == "assistant" else None
    return content if isinstance(content, str) else ""


def match_names(gold: Mapping[str, Any], predictions: Mapping[str, _T]) -> dict[str, _T]:
    """Predictions under the names of gold: those that count rows from 0 are renamed to count from 1.

    Raises:
        UserError: no name of gold is among them.
    """
    if "0" in predictions and "0" not in gold:
        predictions = {str(int(name) + 1) if name.isdecimal() else name: found for name, found in predictions.items()}
    if not gold.keys() & predictions.keys():
        raise UserError(
            f"No prediction is for a gold row: the first is for {next(iter(predictions))!r}, the first gold row is "
            f"{next(iter(gold))!r}. Give both files the same ids."
        )
    return dict(predictions)
