"""Rows -> tokens and loss masks, through mistral-common's own encoders."""

import collections
import dataclasses
import enum
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import TextChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    FinetuningMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer, get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest, ModelSettings
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import Tokenizer, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerBase,
    InstructTokenizerV1,
    InstructTokenizerV3,
    InstructTokenizerV7,
)
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from pydantic import ValidationError

from model.errors import UserError, quoted
from model.file_kinds import looks_like

from .exceptions import ConversationFormatError, JsonError, MessageFormatError, PretrainFormatError, RowError

V3_VOCABULARY = 32768
MAX_ROW_BYTES = 1 << 24  # the longest notes have some 100 kB; more is a file without line ends
_MAX_DEPTH = 100  # of the objects and lists in a row: far below what Python's own functions can follow


_TOO_DEEP = f"Its JSON is nested too deeply, more than {_MAX_DEPTH} levels."
_LONGEST_REASON = 500  # characters


_UNVERSIONED_NAME = "tokenizer.model"
_MARKS_OF_VERSIONS = {  # a piece that earlier versions do not have; v2 was published for no open model
    "[SYSTEM_PROMPT]": (TokenizerVersion.v7, InstructTokenizerV7),
    "[INST]": (TokenizerVersion.v3, InstructTokenizerV3),
    "<s>": (TokenizerVersion.v1, InstructTokenizerV1),
}


class SampleType(enum.StrEnum):
    PRETRAIN = "pretrain"
    INSTRUCT = "instruct"


@dataclasses.dataclass
class TokenSample:
    tokens: list[int]
    masks: list[bool | float]  # as long as tokens; true where the token is to be learnt, or how much it counts
    removed: int = 0  # tokens taken out so that the rest fits a sequence: all of them where there is no rest


@dataclasses.dataclass
class Conversation:
    """An instruct row whose layout has been checked, not yet its meaning."""

    messages: list[FinetuningMessage]  # the system message, if any, first
    tools: list[Tool] | None
    only_last: bool  # train on the last assistant message alone


def load_instruct_tokenizer(model_folder: Path, vocab_size: int) -> InstructTokenizerBase:
    """The tokenizer in the model's folder; without one, mistral-common's v3, or tekken for larger vocabularies.

    Raises:
        UserError: several tokenizers in the folder, one that cannot be read, or one with more tokens than the model.
    """
    files = [*model_folder.glob("tokenizer.model.v*"), *model_folder.glob("tekken.json")]
    files = files or [*model_folder.glob(_UNVERSIONED_NAME)]
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise UserError(f"{model_folder} holds several tokenizers ({names}); leave the model's own.")
    if files:
        source = f"The tokenizer {files[0]}"
        tokenizer = _read_tokenizer(files[0])
    else:
        source = f"{model_folder} holds no tokenizer, and mistral-common's"
        tokenizer = MistralTokenizer.v3(is_tekken=vocab_size > V3_VOCABULARY).instruct_tokenizer
    if tokenizer.tokenizer.n_words > vocab_size:
        raise UserError(
            f"{source} has {tokenizer.tokenizer.n_words} tokens but the model's vocabulary is {vocab_size}; "
            "put the model's own tokenizer (tokenizer.model.v3 or tekken.json) into its folder."
        )
    return tokenizer


def _read_tokenizer(file: Path) -> InstructTokenizerBase:
    try:
        if file.name == _UNVERSIONED_NAME:
            return _unversioned_tokenizer(file)
        return MistralTokenizer.from_file(str(file)).instruct_tokenizer
    except Exception as error:  # whatever three libraries make of bytes that are no tokenizer
        raise UserError(f"The tokenizer {file} cannot be read: {str(error)[:_LONGEST_REASON]}") from error


def _unversioned_tokenizer(file: Path) -> InstructTokenizerBase:
    """Hugging Face's folders do not say the version in the file's name, but its vocabulary does."""
    pieces = SentencePieceTokenizer(file).vocab()
    version, instruct = next(found for mark, found in _MARKS_OF_VERSIONS.items() if mark in pieces)
    return instruct(SentencePieceTokenizer(file, version))


