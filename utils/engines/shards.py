"""Answering a file on several GPUs or machines: each process answers a share of the rows into a file of its own."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError
from utils.engines.prompts import Prompt


class Shard(NamedTuple):
    """Every `total`-th row, from row `number` on; both are at least 1."""

    number: int
    total: int

    def of(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the share of the prompts: all shards together have each prompt once."""
        return list(prompts[self.number - 1 :: self.total])

    def path(self, answers: Path) -> Path:
        """Return the file for this shard of the answers: `P.2of4.jsonl` for `P.jsonl`."""
        return answers.with_stem(f"{answers.stem}.{self.number}of{self.total}")


def parse_shard(text: str | None) -> Shard | None:
    """Return the shard that `--shard I/N` names, or that of a process that torchrun started; None for all rows.

    Raises:
        UserError: the text is not I/N with 1 <= I <= N.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if text is None:
        return Shard(int(os.environ["RANK"]) + 1, world_size) if world_size > 1 else None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard is {text!r}; expected I/N, such as 1/4 for the first of four.")
    if world_size > 1:
        raise UserError("--shard is for single processes; torchrun gives each of its processes a shard.")
    return Shard(int(match[1]), int(match[2]))


def shard_files(answers: Path) -> list[Path]:
    """Return the files of shards next to a file of answers."""
    pattern = re.compile(rf"{re.escape(answers.stem)}\.\d+of\d+{re.escape(answers.suffix)}")
    return sorted(path for path in answers.parent.glob(f"*{answers.suffix}") if pattern.fullmatch(path.name))
