"""The layout of rows: instruct rows -> messages and tools, pretrain rows -> text."""

import dataclasses
from typing import Any, TypeVar

from mistral_common.protocol.instruct.chunk import ContentChunk, TextChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    FinetuningMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.tool_calls import Tool
from pydantic import BaseModel, ValidationError

from model.errors import quoted

from .exceptions import ConversationFormatError, MessageFormatError, PretrainFormatError, RowError
from .rows import json_type

_MAX_KEYS_LENGTH = 500  # characters of a list of keys in a message

_ModelT = TypeVar("_ModelT", bound=BaseModel)


@dataclasses.dataclass
class Conversation:
    """An instruct row whose layout is valid; `SampleEncoder` validates the rest."""

    messages: list[FinetuningMessage]  # the system message, if any, first
    tools: list[Tool] | None
    only_last: bool  # train on the last assistant message only

    def up_to(self, end: int) -> "Conversation":
        """Return the conversation of the first `end` messages only."""
        return dataclasses.replace(self, messages=self.messages[:end])


def parse_conversation(row: dict[str, Any]) -> Conversation:
    """Validate the layout of an instruct row and build its messages.

    Raises:
        ConversationFormatError, MessageFormatError: what is wrong, and what was expected.
    """
    raw_messages = _one_of(row, ("messages", "interactions"), "The conversation", ConversationFormatError)
    if not isinstance(raw_messages, list):
        raise ConversationFormatError(f"`messages` must be a list, found {json_type(raw_messages)}.")
    tools = _parse_tools(row)
    system = row.get("system_prompt")
    messages: list[FinetuningMessage] = []
    if system is not None:
        if not isinstance(system, str):
            raise ConversationFormatError(f"`system_prompt` must be a string, found {json_type(system)}.")
        messages.append(SystemMessage(content=system))
    for raw_message in raw_messages:
        message = _parse_message(raw_message)
        if isinstance(message, SystemMessage) and any(isinstance(other, SystemMessage) for other in messages):
            raise MessageFormatError("Multiple messages with role 'system' encountered; only one is allowed.")
        messages.append(message)
    return Conversation(messages, tools, only_last=bool(row.get("only_last")) or tools is not None)


def pretrain_text(row: dict[str, Any]) -> str:
    """Return the text of a pretrain row.

    Raises:
        PretrainFormatError: there is no text, there are two, or it is not a string.
    """
    text = _one_of(row, ("text", "content"), "The row", PretrainFormatError)
    if not isinstance(text, str):
        raise PretrainFormatError(f"The text must be a string, found {json_type(text)}.")
    return text


def chunk_ends(conversation: Conversation) -> list[int]:
    """Return the lengths in messages of the shorter conversations that `dynamic_chunk_fn_call` adds, longest first.

    A conversation that trains only its last answer also trains each earlier assistant message that way.
    """
    if not conversation.only_last:
        return []
    earlier = list(enumerate(conversation.messages[:-1], start=1))
    return [end for end, message in reversed(earlier) if message_weight(message)]


def message_weight(message: FinetuningMessage | AssistantMessage) -> bool | float:
    """Return the loss weight of a message's tokens: a bool for 0 and 1, so that most masks are bool."""
    if not isinstance(message, AssistantMessage):
        return False
    weight = getattr(message, "weight", None)
    if weight is None:
        return True
    return weight if 0 < weight < 1 else weight == 1


def _one_of(item: dict[str, Any], keys: tuple[str, str], what: str, error: type[RowError]) -> Any:
    first, second = keys
    if first in item and second in item:
        raise error(f"{what} contains both a '{first}' and a '{second}' key; there can be only one of the two.")
    if item.get(first) is None and item.get(second) is None:
        raise error(f"{what} contains neither a '{first}' nor a '{second}' key with a value; its keys: {_keys(item)}.")
    return item[first] if first in item else item[second]


def _keys(item: dict[str, Any]) -> str:
    return ", ".join(item)[:_MAX_KEYS_LENGTH] or "none"


def _parse_tools(row: dict[str, Any]) -> list[Tool] | None:
    """Return None for a row without tools. An empty `available_tools` counts as tools, an empty `tools` does not."""
    if "tools" in row and "available_tools" in row:
        raise ConversationFormatError(
            "The conversation contains both an `available_tools` and a `tools` key; there can be only one of the two."
        )
    raw_tools = row.get("available_tools") if "available_tools" in row else row.get("tools") or None
    if raw_tools is None:
        return None
    if not isinstance(raw_tools, list):
        raise ConversationFormatError(f"`tools` must be a list, found {json_type(raw_tools)}.")
    return [_parse_tool(raw_tool) for raw_tool in raw_tools]


