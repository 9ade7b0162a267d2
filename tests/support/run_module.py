"""Run a command of the project in this process."""

import io
import runpy
import sys
from contextlib import redirect_stdout

import pytest

from tests.support.documents import ROOT


def run_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what `python -m module` prints, which must succeed."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.chdir(ROOT)
    output, code = io.StringIO(), None
    with redirect_stdout(output):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    assert not code
    return output.getvalue()
