"""Read the cells of a hospital's tables: identifiers as texts, and dates that sort as texts."""

import datetime
import math
import re
from decimal import Decimal
from typing import Any

from utils.tables.jsonl import SkippedRowError

WITHOUT_IDENTIFIER = "without an identifier of the stay"

_SCIENTIFIC = re.compile(r"\d(?:[.,]\d+)?[eE]\+\d+")
_DATE = re.compile(r"(\d{4})[-/.]?(\d{2})[-/.]?(\d{2})(?:[ T]?(\d{2}):?(\d{2})(?::?(\d{2}))?)?.*")
_EXCEL_DATE = re.compile(r"[2-7]\d{4}(?:[.,]\d+)?")  # days since 1899-12-30, from 1954 on
_FRENCH_DATE = re.compile(r"(\d{1,2})[-/.](\d{1,2})[-/.](\d{4}|\d{2})(?:[ T]+(\d{1,2})[:hH](\d{2})(?::(\d{2}))?)?.*")


def identifier(value: Any) -> str:
    """Return an identifier as text; an integer that a table stores as a float is written as an integer.

    Raises:
        SkippedRowError: there is none, or digits of it are lost.
    """
    if not isinstance(value, str) and isinstance(value, float | Decimal):
        if not math.isfinite(value):
            value = None
        elif value == int(value):
            if isinstance(value, float) and abs(value) >= 2**53:
                raise SkippedRowError("an identifier that is stored as a float and has lost digits", f"{value:.6e}")
            value = int(value)
    text = "" if value is None else str(value).strip().strip("\ufeff")
    if _SCIENTIFIC.fullmatch(text):
        raise SkippedRowError("an identifier in scientific notation, which has lost digits", text)
    if text.casefold() in ("", "null", "nan", "none", "<na>"):
        raise SkippedRowError(WITHOUT_IDENTIFIER)
    return text


def optional_text(value: Any) -> str:
    """Return an identifier, a kind or a unit as text, "" if there is none."""
    if value is None or value == "":
        return ""
    try:
        return identifier(value)
    except SkippedRowError as skip:
        return skip.detail


def sortable_date(value: Any) -> str:
    """Return `2026-01-05` or `2026-01-05T08:30:00` for a date in ISO or French order, "" if it is none.

    A year of two digits is after 2000. Excel's number of a date is one, too.
    """
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()[:19]
    if not (text := optional_text(value)):
        return ""
    if found := _DATE.fullmatch(text):
        year, month, day, *time = found.groups()
    elif found := _FRENCH_DATE.fullmatch(text):
        day, month, year, *time = found.groups()
        year = year if len(year) == 4 else f"20{year}"
    elif _EXCEL_DATE.fullmatch(text):
        return (datetime.date(1899, 12, 30) + datetime.timedelta(days=int(text[:5]))).isoformat()
    else:
        return ""
    try:
        parts = [int(part) for part in (year, month, day, *(part or 0 for part in time))]
        return datetime.datetime(*parts).isoformat() if time[0] else datetime.date(*parts[:3]).isoformat()  # type: ignore[arg-type]
    except ValueError:
        return ""
