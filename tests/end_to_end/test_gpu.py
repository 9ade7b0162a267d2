"""The checks of benchmarks.acceptance on a GPU. Without one they are skipped; test_acceptance.py runs them on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.acceptance.parts import CORRECTNESS, SPEED
from benchmarks.acceptance.runner import run_parts
from benchmarks.acceptance.summary import Findings, read_findings
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use: torch.cuda.is_available() is false"
)
PARTS = [*((part, "full") for part in CORRECTNESS), *((part, "tiny") for part in SPEED["tiny"])]


@pytest.mark.parametrize(("part", "preset"), PARTS, ids=[part.name for part, _ in PARTS])
def test_part(part: Any, preset: str, tmp_path: Path) -> None:
    [ending] = run_parts([part], "cuda", preset, tmp_path, PATIENCE_S)
    found: Findings = read_findings(tmp_path)
    assert found.failed == [] and ending["state"] == "finished", (tmp_path / "log.txt").read_text()
    assert found.checks
