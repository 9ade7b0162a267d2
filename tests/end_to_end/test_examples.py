"""Every configuration in example/ and in README.md loads, and needs the memory and time that its header states."""

import json
import re
import shlex
from pathlib import Path

import pytest

from finetune.args import TrainArgs, read_train_args
from model.errors import Problem
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.documents import ROOT, blocks
from tests.support.run_module import run_module

EXAMPLES = sorted((ROOT / "example").glob("*.yaml"))
ESTIMATE = re.compile(
    r"^# Estimated by utils\.plan for (.+): ([\d.]+) GiB per GPU, ([\d.]+) (hours|minutes)\.$", re.MULTILINE
)
TABLE = (ROOT / "example/README.md").read_text(encoding="utf-8")
# Keys of paths, which exist only on their user's machine.
PATHS = ("model_id_or_path", "run_dir", "data", "eval_generation.file")
# The keys and values of mistral-finetune's own 7B.yaml.
ORIGINAL = """
data:
  instruct_data: "{instruct}"
  data: ""
  eval_instruct_data: ""
model_id_or_path: "{model}"
lora:
  rank: 64
seq_len: 32768
batch_size: 1
max_steps: 300
optim:
  lr: 6.e-5
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
no_eval: True
ckpt_freq: 100
save_adapters: True
run_dir: "{run}"
wandb:
  project: ""
  run_name: ""
  key: ""
  offline: False
"""


def problems_of(path: Path) -> tuple[TrainArgs, list[Problem]]:
    """Return the settings of a YAML, and what is wrong with them except its paths."""
    problems: list[Problem] = []
    args = read_train_args(path, lambda args: problems.extend(args.problems()) or [])
    return args, [problem for problem in problems if not problem.is_about(*PATHS)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    _, problems = problems_of(path)
    assert problems == []


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "demo"], ids=lambda path: path.name)
def test_headers_follow_the_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = ESTIMATE.findall(path.read_text(encoding="utf-8"))
    assert estimates
    for options, gib, time, unit in estimates:
        plan = json.loads(run_module("utils.plan", [str(path), *shlex.split(options), "--json"], monkeypatch))
        chosen = (plan["base_dtype"], plan["checkpoint"])
        (row,) = (row for row in plan["memory"] if (row["base_dtype"], row["checkpoint"]) == chosen)
        assert row["fits"]
        assert float(gib) == pytest.approx(row["total"] / 2**30, rel=0.03)
        hours = float(time) / (60 if unit == "minutes" else 1)
        assert hours == pytest.approx(plan["expected"]["hours"], rel=0.1)
        assert f"| {gib} GiB | {time} {unit} |" in TABLE


def test_every_example_is_in_the_table_of_recipes() -> None:
    assert [path.name for path in EXAMPLES if f"[{path.name}]({path.name})" not in TABLE] == []


def test_7b_yaml_runs_as_it_is_once_its_paths_exist(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "model", **SMALL)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text = (ROOT / "example/7B.yaml").read_text(encoding="utf-8")
    for key, value in {"instruct_data": "rows.jsonl", "model_id_or_path": "model", "run_dir": "run"}.items():
        text = text.replace(f'{key}: "" # fill in', f'{key}: "{tmp_path / value}" # fill in', 1)
    path = tmp_path / "7B.yaml"
    path.write_text(text, encoding="utf-8")
    args = read_train_args(path, TrainArgs.problems)
    assert args.run_dir == str(tmp_path / "run") and args.optim.lr == 6e-5


def test_the_originals_yaml_loads_unchanged(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "model", **SMALL)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL.format(instruct=tmp_path / "rows.jsonl", model=tmp_path / "model", run=tmp_path / "run"))
    args = read_train_args(path, TrainArgs.problems)
    assert (args.optim.lr, args.seq_len, args.lora.rank, args.no_eval) == (6e-5, 32768, 64, True)
    assert args.wandb.project is None and args.wandb.key is None


def test_the_readmes_yaml_loads(tmp_path: Path) -> None:
    (text,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "yaml")
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    args, problems = problems_of(path)
    assert problems == [] and args.base_dtype == "nf4" and not args.no_eval
