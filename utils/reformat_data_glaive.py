"""Convert Glaive function-calling rows to our format in place: `python -m utils.reformat_data_glaive FILE.jsonl`.

Rows have a `function_description` and `conversations`, a list of {"from": ..., "value": ...} with the speakers system,
human, gpt, function-call and function-response. Rows that cannot be parsed are skipped.
"""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from finetune.cli import run_cli
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId, Warn, rewrite_command
from utils.tables.tool_calls import as_tool, as_tool_call, end_with_assistant, link_tool_calls, require_content

_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "function-call": "assistant",
    "function-response": "tool",
}
# The system prompt repeats the descriptions in `tools`: "... Use them if required - {...}".
_REPEATED_FUNCTIONS = re.compile(r"\s*-\s*\[?\s*\{\s*\".*", re.DOTALL)
# Glaive puts the arguments in single quotes, which is not JSON and, if they contain an apostrophe, not Python either.
_QUOTED_ARGUMENTS = re.compile(r"(?P<before>\{.*?\"arguments\":\s*)'(?P<arguments>.*)'\s*\}", re.DOTALL)


def reformat_glaive_row(row: Row, new_id: NewId, warn: Warn) -> Row:
    """Convert a row; arguments and errors as in `reformat_data.reformat_row`."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise SkippedRowError("no list `conversations`")
    tools = [as_tool(function) for function in _functions(row.get("function_description"))]
    messages = [message for turn in turns if (message := _message(turn, bool(tools), warn))]
    messages = end_with_assistant(messages)
    require_content(messages)
    _require_answers(messages)
    converted: Row = {"messages": link_tool_calls(messages, new_id)}
    return {**converted, "tools": tools} if tools else converted


def _functions(description: Any) -> list[Any]:
    """Return the described functions: a list, or JSON objects separated by blank lines."""
    values = _json_values(description) if isinstance(description, str) else [description]
    functions = [function for value in values for function in (value if isinstance(value, list) else [value])]
    return [function for function in functions if function]


def _json_values(text: str) -> Iterator[Any]:
    rest = text.strip()
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError) as error:
            raise SkippedRowError("`function_description` is not JSON", str(error)) from error
        yield value
        rest = rest[end:].lstrip()


def _message(turn: Any, has_tools: bool, warn: Warn) -> Row | None:
    """Convert a turn; None for an unknown speaker."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise SkippedRowError("a turn of `conversations` without a `value`")
    speaker, value = turn.get("from"), turn["value"].strip()
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        warn(f"turns of the unknown speaker {speaker!r} removed")
        return None
    if speaker == "function-call":
        calls = _called(value)
        return {"role": role, "tool_calls": [as_tool_call(call) for call in calls]}
    if speaker == "system" and has_tools:
        value = _REPEATED_FUNCTIONS.sub("", value)
    return {"role": role, "content": value}


def _called(text: str) -> list[Any]:
    """Parse the calls of a function-call turn: JSON, JSON with arguments in single quotes, or a Python literal."""
    for parse in (json.loads, _unquoted, ast.literal_eval):
        try:
            calls = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if calls:
            return calls if isinstance(calls, list) else [calls]
    raise SkippedRowError("a function call cannot be parsed", text[:60])


def _unquoted(text: str) -> Any:
    quoted = _QUOTED_ARGUMENTS.fullmatch(text)
    if quoted is None:
        raise ValueError("no arguments in single quotes")
    return json.loads(quoted["before"] + quoted["arguments"].replace("\\'", "'") + "}")


def _require_answers(messages: list[Row]) -> None:
    """Raise SkippedRowError unless every call has a response before the next assistant message."""
    unanswered = 0
    for message in messages:
        if message["role"] == "tool":
            if not unanswered:
                raise SkippedRowError("a function response without a call")
            unanswered -= 1
        elif message["role"] == "assistant":
            if unanswered:
                raise SkippedRowError("a function call without a response")
            unanswered = len(message.get("tool_calls", []))


def main() -> None:
    rewrite_command(__doc__, reformat_glaive_row)


if __name__ == "__main__":
    run_cli(main)
