"""Training steps, evaluations and answers of this project on a pretended GPU. Import benchmarks.traced.device first."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.traced.device import H100, GpuModel, Trace, pretended_gpu
from benchmarks.training.weights import RandomWeights
from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.data.data_loader import Batch
from finetune.distributed import World
from finetune.eval import evaluate
from finetune.hardware import Hardware, choose_hardware
from finetune.memory_estimate import MemoryConfig
from finetune.mixed_precision import LossScaler
from finetune.optim import build_optimizer, initialize_state
from finetune.wrapped_model import BaseModel, build_model, shard_count, trainable_parameters
from model.args import ModelArgs
from model.generate import collect_tokens, stream
from model.transformer import Transformer
from train import train_step

T = TypeVar("T")
DEVICE = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, on which GPU.

    Attributes:
        settings: of the training YAML; blocks as their dataclasses.
        documents: per micro-batch, of equal length.
        trained_share: share of the positions that are trained.
        ranks: processes that share the model; rank 0 is traced.
        steps_before: whether there were any before the traced one. The first creates the optimizer's state, which
            belongs to the peak.
    """

    shapes: ModelArgs
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    gpu: GpuModel = H100
    documents: int = 2
    trained_share: float = 1.0
    ranks: int = 1
    steps_before: bool = False

    def args(self) -> TrainArgs:
        return TrainArgs(data=DataArgs(), model_id_or_path="", run_dir="", **self.settings)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a step, an evaluation or an answer asked of the GPU (see `Trace`)."""

    kernels: Counter[str]
    moved: Counter[str]
    waits: Counter[str]
    copies: Counter[str]
    peak: int

    @classmethod
    def of(cls, trace: Trace) -> "Counts":
        return cls(trace.kernels, trace.moved, trace.waits, trace.copies, trace.peak)


@dataclasses.dataclass(frozen=True)
class Traced:
    hardware: Hardware
    trained: int  # parameters, each a tensor
    planned: float  # bytes of a step by finetune.memory_estimate
    step: Counts
    evaluation: Counts


class EmptyWeights(RandomWeights):
    """Weights without values."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return torch.empty(self.shapes[name], dtype=self.dtypes[name], device=DEVICE)[rows or slice(None)]

    read_finite = read


def trace(case: Case) -> Traced:
    """Build the model, take a step and evaluate one batch."""
    with on_pretended_gpu(case) as (args, world, counts):
        hardware, model = build(case, args, world)
        optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
        scaler = LossScaler(hardware.dtype)
        if case.steps_before:
            initialize_state(optimizer)
        batches = [empty_batch(case, args) for _ in range(args.num_microbatches)]
        counts.restart()
        train_step(model, batches, optimizer, schedule, scaler, args.max_norm, DEVICE)
        step = Counts.of(counts)
        counts.restart()
        evaluate(model, batches[:1], dataclasses.replace(world, size=1))
        trained = len(list(trainable_parameters(model)))
        return Traced(hardware, trained, _planned(case, args, hardware, world), step, Counts.of(counts))


@contextlib.contextmanager
def on_pretended_gpu(case: Case) -> Iterator[tuple[TrainArgs, World, Trace]]:
    """Pretend the case's GPUs; yield its settings, the process of rank 0, and the counts."""
    args = case.args()
    with _pretended_ranks(case.ranks if case.ranks > 1 or args.cpu_offload else 0), pretended_gpu(case.gpu) as counts:
        counts.slots_per_expert = _slots_per_expert(case.shapes, args)
        yield args, _PretendedWorld(0, case.ranks, DEVICE, local_size=min(case.ranks, 8)), counts


def build(case: Case, args: TrainArgs, world: World, trains: bool = True) -> tuple[Hardware, Transformer]:
    hardware = choose_hardware(DEVICE, args.param_dtype, args.attention, case.shapes)
    base = BaseModel(Path(), case.shapes, EmptyWeights(case.shapes, DEVICE, hardware.dtype), adapter=None)
    return hardware, build_model(base, args, hardware, world, trains)


class _PretendedWorld(World):
    """A world in which every rank has the values of rank 0."""

    def mesh(self, shards: int) -> DeviceMesh:
        with unset_fake_temporarily():  # a mesh computes with the values of its ranks
            return super().mesh(shards)

    def gather(self, value: T) -> list[T]:
        return [value] * self.size

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.size


@contextlib.contextmanager
def _pretended_ranks(count: int) -> Iterator[None]:
    """Let collectives return at once, as if the other ranks had taken part; 0: without a process group."""
    if count:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def trace_answers(case: Case, prompts: Sequence[int] = (9, 17), tokens: int = 3) -> Counts:
    """Continue prompts of these lengths by some tokens."""
    with pretended_gpu(case.gpu) as counts:
        _, model = build(case, case.args(), World(0, 1, DEVICE), trains=False)
        counts.restart()
        collect_tokens(stream(model, [list(range(length)) for length in prompts], tokens, eos_id=-1))
        return Counts.of(counts)


def empty_batch(case: Case, args: TrainArgs) -> Batch:
    positions = args.seq_len * args.batch_size
    sizes = [positions // case.documents] * case.documents
    sizes[-1] += positions - sum(sizes)
    mask = np.zeros(positions, dtype=bool)
    mask[:: round(1 / case.trained_share)] = True
    tokens = np.zeros(positions, dtype=np.int64)
    return Batch(x=tokens, y=tokens.copy(), sizes=sizes, y_mask=None if mask.all() else mask)


def _slots_per_expert(shapes: ModelArgs, args: TrainArgs) -> int:
    if shapes.moe is None:
        return 1
    return max(1, args.seq_len * args.batch_size * shapes.moe.num_experts_per_tok // shapes.moe.num_experts)


def _planned(case: Case, args: TrainArgs, hardware: Hardware, world: World) -> float:
    shards = shard_count(args, world)
    share = case.trained_share
    config = MemoryConfig.of(args, case.shapes, hardware.dtype, "cuda", hardware.attention, shards, share)
    memory = config.memory()
    return memory.total - memory.overhead  # the CUDA context and the kernels' code are not tensors
