"""Convert a row of a common chat layout to `messages` and `tools`.

Layouts: OpenAI's messages with functions or tools; ShareGPT's `conversations` (LLaMA-Factory's and Hermes' calls
included); Glaive's, with `function_description` or as text; Alpaca's `instruction`, `input` and `output`; qa-expert's
`question`, `sub_questions` and `final_answer`.
"""

import contextlib
import functools
import re
from typing import Any, NamedTuple

from finetune.data.exceptions import RowError
from finetune.data.keys import REFORMAT
from utils.tables.chat_turns import has_calls, is_tool_turn, is_turn, messages_of
from utils.tables.glaive_text import read_glaive_text
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import NewId, Warn
from utils.tables.tool_calls import (
    end_with_assistant,
    link_tool_calls,
    parse_json,
    parse_tools,
    require_answers,
    require_content,
)

_OWN_KEYS = ("messages", "interactions")
_TURN_KEYS = (*_OWN_KEYS, "conversations", "conversation", "chat")
_TOOL_KEYS = ("functions", "function_description", "tools", "available_tools")
_ALPACA_KEYS = ("instruction", "input", "output", "history")
_MULTI_HOP_KEYS = ("question", "sub_questions", "final_answer")
# What qa-expert's model calls for each part of a question.
_RETRIEVE = {
    "name": "retrieve",
    "description": "Return a paragraph that may answer a question.",
    "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "a question about a single fact"}},
        "required": ["query"],
    },
}
# Glaive's system prompt repeats the descriptions in `tools`: "... Use them if required - {...}".
_REPEATED_FUNCTIONS = re.compile(r"\s*-\s*\[?\s*\{\s*\".*", re.DOTALL)


class _Chat(NamedTuple):
    """What a layout contains."""

    key: str  # of the converted messages
    turns: list[Any]
    tools: list[Row]
    rest: Row  # columns that are kept


def reformat_row(row: Row, new_id: NewId, warn: Warn) -> Row | None:
    """Convert a row.

    Args:
        row: a row of the file; it is not modified.
        new_id: generates a call id.
        warn: called with warnings about a row that is kept, once for each occurrence.

    Returns:
        The converted row; a row for pretraining as it is; None for a row without a layout that is known.

    Raises:
        SkippedRowError: the row cannot be converted without loss, or training would refuse the result.
    """
    chat_warnings: list[str] = []
    try:
        converted = _convert(row, new_id, chat_warnings.append)
        if converted is None:
            return row if any(isinstance(row.get(key), str) for key in ("text", "content")) else None
        _require_trainable(converted)
    except SkippedRowError:
        if not _is_trainable(row):
            raise
        converted, chat_warnings = row, []
    messages = converted[next(key for key in _OWN_KEYS if key in converted)]
    require_content(messages)
    if any(message.get("tool_calls") and (message.get("content") or message.get("text")) for message in messages):
        chat_warnings.append("an assistant message has both content and tool calls, which tokenizers before v7 reject")
    for warning in chat_warnings:
        warn(warning)
    return converted


def _convert(row: Row, new_id: NewId, warn: Warn) -> Row | None:
    chat = _read(row, warn)
    if chat is None:
        return None
    # Of Hermes: in our own layout, only where answers have no other calls.
    has_tags = not any(map(has_calls, chat.turns)) and (chat.key not in row or any(map(is_tool_turn, chat.turns)))
    messages = [message for turn in chat.turns for message in messages_of(turn, has_tags, warn)]
    kept = end_with_assistant(messages)
    for _ in messages[len(kept) :]:
        warn("messages after the last answer removed")
    require_content(kept)
    linked = link_tool_calls(kept, new_id)
    require_answers(linked)
    tool_key = "tools" if row.get("available_tools") is None else "available_tools"
    return {chat.key: linked, **chat.rest} | ({tool_key: chat.tools} if chat.tools else {})


def _read(row: Row, warn: Warn) -> _Chat | None:
    keys = [key for key in _TURN_KEYS if row.get(key) is not None] or [key for key in _OWN_KEYS if key in row]
    if len(keys) > 1:
        raise SkippedRowError(f"both `{keys[0]}` and `{keys[1]}`")
    if keys == ["chat"] and isinstance(row["chat"], str):
        return _read_glaive_text(row)
    if keys:
        return _read_turns(row, keys[0], warn)
    if "instruction" in row and "output" in row:
        return _read_alpaca(row)
    if all(key in row for key in _MULTI_HOP_KEYS):
        return _read_multi_hop(row)
    if is_turn(row):
        raise SkippedRowError("a single message, not a row with a list of messages")
    return None


def _read_turns(row: Row, key: str, warn: Warn) -> _Chat:
    turns = row[key]
    if isinstance(turns, str):
        with contextlib.suppress(ValueError, RecursionError):
            turns = parse_json(turns)
    if not isinstance(turns, list):
        raise SkippedRowError(f"`{key}` is not a list")
    tools, rest = _tools(row), _without(row)
    if rest.get("function_call") == "auto":  # a setting of OpenAI's requests, and its default
        warn("a column `function_call` that is `auto` removed")
        del rest["function_call"]
    if "function_description" in row:
        turns = [_cleaned(turn, bool(tools), warn) for turn in turns]
    return _Chat(key if key in _OWN_KEYS else "messages", _with_system(row, turns), tools, rest)


