"""Split French notes into sentences, and mark what in them is denied, about relatives or past.

A sentence ends at a line end, or at a period, question or exclamation mark before white space and a capital letter, a
digit, a dash or a bullet. It does not end after a known abbreviation ("Dr.", "cf.", "env."), an initial ("M. B. sort")
or the number of an item ("1. HTA"). Headings of documents (`## CRH`) are not sentences.

Marks are found in the part of a sentence, between commas, semicolons, colons, periods and "mais", that shares the most
words with a diagnosis, or in the whole sentence if none shares any. They are cues for a reader, not decisions.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Before a name, a number or an example; those that end sentences as often ("mg", "ans", "h") are left out.
_ABBREVIATION = re.compile(
    r"m|mm|mr|mmes?|mlles?|drs?|dre|prs?|prof|me|ste?|cf|ex|env|av|apr|etc|r[ée]f|t[ée]l|fig|art|chap|pp?|n|no|vol|resp|dt"
    r"|adm|hosp|ttt|pte?|atcds?|bilat|lat|sup|inf|ant|post|dte|gche|max|min|moy|nb",
    re.IGNORECASE,
)
_INITIAL = re.compile(r"(?:^|(?:^|\s)[A-ZÀ-ÖØ-Þ]\S*\s+)[A-ZÀ-ÖØ-Þ]\.$")  # "M. B.", but not "hépatite C."
_END = re.compile(r"[.!?…]+[»\")\]]*(?=\s+(?:«\s*|[\"(\[])?[A-ZÀ-ÖØ-Þ\d•*–—-])")
_LAST_WORD = re.compile(r"(?:^|[\s(«])([^\s(«]+)\.$")
_ITEM_NUMBER = re.compile(r"\s*\d{1,2}\.$")
_HEADING = re.compile(r"#{1,6} ")
_PARTS = re.compile(r"[,;:.()]|\bmais\b|\bet\b", re.IGNORECASE)
_SHORTEST_WORD = 3  # letters of words that a diagnosis and a sentence can share

NEGATED, FAMILY, PAST = "negation", "family", "past"
CUES = {
    NEGATED: r"pas d(?:e|u|'|’)|pas\b|absence|aucune?|sans|ni|n(?:e|'|’)\s*(?:retrouve|objective|montre)\w*"
    r"|négati(?:f|ve)s?|élimin\w+|exclue?s?|écartée?s?|infirmée?s?|indemne|hypothèse\b.{0,60}\bpas",
    FAMILY: r"père|mère|frères?|s(?:œ|oe)urs?|parents?|oncle|tante|cousine?s?|grands?[- ](?:père|mère|parent)s?"
    r"|fils|fille|familia(?:l|le|ux|les)",
    PAST: r"ancien(?:ne)?s?\s+\w+|guérie?s?|résolue?s?|(?<!non )sevrée?|antécédents? d(?:e|u|'|’)"
    r"|il y a \d+ (?:ans|mois)|en (?:19|20)\d\d|dans l(?:'|’)enfance|récidive|séquelle",
}
_CUES = {mark: re.compile(rf"(?<!\w)(?:{cues})(?!\w)", re.IGNORECASE) for mark, cues in CUES.items()}
_RELATIVE = re.compile(rf"(?<!\w)({CUES[FAMILY]})\s*:", re.IGNORECASE)  # "mère : HTA"


class Sentence(NamedTuple):
    """A sentence of a text: its characters [start, end)."""

    start: int
    end: int


def split_sentences(text: str) -> list[Sentence]:
    """Return the sentences of a note, without the white space around them."""
    found = []
    for line in re.finditer(r"[^\r\n]+", text):
        if _HEADING.match(line[0]):
            continue
        start = 0
        for end in (*_ends(line[0]), len(line[0])):
            piece = line[0][start:end]
            if any(map(str.isalnum, piece)):
                first = line.start() + start + len(piece) - len(piece.lstrip())
                found.append(Sentence(first, first + len(piece.strip())))
            start = end
    return found


def _ends(line: str) -> Iterator[int]:
    start = 0
    for match in _END.finditer(line):
        before = line[start : match.end()]
        word = _LAST_WORD.search(before)
        is_abbreviation = (word and _ABBREVIATION.fullmatch(word[1])) or _INITIAL.search(before)
        if not is_abbreviation and not _ITEM_NUMBER.fullmatch(before):
            yield match.end()
            start = match.end()


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without accents, plural s and words of under three letters."""
    bare = unicodedata.normalize("NFD", text.lower())
    bare = "".join(letter for letter in bare if not unicodedata.combining(letter))
    return [word.rstrip("s") for word in re.findall(r"[a-z0-9]+", bare) if len(word) >= _SHORTEST_WORD]


def marks(sentence: str, label: str) -> list[str]:
    """Return which of NEGATED, FAMILY and PAST a sentence says about a diagnosis."""
    wanted = set(words(label))
    sentence = _RELATIVE.sub(r"\1", sentence)
    parts = [part for part in _PARTS.split(sentence) if part.strip()]
    shared = [len(wanted & set(words(part))) for part in parts]
    if any(shared):
        sentence = parts[max(range(len(parts)), key=shared.__getitem__)]
    return [mark for mark, cues in _CUES.items() if cues.search(sentence)]


def by_shared_words(sentences: Sequence[str], label: str) -> list[float]:
    """Return how similar each sentence is to a label: shared words, weighted by how rare they are in the note.

    This is the baseline of evidence: it knows no synonyms.
    """
    bags = [set(words(sentence)) for sentence in sentences]
    wanted = set(words(label))
    rarity = {word: 1 / sum(word in bag for bag in bags) for word in wanted if any(word in bag for bag in bags)}
    return [sum(rarity[word] for word in bag & rarity.keys()) / max(1, len(bag)) ** 0.5 for bag in bags]
