"""Which keys of a row are read, which are refused, and which are metadata.

A key that may say what is trained, or that carries content, is read or refused: ignoring it would train something else
than the row says. So is a misspelled key. All others are metadata, which `utils.validate_data` counts.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from .exceptions import ConversationFormatError, MessageFormatError, PretrainFormatError, RowError
from .rows import is_identifier

# Flags of a message: `train` and `training` of axolotl, `trainable` of Tinker, `loss` of XTuner and ms-swift.
TRAIN_FLAGS = ("train", "training", "trainable", "loss")
WEIGHT_KEYS = frozenset(("weight", *TRAIN_FLAGS))
# Words that are close to a key that is read, but not a misspelling where that key, or another name of it, is present.
_OTHER_WORDS = {"message", "interaction", "tool", "context", "contents", "texts", "test", "next", "roles", "rule"}
_OTHER_WORDS |= {"names", "height", "eight"}
_LONGEST_NAME = 64  # characters of a key that can be a misspelling
_NAMES_SHOWN = 20  # keys in a message

_MASK_WORDS = {"train", "trained", "training", "trainable", "loss", "losses", "mask", "masks", "masked", "masking"}
_MASK_WORDS |= {"unmask", "unmasked", "weight", "weights", "untrained", "learn", "learnable", "supervised"}
_ROW_MASK_WORDS = _MASK_WORDS - {"loss", "losses", "weight", "weights", "learn", "supervised"}  # as in "weight_loss"
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of snake_case and camelCase

REFORMAT = "`python -m utils.reformat_data FILE` converts it"
_TEXT_ONLY = "only text is trained on; remove it, or the row"
_REASONING = "reasoning is not trained on; put it into `content` or remove it"
_MESSAGE_MASK = "it may say what is trained, and is not read; use `weight` (0 to 1), or `train` (true or false)"
_ROW_MASK = "it may say what is trained, and is not read; put `weight` (0 to 1) on answers, or rename it"
_ROW_FLAG = "it may say what is trained, and is not read; put `weight` or `train` on answers, or rename it"
_TEXT_MASK = "it may say what is trained, and is not read; every token of a pretrain row is trained on"
_BEGUN = "an answer that is only begun cannot be trained; remove it"
_LABEL = "true or false may be a preference, which is not supported; rename it"
_PREFERENCE = "preference data is not supported; keep only the conversation to train on"
_SYSTEM = "the system prompt is `system_prompt`, `system` or a system message"
_LEFT_OUT = "rows and messages are not left out by a key; remove it, or use `weight`"
_OTHER_LAYOUT = f"the conversation of a row is `messages`; of another layout, {REFORMAT}"
_FUNCTIONS = "functions that can be called are read from `tools`"
_ROW_TOOLS = "`tools` belong to the row, not to a message"
_CONTENT = "it would be lost; the only content of a message is `content` (or `text`)"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # or a flag


# Values that cannot mean what the key may mean, by the reason why the key is refused otherwise.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    _LEFT_OUT: lambda value: value is False,
    _BEGUN: lambda value: value is False,
    _TEXT_ONLY: _is_number,
    _REASONING: _is_number,
    _LABEL: lambda value: not isinstance(value, bool),
    _ROW_FLAG: lambda value: isinstance(value, str | int | float) and not isinstance(value, bool),
}


def _each(keys: str, remedy: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), remedy)


_MEDIA = _each("image images imageurl imageurls video videos videourl audio audios audiourl inputaudio", _TEXT_ONLY)
_THOUGHTS = _each("think thought thoughts cot chainofthought", _REASONING)
_REASONS = ("reasoning", "thinking")  # how keys for reasoning begin
_SWITCHES = _each("skip skipped ignore ignored exclude excluded", _LEFT_OUT)
_ROW_MASKS = "weight weights sampleweight lossweight lossweights loss lossmask lossmasks lossscale mask masks masked "
_ROW_MASKS += "unmask maskhistory train training trainable dotrain trainoninput trainoninputs trainonprompt"


@dataclasses.dataclass(frozen=True, eq=False)
class Keys:
    """The keys of one kind of object in a row."""

    what: str  # begins a sentence
    error: type[RowError]
    groups: tuple[tuple[str, ...], ...]  # keys that are read; those of a group are names of one thing
    prefix: str = ""  # of metadata in a report
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # folded keys, and why
    mask: str = ""  # why any other key with one of `mask_words` is refused; "" accepts it
    mask_words: frozenset[str] = frozenset(_MASK_WORDS)
    instead: tuple[str, ...] = ()  # keys whose presence allows `refused` ones

    @functools.cached_property
    def read(self) -> frozenset[str]:
        return frozenset(key for group in self.groups for key in group)

    @functools.cached_property
    def content(self) -> str:
        return f"The content of {self.what[0].lower()}{self.what[1:]}"

    @functools.cached_property
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """The group of each folded key."""
        return {_folded(key): group for group in self.groups for key in group}


_CONTENT_KEYS = (("role",), ("content", "text"))
_WEIGHT_KEYS = (("weight",), *((flag,) for flag in TRAIN_FLAGS))
_REFUSED_IN_MESSAGES = {
    **_MEDIA,
    **_THOUGHTS,
    **_SWITCHES,
    **_each("functioncall", REFORMAT),
    **_each("tools functions availabletools", _ROW_TOOLS),
    **_each("toolresult toolresults toolresponse toolresponses tooloutput tooloutputs observation refusal", _CONTENT),
    **_each("tooluse tooluses function calls", _CONTENT),
    **_each("prefix partial", _BEGUN),
    "toolcalls": "only an assistant message can have them",
    "toolcallid": "only a tool message can have it",
}


def _message_keys(what: str, *groups: tuple[str, ...]) -> Keys:
    return Keys(
        what,
        MessageFormatError,
        (*_CONTENT_KEYS, *_WEIGHT_KEYS, *groups),
        "messages.",
        _REFUSED_IN_MESSAGES,
        _MESSAGE_MASK,
    )


ROW_KEYS = Keys(
    "The row",
    ConversationFormatError,
    (("messages", "interactions"), ("system_prompt", "system"), ("tools", "available_tools"), ("only_last",)),
    refused={
        **_MEDIA,
        **_SWITCHES,
        **_each(_ROW_MASKS, _ROW_MASK),
        **_each("functions functioncall", REFORMAT),
        **_each("chosen rejected rejectedresponse rejectedmessages preferredoutput nonpreferredoutput", _PREFERENCE),
        **_each("ktotag", _PREFERENCE),
        **_each("label", _LABEL),
        **_each("systemmessage systeminstruction systeminstructions systemtext systemcontent sysprompt", _SYSTEM),
        **_each("developer developerprompt developermessage instructions preamble", _SYSTEM),
        **_each("conversations conversation chat", _OTHER_LAYOUT),
        **_each("availablefunctions tooldefinitions toolconfig toolspecs functiondescription", _FUNCTIONS),
    },
    mask=_ROW_FLAG,
    mask_words=frozenset(_ROW_MASK_WORDS),
)
PRETRAIN_KEYS = Keys(
    "The row",
    PretrainFormatError,
    (("text", "content"),),
    refused={**_SWITCHES, **_each(_ROW_MASKS, _TEXT_MASK), **_each("chosen rejected", _PREFERENCE)},
)
MESSAGE_KEYS = {
    "system": _message_keys("A system message"),
    "user": _message_keys("A user message"),
    "assistant": _message_keys("An assistant message", ("tool_calls",)),
    "tool": _message_keys("A tool message", ("tool_call_id",), ("name",)),
}
CHUNK_KEYS = Keys(
    "A chunk of a message", MessageFormatError, (("type",), ("text",)), "messages.content.", _MEDIA, _MESSAGE_MASK
)
CALL_KEYS = Keys("A tool call", MessageFormatError, (("id",), ("type",), ("function",)), "tool_calls.")
CALLED_KEYS = Keys("The function of a tool call", MessageFormatError, (("name",), ("arguments",)), "tool_calls.")
TOOL_KEYS = Keys("A tool", ConversationFormatError, (("type",), ("function",)), "tools.")
FUNCTION_KEYS = Keys(
    "The function of a tool",
    ConversationFormatError,
    (("type",), ("name",), ("description",), ("parameters",), ("strict",)),
    "tools.",
    _each("inputschema arguments args inputs", f"the schema of its arguments is `parameters`; {REFORMAT}"),
    instead=("parameters",),
)


def check_keys(item: dict[str, Any], keys: Keys, unread: set[str]) -> None:
    """Add the names of an object's metadata to `unread`.

    Raises:
        RowError: a key that may say what is trained, that carries content, or that is misspelled.
    """
    if item.keys() <= keys.read:  # faster than the difference, and so in most objects
        return
    for key in sorted(item.keys() - keys.read):
        value = item[key]
        if value is None or value == "" or value == [] or value == {}:
            continue  # exports of tables fill missing values like this
        if len(key) <= _LONGEST_NAME:
            reason, unless = _refusal(keys, key)
            is_allowed = any(item.get(name) is not None for name in unless) or (
                reason in _HARMLESS and _HARMLESS[reason](value)
            )
            if reason and not is_allowed:
                end = "" if reason.endswith("?") else "."
                raise keys.error(f"{keys.what} has the key {_shown(key)}: {reason}{end}")
        unread.add(f"{keys.prefix}{key}" if is_identifier(key) else f"{keys.prefix}...")


def key_names(item: dict[str, Any]) -> str:
    """Return an object's keys for a message; those that may be text of a note are only counted."""
    names = [key for key in item if is_identifier(key)][:_NAMES_SHOWN]
    others = len(item) - len(names)
    return ", ".join(names + ([f"{others} others" if names else str(others)] if others else [])) or "none"


