"""Errors of training data.

A `RowError` is raised where the problem is found and contains only the reason; `BadRowError` adds the file and the
line. Each kind has a hint, so that a report can explain once how to fix many rows.
"""

from pathlib import Path

from model.errors import UserError


class RowError(UserError):
    """A row that cannot be trained on."""

    kind = "Tokenization errors"
    hint = "The text cannot be encoded; look for control characters and encoding errors in it."


class JsonError(RowError):
    kind = "Data load errors"
    hint = (
        "Each line of a jsonl file is one complete JSON object in UTF-8: no blank lines, no arrays around the rows "
        "(`python -m utils.reformat_data FILE` converts a JSON list)."
    )


class ConversationFormatError(RowError):
    kind = "Conversation format errors"
    hint = (
        "A row has `messages` (or `interactions`), ends with the assistant, and its tools, calls and answers fit "
        "together; `python -m utils.reformat_data FILE` converts common layouts."
    )


class MessageFormatError(RowError):
    kind = "Message format errors"
    hint = (
        "A message has a `role` (system, user, assistant, tool) and either `content` or `text`; docs/data.md lists the "
        "keys that are read."
    )


class PretrainFormatError(RowError):
    kind = "Pretrain format errors"
    hint = 'A pretrain row is {"text": "..."} (or `content` instead of `text`).'


class BadRowError(UserError):
    """A row that cannot be trained on, with its file and line."""

    def __init__(self, path: Path, line: int, error: RowError) -> None:
        super().__init__(f"The data in line {line} of dataset {path} is incorrectly formatted. {error}")
        self.path = path
        self.line = line  # counted from 1
        self.error = error
