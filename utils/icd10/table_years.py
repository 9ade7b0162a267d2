"""Choose the CIM-10 table of a stay by its date of discharge: codes are opened and closed every year."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.errors import UserError
from utils.icd10.codes import Cim10Table

NO_DATE = "without a date of discharge, which chooses the CIM-10 table"
_DATED = re.compile(r"(\d{4})(-\d{2}-\d{2})?=(.+)")


class TableYears:
    """One CIM-10 table for all stays, or one for each period.

    Args:
        options: `TABLE`, or several of `2024=TABLE` or `2024-03-01=TABLE`: the first day on which a table is valid.

    Raises:
        UserError: a table cannot be read, or several are given without the year of each.
    """

    def __init__(self, options: Sequence[str]) -> None:
        dated = [_DATED.fullmatch(option) for option in options]
        if len(options) > 1 and not all(dated):
            raise UserError(
                f"--cim10: {', '.join(options)}: expected one table, or several with their years: 2024=TABLE."
            )
        starts = [(f"{found[1]}{found[2] or '-01-01'}", Path(found[3])) for found in dated if found]
        starts = sorted(starts) or [("", Path(options[0]))]
        self.paths = [path for _, path in starts]
        self._tables = [(start, Cim10Table.from_file(path)) for start, path in starts]
        self._by_year: dict[tuple[str, int], Cim10Table] = {}

    def of(self, stay: str, discharges: Mapping[str, str]) -> Cim10Table | str:
        """Return the table of a stay, with the codes that were closed after its discharge, or why there is none."""
        date = discharges.get(stay)
        if not date:
            return NO_DATE if len(self._tables) > 1 else self._tables[0][1]
        valid = [(start, table) for start, table in self._tables if start <= date[:10]]
        if not valid:
            return f"discharged before {self._tables[0][0]}, the first day of the first CIM-10 table"
        (start, table), year = valid[-1], int(date[:4])
        if (start, year) not in self._by_year:
            self._by_year[start, year] = table.as_of(year)
        return self._by_year[start, year]
