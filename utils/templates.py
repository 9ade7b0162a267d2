"""Templates like "{instruction}\\n{context}" that make a text of a row's columns."""

import dataclasses
import json
import string
from typing import Any

from model.errors import UserError
from utils.jsonl import Row


class MissingKeyError(Exception):
    """A place a template names and a row does not have, with the names that stand there instead."""

    def __init__(self, available: list[str]) -> None:
        super().__init__(available)
        self.available = available


@dataclasses.dataclass(frozen=True)
class Template:
    """Text with fields in braces.

    `{column}` is a column's value, `{column.key}` and `{column.0}` reach into objects and lists, and a key put to a
    list is put to each of its items: `{sub_questions.paragraph}`. `{column:before}` writes "before" in front of the
    value, and neither where the value is empty. `{{` and `}}` are braces.
    """

    pieces: tuple[tuple[str, str | None, str], ...]  # text, the field after it, what stands before the field's value

    @classmethod
    def parse(cls, text: str, option: str) -> "Template":
        """Reads a template; the two characters `\\n`, as a shell passes them, are a newline, `\\t` a tab.

        Raises:
            UserError: naming `option`, where the braces do not match or a field has no name.
        """
        text = text.replace("\\n", "\n").replace("\\t", "\t")
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{option}: {error} in {text!r}; a literal brace is written twice.") from error
        for _, field, before, conversion in parsed:
            if field == "" or conversion or "{" in (before or ""):
                raise UserError(f"{option}: a field in {text!r} is not of the form {{column}} or {{column:before}}.")
        return cls(tuple((literal, field, before or "") for literal, field, before, _ in parsed))

    @property
    def fields(self) -> list[str]:
        return [field for _, field, _ in self.pieces if field is not None]

    def render(self, values: dict[str, str]) -> str:
        """The text for the values of its fields, without blanks around it."""
        text = ""
        for literal, field, before in self.pieces:
            value = values[field] if field is not None else ""
            text += literal + (before + value if value else "")
        return text.strip()


def look_up(row: Row, field: str) -> Any:
    """The value of a field; None where something on the way to it is null or a list is too short.

    Raises:
        MissingKeyError: no such column or key.
    """
    if field in row:  # a column may have dots in its name
        return row[field]
    value: Any = row
    for key in field.split("."):
        value = _step(value, key)
    return value


def _step(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        if key not in value:
            raise MissingKeyError([str(name) for name in value])
        return value[key]
    if isinstance(value, list):
        if key.isdecimal():
            return value[int(key)] if int(key) < len(value) else None
        return [_step(item, key) for item in value]
    if value is None:
        return None
    raise MissingKeyError([])


def as_text(value: Any) -> str:
    """A value as text: nothing for null and NaN, a list's items on a line each, a list within a list on one line."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(_on_one_line(item) for item in value)
    if isinstance(value, bool | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _on_one_line(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_on_one_line(item).strip() for item in value)
    return as_text(value)
