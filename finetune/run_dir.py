"""The run folder: creating it, and finding checkpoints and weights in it."""

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from model.args import PARAMS_NAME
from model.atomic import replace_file
from model.errors import UserError

if TYPE_CHECKING:
    from .args import TrainArgs

ARGS_NAME = "args.yaml"  # the resolved settings; marks a folder as a run folder
TEMPORARY_ARGS_NAME = f"tmp.{ARGS_NAME}"  # the only file in a run folder whose creation was killed
LOCK_NAME = "train.lock"  # present while a run trains, see finetune.run_lock, or after its process was killed
BEST_NAME = "best"  # a symlink to the best checkpoint, with `keep_best`
WEIGHTS_NAME = "consolidated"  # folder in a checkpoint: an adapter or a model, as inference tools load it
_CHECKPOINT = re.compile(r"checkpoint_(\d{6,})")


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a run's `checkpoints` folder, in order of steps."""
    found = [path for path in folder.glob("checkpoint_*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def how_to_continue(run_dir: Path) -> str:
    """Return from what a run that was lost is resumed, a sentence."""
    if checkpoints := saved_checkpoints(run_dir / "checkpoints"):
        return f"The latest checkpoint is {checkpoints[-1]}. Rerun the same command with `resume: auto` to continue."
    return "There is no checkpoint. Rerun the same command with `resume: auto` to start from the beginning."


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint saved after `step`."""
    return f"checkpoint_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint_"))


def find_checkpoint(path: Path, step: int | str | None = None) -> Path:
    """Return the folder of the checkpoint that a user names.

    Args:
        path: a run folder, a checkpoint, or its `consolidated` folder; a folder that contains only a model or an
            adapter is returned as it is.
        step: which checkpoint of a run: a step number or "best"; None: the latest.

    Raises:
        UserError: the folder or checkpoint does not exist.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist or is not a folder; expected a run folder or a checkpoint.")
    if (path / ARGS_NAME).is_file():
        return _checkpoint_of(path, step)
    if step is not None:
        raise UserError(
            f"--step selects a checkpoint of a run, but {path} is not a run folder (it has no {ARGS_NAME})."
        )
    if not ((path / WEIGHTS_NAME).is_dir() or (path / PARAMS_NAME).is_file() or any(path.glob("*.safetensors"))):
        inside = [file.parent for file in sorted(path.glob(f"*/{ARGS_NAME}"))]
        hint = f" Did you mean {inside[0]}?" if inside else ""
        raise UserError(f"{path} is not a run folder (with {ARGS_NAME}), a checkpoint or a model folder.{hint}")
    absolute = Path(os.path.abspath(path))
    return absolute.parent if absolute.name == WEIGHTS_NAME else path


def _checkpoint_of(run_dir: Path, step: int | str | None) -> Path:
    folder = run_dir / "checkpoints"
    if step == BEST_NAME:
        if not (folder / BEST_NAME).is_dir():
            raise UserError(
                f"{run_dir} has no best checkpoint (the run needs `keep_best: true`); choose a step number."
            )
        return folder / (folder / BEST_NAME).resolve().name
    saved = [path for path in saved_checkpoints(folder) if step in (None, step_of(path))]
    if not saved:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{run_dir} has no {which}; train it first, or choose another folder.")
    return saved[-1]


def find_weights(path: Path, step: int | str | None = None) -> Path:
    """Return the folder of the adapter or model that a user names; arguments and errors as in `find_checkpoint`."""
    checkpoint = find_checkpoint(path, step)
    weights = checkpoint / WEIGHTS_NAME
    return weights if weights.is_dir() else checkpoint


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that contains a checkpoint folder; None if it is not in one."""
    folder = Path(os.path.abspath(checkpoint)).parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / ARGS_NAME).is_file() else None


def create_run_dir(run_dir: Path, args: "TrainArgs") -> None:
    """Create the run folder and write the resolved settings to `args.yaml`, without API keys.

    Raises:
        UserError: the folder cannot be written.
    """
    resolved = dataclasses.replace(args, epochs=None)  # replaced by max_steps; only one of the two may be set
    temporary = run_dir / TEMPORARY_ARGS_NAME
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary.write_text(yaml.safe_dump(resolved.to_dict()), encoding="utf-8")
        replace_file(temporary, run_dir / ARGS_NAME)
    except OSError as error:
        raise UserError(f"The run folder {run_dir} cannot be written: {error.strerror}.") from error
