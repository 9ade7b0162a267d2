"""Makes samples fit a sequence by shortening the note, never the instruction or the answer."""

import dataclasses
import re
import unicodedata
from typing import Any

from mistral_common.protocol.instruct.messages import FinetuningMessage, ToolMessage, UserMessage

from .exceptions import RowError
from .tokenize import Conversation, SampleEncoder, SampleType, TokenSample, parse_conversation, pretrain_text

OVERLONG = ("shorten", "drop", "error")

_ENDS = 256  # characters at both ends of a text that stay: instructions stand there
_ROUNDS = 8  # estimates of how much to remove; two or three usually do
# "Motif d'hospitalisation :" at the start of a line, or a line in capitals
_HEADING = re.compile(r"^[ \t#*]*(?P<title>[^\W\d_][^\n:]{1,60}?)[ \t*]*(?::|$)", re.MULTILINE)


@dataclasses.dataclass
class FitCounts:
    """What became of samples longer than a sequence."""

    samples: int = 0
    shortened: int = 0
    dropped: int = 0
    removed_tokens: int = 0  # of shortened and dropped samples


class FittingEncoder:
    """Encodes rows so that each fits in `seq_len` positions.

    Args:
        encoder: the encoder of rows as they stand.
        seq_len: positions of a sequence; a sample of n tokens takes n - 1.
        overlong: `shorten` removes text inside the longest user or tool message (or pretrain text), `drop` leaves the
            sample out, as `shorten` does where that message is too short to help, and `error` refuses it.
        keep_sections: titles whose sections are shortened only when nothing else is left.
    """

    def __init__(self, encoder: SampleEncoder, seq_len: int, overlong: str, keep_sections: list[str]) -> None:
        self._encoder = encoder
        self._seq_len = seq_len
        self._overlong = overlong
        self._keep_sections = tuple(map(_folded, keep_sections))
        self.counts = FitCounts()

    def encode(self, row: dict[str, Any], sample_type: SampleType) -> TokenSample:
        """As `SampleEncoder.encode`; a dropped sample has no tokens.

        Raises:
            RowError: why the row cannot be trained on.
        """
        if sample_type is SampleType.INSTRUCT:
            return self.encode_conversation(parse_conversation(row))
        text = pretrain_text(row)
        return self._fit(self._encoder.encode_text(text), text, self._encoder.encode_text)

    def encode_conversation(self, conversation: Conversation) -> TokenSample:
        """As `SampleEncoder.encode_conversation`; a dropped sample has no tokens."""
        sample = self._encoder.encode_conversation(conversation)
        index = _longest_message(conversation.messages)
        if index is None:
            return self._fit(sample, "", lambda _: sample)

        def encode_with(text: str) -> TokenSample:
            messages = list(conversation.messages)
            messages[index] = messages[index].model_copy(update={"content": text})
            return self._encoder.encode_conversation(dataclasses.replace(conversation, messages=messages))

        return self._fit(sample, conversation.messages[index].content, encode_with)

    def _fit(self, sample: TokenSample, text: str, encode_with: Any) -> TokenSample:
        self.counts.samples += 1
        length = len(sample.tokens)
        if length - 1 <= self._seq_len:
            return sample
        if self._overlong == "error":
            raise RowError(f"It has {length} tokens, more than `seq_len` ({self._seq_len}) can hold.")
        fitted = self._shortened(sample, text, encode_with) if self._overlong == "shorten" else None
        if fitted is None:
            self.counts.dropped += 1
            fitted = TokenSample([], [])
        else:
            self.counts.shortened += 1
        self.counts.removed_tokens += length - len(fitted.tokens)
        return fitted

    def _shortened(self, sample: TokenSample, text: str, encode_with: Any) -> TokenSample | None:
        spans = removable_spans(text, self._keep_sections)
        removable = sum(end - start for span in spans for start, end in span)
        remove = 0
        tokens_per_character = len(sample.tokens) / max(len(text), 1)
        for _ in range(_ROUNDS):
            excess = len(sample.tokens) - 1 - self._seq_len
            if excess <= 0:
                return sample
            if remove >= removable:
                return None
            remove = min(remove + int(excess / tokens_per_character * 1.02) + 16, removable)
            sample = encode_with(without_middle(text, spans, remove))
        return None


def _longest_message(messages: list[FinetuningMessage]) -> int | None:
    """Index of the longest user or tool message that is one text."""
    texts = [
        index
        for index, message in enumerate(messages)
        if isinstance(message, UserMessage | ToolMessage) and isinstance(message.content, str)
    ]
    return max(texts, key=lambda index: len(messages[index].content), default=None)


Span = tuple[int, int]  # characters [start, end) of a text


def removable_spans(text: str, keep_sections: tuple[str, ...]) -> tuple[list[Span], list[Span]]:
    """What may be removed from a text: the sections nobody asked to keep, then those to keep; never the ends.

    Args:
        keep_sections: beginnings of titles, folded (lower case, no accents).
    """
    first, last = _ENDS, len(text) - _ENDS
    if first >= last:
        return [], []
    spans: tuple[list[Span], list[Span]] = ([], [])
    bounds = [(0, "")] + [(match.start(), match["title"]) for match in _HEADING.finditer(text) if _is_title(match)]
    for (start, title), (end, _) in zip(bounds, [*bounds[1:], (len(text), "")], strict=True):
        start, end = max(start, first), min(end, last)
        if start < end:
            kept = bool(keep_sections) and _folded(title).startswith(keep_sections)
            spans[kept].append((start, end))
    return spans


def _is_title(match: re.Match[str]) -> bool:
    return match.group().rstrip().endswith(":") or match["title"].isupper()


def _folded(title: str) -> str:
    decomposed = unicodedata.normalize("NFD", title.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character)).strip()


def without_middle(text: str, spans: tuple[list[Span], list[Span]], count: int) -> str:
    """Removes about `count` characters: from the middle of the first list of spans, then of the second.

    Whole words go, and nothing is put in their place.
    """
    cuts: list[Span] = []
    for group in spans:
        available = sum(end - start for start, end in group)
        take = min(count, available)
        count -= take
        cuts += _cuts(group, (available - take) // 2, take)
    kept, position = [], 0
    for start, end in sorted(cuts):
        start, end = _at_word_ends(text, start, end)
        kept.append(text[position : max(start, position)])
        position = max(end, position)
    return "".join(kept) + text[position:]


def _cuts(spans: list[Span], skip: int, take: int) -> list[Span]:
    """The part [skip, skip + take) of the characters that the spans hold together."""
    cuts = []
    for start, end in spans:
        first, last = start + skip, min(end, start + skip + take)
        if first < last:
            cuts.append((first, last))
            take -= last - first
        skip = max(0, skip - (end - start))
    return cuts


def _at_word_ends(text: str, start: int, end: int) -> Span:
    """Widens a cut to the blanks around it, so that no word is cut in two."""
    while start > 0 and not text[start].isspace() and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    return start, end
