"""Make samples fit a sequence by shortening the note, never the instruction or the answer."""

import bisect
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from mistral_common.protocol.instruct.chunk import TextChunk
from mistral_common.protocol.instruct.messages import FinetuningMessage, ToolMessage, UserMessage

from .conversation import Conversation, parse_conversation, pretrain_text
from .exceptions import RowError
from .tokenize import SampleEncoder, SampleType, TokenSample

_ENDS = 256  # characters kept at both ends of a string, where instructions are
_SLACK = 0.02  # share of a sequence that may stay free after shortening
_ROUNDS = 6  # attempts to reach that share; two or three are usually enough
_WORD = re.compile(r"\s*(\S+)")  # with the blanks before it, so that removing a word does not join its neighbors
# "Motif d'hospitalisation :", "II - ANTECEDENTS" or "**Conclusion :** ...", at the start of a line
_TITLE = re.compile(
    r"^[ \t#*]*(?:(?:\d{1,2}|[IVX]{1,4})[ \t]*[.)/°-][ \t*]*)?"  # Markdown and numbering
    r"(?P<title>[^\W\d_][^\n:]{1,60}?)[ \t*]*"
    r"(?:(?P<colon>:)[ \t*]*(?P<rest>[^\n]*)|$)",
    re.MULTILINE,
)


class FittingEncoder:
    """Encode rows so that each fits into `seq_len` positions; each sample counts the tokens removed from it.

    Args:
        encoder: encodes complete rows.
        seq_len: positions of a sequence; a sample of n tokens has n - 1.
        overlong: `shorten` removes words inside the longest user or tool message (or pretrain text) and drops the
            sample if that is not enough, `drop` drops it, `error` raises an error.
        keep_sections: titles of sections that are shortened only when nothing else is left.
    """

    def __init__(self, encoder: SampleEncoder, seq_len: int, overlong: str, keep_sections: list[str]) -> None:
        self._encoder = encoder
        self._seq_len = seq_len
        self._overlong = overlong
        self._keep_sections = tuple(map(_folded, keep_sections))

    def encode(self, row: dict[str, Any], sample_type: SampleType) -> TokenSample:
        """Encode a row like `SampleEncoder.encode`; a dropped sample has no tokens.

        Raises:
            RowError: why the row cannot be trained on.
        """
        if sample_type is SampleType.INSTRUCT:
            return self.encode_conversation(parse_conversation(row))
        text = pretrain_text(row)
        return self._fit(self._encoder.encode_text(text), text, self._encoder.encode_text)

    def encode_conversation(self, conversation: Conversation) -> TokenSample:
        """Encode a conversation like `SampleEncoder.encode_conversation`; a dropped sample has no tokens.

        Raises:
            RowError: why the conversation cannot be trained on.
        """
        sample = self._encoder.encode_conversation(conversation)
        longest = max(_texts(conversation.messages), key=lambda found: len(found.text), default=_Text(0, None, ""))

        def encode_with(text: str) -> TokenSample:
            messages = _with_text(conversation.messages, dataclasses.replace(longest, text=text))
            return self._encoder.encode_conversation(dataclasses.replace(conversation, messages=messages))

        return self._fit(sample, longest.text, encode_with)

    def _fit(self, sample: TokenSample, text: str, encode_with: Callable[[str], TokenSample]) -> TokenSample:
        length = len(sample.tokens)
        if length - 1 <= self._seq_len:
            return sample
        if self._overlong == "error":
            raise RowError(f"It has {length} tokens, more than `seq_len` ({self._seq_len}) can hold.")
        fitted = self._shortened(length, text, encode_with) if self._overlong == "shorten" else None
        fitted = fitted or TokenSample([], [])
        return dataclasses.replace(fitted, removed=length - len(fitted.tokens))

    def _shortened(self, length: int, text: str, encode_with: Callable[[str], TokenSample]) -> TokenSample | None:
        """Remove little more of `text` than necessary to fit a sample of `length` tokens.

        Returns:
            The shortened sample; None if it does not fit even without all removable words.
        """
        words = removable_words(text, self._keep_sections)
        enough = sum(end - start for group in words for start, end in group)
        fitting = encode_with(without_middle(text, words, enough)) if enough else None
        if fitting is None or len(fitting.tokens) - 1 > self._seq_len:
            return None
        low, low_tokens = 0, length
        for _ in range(_ROUNDS):
            if len(fitting.tokens) >= (1 - _SLACK) * self._seq_len:
                break
            share = (low_tokens - (1 - _SLACK / 2) * self._seq_len) / (low_tokens - len(fitting.tokens))
            middle = low + int((enough - low) * share)
            sample = encode_with(without_middle(text, words, middle))
            if len(sample.tokens) - 1 <= self._seq_len:
                enough, fitting = middle, sample
            else:
                low, low_tokens = middle, len(sample.tokens)
        return fitting


