"""Rows -> tokens and loss masks, with mistral-common's own encoders."""

import contextlib
import dataclasses
import enum
import re
from collections.abc import Iterator
from typing import Any

from mistral_common.exceptions import InvalidToolSchemaException, MistralCommonException
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
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from .conversation import Conversation, message_text, message_weight, parse_conversation, pretrain_text
from .exceptions import ConversationFormatError, RowError
from .keys import REFORMAT
from .rows import shown
from .tools import require_function_name

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_NO_ID = "null"  # mistral-common's default


class SampleType(enum.StrEnum):
    PRETRAIN = "pretrain"
    INSTRUCT = "instruct"


@dataclasses.dataclass
class TokenSample:
    tokens: list[int]
    masks: list[bool | float]  # one per token: true where the token is trained, or its loss weight
    removed: int = 0  # tokens removed so that the sample fits into a sequence; all of them if it was dropped


class SampleEncoder:
    """Encode rows as tokens and loss masks with one tokenizer; validate them as mistral-common does for fine-tuning."""

    def __init__(self, instruct_tokenizer: InstructTokenizerBase) -> None:
        self.instruct_tokenizer = instruct_tokenizer
        tokenizer = instruct_tokenizer.tokenizer
        self._validator = get_validator(tokenizer.version, mode=ValidationMode.finetuning)
        self._normalizer = _finetuning_normalizer(tokenizer) if tokenizer.version.version_num >= 7 else None

    def encode(self, row: dict[str, Any], sample_type: SampleType) -> TokenSample:
        """Encode a row.

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
        """Encode message by message, so that the mask follows the message boundaries.

        Raises:
            RowError: why the conversation cannot be trained on.
        """
        with _row_errors():
            return self._encode_request(self._validated_request(conversation), conversation.only_last)

    def encode_prompt(self, messages: list[FinetuningMessage], tools: list[Tool] | None = None) -> list[int]:
        """Encode the messages before an answer: exactly the tokens that precede it in training.

        Raises:
            RowError: why they cannot be encoded.
        """
        with _row_errors():
            return self._encode_request(self._request(messages, tools), only_last=False).tokens

    def _validated_request(self, conversation: Conversation) -> InstructRequest:
        messages = conversation.messages
        version = self.instruct_tokenizer.tokenizer.version.version_num
        # Before mistral-common does, whose messages quote ids, names and schemas.
        _check_tool_calls(messages, ids_are_free=version >= 13 or version < 3)
        self._validator.validate_messages([_without_weight(message) for message in messages])
        for tool in conversation.tools or []:
            self._check_schema(tool)
        if conversation.only_last:
            messages = _apart_from_last(messages)
        return self._request([*messages[:-1], self._without_call_ids(messages[-1])], conversation.tools)

    def _check_schema(self, tool: Tool) -> None:
        try:
            self._validator._validate_function(tool.function)
        except InvalidToolSchemaException:
            raise ConversationFormatError(
                f"Invalid tool schema: the `parameters` of {shown(tool.function.name)} are not JSON Schema (draft 7)."
            ) from None

    def _request(self, messages: list[FinetuningMessage], tools: list[Tool] | None) -> InstructRequest:
        version = self.instruct_tokenizer.tokenizer.version
        if tools and version == TokenizerVersion.v1:
            raise ConversationFormatError("Tools not implemented for tokenizer V1: `tools` would be lost.")
        if tools and not any(isinstance(message, UserMessage) for message in messages):
            raise ConversationFormatError("The tools would be lost: there is no user message to carry them.")
        if self._normalizer is not None:
            request = ChatCompletionRequest[FinetuningMessage](messages=messages, tools=tools)
            return self._normalizer.from_chat_completion_request(request)
        # Up to v3 the system prompt is part of a user message. Consecutive messages of one role are not merged, as in
        # mistral-finetune.
        messages = [_joined(message, version) for message in messages]
        system = next((str(message.content) for message in messages if isinstance(message, SystemMessage)), None)
        if system and not any(isinstance(message, UserMessage) for message in messages):
            raise ConversationFormatError("The system message would be lost: there is no user message to carry it.")
        return InstructRequest[FinetuningMessage, Tool](
            messages=[message for message in messages if not isinstance(message, SystemMessage)],
            system_prompt=system,
            available_tools=tools,
            settings=ModelSettings.none(),
        )

    def _without_call_ids(self, message: FinetuningMessage) -> FinetuningMessage:
        """Remove the call ids of the last message, so that random strings are not trained."""
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
                weight = (is_last or not only_last) and message_weight(message)
            else:
                piece, _ = tokenizer.encode_system_message(message)
            tokens += piece
            masks += [weight] * len(piece)
        return TokenSample(tokens, masks)


@contextlib.contextmanager
def _row_errors() -> Iterator[None]:
    """Turn what mistral-common raises for a conversation into a RowError."""
    try:
        yield
    except MistralCommonException as error:
        raise ConversationFormatError(str(error)) from error
    except RecursionError as error:  # of JSON inside a string: a call's arguments, a tool's answer
        raise ConversationFormatError("JSON inside a string is nested too deeply.") from error
    except RowError:
        raise
    except (ValueError, AssertionError, TypeError) as error:  # whose messages may quote the row
        raise RowError(f"The tokenizer refuses it ({type(error).__name__}).") from error


def _finetuning_normalizer(tokenizer: Tokenizer) -> InstructRequestNormalizer:
    """Return mistral-common's normalizer, with assistant messages that keep their weight."""
    settings_builder = getattr(tokenizer, "model_settings_builder", None)
    return type(get_normalizer(tokenizer.version, settings_builder))(
        UserMessage,
        FinetuningAssistantMessage,
        ToolMessage,
        SystemMessage,
        InstructRequest[FinetuningMessage, Tool],
        settings_builder,
    )


