"""Convert common chat formats of a jsonl file in place: `python -m utils.reformat_data FILE.jsonl`.

OpenAI's `functions`, `function_call` and role `function` become `tools`, `tool_calls` and role `tool`; call ids are
generated and matched; messages after the last answer are removed; rows with an empty message or without an answer are
skipped. Rows without a conversation are kept unchanged; `utils.validate_data` checks them.
"""

import json
from typing import Any

from finetune.cli import run_cli
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId, Warn, rewrite_command
from utils.tables.tool_calls import as_tool, as_tool_call, end_with_assistant, link_tool_calls, require_content


def reformat_row(row: Row, new_id: NewId, warn: Warn) -> Row:
    """Convert a row.

    Args:
        row: a row of the file; it is not modified.
        new_id: generates a call id.
        warn: called with warnings about a row that is kept.

    Raises:
        SkippedRowError: the row cannot be converted.
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
        warn("an assistant message has both content and tool calls, which tokenizers before v7 reject")
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
    """Return the calls of a message in either format; null and an empty list mean none."""
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
