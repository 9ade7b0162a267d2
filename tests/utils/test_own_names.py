"""No command replaces a file that it reads, whatever the spelling of its name or the link to it."""

import json
from pathlib import Path

import pytest
import yaml

from utils import evaluate_icd10, evaluate_qa, generate_notes, import_data, prepare_icd10_data, validate_data

ROW = {"id": "1", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "un mot"}]}
PREPARE = [prepare_icd10_data, "--text", "train_text.jsonl", "--codes", "codes.csv", "--cim10", "cim10.tsv"]
GENERATE = [generate_notes, "--n", "2", "--cim10", "cim10.tsv"]
IMPORT = [import_data, "train.jsonl", "--text", "{id}", "--overwrite"]
QA = [evaluate_qa, "--gold", "train.jsonl", "--predictions", "answers.jsonl"]
ICD10, SECOND = [evaluate_icd10, "--gold", "train.jsonl"], ["--second", "codes.csv"]
VALIDATE = [validate_data, "config.yaml"]
CASES = {
    "prepare": [*PREPARE, "--out", ".", "--overwrite"],
    "prepare, another spelling": [*PREPARE, "--out", "folder/..", "--overwrite"],
    "prepare, a link": [*PREPARE, "--out", "link", "--overwrite"],
    "generate": [*GENERATE, "--out", ".", "--overwrite"],
    "import": [*IMPORT, "--out", "./"],
    "import, a hard link": [*IMPORT, "--out", "hard"],
    "evaluate_icd10, before it predicts": [*ICD10, "--run", "run", "--json", "train.jsonl"],
    "evaluate_icd10, its second coder": [*ICD10, "--predictions", "answers.jsonl", *SECOND, "--json", "codes.csv"],
    "evaluate_icd10, a record": [*ICD10, "--predictions", "answers.jsonl", "--json", "answers.about.json"],
    "evaluate_qa": [*QA, "--json", "answers.jsonl"],
    "evaluate_qa, a hard link": [*QA, "--json", "hard_train.jsonl"],
    "validate, its report": [*VALIDATE, "--error_report_txt", "train.jsonl"],
    "validate, its statistics": [*VALIDATE, "--train_stats_json", "./config.yaml"],
    "validate, its plot": [*VALIDATE, "--plot", "hard_train.jsonl"],
    "validate, a corrected file": [*VALIDATE, "--create_corrected"],
    "validate, a file of the model": [*VALIDATE, "--error_report_txt", "folder/params.json"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with what the commands read; the current one."""
    monkeypatch.chdir(tmp_path)
    config = {"model_id_or_path": "folder", "run_dir": "run", "max_steps": 1}
    config["data"] = {"instruct_data": "train.jsonl,train.jsonl.corrected"}
    Path("folder").mkdir()
    files = {"config.yaml": yaml.safe_dump(config), "cim10.tsv": "I10|0|0|0|HTA|Hypertension\n", "codes.csv": "x\n"}
    files |= dict.fromkeys(("train.jsonl", "train_text.jsonl", "train.jsonl.corrected"), json.dumps(ROW) + "\n")
    files |= {"answers.jsonl": '{"id": "1", "answer": "un mot"}\n', "folder/params.json": "{}"}
    for name, content in files.items():
        Path(name).write_text(content, encoding="utf-8")
    Path("link").symlink_to(".")
    Path("hard_train.jsonl").hardlink_to("train.jsonl")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_an_output_never_replaces_an_input(case, folder, run_command):
    before = contents(folder)
    code, output = run_command(*CASES[case])
    assert code == 1 and "is an output and also another file of this command" in output
    assert contents(folder) == before


@pytest.mark.parametrize("command", [[*QA, "--json", "new.json"], [*IMPORT, "--out", "new/", "--split", "1"]])
def test_other_names_are_written(command, folder, run_command):
    before = contents(folder)
    assert run_command(*command)[0] == 0
    assert contents(folder).items() > before.items()
