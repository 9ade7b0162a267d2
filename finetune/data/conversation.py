"""The layout of rows: instruct rows -> messages and tools, pretrain rows -> text."""

import dataclasses
import difflib
from typing import Any

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

from .exceptions import ConversationFormatError, MessageFormatError, PretrainFormatError, RowError
from .keys import (
    CHUNK_KEYS,
    MESSAGE_KEYS,
    PRETRAIN_KEYS,
    REFORMAT,
    ROW_KEYS,
    TRAIN_FLAGS,
    WEIGHT_KEYS,
    check_keys,
    key_names,
)
from .rows import json_type, shown
from .tools import parse_tool_calls, parse_tools

# Roles of other tools: those that utils.reformat_data converts, and others that a message may quote.
_CONVERTED_ROLES = {"human", "gpt", "chatgpt", "model", "function", "observation", "function_call", "function-call"}
_CONVERTED_ROLES |= {"tool_call", "tool-call", "function_response", "function-response"}
_CONVERTED_ROLES |= {"tool_response", "tool-response"}
_OTHER_ROLES = {"bot", "ai", "ipython", "chatbot", "critic", "environment"}


@dataclasses.dataclass
class Conversation:
    """An instruct row whose layout is valid; `SampleEncoder` validates the rest."""

    messages: list[FinetuningMessage]  # the system message, if any, first
    tools: list[Tool] | None
    only_last: bool  # train on the last assistant message only
    unread: set[str] = dataclasses.field(default_factory=set)  # names of metadata in the row

    def up_to(self, end: int) -> "Conversation":
        """Return the conversation of the first `end` messages only."""
        return dataclasses.replace(self, messages=self.messages[:end])


def parse_conversation(row: dict[str, Any]) -> Conversation:
    """Validate the layout of an instruct row and build its messages.

    Raises:
        ConversationFormatError, MessageFormatError: what is wrong, and what was expected.
    """
    unread: set[str] = set()
    check_keys(row, ROW_KEYS, unread)
    raw_messages = _one_of(row, ("messages", "interactions"), "The conversation", ConversationFormatError)
    if not isinstance(raw_messages, list):
        raise ConversationFormatError(f"`messages` must be a list, found {json_type(raw_messages)}.")
    tools = parse_tools(row, unread)
    system = _system_prompt(row, unread)
    messages: list[FinetuningMessage] = [] if system is None else [SystemMessage(content=system)]
    only_last = _only_last(row) or tools is not None
    for number, raw_message in enumerate(raw_messages, start=1):
        message = _parse_message(raw_message, only_last and number < len(raw_messages), unread)
        if isinstance(message, SystemMessage) and any(isinstance(other, SystemMessage) for other in messages):
            raise MessageFormatError(
                "Multiple messages with role 'system' encountered; only one is allowed (the row's own prompt counts)."
            )
        messages.append(message)
    return Conversation(messages, tools, only_last, unread)


def _only_last(row: dict[str, Any]) -> bool:
    only_last = row.get("only_last")
    if only_last not in (None, 0, 1):
        raise ConversationFormatError(f"`only_last` must be true or false, found {json_type(only_last)}.")
    return bool(only_last)


def _system_prompt(row: dict[str, Any], unread: set[str]) -> str | list[ContentChunk] | None:
    """Return the system prompt that the row itself has: `system_prompt`, or the `system` of other tools."""
    prompt, system = row.get("system_prompt"), row.get("system") or None  # other tools write "" for none
    if prompt is not None and system is not None:
        raise ConversationFormatError(
            "The row has both `system_prompt` and `system`; there can be only one of the two."
        )
    key, value = ("system", system) if prompt is None else ("system_prompt", prompt)
    return None if value is None else _content(value, f"`{key}`", ConversationFormatError, unread)


def pretrain_text(row: dict[str, Any], unread: set[str] | None = None) -> str:
    """Return the text of a pretrain row; add the names of its metadata to `unread`.

    Raises:
        PretrainFormatError: there is no text, there are two, or it is not a string.
    """
    check_keys(row, PRETRAIN_KEYS, set() if unread is None else unread)
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


def message_text(message: FinetuningMessage) -> str:
    """Return the content of a message, its parts joined; "" if it has none."""
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content if isinstance(part, TextChunk))
    return message.content or ""


def _one_of(item: dict[str, Any], keys: tuple[str, str], what: str, error: type[RowError]) -> Any:
    first, second = keys
    if first in item and second in item:
        raise error(f"{what} contains both a '{first}' and {_a(second)} key; there can be only one of the two.")
    if item.get(first) is None and item.get(second) is None:
        names = key_names(item)
        raise error(f"{what} contains neither a '{first}' nor {_a(second)} key with a value; its keys: {names}.")
    return item[first] if first in item else item[second]


def _a(key: str) -> str:
    return f"an '{key}'" if key[0] in "aeiou" else f"a '{key}'"


