"""The commands of example/exports/README.md, from an export to its scores, in turn."""

import json
import shlex

import pytest

from tests.support.documents import ROOT, blocks
from tests.support.in_turn import run_in_turn


@pytest.mark.slow
def test_an_export_is_prepared_learned_predicted_and_scored_by_the_commands_of_its_page(tmp_path):
    (block,) = blocks((ROOT / "example/exports/README.md").read_text(encoding="utf-8"), "sh")
    commands = [shlex.split(line) for line in block.splitlines()]
    assert all(words[:2] == ["python", "-m"] for words in commands)
    (tmp_path / "example").symlink_to(ROOT / "example")
    outcomes = run_in_turn({str(number): words[2:] for number, words in enumerate(commands)}, tmp_path)
    printed = "".join(output for _, output in outcomes.values())
    assert all(code == 0 for code, _ in outcomes.values()), printed
    assert not (tmp_path / "sockets.txt").exists()
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    # The command that the prediction prints is the page's, up to the names of its outputs.
    command = "utils.evaluate_icd10 --gold data/test_instruct.jsonl --predictions predictions.jsonl --cim10"
    assert f"python -m {command} example/demo_cim10.tsv --json predictions.scores.json" in printed
