"""The run folder: creating it, and finding checkpoints and weights in it."""

import argparse
import dataclasses
import os
import re
from pathlib import Path

import yaml

from model.args import PARAMS_NAME
from model.errors import UserError

from .args import TrainArgs

ARGS_ASIDE = "tmp.args.yaml"  # all that a run folder holds whose process died while making it
BEST_NAME = "best"  # a link to the checkpoint that did best, with `keep_best`
WEIGHTS_NAME = "consolidated"  # folder in a checkpoint: an adapter or a model, as inference tools load it
_CHECKPOINT = re.compile(r"checkpoint_(\d{6,})")


def saved_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("checkpoint_*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def checkpoint_name(step: int) -> str:
    return f"checkpoint_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step behind which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint_"))


def find_checkpoint(path: Path, step: int | str | None = None) -> Path:
    """The folder of the checkpoint that a user names.

    Args:
        path: folder of a run, of a checkpoint, or the `consolidated` in it; that of a model or an adapter alone stands
            for itself.
        step: which checkpoint of a run: its number, or "best"; None: the newest.

    Raises:
        UserError: no such folder or checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist (or is no folder): name a run folder or a checkpoint's.")
    if (path / "args.yaml").is_file():
        return _checkpoint_of(path, step)
    if step is not None:
        raise UserError(f"--step chooses among the checkpoints of a run, but {path} is no run folder (no args.yaml).")
    if not ((path / WEIGHTS_NAME).is_dir() or (path / PARAMS_NAME).is_file() or any(path.glob("*.safetensors"))):
        raise UserError(f"{path} is neither a run folder (with args.yaml) nor a checkpoint nor a model's.")
    absolute = Path(os.path.abspath(path))
    return absolute.parent if absolute.name == WEIGHTS_NAME else path


def _checkpoint_of(run_dir: Path, step: int | str | None) -> Path:
    folder = run_dir / "checkpoints"
    if step == BEST_NAME:
        if not (folder / BEST_NAME).is_dir():
            raise UserError(f"{run_dir} holds no best checkpoint (the run needs `keep_best: true`); name a step.")
        return folder / (folder / BEST_NAME).resolve().name
    saved = [path for path in saved_checkpoints(folder) if step in (None, step_of(path))]
    if not saved:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{run_dir} holds no {which}; train it first, or name another folder.")
    return saved[-1]


def find_weights(path: Path, step: int | str | None = None) -> Path:
    """The folder with the adapter or the model that a user names; arguments and errors as `find_checkpoint`."""
    checkpoint = find_checkpoint(path, step)
    weights = checkpoint / WEIGHTS_NAME
    return weights if weights.is_dir() else checkpoint


def step_option(text: str) -> int | str:
    """Reads `--step`: a number, or best.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text != BEST_NAME and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a step nor `{BEST_NAME}`")
    return text if text == BEST_NAME else int(text)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint's folder lies in; None where it lies in none."""
    folder = Path(os.path.abspath(checkpoint)).parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "args.yaml").is_file() else None


def create_run_dir(run_dir: Path, args: TrainArgs) -> None:
    """Creates the run folder and writes the resolved settings to `args.yaml`; keys of trackers are left out.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        aside = run_dir / ARGS_ASIDE
        resolved = dataclasses.replace(args, epochs=None)  # max_steps says it now, and only one of them may
        aside.write_text(yaml.safe_dump(resolved.to_dict()), encoding="utf-8")
        os.replace(aside, run_dir / "args.yaml")
    except OSError as error:
        raise UserError(f"The run folder {run_dir} cannot be written: {error.strerror}.") from error
