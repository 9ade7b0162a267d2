"""Convert a turn of a chat, whatever it calls its speaker and its text, to messages."""

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from finetune.data.keys import TRAIN_FLAGS
from finetune.data.rows import is_identifier
from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.rewrite import Warn
from utils.tables.tool_calls import as_tool_call, parse_calls

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function_call", "function-call", "tool_call", "tool-call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **dict.fromkeys(("function_response", "function-response", "tool_response", "tool-response"), "tool"),
}
_TEXT_KEYS = ("content", "value", "text")
_WEIGHT_KEYS = ("weight", *TRAIN_FLAGS)
_CALL_KEYS = ("function_call", "tool_calls")
_TEXT_PARTS = ("text", "input_text", "output_text", None)


def has_calls(turn: Any) -> bool:
    """Return whether a turn has calls in one of OpenAI's formats."""
    return isinstance(turn, dict) and any(turn.get(key) for key in _CALL_KEYS)


def is_turn(value: Any) -> bool:
    """Return whether a value has a speaker that is known."""
    return isinstance(value, dict) and _speaker(value) in _ROLES


def is_tool_turn(turn: Any) -> bool:
    """Return whether a turn is a function's answer."""
    return is_turn(turn) and _ROLES[_speaker(turn) or ""] == "tool"


def messages_of(turn: Any, has_tags: bool, warn: Warn) -> list[Row]:
    """Convert a turn; several answers in one turn become several messages.

    Args:
        turn: with `role` or `from`, and `content`, `text` or `value`.
        has_tags: whether `<tool_call>` and `<tool_response>` in a text are Hermes' calls and answers.
        warn: called with warnings.

    Raises:
        SkippedRowError: it cannot be converted without loss.
    """
    speaker = _speaker(turn) if isinstance(turn, dict) else None
    if speaker is None:
        raise SkippedRowError("a message without a `role`")
    if speaker not in _ROLES:
        name = f" `{speaker}`" if is_identifier(speaker) else ""
        raise SkippedRowError(f"a message of the unknown speaker{name}")
    role = _ROLES[speaker]
    text_keys = [key for key in _TEXT_KEYS if turn.get(key) is not None]
    if len(text_keys) > 1:
        raise SkippedRowError(f"a message with both `{text_keys[0]}` and `{text_keys[1]}`")
    if "from" in turn and not text_keys and not _calls(turn):
        raise SkippedRowError("a turn of `conversations` without a `value`")
    text = turn[text_keys[0]] if text_keys else None
    replaced = ("role" if "role" in turn else "from", *_TEXT_KEYS, *_WEIGHT_KEYS, *_CALL_KEYS)
    message = {"role": role, **_weight(turn, role, warn)}
    message |= {key: value for key, value in turn.items() if key not in replaced and value is not None}
    calls = _calls(turn)
    if calls and role != "assistant":
        raise SkippedRowError("a tool call in a message that is not the assistant's")
    if role == "tool":
        texts = _tagged_answers(_answer_text(text)) if has_tags else [_answer_text(text)]
        return [message | ({} if text is None else {"content": text}) for text in texts]
    if speaker.endswith("call") and not calls:
        calls, text = _called(text), None
    elif has_tags and role == "assistant" and isinstance(text, str) and not calls:
        text, calls = _tagged_calls(text)
    if text or (text is not None and not calls):
        message["text" if text_keys == ["text"] else "content"] = _text_parts(text)
    return [message | ({"tool_calls": calls} if calls else {})]


def _speaker(turn: Row) -> str | None:
    speaker = turn["role"] if "role" in turn else turn.get("from")
    return speaker.strip().lower() if isinstance(speaker, str) else None


def _weight(turn: Row, role: str, warn: Warn) -> Row:
    """Return the message's `weight`, as it is or as a flag such as `train` gives it."""
    flags = {key: turn[key] for key in TRAIN_FLAGS if turn.get(key) is not None}
    given = flags | ({"weight": turn["weight"]} if turn.get("weight") is not None else {})
    if not given:
        return {}
    if role != "assistant":
        if any(value not in (0, False) for value in given.values()):
            raise SkippedRowError("a message that is not the assistant's asks to be trained on")
        warn("weights of 0 removed from messages that are never trained on")
        return {}
    if any(flag not in (0, 1) for flag in flags.values()):
        raise SkippedRowError(f"the {_names(flags)} of a message is not true or false")
    if len({bool(value) for value in given.values()}) > 1:
        raise SkippedRowError(f"the {_names(given)} of a message contradict each other")
    return {"weight": turn["weight"] if "weight" in given else int(all(flags.values()))}


def _names(keys: Iterable[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _text_parts(content: Any) -> Any:
    """Return a content that is a list as text parts in the spelling that training reads."""
    if not isinstance(content, list):
        return content
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise SkippedRowError("a content part that is not text")
    return [part if part.get("type") in (None, "text") else part | {"type": "text"} for part in parts]


def _answer_text(content: Any) -> Any:
    """Return a function's answer as text; objects, numbers and lists that are not text parts become JSON."""
    if content is None or isinstance(content, str):
        return content
    if content and isinstance(content, list):
        with contextlib.suppress(SkippedRowError):
            return _text_parts(content)
    return json.dumps(content, ensure_ascii=False)


def _calls(turn: Row) -> list[Row]:
    """Return the calls in either of OpenAI's formats; null and an empty list mean none."""
    call, calls = turn.get("function_call"), turn.get("tool_calls")
    if call and calls:
        raise SkippedRowError("both `function_call` and `tool_calls`")
    if call:
        return [as_tool_call(call)]
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise SkippedRowError("`tool_calls` is not a list of objects")
    return [as_tool_call(call) for call in calls]


def _called(value: Any) -> list[Row]:
    """Return the calls of a turn that consists of them."""
    if isinstance(value, str):
        text, calls = _tagged_calls(value)
        if text and calls:
            raise SkippedRowError("text next to a function call")
        return calls or parse_calls(value.strip())
    return [as_tool_call(call) for call in (value if isinstance(value, list) else [value])]


def _tagged_calls(text: str) -> tuple[str, list[Row]]:
    """Return the text before Hermes' `<tool_call>` tags, and the calls in them."""
    if "<tool_call>" not in text:
        return text, []
    before, *tagged = text.split("<tool_call>")
    calls = []
    for piece in tagged:
        call, end, after = piece.partition("</tool_call>")
        if not end or after.strip():
            raise SkippedRowError("a <tool_call> that is not closed, or text after it")
        calls += parse_calls(call.strip())
    return before.strip(), calls


def _tagged_answers(text: Any) -> list[Any]:
    """Return the content of each of Hermes' `<tool_response>` tags; content without tags is returned unchanged."""
    if not isinstance(text, str) or "<tool_response>" not in text:
        return [text]
    before, *tagged = text.split("<tool_response>")
    answers = [piece.partition("</tool_response>") for piece in tagged]
    if before.strip() or any(not end or after.strip() for _, end, after in answers):
        raise SkippedRowError("a <tool_response> that is not closed, or text around it")
    return [answer.strip() for answer, _, _ in answers]