def _without_weight(message: FinetuningMessage) -> FinetuningMessage:
    """Return the message as mistral-common validates it: it accepts no weights but 0 and 1.

    Raises:
        ConversationFormatError: the weight is not between 0 and 1.
    """
    weight = getattr(message, "weight", None)
    if weight is None:
        return message
    if not 0 <= weight <= 1:
        raise ConversationFormatError(f"The `weight` of an assistant message is {weight:g}; expected 0 to 1.")
    return message.model_copy(update={"weight": None})


def _joined(message: FinetuningMessage, version: TokenizerVersion) -> FinetuningMessage:
    """Join the parts of a text, which encoders up to v3 do not; v3 encodes those of a user message one by one."""
    if not isinstance(message.content, list) or (isinstance(message, UserMessage) and version == TokenizerVersion.v3):
        return message
    return message.model_copy(update={"content": message_text(message)})


def _apart_from_last(messages: list[FinetuningMessage]) -> list[FinetuningMessage]:
    """Give answers just before the last one the weight 0, so that mistral-common does not merge them with it."""
    messages = list(messages)
    for index in range(len(messages) - 2, -1, -1):
        if not isinstance(messages[index], AssistantMessage):
            break
        messages[index] = messages[index].model_copy(update={"weight": 0.0})
    return messages


def _check_tool_calls(messages: list[FinetuningMessage], ids_are_free: bool) -> None:
    """Check that assistant messages say something, and the names and ids of calls, each of which has one answer.

    Args:
        messages: of a conversation.
        ids_are_free: whether the tokenizer encodes no ids, so that they may be any string.

    Raises:
        ConversationFormatError: what is wrong, and what was expected.
    """
    called: set[str] = set()
    unanswered: set[str] = set()  # calls of the last assistant message
    for message in messages:
        if isinstance(message, ToolMessage):
            call_id = str(message.tool_call_id)
            if message.name is not None:
                require_function_name(message.name)
            if call_id not in unanswered:
                why = "is answered already" if call_id in called else "no earlier assistant message makes"
                raise ConversationFormatError(f"A tool message answers the call {shown(call_id)}, which {why}.")
            unanswered.remove(call_id)
        elif isinstance(message, AssistantMessage):
            if not message_text(message) and not message.tool_calls:
                raise ConversationFormatError("Assistant message must have either content or tool_calls, but not both.")
            unanswered = set()
            for call in message.tool_calls or []:
                require_function_name(call.function.name)
                _check_call_id(call.id, ids_are_free)
                if call.id in unanswered and call.id != _NO_ID:
                    raise ConversationFormatError(
                        f"Two calls of an assistant message have the id {shown(call.id)}; each needs its own."
                    )
                unanswered.add(call.id)
            called |= unanswered


def _check_call_id(call_id: str, ids_are_free: bool) -> None:
    if len(call_id) != len(call_id.strip()):
        raise ConversationFormatError(f"The tool call id {shown(call_id)} has blanks around it.")
    if not ids_are_free and call_id != _NO_ID and not _CALL_ID.fullmatch(call_id):
        raise ConversationFormatError(
            f"Tool call id was {shown(call_id, quote='')} but must be a-z, A-Z, 0-9, with a length of 9. {REFORMAT}."
        )
