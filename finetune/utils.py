"""What a run needs besides model and data: seeds, its folder, its state."""

import dataclasses
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from model.args import PARAMS_NAME
from model.errors import UserError

from .args import TrainArgs
from .data.data_loader import Batch


def set_seed(seed: int) -> None:
    """Seeds every generator that dropout or library code may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


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


_CONTINUED = ("step", "tokens", "seconds", "trained_tokens", "skipped_steps", "first_loss", "last_loss")


@dataclasses.dataclass
class TrainState:
    """How far a run is, how fast it went and what came of it."""

    max_steps: int
    started: float = dataclasses.field(default_factory=time.perf_counter)
    step: int = 0
    tokens: int = 0  # of all ranks
    seconds: float = 0.0  # in training steps, data included; evaluations and checkpoints are not
    step_tokens: int = 0
    step_seconds: float = 0.0
    trained_tokens: int = 0  # of this rank: positions that carried loss
    skipped_steps: int = 0  # whose gradient was not finite
    first_loss: float | None = None
    last_loss: float | None = None
    eval_losses: dict[int, float] = dataclasses.field(default_factory=dict)
    checkpoint: Path | None = None

    @contextmanager
    def timed_step(self, tokens: int) -> Iterator[None]:
        """Counts a step of `tokens` tokens and the time it takes."""
        start = time.perf_counter()
        yield
        self.step_seconds = time.perf_counter() - start
        self.seconds += self.step_seconds
        self.step_tokens = tokens
        self.tokens += tokens
        self.step += 1

    def note(self, batches: list[Batch], skipped: bool) -> None:
        """Takes note of what a step trained on and whether it was skipped."""
        self.trained_tokens += sum(batch.trained_tokens for batch in batches)
        self.skipped_steps += skipped

    def note_loss(self, loss: float) -> None:
        """Takes note of a step's training loss, the mean over ranks."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """What a continued run takes over, as JSON can hold it."""
        state = {name: getattr(self, name) for name in _CONTINUED}
        return state | {"eval_losses": [list(item) for item in self.eval_losses.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        for name in _CONTINUED:
            setattr(self, name, state[name])
        self.eval_losses = dict(state["eval_losses"])

    def due(self, freq: int) -> bool:
        """Whether something done every `freq` steps, and always after the last one, is due; 0: only after the last."""
        return self.step == self.max_steps or (freq > 0 and self.step % freq == 0)

    def progress(self) -> dict[str, Any]:
        """What a training step's metrics are made of."""
        names = ("step", "max_steps", "step_tokens", "step_seconds", "tokens", "seconds")
        return {name: getattr(self, name) for name in names} | {"loss": self.last_loss}

    def totals(self) -> dict[str, Any]:
        """What the closing summary is made of."""
        names = ("max_steps", "skipped_steps", "tokens", "first_loss", "last_loss", "eval_losses", "checkpoint")
        wall_seconds = time.perf_counter() - self.started
        return {name: getattr(self, name) for name in names} | {
            "steps": self.step,
            "wall_seconds": wall_seconds,
            "train_seconds": self.seconds,
        }
