"""The reference runs as YAML files, and several runs in one process group.

torchrun --nproc-per-node 2 -m tests.support.run_trajectories CONFIG.yaml CONFIG.yaml ...
"""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import train
from finetune.args import load_train_args
from finetune.cli import run_cli
from finetune.distributed import init_world
from finetune.monitoring.utils import set_up_logging
from tests.support import forking_torchrun
from tests.support.forked import finished
from tests.support.golden import fixture, load_json_gz

ROOT = Path(__file__).parents[2]
INPUTS = fixture("inputs")
RUNS = load_json_gz(fixture("expected/train/trajectories.json.gz"))
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def golden_config(name: str, models: dict[str, Path], folder: Path, **more: Any) -> Path:
    """Write the YAML of a reference run with the run folder `folder/NAME`; `models` maps model names to folders.

    `more` adds settings that mistral-finetune does not have.
    """
    settings = copy.deepcopy(RUNS[name]["settings"])
    for key in ("data", "instruct_data", "eval_instruct_data"):
        if sources := settings["data"][key]:
            settings["data"][key] = ",".join(f"{INPUTS}/{source}" for source in sources.split(","))
    settings["model_id_or_path"] = str(models[Path(settings["model_id_or_path"]).name])
    return write_config(folder, name, settings | {"param_dtype": DTYPES[RUNS[name]["param_dtype"]]} | more)


def write_config(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Write `folder/NAME.yaml`; unless set otherwise, its run folder is `folder/NAME`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / name)} | settings), encoding="utf-8")
    return path


def short_run(folder: Path, model: Path, rows: Sequence[str]) -> dict[str, Any]:
    """Copy `model` and write `train.jsonl` with `rows` to `folder`; return settings that train two steps."""
    shutil.copytree(model, folder / "model")
    (folder / "train.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return {
        "data": {"instruct_data": "train.jsonl", "eval_instruct_data": "train.jsonl"},
        "model_id_or_path": "model",
        "run_dir": "run",
        "lora": {"rank": 2},
        "seq_len": 64,
        "max_steps": 2,
        "optim": {"pct_start": 0.25},
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node 2 -m MODULE ARGUMENT ...` in the root folder of the project."""
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", *map(str, command)]
    return finished(lambda: forking_torchrun.main(arguments))


def main(configs: list[str]) -> None:
    """Train each configuration in turn; starting the processes takes seconds, so they share them."""
    torch.set_num_threads(1)
    with init_world() as world:
        set_up_logging(world.rank)
        for config in configs:
            train.run_training(load_train_args(Path(config)), world)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
