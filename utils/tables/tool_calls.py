"""Convert other function-calling formats to Mistral's `tools`, `tool_calls` and `tool_call_id`."""

import ast
import json
import re
from typing import Any

from finetune.data.exceptions import RowError
from finetune.data.keys import FUNCTION_KEYS, REFORMAT, check_keys
from finetune.data.rows import json_type
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
# Glaive puts the arguments in single quotes, which is not JSON and, if they contain an apostrophe, not Python either.
_QUOTED_ARGUMENTS = re.compile(r"(?P<before>\{.*?\"arguments\":\s*)'(?P<arguments>.*)'\s*\}", re.DOTALL)
_SCHEMA_KEYS = ("input_schema", "inputSchema", "arguments", "args", "inputs")  # Anthropic's, MCP's and others' names
_PARSE_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def parse_json(text: str) -> Any:
    """Parse JSON; NaN and infinities, which are not JSON, raise ValueError."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_tools(value: Any, key: str) -> list[Row]:
    """Return the value of a row's `tools` (or other key) as entries of `tools`.

    Args:
        value: a list of tools, its JSON text, or the JSON texts of tools one after the other.
        key: for the reasons.

    Raises:
        SkippedRowError: it is none of these, or a tool cannot be converted.
    """
    if isinstance(value, str):
        try:
            value = [tool for tool in _json_values(value) if tool]
        except (ValueError, RecursionError) as error:
            raise SkippedRowError(f"`{key}` is not JSON", str(error)) from error
    if not isinstance(value, list):
        raise SkippedRowError(f"`{key}` is not a list")
    return [as_tool(tool) for tool in value]


def _json_values(text: str) -> list[Any]:
    """Parse JSON texts one after the other; the items of a list count as values.

    Raises:
        ValueError, RecursionError: the text is something else.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    values: list[Any] = []
    rest = text.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        values += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip()
    return values


def as_tool(tool: Any) -> Row:
    """Return a function description (OpenAI's, flat or nested; Anthropic's; Glaive's) as an entry of `tools`.

    Raises:
        SkippedRowError: it is not a function description.
    """
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        outer = {key: value for key, value in tool.items() if key != "function" and value is not None}
        function = tool["function"]
    elif isinstance(tool, dict):
        outer = {"type": tool.get("type") or "function"}
        function = {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(tool, dict) or not isinstance(function.get("name"), str):
        raise SkippedRowError("a function description has no name")
    if outer.get("type", "function") != "function":
        raise SkippedRowError("a tool that is not a function")
    function = {key: value for key, value in function.items() if value is not None}
    for key in _SCHEMA_KEYS:
        if "parameters" not in function and _is_schema(function.get(key)):
            function["parameters"] = function.pop(key)
    try:
        check_keys(function, FUNCTION_KEYS, set())  # before defaults make misspelled keys look like others
    except RowError as error:
        raise SkippedRowError(str(error).replace(REFORMAT, "it cannot be converted").rstrip(".")) from error
    described = {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": _json_object(function.get("parameters") or {}),
    }
    return {**outer, "function": function | described}


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("type") == "object" or isinstance(value.get("properties"), dict))


def _json_object(value: Any) -> Row:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise SkippedRowError("the `parameters` of a function are not an object")
    return value


def parse_calls(text: str) -> list[Row]:
    """Parse the text of one or several calls: JSON texts, JSON with arguments in single quotes, or a Python literal.

    Raises:
        SkippedRowError: it is none of these, or a call cannot be converted.
    """
    for parse in (_json_values, _unquoted, ast.literal_eval):
        try:
            calls = parse(text)
        except _PARSE_ERRORS:
            continue
        if calls:
            return [as_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    raise SkippedRowError("a function call cannot be parsed")


def _unquoted(text: str) -> Any:
    quoted = _QUOTED_ARGUMENTS.fullmatch(text)
    if quoted is None:
        raise ValueError("no arguments in single quotes")
    return parse_json(quoted["before"] + quoted["arguments"].replace("\\'", "'") + "}")


def as_tool_call(call: Any) -> Row:
    """Return a call, nested in `function` or flat, as an entry of `tool_calls`; `link_tool_calls` sets the final id.

    Raises:
        SkippedRowError: there is no name, the arguments are not a JSON object, or a key would be lost.
    """
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        outer, function = {key: value for key, value in call.items() if key != "function"}, call["function"]
    elif isinstance(call, dict):
        outer = {key: call[key] for key in ("id", "type") if key in call}
        function = {key: value for key, value in call.items() if key not in outer}
    if not isinstance(call, dict) or not isinstance(function.get("name"), str):
        raise SkippedRowError("a tool call has no function name")
    if outer.get("type") not in (None, "function"):
        raise SkippedRowError("a tool call that is not a function's")
    arguments = "arguments" if function.get("arguments") is not None else "parameters"
    if any(value is not None and key not in ("name", arguments) for key, value in function.items()):
        raise SkippedRowError("a function call has other keys than `name` and `arguments`")
    called = {"name": function["name"], "arguments": json_arguments(function.get(arguments))}
    return {**outer, "id": outer.get("id"), "type": "function", "function": called}


def json_arguments(arguments: Any) -> str:
    """Return a call's arguments as a JSON string; a string that is a JSON object is returned unchanged.

    The repr of a Python dict, which some conversion tools wrote, is accepted.

    Raises:
        SkippedRowError: neither an object nor a string that encodes one.
    """
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, str):
        for parse in (parse_json, ast.literal_eval):
            try:
                parsed = parse(arguments)
                if isinstance(parsed, dict):
                    return arguments if parse is parse_json else _dump_arguments(parsed)
            except _PARSE_ERRORS:
                continue
    elif isinstance(arguments, dict):
        try:
            return _dump_arguments(arguments)
        except ValueError:  # NaN or an infinity
            pass
    raise SkippedRowError("the arguments of a tool call are not a JSON object", f"found {json_type(arguments)}")


def _dump_arguments(arguments: Row) -> str:
    return json.dumps(arguments, ensure_ascii=False, allow_nan=False)


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
        text = "".join(map(_text_of_part, content)) if isinstance(content, list) else str(content or "")
        empty = content is None if message["role"] == "tool" else not text.strip()
        if empty and not message.get("tool_calls"):
            raise SkippedRowError("an empty message", f"message {number}, {message['role']}")


def _text_of_part(part: Any) -> str:
    return str(part.get("text") or "") if isinstance(part, dict) else str(part)


def require_answers(messages: list[Row]) -> None:
    """Raise SkippedRowError unless every call has a response before the next assistant message, except the last."""
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


def link_tool_calls(messages: list[Row], new_id: NewId) -> list[Row]:
    """Give each tool call and its answer the same id of 9 alphanumerics; valid ids are kept.

    An answer belongs to the call with its id; without ids, to the first unanswered call with its name; without a name,
    to the first unanswered call. An answer without a call before it gets a new id.

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
        raise SkippedRowError("a tool message matches no unanswered call before it")
    return candidates[0]


def _written_id(call_id: Any) -> str | None:
    """Return the id written in a row; mistral-common's default, "null", counts as none."""
    return None if call_id in (None, "", "null") else str(call_id)


def _valid_id(call_id: Any) -> str | None:
    return call_id if isinstance(call_id, str) and _CALL_ID.fullmatch(call_id) else None
