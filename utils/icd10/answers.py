"""Build and parse the sentence that lists a stay's codes: `parse_answer(build_answer(diagnoses)) == diagnoses`.

The parser also accepts the bare list of `code_list` and what models write in practice: other layouts, lower case,
dots, bare codes, free text.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from utils.icd10.codes import CODE_PATTERN, CODE_PREFIX, MARKS, ROLES, normalize_code, respell, split_codes
from utils.icd10.prompts import ANSWER, CODE_ITEM, ITEM_SEPARATOR, NOTHING


class Diagnosis(NamedTuple):
    """A coded diagnosis. `role` is DP, DR or DAS, or None where an answer gives no role."""

    role: str | None
    code: str
    label: str = ""


# "diagnostic principal", "Diagnostics associés significatifs (DAS)", "relié :" at a line start, "DP :", "DAS I10".
_ROLE = re.compile(
    r"""diagn\w{0,20}\s+(?P<full>princip|reli|associ)\w*(?:\s+significati\w*)?(?:\s*\((?:DP|DR|DAS)\))?
    | ^[^\w\n]*(?P<opening>princip|reli|associ)\w*\s*(?=:)
    | \b(?P<short>DP|DR|DAS)\b(?=\**\s*[:=–—-]|\s+[A-Z]\d)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_ROLE_OF_STEM = {"princip": "DP", "reli": "DR", "associ": "DAS", "dp": "DP", "dr": "DR", "das": "DAS"}

# Not a code: the start of a longer word, number or range (C00-D48), a code of the asterisk system (G01*).
_END = rf"(?![\w{MARKS}]|\.?-\S|\.-|(?<=\.)-|[.,/]\d|\.\+|\.[^\W_]\b)"
_PREFIX = rf"(?:{CODE_PREFIX})?"
_CLOSED = r"(?:\s*[,;.|])?\s*[)\]]"
_IN_PARENTHESES = rf"[(\[]\s*{_PREFIX}(?P<inner>{CODE_PATTERN}){_END}(?:{_CLOSED}|\s*$)"
# A code without parentheses starts an item ("- I10 : HTA", "code I10") or ends it ("HTA I10,"). "vitamine B12" and
# "sorti à J10" are not codes.
_OPENING = rf"(?:^|[:;,=•*|]|\d[.)]|(?:^|\s)[–—-]|\b(?:et|code|est)\b)[^\S\n]*(?P<opening>{CODE_PATTERN}){_END}"
_CLOSING = rf"(?<!vitamine\s)(?<!\sà\s)\b(?P<closing>{CODE_PATTERN}){_END}(?=\s*(?:[.;,|\n]|\bet\b|$))"
# Malformed codes count as predicted: a word with a digit, or capitals, in the parentheses that end an item, and without
# parentheses a letter and a digit where a code is expected.
_MALFORMED = rf"(?=[\w.+-]*\d)\w[\w.{MARKS}-]{{1,14}}(?: [{MARKS}]+)?(?:,\d+)?|[^\W\d_](?:[ .]?\d){{2,6}}[ .]?[A-Z]?"
_MALFORMED_ITEM = (
    rf"(?:[(\[]\s*{_PREFIX}(?P<malformed>{_MALFORMED})(?:{_CLOSED}|\s*\Z)|\((?P<capitals>(?-i:[A-Z]{{2,5}}))\))"
    r"(?=\s*(?:[;.,\n]|$|\bet\b))"
)
_MALFORMED_BARE = (
    r"(?:(?:^|[:;,=•*|]|\d[.)]|(?:^|\s)[–—-])[^\S\n]*"
    rf"(?P<bare>(?:(?-i:[A-Z]\d)|[a-z]\d{{2}})[\w.{MARKS}-]{{0,13}}(?:,\d+)?)"
    r"(?=\s*[;,|\n:=]|\.?\s|\.?$)"
    r"|(?<!vitamine)(?<!\sà)\s(?P<last>(?-i:[A-Z]\d{2})[\w.]{1,12})(?=\s*(?:[;,|\n]|$)))"
)
_CODES_OF_A_GROUP = re.compile(
    rf"[(\[]\s*{CODE_PATTERN}(?:\s*[;,/]\s*{CODE_PATTERN})+\s*[)\]](?=\s*(?:[;.,\n]|$))", re.IGNORECASE
)
_FLAGS = re.IGNORECASE | re.MULTILINE
_VALID_CODES = rf"{_IN_PARENTHESES}|{_OPENING}|{_CLOSING}"
_CODES = re.compile(rf"{_VALID_CODES}|{_MALFORMED_ITEM}", _FLAGS)
_BARE_CODES = re.compile(rf"{_VALID_CODES}|{_MALFORMED_BARE}", _FLAGS)
_MALFORMED_GROUP = re.compile(_MALFORMED_ITEM, _FLAGS)
_LIST = re.compile(r"(?:[^\[\](]*[:=])?\s*\[(?P<items>[^\[\]{}]*)\]?[\s.,;]*")
_LABEL_FIRST = re.compile(rf"(?:^|[,;|])(?!\s*{_PREFIX}{CODE_PATTERN}\b)[^,;|]*\w\s+\w", re.IGNORECASE)
_GROUP = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_MAX_NESTING = 20  # of parentheses
_AROUND_LABEL = " \t\r\n:,;=•*–—-"


