"""What an implementation gives to the benchmark: a step to time, or a training that it has timed itself."""

import dataclasses
import itertools
import time
from collections.abc import Callable

import torch

from benchmarks.measure import seconds_since_start
from finetune.args import TrainArgs
from finetune.data.data_loader import Batch
from model.args import ModelArgs

from .inputs import packed_batches
from .work import Work, synchronize


@dataclasses.dataclass(frozen=True)
class Trainee:
    step: Callable[[list[Batch]], torch.Tensor]  # runs one optimizer step on micro-batches and returns their mean loss
    attention: str  # the engine in use
    dtype: torch.dtype  # of matrix products


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training whose steps after the warm-up were timed."""

    work: Work  # of the timed steps
    tokens: int  # of the timed steps, without padding
    seconds: float  # of the timed steps
    first_step_seconds: float  # from the start of the process to the end of its first step
    losses: list[float]  # of every step, the warm-up included
    attention: str
    dtype: torch.dtype
    memory: dict[str, int] | None = None  # of the process that trained, unless it is this one
    version: str = ""  # of a peer that is not a package


Build = Callable[[TrainArgs, ModelArgs, torch.device], Trainee]
Train = Callable[[TrainArgs, ModelArgs, torch.device, int], Trial]


def timed(build: Build) -> Train:
    """Return how to train with a step: build it, warm up, and time the steps that remain."""

    def train(args: TrainArgs, shapes: ModelArgs, device: torch.device, warmup: int) -> Trial:
        trainee = build(args, shapes, device)
        batches = packed_batches(args)
        work, losses = Work(), []
        for step in range(args.max_steps):
            if step == warmup:
                synchronize(device)
                start, filled = time.perf_counter(), batches.counts.filled
            micro_batches = list(itertools.islice(batches, args.num_microbatches))
            losses.append(trainee.step(micro_batches))
            if step == 0:
                synchronize(device)
                first = seconds_since_start()
            if step >= warmup:
                work.add(*micro_batches)
        synchronize(device)
        seconds = time.perf_counter() - start
        tokens = batches.counts.filled - filled
        batches.close()
        values = [loss.item() for loss in losses]
        return Trial(work, tokens, seconds, first, values, trainee.attention, trainee.dtype)

    return train
