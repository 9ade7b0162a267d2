"""Runs under attack: changed inputs, crafted state, two starts in one folder. In this process, unless the lock needs two."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from finetune.manifest import MANIFEST_NAME, find_corruption, write_manifest
from finetune.run_dir import LOCK_NAME, saved_checkpoints
from model.errors import UserError
from tests.end_to_end.kill_runs import kill_test_config
from tests.support.run_trajectories import INPUTS, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run whose latest checkpoint is that of step 2 of 4."""
    folder = tmp_path_factory.mktemp("attacked")
    data = folder / "data.jsonl"
    lines = (INPUTS / "train_icd.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:20]), encoding="utf-8")
    train.train(str(config_in(folder)))
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint_000004")
    return folder


def config_in(folder: Path, **settings: Any) -> Path:
    defaults = {"data": {"instruct_data": str(folder / "data.jsonl")}, "no_eval": True, "max_steps": 4}
    return kill_test_config(folder, "run", **defaults | settings)


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, in a folder of the same name, since paths are settings."""
    saved = tmp_path / "saved"
    shutil.copytree(stopped, saved, symlinks=True, copy_function=shutil.copyfile)
    yield_to = tmp_path / "run_folder"
    saved.rename(yield_to)
    rename_paths(yield_to, stopped)
    return yield_to


def rename_paths(folder: Path, before: Path) -> None:
    """Make the settings that a copied run recorded name the files of the copy."""
    checkpoint = folder / "run" / "checkpoints" / "checkpoint_000002"
    edit_state(checkpoint, "run.json", lambda run: json.loads(json.dumps(run).replace(str(before), str(folder))))


def edit_state(checkpoint: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a state file and seal the checkpoint again, as somebody who crafts one would."""
    path = checkpoint / "state" / name
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(state) or state), encoding="utf-8")
    seal(checkpoint)


def seal(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)


def resume(folder: Path, **settings: Any) -> None:
    train.train(str(config_in(folder, **settings)))


def refusal(folder: Path, **settings: Any) -> str:
    """Return why a run is not resumed; it must not have changed."""
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "run").rglob("*") if path.is_file())
    with pytest.raises(UserError) as error:
        resume(folder, **settings)
    after = sorted((path, path.stat().st_mtime_ns) for path in (folder / "run").rglob("*") if path.is_file())
    assert after == before
    return str(error.value)


def steps(folder: Path) -> list[int]:
    return [int(path.name[-6:]) for path in saved_checkpoints(folder / "run" / "checkpoints")]


# ---- Data


def reversed_answers(text: str) -> str:
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = row["messages"][-1]["content"][::-1]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def swapped_words(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[3] = lines[3].replace("role", "ROLE", 1).replace("ROLE", "rolE", 1)
    return "".join(lines)


@pytest.mark.parametrize("change", [reversed_answers, swapped_words, lambda text: text + text.splitlines()[0] + "\n"])
def test_changed_data_is_refused_whatever_its_lengths(folder: Path, change: Callable[[str], str]):
    data = folder / "data.jsonl"
    data.write_text(change(data.read_text(encoding="utf-8")), encoding="utf-8")
    assert f"{data} has changed since the checkpoint was saved" in refusal(folder)


def test_copied_inputs_with_other_modification_times_are_the_same(folder: Path):
    for path in (folder / "data.jsonl", *(folder / "model").iterdir()):
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    resume(folder)
    assert steps(folder)[-1] == 4
    assert [row["step"] for row in read_jsonl(folder / "run" / "metrics.train.jsonl")] == [1, 2, 3, 4, 3, 4]


def test_checkpoint_without_fingerprints_is_resumed_with_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = folder / "run" / "checkpoints" / "checkpoint_000002"
    edit_state(checkpoint, "run.json", lambda run: run.pop("fingerprints") and None)
    resume(folder)
    assert steps(folder)[-1] == 4 and "is of an earlier version, which did not record" in capsys.readouterr().out


# ---- Model


def other_weights(model: Path) -> None:
    tensors = load_file(model / "consolidated.safetensors")
    tensors["norm.weight"][-1] += 0.5
    save_file(tensors, model / "consolidated.safetensors")


def other_shapes(model: Path) -> None:
    params = json.loads((model / "params.json").read_text(encoding="utf-8"))
    (model / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-4}), encoding="utf-8")


@pytest.mark.parametrize(("change", "what"), [(other_weights, "weights"), (other_shapes, "shapes")])
def test_another_base_is_refused(folder: Path, change: Callable[[Path], None], what: str):
    change(folder / "model")
    assert f"The model in {folder / 'model'} has changed since the checkpoint was saved ({what})" in refusal(folder)
