"""Every engine that can run here gives the answers of our own generation; `transformers serve` is a real server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from model.args import LoraArgs
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.transformers_serve import transformers_serve
from utils import predict_icd10
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.prompts import instruct_row
from utils.models.exports import export

CODES = {"I10": "Hypertension essentielle", "J459": "Asthme", "E119": "Diabète", "N390": "Infection urinaire"}
RunCommand = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with notes, a table of codes, a run and its export."""
    folder = tmp_path_factory.mktemp("serving")
    rows = [
        instruct_row(f"Patient n°{n}, {label}.", build_answer([Diagnosis("DP", code, label)]), f"s{n}")
        for n, (code, label) in enumerate(CODES.items())
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = "".join(f"{code}\t0\t{label}\n" for code, label in CODES.items())
    (folder / "cim10.tsv").write_text("code\ttype_mco\tlabel\n" + table, encoding="utf-8")
    args = TrainArgs(
        data=DataArgs(instruct_data=str(folder / "notes.jsonl")),
        model_id_or_path=str(make_tiny_checkpoint(folder / "model", dtype=torch.float32)),
        run_dir=str(folder / "run"),
        lora=LoraArgs(rank=8),
        seq_len=512,
        max_steps=40,
    )
    args.optim.lr = 2e-2
    train.run_training(args, World(0, 1, torch.device("cpu")))
    export(folder / "run", "hf", folder / "export", merged=True)
    return folder


def predict(run_command: RunCommand, folder: Path, name: str, *options: object) -> dict[str, dict]:
    out = folder / f"{name}.jsonl"
    code, output = run_command(
        predict_icd10, "--notes", folder / "notes.jsonl", "--out", out, "--max_tokens", 60, *options
    )
    assert code == 0, output
    return {row["id"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}


@pytest.mark.parametrize("constrained", [False, True])
def test_transformers_answers_as_we_do(constrained: bool, folder: Path, run_command: RunCommand) -> None:
    table = ["--cim10", folder / "cim10.tsv"] if constrained else []
    ours = predict(run_command, folder, f"ours {constrained}", "--run", folder / "run", *table)
    options = ["--engine", "transformers", "--run", folder / "export", "--batch_size", 3, *table]
    theirs = predict(run_command, folder, f"theirs {constrained}", *options)
    assert {row["answer"] for row in ours.values()} != {""}
    for name, row in ours.items():
        assert theirs[name]["answer"] == row["answer"]
        assert theirs[name]["log_probability"] == pytest.approx(row["log_probability"], abs=1e-2)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Address of a `transformers serve` of the export."""
    with transformers_serve(folder / "export", folder / "server.log") as url:
        yield url


def test_a_served_export_answers_as_we_do(folder: Path, server: str, run_command: RunCommand) -> None:
    ours = predict(run_command, folder, "ours", "--run", folder / "run")
    options = ["--engine", "server", "--server", server, "--model", folder / "export", "--concurrency", 2]
    theirs = predict(run_command, folder, "served", *options)
    assert {name: row["answer"] for name, row in theirs.items()} == {name: row["answer"] for name, row in ours.items()}
