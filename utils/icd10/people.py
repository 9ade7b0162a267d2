"""The sex and the age of the patients of stays, for the rules that need them."""

import datetime
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from model.wording import counted
from utils.icd10.cells import sortable_date

MALE, FEMALE = "M", "F"
PERSON_FIELDS = ("sex", "age", "birth")

# PMSI and SNDS: 1 and 2; OMOP: 8507 and 8532.
_SEXES = {
    **dict.fromkeys(("1", "8507", "m", "h", "homme", "masculin", "male", "man"), MALE),
    **dict.fromkeys(("2", "8532", "f", "femme", "féminin", "feminin", "female", "woman"), FEMALE),
}
_AGE = re.compile(r"(\d{1,3})(?:[.,]\d*)?\s*(?:ans?|années?|years?|y|a)?\.?", re.IGNORECASE)
_YOUNG = re.compile(r"(\d{1,3})(?:[.,]\d*)?\s*(?:(mois|months?)|jours?|j|days?|semaines?|sem|weeks?)\.?", re.IGNORECASE)
_OLDEST = 130
_LONGEST_CELL = 12  # characters of a sex, an age or a date


def parse_sex(text: str) -> str | None:
    """Return M or F, None if the text is neither."""
    return _SEXES.get(text.strip().rstrip(".").casefold())


def parse_age(text: str) -> int | None:
    """Return completed years of `67`, `67.5`, `67 ans`, `18 mois` or `3 jours`, None if the text is not an age."""
    text = text.strip()
    if found := _YOUNG.fullmatch(text):
        return int(found[1]) // 12 if found[2] else 0
    found = _AGE.fullmatch(text)
    return int(found[1]) if found and int(found[1]) <= _OLDEST else None


def age_at(birth: str, date: str) -> int | None:
    """Return the completed years from one ISO date to another, None if they are no age."""
    first, last = (datetime.date.fromisoformat(text[:10]) for text in (birth, date))
    years = last.year - first.year - ((last.month, last.day) < (first.month, first.day))
    return years if 0 <= years <= _OLDEST else None


class People:
    """What the tables say about the patients of stays.

    Attributes:
        unreadable: values that are not a sex, an age or a date, by field and value.
        contradictory: stays with two sexes or two dates of birth, of which none is used.
        undated: stays whose age was asked for, with a date of birth but no date of discharge.
    """

    def __init__(self) -> None:
        self.unreadable: Counter[tuple[str, str]] = Counter()
        self.contradictory: dict[str, None] = {}  # an ordered set
        self.undated: dict[str, None] = {}
        self._found: dict[str, dict[str, str | int]] = {field: {} for field in PERSON_FIELDS}

    def add(self, stay: str, person: Mapping[str, str]) -> None:
        """Add what a row of a stay says: text by field of PERSON_FIELDS."""
        for field, text in person.items():
            value = _PARSERS[field](text)
            if value in (None, ""):
                self.unreadable[field, text] += 1
                continue
            known = self._found[field].setdefault(stay, value)
            if known != value and field == "age":  # the years of a stay; that of its beginning counts
                self._found[field][stay] = min(known, value)
            elif known != value:
                self.contradictory[stay] = None

    def facts(self, stay: str, date: str | None) -> dict[str, str | int]:
        """Return the `sex` and the `age` of a stay, if known.

        Args:
            stay: identifier.
            date: of discharge, for the age of a date of birth; None if unknown.
        """
        if stay in self.contradictory:
            return {}
        found = {field: values[stay] for field, values in self._found.items() if stay in values}
        birth = found.pop("birth", None)
        if birth and not date and "age" not in found:
            self.undated[stay] = None
        age = found.get("age", age_at(str(birth), date) if birth and date else None)
        return found if age is None else found | {"age": age}

    def warnings(self) -> list[str]:
        """Return what is not used."""
        found = []
        if self.unreadable:
            examples = ", ".join(f"{field} {_shown(text)}" for field, text in list(self.unreadable)[:3])
            rows = counted(self.unreadable.total(), "value of sex, age or birth is", "values of sex, age or birth are")
            found.append(f"{rows} not understood ({examples}): expected M or F, years, a date")
        if self.contradictory:
            stays = counted(len(self.contradictory), "stay has", "stays have")
            found.append(f"{stays} two sexes or dates of birth; none is used (e.g. {next(iter(self.contradictory))})")
        if self.undated:
            stays = counted(len(self.undated), "stay has", "stays have")
            found.append(
                f"{stays} a date of birth but no date of discharge, so that the age is not known (e.g. "
                f"{next(iter(self.undated))}): name a column, --columns discharge=COLUMN or age=COLUMN"
            )
        return found


def _shown(text: str) -> str:
    """Return a cell for a message; a longer one may be a note."""
    return repr(text) if len(text) <= _LONGEST_CELL else f"of {len(text)} characters"


def _parse_birth(text: str) -> str:
    """Return a date in the order of ISO; a year of two digits says nothing, since ages can be over 100."""
    return "" if re.fullmatch(r"\d{1,2}\D\d{1,2}\D\d{2}", text) else sortable_date(text)


_PARSERS: dict[str, Any] = {"sex": parse_sex, "age": parse_age, "birth": _parse_birth}
