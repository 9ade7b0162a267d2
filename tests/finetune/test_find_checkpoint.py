"""What a user may name where weights are asked for: a run, a checkpoint, or the folder inside that holds them."""

import argparse
import os
from pathlib import Path

import pytest

from finetune.run_dir import find_checkpoint, find_weights, run_of, step_option
from model.errors import UserError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints, the first of which was the best."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("checkpoint_000008", "checkpoint_000010"):
        (checkpoints / name / "consolidated").mkdir(parents=True)
        (checkpoints / name / "consolidated" / "lora.safetensors").touch()
    (checkpoints / "best").symlink_to("checkpoint_000008")
    (checkpoints / "last").symlink_to("checkpoint_000010")
    (tmp_path / "run" / "args.yaml").touch()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("inside", "step", "name"),
    [
        ("", None, "checkpoint_000010"),
        ("", 8, "checkpoint_000008"),
        ("", "best", "checkpoint_000008"),
        ("checkpoints/checkpoint_000008", None, "checkpoint_000008"),
        ("checkpoints/checkpoint_000008/consolidated", None, "checkpoint_000008"),
        ("checkpoints/best", None, "checkpoint_000008"),
        ("checkpoints/last/consolidated", None, "checkpoint_000010"),
    ],
)
def test_all_ways_lead_to_the_checkpoint(inside: str, step: int | str | None, name: str, run_dir: Path):
    expected = run_dir / "checkpoints" / name
    found = find_checkpoint(run_dir / inside, step)
    assert found.samefile(expected) and run_of(found) == run_dir
    assert find_weights(run_dir / inside, step).samefile(expected / "consolidated")


def test_where_one_stands_does_not_matter(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    weights = run_dir / "checkpoints" / "checkpoint_000008" / "consolidated"
    monkeypatch.chdir(weights)
    for path in (".", "..", "../consolidated"):
        assert find_weights(Path(path)).samefile(weights) and run_of(find_checkpoint(Path(path))) == run_dir


@pytest.mark.parametrize("file", ["params.json", "lora.safetensors"])
@pytest.mark.parametrize("name", ["mine", "consolidated"])
def test_a_model_or_an_adapter_alone_stands_for_itself(file: str, name: str, tmp_path: Path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / file).touch()
    assert find_weights(folder) == folder and run_of(find_checkpoint(folder)) is None


@pytest.mark.parametrize(
    ("inside", "step", "sentence"),
    [
        ("nowhere", None, "does not exist"),
        ("checkpoints", None, "neither a run folder .* nor a checkpoint"),
        ("", 9, "holds no checkpoint of step 9"),
        ("checkpoints/checkpoint_000008", 8, "--step chooses among the checkpoints of a run"),
    ],
)
def test_what_is_not_there_is_named(inside: str, step: int | None, sentence: str, run_dir: Path):
    with pytest.raises(UserError, match=sentence):
        find_checkpoint(run_dir / inside, step)


def test_a_run_without_a_best_checkpoint(run_dir: Path):
    os.unlink(run_dir / "checkpoints" / "best")
    with pytest.raises(UserError, match=r"holds no best checkpoint .*keep_best: true"):
        find_checkpoint(run_dir, "best")


def test_the_option_is_a_number_or_best():
    assert (step_option("12"), step_option("best")) == (12, "best")
    for text in ("newest", "-1", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="neither the number of a step nor `best`"):
            step_option(text)
