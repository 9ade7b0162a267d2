"""Trainings killed at random instants and started again: `python -m tests.end_to_end.kill_runs --kills 200`.

Each trial starts a run, kills all its processes with SIGKILL at a random instant, looks at the checkpoints that are
visible then, starts the same command again and compares the metrics with those of a run that nobody disturbed.
Processes are forked from one that has imported torch, so that the instants fall into the run and not into its imports.
"""

import argparse
import collections
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  imported before forking, as everything a run needs
import torch
import torch.utils.tensorboard

import train
from finetune.cli import run_cli
from finetune.manifest import find_corruption
from finetune.monitoring.metrics_logger import read_metrics
from finetune.run_dir import saved_checkpoints
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.run_trajectories import INPUTS, write_config

COMPARED = {"train": ("step", "loss", "lr", "grad_norm"), "eval": ("step", "eval_loss", "train_loss")}


def kill_test_config(folder: Path, name: str, **settings: object) -> Path:
    """A run of some seconds that saves and evaluates often, with dropout, over a model made on first use."""
    model = folder / "model"
    if not model.exists():
        make_tiny_checkpoint(model, dtype=torch.float32, **SMALL)
    data = {"instruct_data": f"{INPUTS}/train_icd.jsonl", "eval_instruct_data": f"{INPUTS}/eval_instruct.jsonl"}
    defaults = {
        "data": data | {"shuffle": True, "packing": "best_fit"},
        "model_id_or_path": str(model),
        "resume": "auto",
        "lora": {"rank": 4, "dropout": 0.1},
        "seq_len": 512,
        "max_steps": 16,
        "optim": {"lr": 0.01},
        "ckpt_freq": 2,
        "eval_freq": 4,
        "no_eval": False,
        "num_ckpt_keep": 2,
    }
    return write_config(folder, name, defaults | settings)


class ForkedRun:
    """`ranks` processes that train as a configuration says."""

    def __init__(self, config: Path, ranks: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self._log = config.with_suffix(".log")
        self.pids = [self._fork(config, rank, ranks, port) for rank in range(ranks)]

    def _fork(self, config: Path, rank: int, ranks: int, port: str) -> int:
        if pid := os.fork():
            return pid
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put its own there
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            torch.set_num_threads(1)
            run_cli(lambda: train.train(str(config)))
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signals all its processes."""
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self) -> list[int]:
        """The processes' exit codes; minus the signal where one ended it."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")


def curve(run_dir: Path) -> dict[str, list[list[float]]]:
    """What must not depend on whether a run was interrupted."""
    return {
        tag: [[record[key] for key in keys] for record in read_metrics(run_dir, tag)] for tag, keys in COMPARED.items()
    }


def stage(log: str, run_dir: Path) -> str:
    """What a killed run was doing, as far as can be seen from outside."""
    if list((run_dir / "checkpoints").glob("tmp.*")):
        return "saving"
    if "Run dir:" not in log:
        return "reading and indexing"
    return "training" if "step:" in log else "loading"


def trial(folder: Path, name: str, ranks: int, instant: float, expected: dict[str, list]) -> str:
    """Kills a run after `instant` seconds and starts it again. Returns what it was doing.

    Raises:
        AssertionError: a damaged checkpoint was visible, the second start failed, or the curve differs.
    """
    config = kill_test_config(folder, name)
    run_dir = config.with_suffix("")
    first = ForkedRun(config, ranks)
    time.sleep(instant)
    first.kill()
    first.wait()
    doing = stage(first.log, run_dir)
    for checkpoint in saved_checkpoints(run_dir / "checkpoints"):
        assert find_corruption(checkpoint) is None, f"{checkpoint}: {find_corruption(checkpoint)}"
    second = ForkedRun(config, ranks)
    assert second.wait() == [0] * ranks, second.log
    assert curve(run_dir) == expected, second.log
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {"checkpoint_000014", "checkpoint_000016", "last"}, left
    return doing


def run_trials(folder: Path, ranks: int, kills: int, seed: int) -> dict[str, int]:
    """Runs `kills` trials. Returns how many fell into what."""
    undisturbed = kill_test_config(folder, f"undisturbed_{ranks}")
    start = time.monotonic()
    run = ForkedRun(undisturbed, ranks)
    assert run.wait() == [0] * ranks, run.log
    seconds = time.monotonic() - start
    expected = curve(undisturbed.with_suffix(""))
    assert [row[0] for row in expected["train"]] == list(range(1, 17))
    instants = random.Random(seed)
    return collections.Counter(
        trial(folder, f"trial_{ranks}_{index}", ranks, instants.uniform(0, seconds), expected) for index in range(kills)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills trainings at random instants and starts them again.")
    parser.add_argument("--kills", type=int, default=200, help="half of them with one process, half with two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            doing = run_trials(Path(folder), ranks, options.kills // 2, options.seed)
        print(json.dumps({"ranks": ranks, "kills": sum(doing.values()), "while": doing, "all_curves_equal": True}))


if __name__ == "__main__":
    main()
