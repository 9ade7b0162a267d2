"""Mends common chat layouts of a jsonl file in place: `python -m utils.reformat_data FILE.jsonl`.

OpenAI's `functions`, `function_call` and role `function` become `tools`, `tool_calls` and role `tool`; call ids are
made and matched; messages after the last answer are cut; rows with an empty message or no answer are left out.
Rows without a conversation pass unchanged: `utils.validate_data` judges them.
"""

import json
from typing import Any

from finetune.cli import run_cli
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId, Note, rewrite_command
from utils.tables.tool_calls import as_tool, as_tool_call, end_with_assistant, link_tool_calls, require_content


def reformat_row(row: Row, new_id: NewId, note: Note) -> Row:
    """Converts one row.

    Args:
        row: as it stands in the file; it is not edited.
        new_id: makes a call id.
        note: takes remarks about a row that is kept.

    Raises:
        SkippedRowError: it cannot be mended.
    """
    row = _with_tools(row)
    key = next((key for key in ("messages", "interactions") if key in row), None)
    if key is None:
        return row
    if not isinstance(row[key], list):
        raise SkippedRowError(f"`{key}` is not a list")
    messages = end_with_assistant([_reformat_message(message) for message in row[key]])
    require_content(messages)
    if any(message.get("tool_calls") and (message.get("content") or message.get("text")) for message in messages):
        note("an assistant message has both a text and tool calls, which tokenizers before v7 refuse")
    return {**row, key: link_tool_calls(messages, new_id)}


def _with_tools(row: Row) -> Row:
    functions = row.get("functions")
    row = {key: value for key, value in row.items() if key != "functions"}
    if not functions:
        return row
    if row.get("tools") or row.get("available_tools"):
        raise SkippedRowError("both `functions` and `tools`")
    if not isinstance(functions, list):
        raise SkippedRowError("`functions` is not a list")
    return {**row, "tools": [as_tool(function) for function in functions]}


def _reformat_message(message: Any) -> Row:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise SkippedRowError("a message without a `role`")
    calls = _tool_calls(message)
    message = {key: value for key, value in message.items() if key not in ("function_call", "tool_calls")}
    if message["role"] == "function":
        message["role"] = "tool"
    if message["role"] == "tool" and isinstance(message.get("content"), dict):
        message["content"] = json.dumps(message["content"], ensure_ascii=False)
    if calls:
        empty = [key for key in ("content", "text") if key in message and not message[key]]
        message = {key: value for key, value in message.items() if key not in empty} | {"tool_calls": calls}
    return message


def _tool_calls(message: Row) -> list[Row]:
    """The calls of a message in either layout; a null or an empty list means none."""
    call, calls = message.get("function_call"), message.get("tool_calls")
    if call and calls:
        raise SkippedRowError("both `function_call` and `tool_calls`")
    if call:
        return [as_tool_call(call)]
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise SkippedRowError("`tool_calls` is not a list of objects")
    return [as_tool_call(call.get("function"), call.get("id")) for call in calls]


def main() -> None:
    rewrite_command(__doc__, reformat_row)


if __name__ == "__main__":
    run_cli(main)
