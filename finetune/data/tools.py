"""Tools, tool calls and their arguments in rows, in the spellings that are read."""

import json
import math
import re
from typing import Any

from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall

from .exceptions import ConversationFormatError, JsonError, MessageFormatError
from .keys import CALL_KEYS, CALLED_KEYS, FUNCTION_KEYS, REFORMAT, TOOL_KEYS, check_keys, key_names
from .rows import json_type, shown, unique_keys

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def parse_tools(row: dict[str, Any], unread: set[str]) -> list[Tool] | None:
    """Return the tools of a row, or None: an empty `available_tools` counts as tools, an empty `tools` does not.

    A tool is an object with a `function`, or the function itself; all of them, or one, may be JSON text.

    Args:
        row: an instruct row.
        unread: receives the names of keys that are not read.

    Raises:
        ConversationFormatError: what is wrong, and what was expected.
    """
    if "tools" in row and "available_tools" in row:
        raise ConversationFormatError(
            "The conversation contains both an `available_tools` and a `tools` key; there can be only one of the two."
        )
    raw_tools = _from_json(row.get("available_tools"))
    if raw_tools is None:
        raw_tools = _from_json(row.get("tools")) or None
    if raw_tools is None:
        return None
    if not isinstance(raw_tools, list):
        raise ConversationFormatError(f"`tools` must be a list, found {json_type(raw_tools)}.")
    return [_parse_tool(_from_json(raw_tool), unread) for raw_tool in raw_tools]


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json_text(value)
    except JsonTextError as error:
        raise ConversationFormatError(f"`tools` is {error}; expected a list, or the JSON text of one.") from None


def _parse_tool(raw: Any, unread: set[str]) -> Tool:
    if not isinstance(raw, dict):
        raise ConversationFormatError(f"A tool must be an object with a 'function' object, found {json_type(raw)}.")
    if (raw.get("type") or "function") != "function":
        raise ConversationFormatError(f"A tool's `type` is {shown(raw['type'])}; only 'function' can be trained.")
    function = raw.get("function")
    if function is None and isinstance(raw.get("name"), str):
        function = raw
    elif not isinstance(function, dict):
        raise ConversationFormatError("A tool must be an object with a 'function' object in it.")
    else:
        check_keys(raw, TOOL_KEYS, unread)
    check_keys(function, FUNCTION_KEYS, unread)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str):
        raise ConversationFormatError(
            f"The function of a tool does not have a 'name' that is a string; its keys: {key_names(function)}."
        )
    require_function_name(name)
    description = function.get("description")
    if not isinstance(description, str | None):
        raise ConversationFormatError(
            f"The 'description' of a tool's function must be a string, found {json_type(description)}."
        )
    if not isinstance(parameters, dict | None):
        raise ConversationFormatError(
            f"The 'parameters' of a tool's function must be an object, found {json_type(parameters)}; "
            f"write {{}} for a function without parameters. Of JSON text, {REFORMAT}."
        )
    # A `strict` of OpenAI limits what may be generated; no tokenizer encodes it.
    return Tool(function=Function(name=name, description=description or "", parameters=parameters or {}))


def parse_tool_calls(raw_calls: Any, is_context: bool, unread: set[str]) -> list[ToolCall]:
    """Return the tool calls of a message.

    Args:
        raw_calls: the message's `tool_calls`.
        is_context: whether the row trains a later message only.
        unread: receives the names of keys that are not read.

    Raises:
        MessageFormatError: what is wrong, and what was expected.
    """
    if not isinstance(raw_calls, list):
        raise MessageFormatError(f"'tool_calls' must be a list, found {json_type(raw_calls)}.")
    return [_parse_tool_call(raw_call, is_context, unread) for raw_call in raw_calls]


def _parse_tool_call(raw: Any, is_context: bool, unread: set[str]) -> ToolCall:
    if not isinstance(raw, dict):
        raise MessageFormatError(f"A tool call must be an object, found {json_type(raw)}.")
    if (raw.get("type") or "function") != "function":
        raise MessageFormatError(f"A tool call's `type` is {shown(raw['type'])}; only 'function' can be trained.")
    check_keys(raw, CALL_KEYS, unread)
    call_id, function = raw.get("id"), raw.get("function")
    if not isinstance(function, dict):
        raise MessageFormatError(
            f"A tool call must have a 'function' object with a name and arguments, found {json_type(function)}; "
            f"{REFORMAT}."
        )
    check_keys(function, CALLED_KEYS, unread)
    name = function.get("name")
    if not isinstance(name, str):
        raise MessageFormatError(
            f"The function of a tool call must have a 'name' that is a string, found {json_type(name)}."
        )
    if not isinstance(call_id, str):
        raise MessageFormatError(
            f"A tool call must have an 'id' that is a string, found {json_type(call_id)}; {REFORMAT}."
        )
    arguments = function.get("arguments")
    if not (is_context and isinstance(arguments, str) and _is_tolerated(arguments)):
        arguments = read_arguments(arguments)
    return ToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments))


def _is_tolerated(arguments: str) -> bool:
    """Return whether arguments are accepted as context, with a warning, because mistral-finetune trains such rows.

    They are plain text, or the text of an object with NaN or a repeated key; not objects in another notation.
    """
    try:
        return isinstance(json.loads(arguments), dict)
    except json.JSONDecodeError:
        return not arguments.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def read_arguments(arguments: Any) -> str:
    """Return the arguments of a call as JSON text: they are an object, or the text of one, which is not changed.

    Raises:
        MessageFormatError: anything else.
    """
    found = json_type(arguments)
    try:
        if isinstance(arguments, dict):
            found = "an object with a number that JSON does not have (NaN or Infinity)"
            return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if isinstance(arguments, str):
            if isinstance(parsed := parse_json_text(arguments), dict):
                return arguments
            found = f"the text of {json_type(parsed)}"
    except JsonTextError as error:
        found = str(error)
    except ValueError:
        pass  # raised by dumps
    is_python = isinstance(arguments, str) and arguments.lstrip().startswith("{'")
    remedy = f" {REFORMAT}." if arguments in (None, "") or is_python else ""
    raise MessageFormatError(
        "The 'arguments' of a tool call must be an object, or the text of a JSON object (`{}` if there are none), "
        f"found {found}.{remedy}"
    )


class JsonTextError(ValueError):
    """What a string inside a row is, if not the text of a JSON value."""


def parse_json_text(text: str) -> Any:
    """Parse JSON inside a string of a row.

    Raises:
        JsonTextError: it is not JSON, repeats a key, or contains a number or character that JSON does not have.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for unpaired surrogates
        return value
    except json.JSONDecodeError:
        raise JsonTextError("text that is not JSON" if text.strip() else "an empty string") from None
    except JsonError:
        raise JsonTextError("JSON text with a repeated key") from None
    except UnicodeEncodeError:
        raise JsonTextError("JSON text with an unpaired surrogate (\\ud800 to \\udfff)") from None
    except RecursionError:
        raise JsonTextError("JSON text that is nested too deeply") from None
    except ValueError:
        raise JsonTextError("JSON text with a number that JSON does not have, or that is too large") from None


def _refuse_number(name: str) -> Any:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(text)
    return number


def require_function_name(name: str) -> None:
    """Raise ConversationFormatError unless `name` can be the name of a function."""
    if not _NAME.fullmatch(name):
        raise ConversationFormatError(
            f"Function name was {shown(name, quote='')} but must be a-z, A-Z, 0-9, "
            "or contain underscores and dashes, with a maximum length of 64."
        )
