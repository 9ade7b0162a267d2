"""Runs that continue with another length: what they repeat exactly, how their rate continues, what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune.manifest import find_corruption
from finetune.run_dir import checkpoint_name
from tests.end_to_end.kill_runs import ForkedRun, curve, kill_test_config, train_forked
from tests.support.run_trajectories import INPUTS, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

LR, LAST = 0.01, 0.01 / 25 / 1e4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the model that all runs share."""
    return tmp_path_factory.mktemp("longer")


def config(folder: Path, name: str, max_steps: int | None, **settings: object) -> Path:
    data = {"instruct_data": f"{INPUTS}/train_icd.jsonl", "shuffle": True}
    short = {"data": data, "seq_len": 128, "no_eval": True, "ckpt_freq": 2, "num_ckpt_keep": None}
    return kill_test_config(folder, name, **short | {"max_steps": max_steps} | settings)


def refused(path: Path) -> str:
    run = ForkedRun(path, 1)
    assert run.wait() == [1] and "Traceback" not in run.log, run.log
    return run.log


def adapter(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / checkpoint_name(step) / "consolidated" / "lora.safetensors")


def plan(run_dir: Path, step: int) -> dict[str, float]:
    checkpoint = run_dir / "checkpoints" / checkpoint_name(step)
    assert find_corruption(checkpoint) is None  # its manifest has the hash of run.json
    run = json.loads((checkpoint / "state" / "run.json").read_text())
    assert run["args"]["max_steps"] == yaml.safe_load((run_dir / "args.yaml").read_text())["max_steps"]
    return run["schedule"]["plan"]


def rates(run_dir: Path) -> list[float]:
    return [row["lr"] for row in read_jsonl(run_dir / "metrics.train.jsonl")]


@pytest.mark.parametrize("ranks, name", [(1, "adamw"), (2, "sgd")])
def test_four_steps_and_four_more_are_eight(ranks, name, folder):
    optim = {"optim": {"name": name, "lr": LR, "schedule": "constant", "pct_start": 0.0}, "ckpt_freq": 0}
    expected = train_forked(config(folder, f"eight_{name}", 8, **optim), ranks)
    four = config(folder, f"four_{name}", 4, **optim)
    found = train_forked(four, ranks)
    assert len(curve(found)["train"]) == 4
    run = ForkedRun(config(folder, f"four_{name}", 8, **optim), ranks)  # `resume: auto`
    assert run.wait() == [0] * ranks and "now ends after step 8 instead of 4" in run.log, run.log
    assert curve(found)["train"] == curve(expected)["train"] and len(curve(found)["train"]) == 8
    ours, theirs = adapter(found, 8), adapter(expected, 8)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert plan(found, 8) == {"start": 0, "end": 4, "rate": None}


@pytest.fixture(scope="module")
def lengthened(folder) -> Path:
    """A run of 4 steps under onecycle, continued to 12."""
    run_dir = train_forked(config(folder, "lengthened", 4), 1)
    train_forked(config(folder, "lengthened", 12), 1)
    return run_dir


def test_one_cycle_continues_from_the_present_rate_and_ends_as_configured(lengthened):
    found = rates(lengthened)
    assert len(found) == 12 and found[3] == pytest.approx(LAST)
    assert found[4] == found[3]  # continuous at the joint
    assert found[5] == pytest.approx(LR) and found[-1] == pytest.approx(LAST)
    assert found[5:] == sorted(found[5:], reverse=True)
    assert plan(lengthened, 12) == {"start": 4, "end": 12, "rate": found[3]}
    assert yaml.safe_load((lengthened / "args.yaml").read_text())["max_steps"] == 12


def test_a_lengthened_run_that_was_interrupted_resumes_bit_identically(lengthened, folder):
    run_dir = folder / "interrupted"
    shutil.copytree(lengthened, run_dir, symlinks=True)
    for step in (10, 12):
        shutil.rmtree(run_dir / "checkpoints" / checkpoint_name(step))
    train_forked(config(folder, run_dir.name, 12), 1)
    assert curve(run_dir)["train"] == curve(lengthened)["train"]
    ours, theirs = adapter(run_dir, 12), adapter(lengthened, 12)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_shorter_run_than_was_trained_is_refused_and_nothing_changes(lengthened, folder):
    before = {path: path.stat().st_mtime_ns for path in lengthened.rglob("*")}
    log = refused(config(folder, "lengthened", 8))
    assert f"{checkpoint_name(12)} has taken 12 of 12 steps already and would now end after 8: set `max_steps`" in log
    assert {path: path.stat().st_mtime_ns for path in lengthened.rglob("*")} == before


def test_settings_of_data_and_model_are_refused_in_a_longer_run(lengthened, folder):
    changed = {"lora": {"rank": 8, "dropout": 0.1}, "optim": {"lr": 0.02, "name": "sgd"}, "max_norm": 2.0, "seed": 1}
    log = refused(config(folder, "lengthened", 20, **changed))
    assert set(re.findall(r"^  - `(.*?)` is", log, re.MULTILINE)) == {"lora.rank", "optim.name", "seed"}
    assert set(re.findall(r"^  - `(.*?)` is", refused(config(folder, "lengthened", 12, **changed)), re.MULTILINE)) == {
        *("lora.rank", "optim.name", "seed", "optim.lr", "max_norm")
    }
