"""Function calling in other layouts -> Mistral's `tools`, `tool_calls` and `tool_call_id`."""

import ast
import json
import re
from typing import Any

from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def as_tool(function: Any) -> Row:
    """A function's description (OpenAI's `functions`, Glaive's) as an entry of `tools`.

    Raises:
        SkippedRowError: it is no description.
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
    """A function's name and arguments as an entry of `tool_calls`; its id is final only after `link_tool_calls`.

    Raises:
        SkippedRowError: no name, or arguments that are no JSON object.
    """
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SkippedRowError("a tool call has no function name")
    called = {"name": function["name"], "arguments": json_arguments(function.get("arguments"))}
    return {"id": call_id, "type": "function", "function": called}


def json_arguments(arguments: Any) -> str:
    """A call's arguments as JSON text; text that is a JSON object already stays to the letter.

    Python's repr of a dict (which earlier versions of such tools wrote) is read as what was meant.

    Raises:
        SkippedRowError: neither an object nor the text of one.
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
    raise SkippedRowError("the arguments of a tool call are no JSON object", repr(arguments)[:60])


def end_with_assistant(messages: list[Row]) -> list[Row]:
    """Cuts what follows the last assistant message: nothing is learnt from it.

    Raises:
        SkippedRowError: there is no assistant message.
    """
    ends = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if not ends:
        raise SkippedRowError("no assistant message")
    return messages[: ends[-1]]


def require_content(messages: list[Row]) -> None:
    """Raises SkippedRowError where a message says nothing. A tool's answer may be empty, but not absent."""
    for number, message in enumerate(messages, start=1):
        content = message.get("content", message.get("text"))
        empty = content is None if message["role"] == "tool" else not content or not str(content).strip()
        if empty and not message.get("tool_calls"):
            raise SkippedRowError("an empty message", f"message {number}, {message['role']}")


def link_tool_calls(messages: list[Row], new_id: NewId) -> list[Row]:
    """Gives each tool call and its answer one id of 9 alphanumerics; ids that are right already stay.

    An answer belongs to the call of its id; without ids, to the first unanswered call of its name; without a name, to
    the first unanswered call. An answer without any call before it gets an id of its own: `validate_data` judges it.

    Raises:
        SkippedRowError: an answer names another id or function than the calls before it.
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
    """The id of an answer; completes the call it belongs to and takes it from the unanswered ones."""
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
            "a tool message answers none of the calls before it", f"name {answer.get('name')}, id {written}"
        )
    return candidates[0]


def _written_id(call_id: Any) -> str | None:
    """What a row says about an id; mistral-common's own default, "null", says nothing."""
    return None if call_id in (None, "", "null") else str(call_id)


def _valid_id(call_id: Any) -> str | None:
    return call_id if isinstance(call_id, str) and _CALL_ID.fullmatch(call_id) else None