def _parse_message(raw: Any, is_context: bool, unread: set[str]) -> FinetuningMessage:
    if not isinstance(raw, dict):
        raise MessageFormatError(f"A message must be an object, found {json_type(raw)}.")
    if "role" not in raw:
        raise MessageFormatError(f"A message does not contain a 'role' key; its keys: {key_names(raw)}.")
    role = "system" if raw["role"] == "developer" else raw["role"]  # OpenAI's newer name
    keys = MESSAGE_KEYS.get(role) if isinstance(role, str) else None
    if keys is None:
        raise MessageFormatError(f"A message has {_unknown_role(role)}.")
    check_keys(raw, keys, unread)
    if role == "assistant":
        return _parse_assistant_message(raw, is_context, unread)
    if not raw.keys().isdisjoint(WEIGHT_KEYS):
        _require_untrained(raw, keys.what)
    content = _one_of(raw, ("content", "text"), keys.what, MessageFormatError)
    if role == "tool" and isinstance(content, dict):
        raise MessageFormatError(f"The content of a tool message must be a string, found an object; {REFORMAT}.")
    content = _content(content, keys.content, MessageFormatError, unread)
    if role == "system":
        return SystemMessage(content=content)
    if role == "user":
        return UserMessage(content=content)
    return _tool_message(raw, content)


def _require_untrained(raw: dict[str, Any], what: str) -> None:
    for key in ("weight", *TRAIN_FLAGS):
        if raw.get(key) not in (None, 0):
            raise MessageFormatError(f"{what} has `{key}`; only assistant messages can be trained.")


def _unknown_role(role: Any) -> str:
    """Quote a role that other tools use, or a misspelled one; any other may be the content, swapped with the role."""
    expected = "expected system, user, assistant or tool"
    if not isinstance(role, str):
        return f"a role that is {json_type(role)}; {expected}"
    name = role.strip().lower()
    if name in _CONVERTED_ROLES or name in MESSAGE_KEYS:
        return f"the role {role!r}; {expected} ({REFORMAT})"
    if difflib.get_close_matches(name, [*MESSAGE_KEYS, *_OTHER_ROLES], n=1, cutoff=0.8):
        return f"the role {role!r}; {expected}"
    return f"a role of {len(role):,} characters; {expected}"


def _tool_message(raw: dict[str, Any], content: str | list[ContentChunk]) -> ToolMessage:
    call_id, name = raw.get("tool_call_id"), raw.get("name")
    if not isinstance(call_id, str):
        raise MessageFormatError(
            f"A tool message must have a 'tool_call_id' key with a string, found {json_type(call_id)}; {REFORMAT}."
        )
    if not isinstance(name, str | None):
        raise MessageFormatError(f"The 'name' of a tool message must be a string, found {json_type(name)}.")
    return ToolMessage(content=content, tool_call_id=call_id, name=name or None)


def _parse_assistant_message(raw: dict[str, Any], is_context: bool, unread: set[str]) -> FinetuningAssistantMessage:
    raw_calls = raw.get("tool_calls")
    calls = None if raw_calls is None else parse_tool_calls(raw_calls, is_context, unread)
    content = None
    if not calls or raw.get("content") is not None or raw.get("text") is not None:
        content = _one_of(raw, ("content", "text"), "An assistant message", MessageFormatError)
        content = _content(content, "The content of an assistant message", MessageFormatError, unread)
    return FinetuningAssistantMessage(content=content, tool_calls=calls, weight=_weight(raw))


def _weight(raw: dict[str, Any]) -> float | None:
    """Return the weight that a message states, as a number or as a flag; None if it states none.

    Raises:
        MessageFormatError: a value of another type, or values that contradict each other.
    """
    if raw.keys().isdisjoint(WEIGHT_KEYS):  # most messages
        return None
    weight = None if raw.get("weight") is None else _number(raw["weight"])
    flags = {key: raw[key] for key in TRAIN_FLAGS if raw.get(key) is not None}
    for key, flag in flags.items():
        if flag not in (0, 1):
            raise MessageFormatError(f"`{key}` of an assistant message must be true or false, found {json_type(flag)}.")
    stated = {key: bool(value) for key, value in flags.items()}
    if weight is not None:
        stated["weight"] = weight != 0
    if len(set(stated.values())) > 1:
        keys = ", ".join(f"`{key}`" for key in stated)
        raise MessageFormatError(f"The keys {keys} of an assistant message contradict each other.")
    return 0.0 if weight is None and False in stated.values() else weight


def _number(weight: Any) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError, OverflowError):
        raise MessageFormatError(
            f"An assistant message has an invalid `weight`: expected a number from 0 to 1, found {shown(weight)}."
        ) from None


def _content(value: Any, what: str, error: type[RowError], unread: set[str]) -> str | list[ContentChunk]:
    """Return a string, or the chunks of a text that is written as a list of them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise error(f"{what} must be a string, found {json_type(value)}.")
    texts = [_text_of_chunk(chunk, what, error, unread) for chunk in value]
    return "".join(texts) if len(texts) < 2 else [TextChunk(text=text) for text in texts]


def _text_of_chunk(chunk: Any, what: str, error: type[RowError], unread: set[str]) -> str:
    if not isinstance(chunk, dict):
        raise error(f"{what} must be a string or a list of text chunks, found a list with {json_type(chunk)} in it.")
    if (chunk.get("type") or "text") != "text":
        remedy = f" ({REFORMAT})" if chunk["type"] in ("input_text", "output_text") else ""
        raise error(f"{what} has a chunk of the type {shown(chunk['type'])}; expected text chunks only{remedy}.")
    check_keys(chunk, CHUNK_KEYS, unread)
    if not isinstance(chunk.get("text"), str):
        raise error(f"{what} has a chunk without a 'text' that is a string; its keys: {key_names(chunk)}.")
    return chunk["text"]
