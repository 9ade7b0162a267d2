"""Start several runs that must be refused, in one process group, and print how each one ended on each rank."""

import json
import sys
from pathlib import Path

import torch

import train
from finetune.args import load_train_args
from finetune.distributed import World, init_world
from model.errors import UserError


def ending(config: Path, world: World) -> str | int | None:
    """Return the message of the UserError or the exit code that ended a run; None if it trained."""
    try:
        with world.synchronized_errors():
            args = load_train_args(config)
        train.run_training(args, world)
    except UserError as error:
        return str(error)
    except SystemExit as exit:
        return exit.code
    return None


def main(configs: list[str]) -> None:
    torch.set_num_threads(1)
    with init_world() as world:
        for config in configs:
            # In one write: the ranks share a file.
            sys.stdout.write(json.dumps([config, world.rank, ending(Path(config), world)]) + "\n")
            sys.stdout.flush()
