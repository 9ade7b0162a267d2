"""Mistakes that end several processes, each with what must be printed: `python -m tests.end_to_end.reasons`.

The command starts torchrun for each mistake, number of processes and rank with a slow console, and counts how often the
reason is shown by the run itself, and whether torchrun's report repeats it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.kill_runs import kill_test_config
from tests.support.patience import PATIENCE_S
from tests.support.run_trajectories import INPUTS, ROOT

REPORT = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"  # torchrun's own, at its end


def _existing(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "args.yaml").touch()
    return kill_test_config(folder, name, resume="never")


def _value(folder: Path, name: str) -> Path:
    return kill_test_config(folder, name, seq_len="long")


def _model(folder: Path, name: str) -> Path:
    return kill_test_config(folder, name, model_id_or_path=str(folder / "nowhere"))


def _with_rows(folder: Path, name: str, bad: int, rows: int, **settings: object) -> Path:
    lines = (INPUTS / "train_icd.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [lines[index % len(lines)] for index in range(rows)]
    lines[bad - 1] = "{"
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"instruct_data": str(folder / f"{name}.jsonl")}
    return kill_test_config(folder, name, data=data, no_eval=True, **settings)


def _row(folder: Path, name: str) -> Path:
    return _with_rows(folder, name, bad=1, rows=8)


def _row_of_one_rank(folder: Path, name: str) -> Path:
    """A row that the second of 2, or of 4, processes reads after some steps."""
    return _with_rows(folder, name, bad=82, rows=84, max_steps=1000, no_ckpt=True)


# Name -> how to write the YAML, and a part of the reason.
MISTAKES: dict[str, tuple[Callable[[Path, str], Path], str]] = {
    "existing run folder": (_existing, "already exists. Set `resume: auto`"),
    "malformed value": (_value, "`seq_len`"),
    "missing model": (_model, "nowhere"),
    "malformed row": (_row, "The data in line 1 of dataset"),
    "malformed row of one rank": (_row_of_one_rank, "The data in line 82 of dataset"),
}


def shown(output: str, reason: str) -> dict[str, object]:
    """Return how often the run shows a reason, and whether torchrun's report repeats it."""
    own, _, report = output.partition(REPORT)
    errors = [line for line in own.splitlines() if line.startswith("error: ")]
    return {"shown": own.count(reason), "errors": len(errors), "repeated": reason in report}


def launch(config: Path, ranks: int, slow: int | None) -> tuple[int, str]:
    """Train under torchrun, where the console of rank `slow` is slow. Return exit code and output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if slow is not None:
        environment |= {"SLOW_RANK": str(slow), "PYTHONPATH": f"{ROOT / 'tests/support/slow_console'}:{ROOT}"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "train", str(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--slow", type=int, nargs="+", default=[0, 1], help="ranks whose console is slow, in turn")
    parser.add_argument("--mistakes", nargs="+", default=list(MISTAKES), choices=list(MISTAKES))
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    for ranks, slow, mistake, _ in itertools.product(
        options.ranks, options.slow, options.mistakes, range(options.repeat)
    ):
        with tempfile.TemporaryDirectory() as name:
            write, reason = MISTAKES[mistake]
            began = time.monotonic()
            code, output = launch(write(Path(name), "run"), ranks, slow)
            facts = {"ranks": ranks, "slow": slow, "mistake": mistake, "code": code, **shown(output, reason)}
            print(json.dumps(facts | {"seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
