"""Kill training runs at random times and restart them: `python -m tests.end_to_end.kill_runs --kills 200`.

Each trial starts a run, kills all its processes with SIGKILL at a random time, verifies the checkpoints that exist
then, starts the same command again and compares the metrics with those of an uninterrupted run. Processes are forked
from one that has imported torch, so that the kills hit the run and not its imports.
"""

import argparse
import collections
import functools
import json
import os
import random
import signal
import socket
import tempfile
import time
from pathlib import Path

import torch

import train
from finetune.cli import run_cli
from finetune.manifest import find_corruption
from finetune.monitoring.metrics_logger import read_metrics
from finetune.run_dir import checkpoint_name, saved_checkpoints
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.forked import fork, import_before_forking
from tests.support.run_trajectories import INPUTS, write_config

STEPS = 8  # of a run, unless set otherwise; its last checkpoints are those of steps 6 and 8
EVAL_ROWS = 4
COMPARED = {"train": ("step", "loss", "lr", "grad_norm"), "eval": ("step", "eval_loss", "train_loss")}


def kill_test_config(folder: Path, name: str, **settings: object) -> Path:
    """Write the YAML of a run of a few seconds that saves and evaluates often, with dropout. Creates its model once."""
    model = folder / "model"
    if not model.exists():
        make_tiny_checkpoint(model, dtype=torch.float32, **SMALL)
    few = folder / "eval.jsonl"
    if not few.exists():
        rows = Path(INPUTS, "eval_instruct.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        few.write_text("".join(rows[:EVAL_ROWS]), encoding="utf-8")
    data = {"instruct_data": f"{INPUTS}/train_icd.jsonl", "eval_instruct_data": str(few)}
    defaults = {
        "data": data | {"shuffle": True, "packing": "best_fit"},
        "model_id_or_path": str(model),
        "resume": "auto",
        "lora": {"rank": 4, "dropout": 0.1},
        "seq_len": 512,
        "max_steps": STEPS,
        "optim": {"lr": 0.01},
        "ckpt_freq": 2,
        "eval_freq": 4,
        "no_eval": False,
        "num_ckpt_keep": 2,
    }
    return write_config(folder, name, defaults | settings)


class ForkedRun:
    """A training run in `ranks` forked processes."""

    def __init__(self, config: Path, ranks: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self._log = config.with_suffix(".log")
        self.pids = [self._fork(config, rank, ranks, port) for rank in range(ranks)]

    def _fork(self, config: Path, rank: int, ranks: int, port: str) -> int:
        def train_as_rank() -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._prepare(rank)
            run_cli(functools.partial(self._command, config))

        return fork(train_as_rank, self._log, self._log)

    def _prepare(self, rank: int) -> None:
        """Change a process before it trains."""

    def _command(self, config: Path) -> None:
        train.train(str(config))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes."""
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self) -> list[int]:
        """Return the processes' exit codes; a negative signal number if a signal ended the process."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")


def train_forked(config: Path, ranks: int) -> Path:
    """Train to the end in `ranks` forked processes. Return the run folder."""
    run = ForkedRun(config, ranks)
    assert run.wait() == [0] * ranks, run.log
    return config.with_suffix("")


@functools.cache
def uninterrupted(folder: Path, ranks: int, steps: int) -> tuple[Path, float]:
    """Return the run folder of an uninterrupted run, and its duration in seconds."""
    import_before_forking()
    start = time.monotonic()
    run_dir = train_forked(kill_test_config(folder, f"uninterrupted_{ranks}_{steps}", max_steps=steps), ranks)
    return run_dir, time.monotonic() - start


def curve(run_dir: Path) -> dict[str, list[list[float]]]:
    """Return the metrics that must not depend on whether a run was interrupted."""
    return {
        tag: [[record[key] for key in keys] for record in read_metrics(run_dir, tag)] for tag, keys in COMPARED.items()
    }


def stage_of(log: str, run_dir: Path) -> str:
    """Return what a killed run was doing, judging by its log and files."""
    if list((run_dir / "checkpoints").glob("tmp.*")):
        return "saving"
    if "Run dir:" not in log:
        return "reading and indexing"
    return "training" if "step:" in log else "loading"


def trial(folder: Path, name: str, ranks: int, steps: int, delay: float, expected: dict[str, list]) -> str:
    """Kill a run after `delay` seconds and restart it. Return what it was doing when it was killed.

    Raises:
        AssertionError: a checkpoint was corrupt, the restarted run failed, or its metrics differ.
    """
    config = kill_test_config(folder, name, max_steps=steps)
    run_dir = config.with_suffix("")
    first = ForkedRun(config, ranks)
    time.sleep(delay)
    first.kill()
    first.wait()
    stage = stage_of(first.log, run_dir)
    for checkpoint in saved_checkpoints(run_dir / "checkpoints"):
        assert find_corruption(checkpoint) is None, f"{checkpoint}: {find_corruption(checkpoint)}"
    second = ForkedRun(config, ranks)
    assert second.wait() == [0] * ranks, second.log
    assert curve(run_dir) == expected, second.log
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {checkpoint_name(steps - 2), checkpoint_name(steps), "last"}, left
    return stage


def run_trials(folder: Path, ranks: int, kills: int, seed: int, steps: int = STEPS) -> dict[str, int]:
    """Run `kills` trials of runs of `steps` steps. Return the number of kills per stage of the run."""
    run_dir, seconds = uninterrupted(folder, ranks, steps)
    expected = curve(run_dir)
    assert [row[0] for row in expected["train"]] == list(range(1, steps + 1))
    generator = random.Random(seed)
    return collections.Counter(
        trial(folder, f"trial_{ranks}_{index}", ranks, steps, generator.uniform(0, seconds), expected)
        for index in range(kills)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill training runs at random times and restart them.")
    parser.add_argument("--kills", type=int, default=200, help="half with one process, half with two (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            stages = run_trials(Path(folder), ranks, options.kills // 2, options.seed, steps=16)
        print(json.dumps({"ranks": ranks, "kills": sum(stages.values()), "while": stages, "all_curves_equal": True}))


if __name__ == "__main__":
    main()
