"""Coded stays as sentences, and back: `parse_answer(build_answer(diagnoses)) == diagnoses`.

The parser also reads what models really write: other layouts, lower case, dots, bare codes, lists, free text.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from utils.icd10.codes import CODE_PATTERN, ROLES, normalise_code
from utils.icd10.prompts import ANSWER, CODE_ITEM, ITEM_SEPARATOR, NOTHING


class Diagnosis(NamedTuple):
    """A coded diagnosis. `role` is DP, DR or DAS; None where an answer does not tell."""

    role: str | None
    code: str
    label: str = ""


# "diagnostic principal", "Diagnostics associés significatifs (DAS)", "relié :" opening a line, "DP :", "DAS I10".
_ROLE = re.compile(
    rf"""diagn\w{{0,20}}\s+(?P<full>princip|reli|associ)\w*(?:\s+significati\w*)?(?:\s*\((?:DP|DR|DAS)\))?
    | ^[^\w\n]*(?P<opening>princip|reli|associ)\w*\s*(?=:)
    | \b(?P<short>DP|DR|DAS)\b(?=\s*[:=–—-]|\s+{CODE_PATTERN}\b)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_ROLE_OF_STEM = {"princip": "DP", "reli": "DR", "associ": "DAS", "dp": "DP", "dr": "DR", "das": "DAS"}

# A code is not the start of a longer word, of a range (C00-D48), nor one of the asterisk system (G01*).
_END = r"(?![\w*†+]|\.?-\S|\.-)"
_IN_PARENTHESES = rf"[(\[]\s*(?:(?:code|cim(?:[ -]?10)?)\b(?:\s*:)?\s*)?(?P<inner>{CODE_PATTERN}){_END}\s*(?:[)\]]|$)"
# Without parentheses a code opens an item ("- I10 : HTA", "code I10") or closes it ("HTA I10,"); "vitamine B12" and
# "sorti à J10" are none.
_OPENING = rf"(?:^|[:;,=•*|]|\d[.)]|(?:^|\s)[–—-]|\b(?:et|code|est)\b)[^\S\n]*(?P<opening>{CODE_PATTERN}){_END}"
_CLOSING = rf"(?<!vitamine\s)(?<!\sà\s)\b(?P<closing>{CODE_PATTERN}){_END}(?=\s*(?:[.;,|\n]|\bet\b|$))"
_CODES = re.compile(rf"{_IN_PARENTHESES}|{_OPENING}|{_CLOSING}", re.IGNORECASE | re.MULTILINE)
_GROUP = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_DEEPEST_REMARK = 20  # parentheses within parentheses
_AROUND_LABEL = " \t\r\n:,;=•*–—-"


def list_codes(diagnoses: Iterable[Diagnosis]) -> str:
    """`label (code), label (code)` in the order given, "aucun" if there is none."""
    items = (CODE_ITEM.format(label=diagnosis.label, code=diagnosis.code) for diagnosis in diagnoses)
    return ITEM_SEPARATOR.join(items) or NOTHING


def build_answer(diagnoses: Iterable[Diagnosis]) -> str:
    """The answer of the documents.

    Raises:
        ValueError: there is not exactly one DP, or more than one DR.
    """
    diagnoses = list(diagnoses)
    by_role = {role: [diagnosis for diagnosis in diagnoses if diagnosis.role == role] for role in ROLES}
    if len(by_role["DP"]) != 1 or len(by_role["DR"]) > 1:
        raise ValueError(f"expected one DP and at most one DR, found {diagnoses}")
    return ANSWER.format(**{role: list_codes(found) for role, found in by_role.items()})


def parse_answer(text: str) -> list[Diagnosis]:
    """The diagnoses of an answer in the order they stand, each code once, under its strongest role.

    Codes are normalised but not checked against a table: an invented code is returned, for evaluation to count it.
    Labels are exact in the layout of `build_answer`, a guess or empty in others.
    """
    kept: dict[str, Diagnosis] = {}
    for role, section in _sections(text):
        for code, label in _codes(section):
            if code not in kept or _strength(role) < _strength(kept[code].role):
                kept[code] = Diagnosis(role, code, label)
    return list(kept.values())


def _strength(role: str | None) -> int:
    return ROLES.index(role) if role else len(ROLES)


def _sections(text: str) -> list[tuple[str | None, str]]:
    marks = list(_ROLE.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    sections: list[tuple[str | None, str]] = [(None, text[: marks[0].start()] if marks else text)]
    for mark, end in zip(marks, ends):
        stem = (mark["full"] or mark["opening"] or mark["short"]).lower()
        sections.append((_ROLE_OF_STEM[stem], text[mark.end() : end]))
    return sections


def _codes(section: str) -> list[tuple[str, str]]:
    """Codes of a section with the text that stands before each; a code inside a label is no item of its own."""
    matches = list(_CODES.finditer(_blank_remarks(section)))
    found, start = [], 0
    for match, following in zip(matches, [*matches[1:], None]):
        if following is not None and following["inner"] and _same_item(match, following, section):
            continue
        code = match["inner"] or match["opening"] or match["closing"]
        label = section[start : match.start()].strip(_AROUND_LABEL) if match["inner"] else ""
        found.append((normalise_code(code), label))
        start = match.end()
    return found


def _same_item(match: re.Match[str], following: re.Match[str], section: str) -> bool:
    """Whether the parenthesised code that follows closes the item that this match stands in."""
    between = section[match.end() : following.start()]
    if not match["inner"]:
        return not re.search(r"[,;\n]", between)
    # "Arthrite (A39.8) - Coude, poignet (M0102)": only the label's reference has its dot.
    reference = "." in match["inner"] and "." not in following["inner"] and len(following["inner"]) > 3
    return not between.strip() or (reference and re.fullmatch(r" - [^;\n]*", between) is not None)


def _blank_remarks(section: str) -> str:
    """Parentheses that hold more than a code become blanks: what they mention belongs to a label."""
    for _ in range(_DEEPEST_REMARK):
        blanked = _GROUP.sub(
            lambda group: group[0] if re.fullmatch(_IN_PARENTHESES, group[0], re.IGNORECASE) else " " * len(group[0]),
            section,
        )
        if blanked == section:
            break
        section = blanked
    return section
