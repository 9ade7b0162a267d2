"""Convert other function-calling formats to Mistral's `tools`, `tool_calls` and `tool_call_id`."""

import ast
import json
import re
from typing import Any

from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def as_tool(function: Any) -> Row:
    """Return a function description (of OpenAI's `functions`, or Glaive's) as an entry of `tools`.

    Raises:
        SkippedRowError: it is not a function description.
    """
    if isinstance(function, dict) and isinstance(function.get("function"), dict):
        function = function["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SkippedRowError("a function description has no name")
    description, parameters = function.get("description") or "", function.get("parameters") or {}
    extra = {key: value for key, value in function.items() if key not in ("name", "description", "parameters")}
    described = {"name": function["name"], "description": description, "parameters": parameters, **extra}
    return {"type": "function", "function": described}


def as_tool_call(function: Any, call_id: Any = None) -> Row:
    """Return a function's name and arguments as an entry of `tool_calls`; `link_tool_calls` sets the final id.

    Raises:
        SkippedRowError: there is no name, or the arguments are not a JSON object.
    """
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SkippedRowError("a tool call has no function name")
    called = {"name": function["name"], "arguments": json_arguments(function.get("arguments"))}
    return {"id": call_id, "type": "function", "function": called}


def json_arguments(arguments: Any) -> str:
    """Return a call's arguments as a JSON string; a string that is a JSON object is returned unchanged.

    The repr of a Python dict, which some conversion tools wrote, is accepted.

    Raises:
        SkippedRowError: neither an object nor a string that encodes one.
    """
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(arguments)
                if isinstance(parsed, dict):
                    return arguments if parse is json.loads else json.dumps(parsed, ensure_ascii=False)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
    raise SkippedRowError("the arguments of a tool call are not a JSON object", repr(arguments)[:60])


def end_with_assistant(messages: list[Row]) -> list[Row]:
    """Remove the messages after the last assistant message, which carry no loss.

    Raises:
        SkippedRowError: there is no assistant message.
    """
    ends = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if not ends:
        raise SkippedRowError("no assistant message")
    return messages[: ends[-1]]


def require_content(messages: list[Row]) -> None:
    """Raise SkippedRowError if a message is empty. A tool's answer may be empty, but not missing."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content", message.get("text"))
        empty = content is None if message["role"] == "tool" else not content or not str(content).strip()
        if empty and not message.get("tool_calls"):
            raise SkippedRowError("an empty message", f"message {number}, {message['role']}")


def link_tool_calls(messages: list[Row], new_id: NewId) -> list[Row]:
    """Give each tool call and its answer the same id of 9 alphanumerics; valid ids are kept.

    An answer belongs to the call with its id; without ids, to the first unanswered call with its name; without a name,
    to the first unanswered call. An answer without a call before it gets a new id, and `validate_data` reports it.

    Raises:
        SkippedRowError: no call before an answer has its id or function.
    """
    linked = []
    unanswered: list[Row] = []
    for message in messages:
        if message["role"] == "tool":
            message = {**message, "tool_call_id": _link_answer(message, unanswered, new_id)}
        elif message["role"] == "assistant":
            unanswered = [dict(call) for call in message.get("tool_calls", [])]
            if unanswered:
                message = {**message, "tool_calls": list(unanswered)}  # the same objects: answers complete them
        linked.append(message)
    for message in linked:
        for call in message.get("tool_calls", []):
            call["id"] = _valid_id(call.get("id")) or new_id()
    return linked


def _link_answer(answer: Row, unanswered: list[Row], new_id: NewId) -> str:
    """Return the id of an answer; set it in the call that it answers and remove that call from `unanswered`."""
    written = _written_id(answer.get("tool_call_id"))
    if not unanswered:
        return _valid_id(written) or new_id()
    call = _called_by(answer, written, unanswered)
    unanswered[:] = [other for other in unanswered if other is not call]
    call["id"] = _valid_id(call["id"]) or _valid_id(written) or new_id()
    return call["id"]


def _called_by(answer: Row, written: str | None, unanswered: list[Row]) -> Row:
    for call in unanswered:
        if written is not None and _written_id(call["id"]) == written:
            return call
    candidates = [call for call in unanswered if written is None or _written_id(call["id"]) is None]
    if answer.get("name"):
        candidates = [call for call in candidates if call["function"]["name"] == answer["name"]]
    if not candidates:
        raise SkippedRowError(
            "a tool message matches no unanswered call before it", f"name {answer.get('name')}, id {written}"
        )
    return candidates[0]


def _written_id(call_id: Any) -> str | None:
    """Return the id written in a row; mistral-common's default, "null", counts as none."""
    return None if call_id in (None, "", "null") else str(call_id)


def _valid_id(call_id: Any) -> str | None:
    return call_id if isinstance(call_id, str) and _CALL_ID.fullmatch(call_id) else None
