"""Turn what a table has in a note's cell into text, or say why it is not a note."""

import functools
import html
import html.parser
import re
from collections.abc import Iterable

from utils.icd10.codes import CODE_PATTERN, normalize_code
from utils.tables.jsonl import SkippedRowError

BLANK = "blank, NULL or nan"

_NULLS = {
    "",
    "null",
    "(null)",
    "nan",
    "<na>",
    "na",
    "n/a",
    "#n/a",
    "nat",
    "none",
    "nil",
    "\\n",
    "-",
    ".",
    "vide",
    "néant",
}
_LONGEST_NULL = max(map(len, _NULLS))
_BINARY = ("%PDF-", "PK\x03\x04", "ÐÏ\x11à", "\x89PNG", "ÿØÿ")
_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{200,}={0,2}\s*")
_RTF = re.compile(r"\{\\rtf\d")
_MARKUP = re.compile(
    r"^\s*<(?:!doctype|html|\?xml|body|head)\b"
    r"|<(p|div|span|table|tr|td|th|ul|ol|li|h[1-6]|b|i|u|em|strong|font|pre|center|body)(?:\s[^<>]*)?>.*?</\1\s*>"
    r"|<br\s*/?>",
    re.IGNORECASE | re.DOTALL,
)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|[aeiouyc](?:acute|grave|circ|uml|cedil)|oelig|deg|#\d{2,5}|#x[\da-f]{2,4});", re.I
)
_BLOCKS = frozenset(
    [
        "p",
        "div",
        "br",
        "tr",
        "table",
        "ul",
        "ol",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "pre",
        "section",
        "article",
        "title",
        "paragraph",
        "text",
    ]
)
_HIDDEN = frozenset(("script", "style", "head"))
_LONG_LABEL = 6  # words
_CODE = re.compile(rf"\b{CODE_PATTERN}(?![\w+])", re.IGNORECASE)


def note_text(value: object) -> tuple[str, str | None]:
    """Return the text of a cell and the format it was converted from ("RTF", "HTML"), None if it was plain text.

    Raises:
        SkippedRowError: the cell has no text, or not as text.
    """
    text = "" if value is None or value != value else str(value)  # nan is the only value that differs from itself
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\x00", "")
    text = text.strip().strip("\ufeff")
    if (len(text) <= _LONGEST_NULL and text.casefold() in _NULLS) or not any(map(str.isalnum, text)):
        raise SkippedRowError(BLANK)
    if text.startswith(_BINARY) or _BASE64.fullmatch(text):
        raise SkippedRowError("a file (PDF, image or base64) instead of text")
    converted = None
    if "\\rtf" in text and _RTF.search(text):
        text, converted = _from_rtf(text), "RTF"
    if "&" in text and _ENTITY.search(text) and not _MARKUP.search(text):  # escaped markup, or entities alone
        text, converted = html.unescape(text).replace("\xa0", " "), converted or "HTML"
    if "<" in text and _MARKUP.search(text):
        text, converted = _from_html(text), converted or "HTML"
    if converted and not any(map(str.isalnum, text)):
        raise SkippedRowError(f"{converted} without text")
    return text.strip(), converted


def _from_rtf(text: str) -> str:
    try:
        from striprtf.striprtf import rtf_to_text
    except ImportError:
        raise SkippedRowError('RTF, which needs striprtf: pip install -e ".[rtf]"') from None
    try:
        return _tidy(rtf_to_text(text, encoding="cp1252", errors="replace"))
    except Exception as error:  # the library raises various errors on damaged files
        raise SkippedRowError("RTF that cannot be converted", type(error).__name__) from None


def _from_html(text: str) -> str:
    reader = _HtmlText()
    reader.feed(text)
    reader.close()
    return _tidy("".join(reader.parts))


def _tidy(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.replace("\xa0", " ").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _HtmlText(html.parser.HTMLParser):
    """Collect the text of a page; blocks begin on a new line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        self.parts.append("\n" if tag in _BLOCKS else " " if tag in ("td", "th") else "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self.parts.append("\n" if tag in _BLOCKS else "")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def quoted_codes(note: str, codes: set[str]) -> set[str]:
    """Return those of a stay's codes that its note quotes, dotted or not, as notes written after coding do."""
    if not any(code[:3] in note or code[:3].lower() in note for code in codes):  # most notes, without the slower search
        return set()
    return codes & {normalize_code(found) for found in _CODE.findall(note)}


def quotes_label(note: str, labels: Iterable[str]) -> bool:
    """Return whether a note quotes a label that is too long to be there by chance, in any case."""
    folded = note.casefold()
    return any(label in folded for label in map(_long_label, labels) if label)


@functools.lru_cache(1 << 16)
def _long_label(label: str) -> str:
    """Return a label without case, "" for one that is short."""
    return label.casefold() if len(label.split()) >= _LONG_LABEL else ""
