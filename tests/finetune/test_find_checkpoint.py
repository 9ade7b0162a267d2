"""Paths that name a checkpoint: a run folder, a checkpoint, or the weights folder in it; and the option --step."""

import argparse
import os
from pathlib import Path

import pytest

from finetune.cli import add_step_option
from finetune.run_dir import find_checkpoint, find_weights, run_of
from model.errors import UserError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints; the first is the best."""
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
def test_every_path_finds_the_checkpoint(inside: str, step: int | str | None, name: str, run_dir: Path):
    expected = run_dir / "checkpoints" / name
    found = find_checkpoint(run_dir / inside, step)
    assert found.samefile(expected) and run_of(found) == run_dir
    assert find_weights(run_dir / inside, step).samefile(expected / "consolidated")


def test_paths_relative_to_the_weights_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    weights = run_dir / "checkpoints" / "checkpoint_000008" / "consolidated"
    monkeypatch.chdir(weights)
    for path in (".", "..", "../consolidated"):
        assert find_weights(Path(path)).samefile(weights) and run_of(find_checkpoint(Path(path))) == run_dir


@pytest.mark.parametrize("file", ["params.json", "lora.safetensors"])
@pytest.mark.parametrize("name", ["mine", "consolidated"])
def test_folder_of_a_model_or_adapter_is_returned_as_it_is(file: str, name: str, tmp_path: Path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / file).touch()
    assert find_weights(folder) == folder and run_of(find_checkpoint(folder)) is None


@pytest.mark.parametrize(
    ("inside", "step", "message"),
    [
        ("nowhere", None, "does not exist"),
        ("checkpoints", None, r"is not a run folder .*, a checkpoint or a model folder\.$"),
        ("..", None, r"is not a run folder .*\. Did you mean .*\?"),
        ("", 9, "has no checkpoint of step 9"),
        ("checkpoints/checkpoint_000008", 8, "--step selects a checkpoint of a run"),
    ],
)
def test_missing_checkpoint_is_named(inside: str, step: int | None, message: str, run_dir: Path):
    with pytest.raises(UserError, match=message):
        find_checkpoint(run_dir / inside, step)


def test_run_without_a_best_checkpoint(run_dir: Path):
    os.unlink(run_dir / "checkpoints" / "best")
    with pytest.raises(UserError, match=r"has no best checkpoint .*keep_best: true"):
        find_checkpoint(run_dir, "best")


def test_step_option_is_a_number_or_best(capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    add_step_option(parser)
    assert [parser.parse_args(args).step for args in ([], ["--step", "12"], ["--step=best"])] == [None, 12, "best"]
    for value in ("latest", "-1", "1.5", ""):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--step={value}"])
        assert "neither a step number nor `best`" in capsys.readouterr().err
