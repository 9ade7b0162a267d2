"""The parts of a run, in the order of what must be known first."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from benchmarks.acceptance.check import Check, Setting
from benchmarks.acceptance.environment import environment
from benchmarks.acceptance.generation import generation
from benchmarks.acceptance.kernels import kernels
from benchmarks.acceptance.measured import measured, profile
from benchmarks.acceptance.training import full_memory, gradients, precisions, resuming, sharding


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[Setting], Iterator[Check]]  # defined in a module, since another process runs it
    limit_s: float  # on a GPU


CORRECTNESS = [
    Part("environment", environment, 60),
    Part("kernels", kernels, 60),
    Part("gradients", gradients, 120),
    Part("resuming", resuming, 60),
    Part("precisions", precisions, 60),
    Part("sharding", sharding, 60),
    Part("full memory", full_memory, 60),
    Part("generation", generation, 60),
]
# Four of A's sixteen micro-batches: enough to time, and a step takes seconds instead of a quarter of a minute.
_A = functools.partial(measured, preset="A")
_FOUR = "num_microbatches=4"
_PLAIN = {"checkpoint": "true", "set": [_FOUR, "compile=false"]}  # as the peer
SPEED = {
    "full": [
        Part("speed A", functools.partial(_A, impl="ours", set=[_FOUR]), 120),
        Part("speed A, transformers + PEFT", functools.partial(_A, impl="peft", checkpoint="true", set=[_FOUR]), 75),
        Part("speed A, recomputed, not compiled", functools.partial(_A, impl="ours", **_PLAIN), 60),
        Part("speed B", functools.partial(measured, impl="ours", preset="B"), 100),
        Part(
            "speed B, transformers + PEFT", functools.partial(measured, impl="peft", preset="B", checkpoint="true"), 75
        ),
        Part("profile A", functools.partial(profile, preset="A"), 60),
        Part("speed A, fp8", functools.partial(_A, impl="ours", set=[_FOUR, "base_dtype=fp8"]), 75),
        Part("speed A, nf4", functools.partial(_A, impl="ours", set=[_FOUR, "base_dtype=nf4"]), 75),
        Part(
            "memory B, recomputed", functools.partial(measured, impl="ours", preset="B", checkpoint="true", steps=1), 45
        ),
        Part(
            "memory 8x7B, nf4",
            functools.partial(
                measured, impl="ours", preset="E", seq_len=4096, steps=1, set=["base_dtype=nf4", "num_microbatches=1"]
            ),
            90,
        ),
    ],
    "tiny": [
        Part(
            "speed",
            functools.partial(measured, impl="ours", preset="tiny", seq_len=512, steps=1, checkpoint="true"),
            60,
        ),
        Part(
            "speed, transformers + PEFT",
            functools.partial(measured, impl="peft", preset="tiny", seq_len=512, steps=1, checkpoint="true"),
            60,
        ),
        Part("profile", functools.partial(profile, preset="tiny", seq_len=256), 60),
    ],
}


def all_parts(preset: str) -> list[Part]:
    """Return the parts of a run with a preset, in order; those of `tiny` with more time, since a CPU may be slow."""
    parts = [*CORRECTNESS, *SPEED[preset]]
    return parts if preset == "full" else [dataclasses.replace(part, limit_s=4 * part.limit_s) for part in parts]