def _parse_tool(raw_tool: Any) -> Tool:
    function = raw_tool.get("function") if isinstance(raw_tool, dict) else None
    if not isinstance(function, dict):
        raise ConversationFormatError("A tool must be an object with a 'function' object in it.")
    if raw_tool.get("type", "function") != "function":
        raise ConversationFormatError(f"A tool's `type` is {quoted(raw_tool['type'])}; only 'function' can be trained.")
    for key in ("name", "description", "parameters"):
        if key not in function:
            raise ConversationFormatError(
                f"The function of a tool does not have a '{key}' key; its keys: {_keys(function)}."
            )
    if not isinstance(function["parameters"], dict):
        raise ConversationFormatError(
            f"The 'parameters' of a tool's function must be an object, found {json_type(function['parameters'])}; "
            "write {} for a function without parameters."
        )
    return _build(Tool, "A tool", ConversationFormatError, function=function)


def _parse_message(raw: Any) -> FinetuningMessage:
    if not isinstance(raw, dict):
        raise MessageFormatError(f"A message must be an object, found {json_type(raw)}.")
    if "role" not in raw:
        raise MessageFormatError(f"A message does not contain a 'role' key; its keys: {_keys(raw)}.")
    role = raw["role"]
    if role == "assistant":
        return _parse_assistant_message(raw)
    if role not in ("system", "user", "tool"):
        raise MessageFormatError(f"A message has the role {quoted(role)}; expected system, user, assistant or tool.")
    content = _one_of(raw, ("content", "text"), f"A {role} message", MessageFormatError)
    if raw.get("tool_calls"):
        raise MessageFormatError(f"A {role} message has 'tool_calls'; only an assistant message can have them.")
    if role == "system":
        return SystemMessage(content=_string(content, role))
    if role == "user":
        return UserMessage(content=_string_or_chunks(content))
    return _parse_tool_message(raw, content)


def _parse_tool_message(raw: dict[str, Any], content: Any) -> ToolMessage:
    if "tool_call_id" not in raw:
        raise MessageFormatError(f"A tool message does not contain a 'tool_call_id' key; its keys: {_keys(raw)}.")
    if not isinstance(raw["tool_call_id"], str):
        raise MessageFormatError(
            f"A tool message's 'tool_call_id' must be a string, found {json_type(raw['tool_call_id'])}."
        )
    return _build(
        ToolMessage,
        "A tool message",
        MessageFormatError,
        content=_string(content, "tool"),
        tool_call_id=raw["tool_call_id"],
        name=raw.get("name"),
    )


def _parse_assistant_message(raw: dict[str, Any]) -> FinetuningAssistantMessage:
    calls = raw.get("tool_calls")
    content = None
    if not calls or raw.get("content") is not None or raw.get("text") is not None:
        content = _string(_one_of(raw, ("content", "text"), "An assistant message", MessageFormatError), "assistant")
    return _build(
        FinetuningAssistantMessage,
        "An assistant message",
        MessageFormatError,
        content=content,
        tool_calls=None if calls is None else _parse_tool_calls(calls),
        weight=raw.get("weight"),
    )


def _parse_tool_calls(raw_calls: Any) -> list[dict[str, Any]]:
    if not isinstance(raw_calls, list):
        raise MessageFormatError(f"'tool_calls' must be a list, found {json_type(raw_calls)}.")
    calls = []
    for raw_call in raw_calls:
        if not isinstance(raw_call, dict):
            raise MessageFormatError(f"A tool call must be an object, found {json_type(raw_call)}.")
        call_id, function = raw_call.get("id"), raw_call.get("function")
        if not isinstance(call_id, str):
            raise MessageFormatError(f"A tool call must have an 'id' that is a string, found {json_type(call_id)}.")
        if not isinstance(function, dict):
            raise MessageFormatError("A tool call must have a 'function' object with a name and arguments.")
        for key in ("name", "arguments"):
            if not isinstance(function.get(key), str):
                found = json_type(function.get(key))
                raise MessageFormatError(
                    f"The function of a tool call must have {_a(repr(key))} that is a string, found {found}."
                )
        calls.append({"id": call_id, "function": {"name": function["name"], "arguments": function["arguments"]}})
    return calls


def _string(content: Any, role: str) -> str:
    if not isinstance(content, str):
        raise MessageFormatError(f"The content of {_a(role)} message must be a string, found {json_type(content)}.")
    return content


def _string_or_chunks(content: Any) -> str | list[ContentChunk]:
    """A user's content may be a list of text chunks, which are encoded one by one, without a separator."""
    if not isinstance(content, list):
        return _string(content, "user")
    if not all(isinstance(chunk, dict) and isinstance(chunk.get("text"), str) for chunk in content):
        raise MessageFormatError("The content of a user message must be a string or a list of text chunks.")
    return [TextChunk(text=chunk["text"]) for chunk in content]


def _a(word: str) -> str:
    return f"an {word}" if word.lstrip("'")[0] in "aeiou" else f"a {word}"


def _build(cls: type[_ModelT], what: str, error: type[RowError], **values: Any) -> _ModelT:
    """Build a mistral-common object; turn pydantic's error into one sentence."""
    try:
        return cls(**values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        where = ".".join(map(str, first["loc"]))
        found = quoted(str(first["input"])[:40])
        raise error(f"{what} has an invalid `{where}`: {first['msg']}, found {found}.") from None
