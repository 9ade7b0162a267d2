"""A run that waits at the end of a step for the test: `torchrun -m tests.support.held_run CONFIG.yaml`.

A test that kills a run at a certain step, or sends it a signal, would otherwise race against the run, which may have
finished by then.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from finetune.cli import run_cli
from finetune.preemption import StopRequest
from finetune.run import Run

HELD_STEP = 3  # after the first checkpoint of a run that saves every second step


def _released(config: Path) -> Path:
    return config.with_suffix(".released")


def release(config: Path) -> None:
    """Let the run of `config` continue."""
    _released(config).touch()


def hold(config: Path) -> Callable[[Run, StopRequest], None]:
    """Return a `train.finish_step` that waits at HELD_STEP for `release`, or for a signal to this rank."""
    original = train.finish_step

    def finish_step(run: Run, stop: StopRequest) -> None:
        while run.state.step == HELD_STEP and not (stop or _released(config).exists()):
            time.sleep(0.01)
        original(run, stop)

    return finish_step


def main(config: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish_step", hold(Path(config)))
        train.train(config)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1]))