@dataclasses.dataclass(frozen=True)
class _Text:
    """A string in a user or tool message."""

    message: int  # index in the conversation
    chunk: int | None  # index in the message's content if that is a list of chunks
    text: str


def _texts(messages: list[FinetuningMessage]) -> Iterator[_Text]:
    for index, message in enumerate(messages):
        if isinstance(message, UserMessage | ToolMessage):
            if isinstance(message.content, str):
                yield _Text(index, None, message.content)
            else:
                for part, chunk in enumerate(message.content):
                    if isinstance(chunk, TextChunk):
                        yield _Text(index, part, chunk.text)


def _with_text(messages: list[FinetuningMessage], new: _Text) -> list[FinetuningMessage]:
    content = messages[new.message].content
    if isinstance(content, list) and new.chunk is not None:
        content = [*content[: new.chunk], TextChunk(text=new.text), *content[new.chunk + 1 :]]
    else:
        content = new.text
    changed = messages[new.message].model_copy(update={"content": content})
    return [*messages[: new.message], changed, *messages[new.message + 1 :]]


Span = tuple[int, int]  # characters [start, end) of a string
Words = tuple[list[Span], list[Span]]  # words to remove first, and words of sections to keep, removed only after them


def removable_words(text: str, keep_sections: tuple[str, ...]) -> Words:
    """Return the words that may be removed: those of other sections, and those of sections to keep; never the ends.

    Args:
        text: a note.
        keep_sections: beginnings of titles, folded (lower case, no accents).
    """
    words: Words = ([], [])
    sections = _sections(text, keep_sections)
    for word in _WORD.finditer(text):
        if word.start() >= _ENDS and word.end() <= len(text) - _ENDS:
            _, kept = sections[bisect.bisect_right(sections, word.start(1), key=lambda section: section[0]) - 1]
            words[kept].append(word.span())
    return words


def _sections(text: str, keep_sections: tuple[str, ...]) -> list[tuple[int, bool]]:
    """Return where the sections of a text start, and whether they are to be kept.

    A section whose title is alone on its line extends to the next such title (or one to keep): a line such as
    "HTA : depuis 2010" belongs to it.
    """
    sections = [(0, False)]
    under_title = False
    for line in _TITLE.finditer(text):
        if not (line["colon"] or line["title"].isupper()):
            continue
        alone = not (line["rest"] or "").strip()
        kept = _folded(line["title"]).startswith(keep_sections)
        if alone or kept or not under_title:
            sections.append((line.start(), kept))
            under_title = alone
    return sections


def _folded(title: str) -> str:
    decomposed = unicodedata.normalize("NFD", title.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character)).strip()


def without_middle(text: str, words: Words, count: int) -> str:
    """Remove words of about `count` characters in total: from the middle of the first list, then of the second."""
    cuts: list[Span] = []
    for group in words:
        available = sum(end - start for start, end in group)
        if take := min(count, available):
            cuts += _middle(group, (available - take) // 2, take)
            count -= take
    kept, position = [], 0
    for start, end in sorted(cuts):
        kept.append(text[position:start])
        position = end
    return "".join(kept) + text[position:]


def _middle(words: list[Span], skip: int, take: int) -> Iterator[Span]:
    """Yield the words that overlap characters [skip, skip + take) of all the words joined together."""
    position = 0
    for start, end in words:
        length = end - start
        if position < skip + take and position + length > skip:
            yield start, end
        position += length
