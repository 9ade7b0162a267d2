"""Templates such as "{instruction}\\n{context}", which build the strings of a training row from a table's columns."""

import dataclasses
import difflib
import itertools
import json
import string
from pathlib import Path
from typing import Any

from model.errors import UserError
from utils.tables.jsonl import Row, SkippedRowError

_SHOWN_NAMES = 40  # columns or keys that an error lists


class MissingKeyError(Exception):
    """A field of a template that a row does not have, with the names that are available instead."""

    def __init__(self, available: list[str]) -> None:
        super().__init__(available)
        self.available = available


@dataclasses.dataclass(frozen=True)
class Template:
    """Text with fields in braces.

    `{column}` is a column's value; `{column.key}` and `{column.0}` index into objects and lists; a key applied to a
    list is applied to each item: `{sub_questions.paragraph}`. `{column:before}` inserts "before" before the value, and
    nothing if the value is empty. `{{` and `}}` are literal braces.
    """

    pieces: tuple[tuple[str, str | None, str], ...]  # literal text, the field after it, the field's prefix

    @classmethod
    def parse(cls, text: str, option: str) -> "Template":
        """Parse a template; the two characters `\\n`, as a shell passes them, are a newline, `\\t` a tab.

        Raises:
            UserError: names `option`; braces do not match or a field has no name.
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
        """Return the template with its fields replaced by `values`, stripped of surrounding whitespace."""
        text = ""
        for literal, field, before in self.pieces:
            value = values[field] if field is not None else ""
            text += literal + (before + value if value else "")
        return text.strip()


def look_up(row: Row, field: str) -> Any:
    """Return the value of a field; None if a parent is null or a list is too short.

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
    """Return a value as a string: empty for null and NaN, one line per item of a list or per nested list."""
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


@dataclasses.dataclass
class Recipe:
    """How a row of the source becomes a training row: `user` and `assistant`, or `text` alone."""

    user: Template | None = None
    assistant: Template | None = None
    system: Template | None = None
    text: Template | None = None
    group: str | None = None  # field; rows with equal values share a split
    found: set[str] = dataclasses.field(default_factory=set, init=False)  # fields that at least one row had
    missing: dict[str, list[str]] = dataclasses.field(
        default_factory=dict, init=False
    )  # field: the names available instead

    def templates(self) -> dict[str, Template]:
        """Return the given templates by option, the required ones first."""
        named = {"--user": self.user, "--assistant": self.assistant, "--text": self.text, "--system": self.system}
        return {option: template for option, template in named.items() if template is not None}

    def convert(self, row: Row) -> tuple[Row, str | None]:
        """Return the new row, and its group if there are groups.

        Raises:
            SkippedRowError: a required string or the group is empty.
        """
        templates = self.templates()
        fields = itertools.chain.from_iterable(template.fields for template in templates.values())
        values = {field: self._value(row, field) for field in fields}
        texts = {option: template.render(values) for option, template in templates.items()}
        for option, text in texts.items():
            if not text and option != "--system":
                raise SkippedRowError(f"{option} is empty")
        group = None if self.group is None else self._value(row, self.group).strip()
        if group == "":
            raise SkippedRowError(f"the group {self.group!r} is empty, so its split cannot be chosen")
        if "--text" in texts:
            return {"text": texts["--text"]}, group
        roles = {"system": texts.get("--system"), "user": texts["--user"], "assistant": texts["--assistant"]}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items() if text]}, group

    def _value(self, row: Row, field: str) -> str:
        try:
            value = as_text(look_up(row, field))
        except MissingKeyError as error:
            self.missing.setdefault(field, error.available)
            return ""
        self.found.add(field)
        return value

    def require_found(self, path: Path) -> None:
        """Raise UserError for fields that no row had: misspelled names."""
        problems = []
        for field, available in self.missing.items():
            if field not in self.found:
                close = difflib.get_close_matches(field.split(".")[-1], available, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}? " if close else ""
                names = ", ".join(map(repr, available[:_SHOWN_NAMES])) or "nothing"
                problems.append(f"  {{{field}}}: {hint}Available: {names}.")
        if problems:
            raise UserError(f"No row of {path} has these fields:\n" + "\n".join(problems))