def _read_glaive_text(row: Row) -> _Chat:
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise SkippedRowError("`system` is not a string")
    turns, described = read_glaive_text(system or "", row["chat"])
    columns = _tools(row)
    if described and columns:
        raise SkippedRowError("functions both in `system` and in another column")
    return _Chat("messages", turns, described or columns, _without(row))


def _read_alpaca(row: Row) -> _Chat:
    texts = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise SkippedRowError(f"`{key}` is not a string")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise SkippedRowError("`history` is not a list of pairs of a question and its answer")
    question = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    turns = []
    for asked, answered in (*history, (question, texts["output"])):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return _Chat("messages", _with_system(row, turns), _tools(row), _without(row, *_ALPACA_KEYS))


def _read_multi_hop(row: Row) -> _Chat:
    """Read a question whose parts are retrieved one by one; each of them is a call, its paragraph the response.

    The answers to the parts, `long_answer`, have no turn: the final answer sums them up.
    """
    parts = row["sub_questions"]
    if not isinstance(parts, list) or not parts:
        raise SkippedRowError("`sub_questions` is not a list with entries")
    turns: list[Row] = [{"role": "user", "content": _required_text(row, "question")}]
    for part in parts:
        if not isinstance(part, dict):
            raise SkippedRowError("an entry of `sub_questions` is not an object")
        query = {"query": _required_text(part, "question", "sub_questions.")}
        call = {"type": "function", "function": {"name": _RETRIEVE["name"], "arguments": query}}
        turns.append({"role": "assistant", "tool_calls": [call]})
        turns.append({"role": "tool", "content": _required_text(part, "paragraph", "sub_questions.")})
    turns.append({"role": "assistant", "content": _required_text(row, "final_answer")})
    return _Chat(
        "messages", _with_system(row, turns), parse_tools([_RETRIEVE], "tools"), _without(row, *_MULTI_HOP_KEYS)
    )


def _required_text(row: Row, key: str, where: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise SkippedRowError(f"`{where}{key}` is not a string with text")
    return value


def _without(row: Row, *keys: str) -> Row:
    """Return the columns that a layout does not convert. An empty `available_tools` counts as tools and is kept."""
    rest = {key: value for key, value in row.items() if key not in (*keys, "system", *_TURN_KEYS, *_TOOL_KEYS)}
    return rest | ({"available_tools": []} if row.get("available_tools") == [] else {})


def _with_system(row: Row, turns: list[Any]) -> list[Any]:
    """Return the turns with the column `system` as their first message."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise SkippedRowError("`system` is not a string")
    written = [message for turn in turns[:1] for message in messages_of(turn, False, lambda _: None)]
    if written and written[0]["role"] == "system":
        if written[0].get("content", written[0].get("text")) == system:
            return turns
        raise SkippedRowError("both a column `system` and a system message")
    return [{"role": "system", "content": system}, *turns]


def _tools(row: Row) -> list[Row]:
    keys = [key for key in _TOOL_KEYS if row.get(key)]
    if len(keys) > 1:
        raise SkippedRowError(f"both `{keys[0]}` and `{keys[1]}`")
    if not keys:
        return []
    value = row[keys[0]]
    if keys == ["function_description"] and isinstance(value, dict):
        value = [value]
    return parse_tools(value, keys[0])


def _cleaned(turn: Any, has_tools: bool, warn: Warn) -> Any:
    """Return a turn of Glaive's without the white space around it and the functions that its system prompt repeats."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        return turn
    value = turn["value"].strip()
    if turn.get("from") == "system" and has_tools and _REPEATED_FUNCTIONS.search(value):
        warn("functions that the system message repeats removed from it")
        value = _REPEATED_FUNCTIONS.sub("", value)
    return turn | {"value": value}


@functools.cache
def _validator() -> Any:
    """Return the strictest of mistral-common's validators that accepts content next to tool calls."""
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return get_validator(TokenizerVersion.v11, mode=ValidationMode.finetuning)


def _is_trainable(row: Row) -> bool:
    try:
        _require_trainable(row)
    except SkippedRowError:
        return False
    return True


def _require_trainable(row: Row) -> None:
    """Raise SkippedRowError if training refuses a row with any tokenizer."""
    from mistral_common.exceptions import MistralCommonException  # loads pydantic, which --help does not need

    from finetune.data.conversation import parse_conversation

    try:
        conversation = parse_conversation(row)
        weights = [getattr(message, "weight", None) for message in conversation.messages]
        if not all(weight is None or 0 <= weight <= 1 for weight in weights):
            raise SkippedRowError("the `weight` of a message is not a number from 0 to 1")
        if conversation.tools and not any(message.role == "user" for message in conversation.messages):
            raise SkippedRowError("tools, but no user message to carry them")
        # Its own check of weights refuses what training accepts: numbers between 0 and 1.
        messages = [message.model_copy(update={"weight": None}) for message in conversation.messages]
        _validator().validate_messages(messages)
        _validator()._validate_tools(conversation.tools or [])
    except (RowError, MistralCommonException) as error:
        reason = str(error).replace(REFORMAT, "it cannot be converted").rstrip(".")
        raise SkippedRowError(f"training would refuse it: {reason}") from error