def list_codes(diagnoses: Iterable[Diagnosis]) -> str:
    """Return `label (code), label (code)` in the given order, or "aucun" if there are no diagnoses."""
    items = (CODE_ITEM.format(label=diagnosis.label, code=diagnosis.code) for diagnosis in diagnoses)
    return ITEM_SEPARATOR.join(items) or NOTHING


def build_answer(diagnoses: Iterable[Diagnosis]) -> str:
    """Return the answer to train on: the sentence of `prompts.ANSWER`.

    Raises:
        ValueError: the number of DP is not 1, or there is more than one DR.
    """
    diagnoses = list(diagnoses)
    by_role = {role: [diagnosis for diagnosis in diagnoses if diagnosis.role == role] for role in ROLES}
    if len(by_role["DP"]) != 1 or len(by_role["DR"]) > 1:
        raise ValueError(f"expected one DP and at most one DR, found {diagnoses}")
    return ANSWER.format(**{role: list_codes(found) for role, found in by_role.items()})


def code_list(diagnoses: Iterable[Diagnosis]) -> str:
    """Return the answer of the format `list`, without labels and roles: `[C509, I10]`."""
    return f"[{ITEM_SEPARATOR.join(diagnosis.code for diagnosis in diagnoses)}]"


def parse_answer(text: str) -> list[Diagnosis]:
    """Return the diagnoses of an answer in order of appearance; a repeated code is kept once, with its highest role.

    Codes are read as in the cells of tables (`codes.respell`, `codes.normalize_code`) but not checked against a table:
    invented and malformed codes (`E11X`) are returned as they are, so that evaluation counts them. Labels are exact in
    the layout of `build_answer`; in other layouts they are approximate or empty.
    """
    kept: dict[str, Diagnosis] = {}
    for role, section in _sections(respell(text)):
        for code, label in _codes(section, has_role=role is not None):
            if code not in kept or _rank(role) < _rank(kept[code].role):
                kept[code] = Diagnosis(role, code, label)
    return list(kept.values())


def _rank(role: str | None) -> int:
    return ROLES.index(role) if role else len(ROLES)


def _sections(text: str) -> list[tuple[str | None, str]]:
    """Split the answer into (role, text after its heading); the text before the first heading has no role."""
    headings = list(_ROLE.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    sections: list[tuple[str | None, str]] = [(None, text[: headings[0].start()] if headings else text)]
    for heading, end in zip(headings, ends):
        stem = (heading["full"] or heading["opening"] or heading["short"]).lower()
        sections.append((_ROLE_OF_STEM[stem], text[heading.end() : end]))
    return sections


def _codes(section: str, has_role: bool) -> list[tuple[str, str]]:
    """Return (code, label) of each item of a section; a code inside a label is not an item."""
    if listed := _LIST.fullmatch(section):
        section = listed["items"]
        if not _LABEL_FIRST.search(section):
            items = [code for item in re.split(r"[;|]|,(?!\d)", section) for code in split_codes(item)]
            return [(code, "") for code in items if code.lower() != NOTHING]
    blanked = _blank_remarks(section)
    pattern = _CODES if re.search(r"[(\[]", blanked) else _BARE_CODES
    matches = [match for match in pattern.finditer(blanked) if _is_code(match, has_role)]
    found, start = [], 0
    for match, following in zip(matches, [*matches[1:], None]):
        if following is not None and following["inner"] and _same_item(match, following, section):
            continue
        code = next(filter(None, match.groups()))
        label = section[start : match.start()].strip(_AROUND_LABEL) if match[0][0] in "([" else ""
        found.append((normalize_code(code), label))
        start = match.end()
    return found


def _is_code(match: re.Match[str], has_role: bool) -> bool:
    """Return whether a match is a code, of whatever form: "(IRM)." in free text and "(VIH), avec" are not."""
    groups = match.groupdict()
    if groups.get("capitals"):
        return has_role and not re.match(r",\s*[a-zà-ÿ]", match.string[match.end() :])
    if has_role:
        return True
    bare, last = groups.get("bare") or "C00", groups.get("last") or "C00"
    return bare[1:3].isdigit() and re.fullmatch(CODE_PATTERN, last, re.IGNORECASE) is not None


def _same_item(match: re.Match[str], following: re.Match[str], section: str) -> bool:
    """Return whether the next code, which is in parentheses, ends the item that contains this match."""
    between = section[match.end() : following.start()]
    if not match["inner"]:
        return match[0][0] != "(" and not re.search(r"[,;\n]", between)
    # "Arthrite (A39.8) - Coude, poignet (M0102)": only the reference inside the label is written with a dot.
    reference = "." in match["inner"] and "." not in following["inner"] and len(following["inner"]) > 3
    return not between.strip() or (reference and re.fullmatch(r" - [^;\n]*", between) is not None)


def _blank_remarks(section: str) -> str:
    """Replace parentheses that contain more than a code with spaces: codes mentioned there belong to a label."""

    def blank(group: re.Match[str]) -> str:
        if _CODES_OF_A_GROUP.match(group.string, group.start()):
            return f",{group[0][1:-1]},"
        is_code = re.fullmatch(_IN_PARENTHESES, group[0], _FLAGS) or _MALFORMED_GROUP.match(group.string, group.start())
        return group[0] if is_code else " " * len(group[0])

    for _ in range(_MAX_NESTING):
        blanked = _GROUP.sub(blank, section)
        if blanked == section:
            break
        section = blanked
    return section
