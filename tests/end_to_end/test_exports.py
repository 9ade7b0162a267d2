"""The commands of example/exports/README.md, from an export to its scores, in turn."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.support.documents import ROOT, blocks
from tests.support.no_network import without_network
from tests.support.patience import PATIENCE_S

RUN_ALL = """
import json, runpy, sys
for module, *arguments in json.load(sys.stdin):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise
"""


@pytest.mark.slow
def test_an_export_is_prepared_learned_predicted_and_scored_by_the_commands_of_its_page(tmp_path):
    (block,) = blocks((ROOT / "example/exports/README.md").read_text(encoding="utf-8"), "sh")
    commands = [shlex.split(line) for line in block.splitlines()]
    assert all(words[:2] == ["python", "-m"] for words in commands)
    (tmp_path / "example").symlink_to(ROOT / "example")
    environment, record = without_network(tmp_path, ROOT)
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([words[2:] for words in commands]),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert not record.exists()
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    # The command that the prediction prints is the page's, up to the names of its outputs.
    printed = "utils.evaluate_icd10 --gold data/test_instruct.jsonl --predictions predictions.jsonl --cim10"
    assert f"python -m {printed} example/demo_cim10.tsv --json predictions.scores.json" in run.stdout
