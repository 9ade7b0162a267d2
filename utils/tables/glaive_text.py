"""Read the layout of glaive-function-calling-v2: a `system` and a `chat`, each one string with labels."""

import re

from utils.tables.jsonl import Row, SkippedRowError
from utils.tables.tool_calls import parse_calls, parse_tools

_LABELS = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_LABEL = rf"({'|'.join(_LABELS)}):"
# The data set separates messages by two empty lines; copies of it by a line end, or a space.
_SEPARATORS = [re.compile(before + _LABEL) for before in (r"(?:^|\n\n\n)\s*", r"(?m:^)\s*", r"(?:^|(?<=\s)|(?<=\|>))")]
_END, _CALL = "<|endoftext|>", "<functioncall>"
_FUNCTIONS = re.compile(r"\s*-\s*(?=\[?\s*\{\s*\")")  # "... Use them if required - {...}"


def read_glaive_text(system: str, chat: str) -> tuple[list[Row], list[Row]]:
    """Return the turns, and the tools that the system prompt describes.

    Raises:
        SkippedRowError: a label or a call is not as expected.
    """
    prompt, *described = _FUNCTIONS.split(system.strip().removeprefix("SYSTEM:").strip(), maxsplit=1)
    tools = parse_tools(described[0], "system") if described else []
    turns = [{"role": "system", "content": prompt}] if prompt else []
    return turns + _turns(chat.strip()), tools


def _turns(chat: str) -> list[Row]:
    separator = next((found for found in _SEPARATORS if "ASSISTANT" in found.findall(chat)), None)
    if separator is None:
        raise SkippedRowError("`chat` has no label ASSISTANT:")
    before, *pieces = separator.split(chat)
    if before.strip() or (separator is _SEPARATORS[0] and any(map(_SEPARATORS[1].search, pieces[1::2]))):
        raise SkippedRowError("the messages of `chat` cannot be separated")
    return [_turn(_LABELS[label], text) for label, text in zip(pieces[::2], pieces[1::2], strict=True)]


def _turn(role: str, text: str) -> Row:
    text = text.strip().removesuffix(_END).strip()
    if _END in text:
        raise SkippedRowError(f"text after {_END}")
    if role != "assistant" or _CALL not in text:
        return {"role": role, "content": text}
    content, _, call = text.partition(_CALL)
    return {"role": role, "content": content.strip(), "tool_calls": parse_calls(call.strip())}