@functools.lru_cache(maxsize=4096)
def _refusal(keys: Keys, key: str) -> tuple[str, tuple[str, ...]]:
    """Return why a key that is not read is refused, "" if it is not, and the keys whose presence allows it."""
    folded = _folded(key)
    if folded in keys.group_of:  # spelled like `toolCalls`
        return _meant(keys, folded)[0], ()
    if folded in keys.refused:
        return keys.refused[folded], keys.instead
    if folded.startswith(_REASONS) and keys.error is not PretrainFormatError:
        return _REASONING, ()
    similar = next((read for read in keys.group_of if _is_misspelled(folded, read)), None)
    if similar and not folded.endswith("id"):
        reason, group = _meant(keys, similar)
        return reason, group if folded in _OTHER_WORDS else ()
    if "weight" in keys.refused and folded not in _OTHER_WORDS and _is_misspelled(folded, "weight"):
        return keys.refused["weight"], ()
    if keys.mask and not keys.mask_words.isdisjoint(word.lower() for word in _WORD.findall(key)):
        return keys.mask, ()
    return "", ()


def _is_misspelled(key: str, read: str) -> bool:
    """Return whether one letter, or two of a long key, is missing, added or wrong, or exchanged with its neighbor."""
    allowed = (len(read) >= 4) + (len(read) >= 9)
    if abs(len(key) - len(read)) > allowed:
        return False
    before: list[int] = []  # the last two rows of the table of distances between prefixes
    above = list(range(len(read) + 1))
    for row, letter in enumerate(key, start=1):
        current = [row]
        for column, other in enumerate(read, start=1):
            changes = min(above[column] + 1, current[-1] + 1, above[column - 1] + (letter != other))
            if row > 1 and column > 1 and letter == read[column - 2] and key[row - 2] == other:
                changes = min(changes, before[column - 2] + 1)
            current.append(changes)
        before, above = above, current
    return above[-1] <= allowed


def _meant(keys: Keys, folded: str) -> tuple[str, tuple[str, ...]]:
    group = keys.group_of[folded]
    name = next(name for name in group if _folded(name) == folded)
    return f"it is not read; did you mean `{name}`?", group


def _folded(key: str) -> str:
    return re.sub(r"[\s_-]", "", key).casefold()


def _shown(key: str) -> str:
    return f"`{key}`" if is_identifier(key) else f"of {len(key)} characters"