def parse_row(line: bytes) -> dict[str, Any]:
    """Reads one line of a jsonl file.

    Raises:
        JsonError: not UTF-8, not JSON, no object, one that names a key twice, or a line that can be no row.
    """
    require_row_size(len(line))
    try:
        text = line.decode("utf-8")
        if not text.strip():
            raise JsonError("The line is blank.")
        row = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # finds halves of surrogate pairs
    except UnicodeDecodeError as error:
        raise _not_json(line, f"Byte {error.start + 1} is not valid UTF-8 ({error.reason}).") from error
    except UnicodeEncodeError as error:
        raise JsonError("It holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.") from error
    except RecursionError as error:
        raise JsonError(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise _not_json(line, str(error)) from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError("It holds a whole number of too many digits.") from error
    if not isinstance(row, dict):
        raise JsonError(f"Expected a JSON object, found {_json_type(row)}.")
    if line.count(b"{") + line.count(b"[") > _MAX_DEPTH and _depth(row) > _MAX_DEPTH:
        raise JsonError(_TOO_DEEP)
    return row


def require_row_size(size: int) -> None:
    """Raises JsonError where a line of `size` bytes is too long to be a row."""
    if size > MAX_ROW_BYTES:
        raise JsonError(
            f"It has {size:,} bytes; a row has at most {MAX_ROW_BYTES:,}. Is there a line end after each row?"
        )


def _not_json(line: bytes, reason: str) -> JsonError:
    kind = looks_like(line)
    return JsonError(f"It begins like {kind}, not like a row of jsonl." if kind else reason)


def _depth(value: Any) -> int:
    """How deep objects and lists are nested; without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise JsonError(f"The key {quoted(twice)} stands twice.")
    return unique


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def parse_conversation(row: dict[str, Any]) -> Conversation:
    """Checks the layout of an instruct row and builds its messages.

    Raises:
        ConversationFormatError, MessageFormatError: what is wrong, and what was expected.
    """
    raw_messages = _one_of(row, ("messages", "interactions"), "The conversation", ConversationFormatError)
    if not isinstance(raw_messages, list):
        raise ConversationFormatError(f"`messages` must be a list, found {_json_type(raw_messages)}.")
    tools = _parse_tools(row)
    system = row.get("system_prompt")
    messages: list[FinetuningMessage] = []
    if system is not None:
        if not isinstance(system, str):
            raise ConversationFormatError(f"`system_prompt` must be a text, found {_json_type(system)}.")
        messages.append(SystemMessage(content=system))
    for raw_message in raw_messages:
        message = _parse_message(raw_message)
        if isinstance(message, SystemMessage) and any(isinstance(other, SystemMessage) for other in messages):
            raise MessageFormatError("Multiple messages with role 'system' encountered; only one is allowed.")
        messages.append(message)
    return Conversation(messages, tools, only_last=bool(row.get("only_last")) or tools is not None)


def _one_of(item: dict[str, Any], keys: tuple[str, str], what: str, error: type[RowError]) -> Any:
    first, second = keys
    if first in item and second in item:
        raise error(f"{what} contains both a '{first}' and a '{second}' key; there can be only one of the two.")
    if item.get(first) is None and item.get(second) is None:
        raise error(f"{what} contains neither a '{first}' nor a '{second}' key with a value; its keys: {_keys(item)}.")
    return item[first] if first in item else item[second]


def _keys(item: dict[str, Any]) -> str:
    return ", ".join(item)[:_LONGEST_REASON] or "none"


def _parse_tools(row: dict[str, Any]) -> list[Tool] | None:
    """None where the row has no tools. An empty `available_tools` counts as having tools, an empty `tools` does not."""
    if "tools" in row and "available_tools" in row:
        raise ConversationFormatError(
            "The conversation contains both an `available_tools` and a `tools` key; there can be only one of the two."
        )
    raw_tools = row.get("available_tools") if "available_tools" in row else row.get("tools") or None
    if raw_tools is None:
        return None
    if not isinstance(raw_tools, list):
        raise ConversationFormatError(f"`tools` must be a list, found {_json_type(raw_tools)}.")
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
            f"The 'parameters' of a tool's function must be an object, found {_json_type(function['parameters'])}; "
            "write {} if it takes none."
        )
    return _build(Tool, "A tool", ConversationFormatError, function=function)


def _parse_message(raw: Any) -> FinetuningMessage:
    if not isinstance(raw, dict):
        raise MessageFormatError(f"A message must be an object, found {_json_type(raw)}.")
    if "role" not in raw:
        raise MessageFormatError(f"A message does not contain a 'role' key; its keys: {_keys(raw)}.")
    role = raw["role"]
    if role == "assistant":
        return _parse_assistant_message(raw)
    if role not in ("system", "user", "tool"):
        raise MessageFormatError(f"A message has the role {quoted(role)}; expected system, user, assistant or tool.")
    content = _one_of(raw, ("content", "text"), f"A {role} message", MessageFormatError)
    if raw.get("tool_calls"):
        raise MessageFormatError(f"A {role} message has 'tool_calls'; only an assistant message may.")
    if role == "system":
        return SystemMessage(content=_text(content, role))
    if role == "user":
        return UserMessage(content=_text_or_chunks(content))
    if "tool_call_id" not in raw:
        raise MessageFormatError(f"A tool message does not contain a 'tool_call_id' key; its keys: {_keys(raw)}.")
    if not isinstance(raw["tool_call_id"], str):
        raise MessageFormatError(
            f"A tool message's 'tool_call_id' must be a text, found {_json_type(raw['tool_call_id'])}."
        )
    return _build(
        ToolMessage,
        "A tool message",
        MessageFormatError,
        content=_text(content, role),
        tool_call_id=raw["tool_call_id"],
        name=raw.get("name"),
    )


def _parse_assistant_message(raw: dict[str, Any]) -> FinetuningAssistantMessage:
    calls = raw.get("tool_calls")
    content = None
    if not calls or raw.get("content") is not None or raw.get("text") is not None:
        content = _text(_one_of(raw, ("content", "text"), "An assistant message", MessageFormatError), "assistant")
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
        raise MessageFormatError(f"'tool_calls' must be a list, found {_json_type(raw_calls)}.")
    calls = []
    for raw_call in raw_calls:
        if not isinstance(raw_call, dict):
            raise MessageFormatError(f"A tool call must be an object, found {_json_type(raw_call)}.")
        call_id, function = raw_call.get("id"), raw_call.get("function")
        if not isinstance(call_id, str):
            raise MessageFormatError(f"A tool call must have an 'id' that is a text, found {_json_type(call_id)}.")
        if not isinstance(function, dict):
            raise MessageFormatError("A tool call must have a 'function' object with a name and arguments.")
        for key in ("name", "arguments"):
            if not isinstance(function.get(key), str):
                found = _json_type(function.get(key))
                raise MessageFormatError(
                    f"The function of a tool call must have {_a(repr(key))} that is a text, found {found}."
                )
        calls.append({"id": call_id, "function": {"name": function["name"], "arguments": function["arguments"]}})
    return calls


def _text(content: Any, role: str) -> str:
    if not isinstance(content, str):
        raise MessageFormatError(f"The content of {_a(role)} message must be a text, found {_json_type(content)}.")
    return content


def _text_or_chunks(content: Any) -> str | list[TextChunk]:
    """A user's content may be a list of text chunks: encoded one by one, without a separator."""
    if not isinstance(content, list):
        return _text(content, "user")
    if not all(isinstance(chunk, dict) and isinstance(chunk.get("text"), str) for chunk in content):
        raise MessageFormatError("The content of a user message must be a text or a list of text chunks.")
    return [TextChunk(text=chunk["text"]) for chunk in content]


def _a(word: str) -> str:
    return f"an {word}" if word.lstrip("'")[0] in "aeiou" else f"a {word}"


def _build(cls: type, what: str, error: type[RowError], **values: Any) -> Any:
    """Builds a mistral-common object; pydantic's complaint becomes one sentence."""
    try:
        return cls(**values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        where = ".".join(map(str, first["loc"]))
        found = quoted(str(first["input"])[:40])
        raise error(f"{what} has a wrong `{where}`: {first['msg']}, found {found}.") from None


def chunk_ends(conversation: Conversation) -> list[int]:
    """Where the shorter conversations of `dynamic_chunk_fn_call` end: numbers of messages to keep, longest first.

    A conversation that trains its last answer alone also trains each earlier assistant message that way.
    """
    if not conversation.only_last:
        return []
    last = len(conversation.messages) - 1
    return [
        index + 1
        for index in range(last - 1, -1, -1)
        if isinstance(conversation.messages[index], AssistantMessage) and _weight(conversation.messages[index])
    ]


def _weight(message: Any) -> bool | float:
    """A number only where it is neither 0 nor 1, so that masks stay masks wherever they can."""
    if message.weight is None:
        return True
    return message.weight if 0 < message.weight < 1 else message.weight == 1


def _unweighted(message: FinetuningMessage) -> FinetuningMessage:
    """A message as mistral-common validates it, which knows no weights but 0 and 1."""
    weight = getattr(message, "weight", None)
    if weight is None:
        return message
    if not 0 <= weight <= 1:
        raise ConversationFormatError(f"The `weight` of an assistant message is {weight:g}; expected 0 to 1.")
    return message.model_copy(update={"weight": None})


class SampleEncoder:
    """Turns rows into tokens and masks with one tokenizer, validating as mistral-common does for fine-tuning."""

    def __init__(self, instruct_tokenizer: InstructTokenizerBase) -> None:
        self.instruct_tokenizer = instruct_tokenizer
        tokenizer = instruct_tokenizer.tokenizer
        self._validator = get_validator(tokenizer.version, mode=ValidationMode.finetuning)
        self._normalizer = _finetuning_normalizer(tokenizer) if tokenizer.version.version_num >= 7 else None

    def encode(self, row: dict[str, Any], sample_type: SampleType) -> TokenSample:
        """Encodes a row as it stands in the file.

        Raises:
            RowError: why the row cannot be trained on.
        """
        if sample_type is SampleType.PRETRAIN:
            return self.encode_text(pretrain_text(row))
        return self.encode_conversation(parse_conversation(row))

    def encode_text(self, text: str) -> TokenSample:
        tokens = self.instruct_tokenizer.tokenizer.encode(text, bos=True, eos=True)
        return TokenSample(tokens, [True] * len(tokens))

    def encode_conversation(self, conversation: Conversation) -> TokenSample:
        """Encodes message by message, so that the mask follows the messages' bounds."""
        try:
            request = self._validated_request(conversation)
            return self._encode_request(request, conversation.only_last)
        except MistralCommonException as error:
            raise ConversationFormatError(str(error)) from error
        except RecursionError as error:  # of JSON written as a text: a call's arguments
            raise ConversationFormatError("The arguments of a tool call are nested too deeply.") from error
        except (ValueError, AssertionError, TypeError) as error:
            raise error if isinstance(error, RowError) else RowError(str(error)) from error

    def encode_prompt(self, messages: list[FinetuningMessage], tools: list[Tool] | None = None) -> list[int]:
        """Encodes the messages before an answer: exactly the tokens that stand before it when it is trained.

        Raises:
            RowError: why they cannot be encoded.
        """
        try:
            return self._encode_request(self._request(messages, tools), only_last=False).tokens
        except MistralCommonException as error:
            raise ConversationFormatError(str(error)) from error

    def _validated_request(self, conversation: Conversation) -> InstructRequest:
        messages = conversation.messages
        self._validator.validate_messages([_unweighted(message) for message in messages])
        for tool in conversation.tools or []:
            self._validator._validate_function(tool.function)
        _check_tool_use(messages)
        return self._request([*messages[:-1], self._without_call_ids(messages[-1])], conversation.tools)

    def _request(self, messages: list[FinetuningMessage], tools: list[Tool] | None) -> InstructRequest:
        if self._normalizer is not None:
            request = ChatCompletionRequest[FinetuningMessage](messages=messages, tools=tools)
            return self._normalizer.from_chat_completion_request(request)
        # Up to v3 the system prompt is part of a user message. Neighbours of one role stay apart, as in the original.
        system = next((message.content for message in messages if isinstance(message, SystemMessage)), None)
        if system and not any(isinstance(message, UserMessage) for message in messages):
            raise ConversationFormatError("The system message would be lost: there is no user message to carry it.")
        return InstructRequest[FinetuningMessage, Tool](
            messages=[message for message in messages if not isinstance(message, SystemMessage)],
            system_prompt=system,
            available_tools=tools,
            settings=ModelSettings.none(),
        )

    def _without_call_ids(self, message: FinetuningMessage) -> FinetuningMessage:
        """Drops the call ids of the last message, so that nobody learns random strings."""
        if (
            not isinstance(message, AssistantMessage)
            or not message.tool_calls
            or self.instruct_tokenizer.tokenizer.version.version_num >= 13
        ):
            return message  # from v13 on, ids are not encoded
        calls = [call.model_copy(update={"id": "null"}) for call in message.tool_calls]
        return message.model_copy(update={"tool_calls": calls})

    def _encode_request(self, request: InstructRequest, only_last: bool) -> TokenSample:
        tokenizer = self.instruct_tokenizer
        tokenizer.validate_messages(request.messages)
        first_user, last_user = tokenizer.find_first_last_user(request)
        tokens = list(tokenizer.start())
        masks: list[bool | float] = [False] * len(tokens)
        for index, message in enumerate(request.messages):
            is_last = index == len(request.messages) - 1
            weight: bool | float = False
            if isinstance(message, UserMessage):
                piece, _, _ = tokenizer.encode_user_message(
                    message,
                    request.available_tools,
                    index == last_user,
                    index == first_user,
                    system_prompt=request.system_prompt,
                    force_img_first=True,
                    settings=request.settings,
                )
            elif isinstance(message, ToolMessage):
                piece, _, _ = tokenizer.encode_tool_message(message, index < last_user)
            elif isinstance(message, AssistantMessage):
                piece = tokenizer.encode_assistant_message(message, index < last_user)
                weight = (is_last or not only_last) and _weight(message)
            else:
                piece, _ = tokenizer.encode_system_message(message)
            tokens += piece
            masks += [weight] * len(piece)
        return TokenSample(tokens, masks)


def _finetuning_normalizer(tokenizer: Tokenizer) -> InstructRequestNormalizer:
    """mistral-common's normalizer, with assistant messages that keep their weight."""
    settings_builder = getattr(tokenizer, "model_settings_builder", None)
    return type(get_normalizer(tokenizer.version, settings_builder))(
        UserMessage,
        FinetuningAssistantMessage,
        ToolMessage,
        SystemMessage,
        InstructRequest[FinetuningMessage, Tool],
        settings_builder,
    )


def pretrain_text(row: dict[str, Any]) -> str:
    """The text of a pretrain row.

    Raises:
        PretrainFormatError: no text, two of them, or one that is no text.
    """
    text = _one_of(row, ("text", "content"), "The row", PretrainFormatError)
    if not isinstance(text, str):
        raise PretrainFormatError(f"The text must be a text, found {_json_type(text)}.")
    return text


def _check_tool_use(messages: Iterable[FinetuningMessage]) -> None:
    """Refuses an answer to no call, which mistral-common lets pass.

    Raises:
        ConversationFormatError: the id that fits no earlier call.
    """
    called: set[str] = set()
    for message in messages:
        if isinstance(message, ToolMessage) and message.tool_call_id not in called:
            raise ConversationFormatError(
                f"A tool message answers the call {message.tool_call_id!r}, which no earlier assistant message makes."
            )
        for call in (message.tool_calls if isinstance(message, AssistantMessage) else None) or []:
            if len(call.id) != len(call.id.strip()):
                raise ConversationFormatError(f"The tool call id {call.id!r} has blanks around it.")
            called.add(call.id)
