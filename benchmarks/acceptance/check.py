"""What a part of the acceptance run is given and what it finds."""

import dataclasses
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.presets import PRESETS
from model.args import ModelArgs, MoeArgs
from model.errors import first_line


@dataclasses.dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        name: what was checked, unique within its part.
        passed: None if nothing was expected: a measurement, or a check that does not apply here.
        numbers: what was measured.
        message: why it failed, or does not apply.
    """

    name: str
    passed: bool | None
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Attributes:
        device: of the models that are checked; their references are computed on the CPU.
        preset: tiny or full.
        folder: for files of this part only.
    """

    device: torch.device
    preset: str
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def shapes(self, moe: bool = False) -> ModelArgs:
        """Return the shapes of the small model, which a CPU computes as well."""
        wide = {"dim": 256, "head_dim": 64, "hidden_dim": 512} if self.preset == "full" else {}
        mixture = MoeArgs(num_experts=4, num_experts_per_tok=2) if moe else None
        return dataclasses.replace(PRESETS["tiny"].shapes, **wide, moe=mixture)


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Return a check, or one that has failed with the exception, so that the next ones are made."""
    try:
        return check()
    except Exception as error:
        traceback.print_exc()
        return failure(name, error)


def failure(name: str, error: Exception) -> Check:
    """Return the check that an exception has ended."""
    return Check(name, False, message=f"{type(error).__name__}: {first_line(error)}")


def within(name: str, limit: float, numbers: dict[str, Any], *, of: str) -> Check:
    """Return a check that `numbers[of]` is at most `limit` in magnitude. NaN fails."""
    passed = math.isfinite(numbers[of]) and abs(numbers[of]) <= limit
    return Check(name, passed, numbers | {"limit": limit}, "" if passed else f"{of} is {numbers[of]:.3g}")


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |found - exact| / |exact|, by Euclidean norms, in float64 on the CPU."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()
