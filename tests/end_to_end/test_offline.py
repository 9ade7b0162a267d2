"""From notes to scores without network access: no connection, no data sent, no name lookup."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.no_network import without_network

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def python(tmp_path):
    """A function that runs Python without sockets; it returns the finished process and the recorded attempts."""
    environment, record = without_network(tmp_path, ROOT)

    def run(*arguments, stdin=""):
        command, environ = [sys.executable, *arguments], environment | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, input=stdin, env=environ, cwd=tmp_path, capture_output=True, text=True)
        return done, record.read_text(encoding="utf-8") if record.exists() else ""

    return run


@pytest.mark.parametrize(
    "attempt", ["socket.create_connection(('127.0.0.1', 9), 1)", "socket.getaddrinfo('localhost', 80)"]
)
def test_attempts_are_recorded_even_if_their_error_is_caught(python, attempt):
    done, tried = python("-c", f"import socket\ntry: {attempt}\nexcept OSError as error: print(error)")
    assert "no network here" in done.stdout
    assert tried


def test_pipeline_opens_no_socket(python, tmp_path):
    notes, data, run_dir = (str(tmp_path / name) for name in ("notes", "data", "run"))
    config = {
        "data": {"instruct_data": f"{data}/train_instruct.jsonl", "eval_instruct_data": f"{data}/val_instruct.jsonl"},
        "model_id_or_path": str(make_tiny_checkpoint(tmp_path / "model")),
        "run_dir": run_dir,
        "seq_len": 512,
        "max_steps": 1,
        "no_eval": False,
        "eval_generation": {"file": f"{data}/val_instruct.jsonl", "n_samples": 2, "max_tokens": 3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    cim10, gold, answers = f"{notes}/cim10.tsv", f"{data}/test_instruct.jsonl", str(tmp_path / "p.jsonl")
    tables = ["--text", f"{notes}/text.csv", "--codes", f"{notes}/codes.csv", "--cim10", cim10]
    constrained = ["--cim10", cim10, "--max_tokens", "40"]
    outputs = ["--html", str(tmp_path / "scores.html"), "--csv", str(tmp_path / "scores.csv"), "--cim10", cim10]
    commands = [
        ["utils.generate_notes", "--out", notes, "--n", "30", "--length", "short"],
        ["utils.prepare_icd10_data", *tables, "--out", data],
        ["train", str(tmp_path / "config.yaml")],
        ["utils.predict_icd10", "--run", run_dir, "--notes", gold, "--out", answers, *constrained],
        ["utils.evaluate_icd10", "--gold", gold, "--predictions", answers, "--json", f"{data}/a.json", *outputs],
        ["utils.evaluate_icd10", "--gold", gold, "--run", run_dir, "--json", f"{data}/b.json"],
    ]
    done, tried = python("-m", "tests.support.in_turn", stdin=json.dumps(commands))  # a new process, with its imports
    assert done.returncode == 0, done.stderr
    assert [code for code, _ in json.loads(done.stdout)] == [0] * len(commands), done.stdout
    assert not tried
    scores = [json.loads(Path(f"{data}/{name}.json").read_text(encoding="utf-8")) for name in "ab"]
    assert all(score["counts"]["notes"] == 3 and not score["counts"]["missing_predictions"] for score in scores)
    assert len(list(Path(run_dir, "answers").iterdir())) == 2
