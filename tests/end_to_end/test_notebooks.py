"""The tutorials run from top to bottom, each on its own, at the small size that RECODE_QUICK asks for."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from utils.icd10.answers import parse_answer
from utils.icd10.codes import Cim10Table

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
WORK = "runs/tutorials"


def execute(name, folder, monkeypatch):
    """Runs a tutorial in a copy of the project's layout; returns all that it printed."""
    (folder / "tutorials").mkdir()
    for source in ("example", "finetune", "model", "train.py", "utils"):
        (folder / source).symlink_to(ROOT / source)
    monkeypatch.setenv("RECODE_QUICK", "1")
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = nbformat.read(ROOT / "tutorials" / name, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "tutorials")}})
    client.execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_are_committed_without_outputs_and_open_in_colab(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    badge = notebook.cells[0].source
    assert f"/tutorials/{path.name}" in badge and "https://colab.research.google.com/assets/colab-badge.svg" in badge
    assert 'if "google.colab" in sys.modules' in code[0].source


def test_commands_of_the_tutorials_name_existing_modules():
    sources = "".join(path.read_text(encoding="utf-8") for path in TUTORIALS)
    modules = set(re.findall(r"(?<=-m )utils\.\w+", sources))
    assert len(modules) >= 6
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)


def test_generate_fictives_notes(tmp_path, monkeypatch):
    printed = execute("generate_fictives_notes.ipynb", tmp_path, monkeypatch)
    notes = tmp_path / WORK / "notes"
    assert {path.name for path in notes.iterdir()} >= {"text.csv", "codes.csv", "cim10.tsv"}
    assert len(read_jsonl(tmp_path / WORK / "notes-mistral/prompts.jsonl")) == 20
    assert "Nothing was sent." in printed and "no note was asked for" in printed


def test_prepare_data_for_generative_finetuning(tmp_path, monkeypatch):
    printed = execute("prepare_data_for_generative_finetuning.ipynb", tmp_path, monkeypatch)
    work = tmp_path / WORK
    rows = [row for split in ("train", "val", "test") for row in read_jsonl(work / f"data/{split}_instruct.jsonl")]
    assert len(rows) == 100 and all(parse_answer(row["messages"][-1]["content"]) for row in rows)
    assert (work / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "No errors! Data is correctly formatted!" in printed
    faults = (
        "dropped, without codes: 1",
        "dropped, without text: 1",
        "dropped, not in the CIM-10 table: 1",
        "dropped, a category with children or a closed code: 1",
        "dropped, another DP is more frequent: 1",
    )
    assert all(fault in printed for fault in faults)


def test_mistral_finetune_7b(tmp_path, monkeypatch):
    execute("mistral_finetune_7b.ipynb", tmp_path, monkeypatch)
    work = tmp_path / WORK
    (run,) = work.glob("run_*")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in read_jsonl(run / "metrics.train.jsonl")]
    assert losses[-1] < losses[0]
    assert len(list((run / "answers").glob("*.jsonl"))) == 2
    gold = read_jsonl(work / "test.jsonl")
    table = Cim10Table.from_file(work / "notes/cim10.tsv")
    for kind in ("free", "constrained"):
        predictions = read_jsonl(run / f"{kind}.jsonl")
        assert {row["id"] for row in predictions} == {row["id"] for row in gold}
        assert json.loads((run / f"{kind}.json").read_text(encoding="utf-8"))["exact"]["micro"].keys() >= {"f1"}
        assert (run / f"{kind}.html").is_file() and (run / f"{kind}.csv").is_file()
    assert all(table.allows(item["role"], item["code"]) for row in predictions for item in row["codes"])
