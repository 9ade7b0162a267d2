"""csv files that we write: a spreadsheet must not execute a cell, and reading them back must restore every string."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.tables.csv_cells import CsvWriter
from utils.tables.read_table import read_table


def csv_of(*rows):
    file = io.StringIO()
    writer = CsvWriter(file, [f"c{number}" for number in range(len(rows[0]))])
    for row in rows:
        writer.write(*row)
    return file.getvalue()


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "@SUM(1)", "+1+1", "-1+1", "\tx", "\rx", "\n=1", "'=1", "＝1"])
def test_formulas_get_an_apostrophe(cell):
    assert list(csv.reader(io.StringIO(csv_of((cell, "x"))), strict=True))[1] == ["'" + cell, "x"]


@pytest.mark.parametrize("cell", ["I10", "'tis", "", "a=b", " - douleur", "l'état", 5, -0.5, None])
def test_other_cells_are_unchanged(cell):
    row = next(csv.DictReader(io.StringIO(csv_of((cell, "x")))))
    assert row == {"c0": "" if cell is None else str(cell), "c1": "x"}


def test_every_csv_is_written_by_the_one_class():
    root = Path(__file__).parents[2]
    files = [*(root / "utils").rglob("*.py"), *(root / "finetune").rglob("*.py")]
    writing = [file.name for file in files if re.search(r"csv\.(writer|DictWriter)", file.read_text(encoding="utf-8"))]
    assert writing == ["csv_cells.py"]


TEXTS = st.text(st.characters(exclude_characters="\0", codec="utf-8")) | st.text("'=+-@\t＝")


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_reading_restores_what_was_written(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    path.write_text(csv_of(*rows), encoding="utf-8", newline="")
    assert [tuple(row.values()) for _, row in read_table(path)] == rows
