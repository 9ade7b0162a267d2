"""The tutorials: committed with their outputs, and runnable from top to bottom, at the small size of RECODE_QUICK."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.forked_python import forked_python
from tests.support.patience import PATIENCE_S
from tutorials.execute import NAMES
from utils.icd10.answers import parse_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import guide_rules

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PROJECT_URL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
WORK = "runs/tutorials"
PLOTS_AND_TABLES = {
    "generate_fictives_notes": (2, 3),
    "prepare_data_for_generative_finetuning": (2, 2),
    "mistral_finetune_7b": (2, 2),
    "icd10_weekly_loop": (2, 8),
}


def read_notebook(name):
    return nbformat.read(ROOT / "tutorials" / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]


def execute(name, folder, monkeypatch):
    """Run a tutorial in a copy of the project's layout; return everything it printed.

    Its kernel and the commands in its cells are new processes, unless JUPYTER_PATH names another kernel.
    """
    (folder / "tutorials").mkdir()
    for source in ("example", "finetune", "model", "train.py", "utils"):
        (folder / source).symlink_to(ROOT / source)
    monkeypatch.setenv("RECODE_QUICK", "1")
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = read_notebook(name)
    client = NotebookClient(
        notebook, timeout=int(PATIENCE_S), resources={"metadata": {"path": str(folder / "tutorials")}}
    )
    client.execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture
def forked_kernel(tmp_path, monkeypatch):
    """Fork kernels, and commands in cells, from a process that has imported torch."""
    with forked_python(tmp_path / "programs") as programs:
        argv = [str(programs / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = tmp_path / "jupyter/kernels/python3/kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps({"argv": argv, "display_name": "forked", "language": "python"}), encoding="utf-8")
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        yield


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", PLOTS_AND_TABLES)
def test_committed_outputs_are_complete(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shows = re.compile(r"^(%%bash|!|table\(|Image\(|run\(|highlighted\(|print\()|plt\.show", re.MULTILINE)
    assert [cell.source for cell in cells if shows.search(cell.source) and not cell.outputs] == []
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    streams = [[output.name for output in cell.outputs if output.output_type == "stream"] for cell in cells]
    assert all(len(names) == len(set(names)) for names in streams), (
        "run make notebooks, which joins the pieces of a stream"
    )
    types = [kind for output in outputs for kind in output.get("data", {})]
    plots, tables = PLOTS_AND_TABLES[name]
    assert types.count("image/png") >= plots and types.count("text/html") >= tables


@pytest.mark.parametrize("name", PLOTS_AND_TABLES)
def test_committed_outputs_contain_no_paths_or_progress_bars(name):
    for cell in code_cells(name):
        for output in cell.outputs:
            shown = "\n".join([output.get("text", ""), *output.get("data", {}).values()])
            assert not re.search(r"/(home|root|work|tmp|usr|Users|opt)/|\r|it/s|Traceback|\x1b", shown), shown


def test_committed_outputs_are_small():
    assert sum(path.stat().st_size for path in TUTORIALS) < 1_500_000


def test_every_tutorial_is_executed_tested_and_linked():
    assert {path.stem for path in TUTORIALS} == set(NAMES) == set(PLOTS_AND_TABLES)
    page = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    assert all(f"/blob/main/tutorials/{path.name})" in page for path in TUTORIALS)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_open_in_colab_from_the_project_url(path):
    notebook = read_notebook(path.stem)
    nbformat.validate(notebook)
    repository = PROJECT_URL.removeprefix("https://github.com/")
    badge = notebook.cells[0].source
    assert f"https://colab.research.google.com/github/{repository}/blob/main/tutorials/{path.name}" in badge
    assert "https://colab.research.google.com/assets/colab-badge.svg" in badge
    setup = code_cells(path.stem)[0].source
    assert f'PROJECT_URL = "{PROJECT_URL}"' in setup and "git clone --quiet {PROJECT_URL}" in setup
    assert setup == code_cells(TUTORIALS[0].stem)[0].source


def test_colab_setup_stops_if_the_clone_is_another_project(tmp_path):
    other = tmp_path / "other"
    subprocess.run(["git", "init", "--quiet", other], check=True)
    setup = code_cells("mistral_finetune_7b")[0].source
    setup = setup.replace(PROJECT_URL, str(other)).replace("/content", str(tmp_path))
    program = (
        "import sys, types; from IPython.core.interactiveshell import InteractiveShell\n"
        "sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
        f"error = InteractiveShell.instance().run_cell({setup!r}).error_in_exec\n"
        "print('STOPPED', repr(error))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "recode/.git").is_dir(), done.stderr
    stopped = done.stdout.partition("STOPPED ")[2]
    assert stopped.startswith("SystemExit(") and "does not contain recode-mistral-finetune" in stopped
    assert "UPLOAD_ZIP = True" in stopped and "git archive" in stopped


def test_commands_of_the_tutorials_exist():
    sources = "".join(cell.source for path in TUTORIALS for cell in read_notebook(path.stem).cells)
    modules = set(re.findall(r"(?<=-m )utils\.\w+|(?<=run\(f\")utils\.\w+", sources))
    assert len(modules) >= 10
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)


@pytest.mark.slow
def test_generate_fictives_notes(tmp_path, monkeypatch):
    printed = execute("generate_fictives_notes", tmp_path, monkeypatch)
    notes = tmp_path / WORK / "notes"
    assert {path.name for path in notes.iterdir()} >= {"text.csv", "codes.csv"}
    assert len(read_jsonl(tmp_path / WORK / "notes-mistral/prompts.jsonl")) == 20
    assert "Nothing was sent." in printed and "no note was requested" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernel")
def test_prepare_data_for_generative_finetuning(tmp_path, monkeypatch):
    printed = execute("prepare_data_for_generative_finetuning", tmp_path, monkeypatch)
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
        "DP of another unit, kept as DAS: 1",
    )
    assert all(fault in printed for fault in faults)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernel")
def test_mistral_finetune_7b(tmp_path, monkeypatch):
    execute("mistral_finetune_7b", tmp_path, monkeypatch)
    work = tmp_path / WORK
    (run,) = work.glob("run_*")
    losses = [row["loss"] for row in read_jsonl(run / "metrics.train.jsonl")]
    assert losses[-1] < losses[0]
    test, unseen = work / "test.jsonl", work / "unseen/notes_instruct.jsonl"
    table = Cim10Table.from_file(ROOT / "example/demo_cim10.tsv")
    for kind, gold in {"base": test, "free": test, "constrained": test, "unseen": unseen}.items():
        predictions = read_jsonl(run / f"{kind}.jsonl")
        assert {row["id"] for row in predictions} == {row["id"] for row in read_jsonl(gold)}
        assert json.loads((run / f"{kind}.json").read_text(encoding="utf-8"))["exact"]["micro"].keys() >= {"f1"}
        assert (run / f"{kind}.html").is_file() and (run / f"{kind}.csv").is_file()
    constrained = read_jsonl(run / "constrained.jsonl")
    items = [item for row in constrained for item in row["codes"]]
    assert all(guide_rules().allows(item["role"], table.get(item["code"])) for item in items)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernel")
def test_icd10_weekly_loop(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = execute("icd10_weekly_loop", tmp_path, monkeypatch)
    weekly = tmp_path / WORK / "weekly"
    events = read_jsonl(weekly / "worklist/journal.jsonl")
    coded = [row["stay"] for row in events if row["event"] == "coded"]
    changed = {stay for stay in coded if coded.count(stay) > 1}
    assert changed and all(stay.startswith("week1-") and coded.count(stay) == 2 for stay in changed)
    assert set(coded) == {f"week{week}-{number:03}" for week in (1, 2, 3) for number in (1, 2, 3)}
    assert "stays coded now, 0 before" in printed and "0 stays coded now, 3 before" in printed
    reviewed = {row["stay"] for row in events if row["event"] == "reviewed"}
    rows = read_jsonl(weekly / "worklist/corrections.jsonl")
    assert {row["id"] for row in rows} == reviewed == set(coded)
    expected = {row["id"]: row for week in (1, 2, 3) for row in read_jsonl(weekly / f"week{week}.jsonl")}
    for row in rows:
        final, right = (
            {item[:2] for item in parse_answer(each["messages"][-1]["content"])} for each in (row, expected[row["id"]])
        )
        assert final == right | ({("DAS", "N390")} if row["id"] in changed else set())
    assert (weekly / "worklist/drift.html").is_file() and (weekly / "second_reading/review.html").is_file()
    assert "with a broken rule" in printed
