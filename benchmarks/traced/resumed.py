"""A run that is saved and resumed on a pretended GPU. Import benchmarks.traced.device first.

The project's code and PyTorch's write real files and read them. Only values are missing: tensors without values are
replaced where bytes are made of them, and where bytes become tensors.
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.checkpoint import planner_helpers, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.tensor import DTensor

from benchmarks.traced.device import Trace
from benchmarks.traced.steps import DEVICE, Case, Counts, build, empty_batch, on_pretended_gpu
from finetune import resume
from finetune.anomalies import AnomalyDetector
from finetune.args import TrainArgs
from finetune.checkpointing import Checkpointer
from finetune.distributed import World, is_sharded
from finetune.eval import EarlyStopping
from finetune.mixed_precision import LossScaler, choose_dtype
from finetune.optim import build_optimizer
from finetune.resume import STATE_NAME, RunState, find_saved_state
from finetune.run_dir import create_run_dir
from finetune.schedules import Plan
from finetune.utils import TrainState
from finetune.wrapped_model import shard_count, shard_rows, trainable_parameters
from model import weights
from train import train_step

T = TypeVar("T")
_RANDOM_STATE = bytes(range(16))  # of CUDA
_SCALE = 2.0**10  # of the saved run's loss; a new run begins with another


@dataclasses.dataclass(frozen=True)
class Placed:
    """A tensor of the training state, or this rank's part of it."""

    shape: tuple[int, ...]
    dtype: str
    device: str


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What was saved and restored.

    Attributes:
        before, after: the state of the saved run, and that of the resumed one, by name.
        copies: how often each tensor of the state was copied to the host's memory while it was saved.
        exported: number of tensors of the weights for inference tools, which a checkpoint contains as well.
        restored: number of tensors that were read from the checkpoint.
        scales: the factor of the loss of the saved run, and that of the resumed one.
        random_restored: whether the resumed run has the state of CUDA's random numbers that was saved.
        save, resume, step: what these asked of the GPU; the step is the first one after resuming.
    """

    before: dict[str, Placed]
    after: dict[str, Placed]
    copies: dict[str, int]
    exported: int
    restored: int
    scales: tuple[float, float]
    random_restored: bool
    save: Counts
    resume: Counts
    step: Counts


def trace_resume(case: Case) -> Resumed:
    """Take a step, save, resume in a new run, and take another step."""
    with tempfile.TemporaryDirectory() as folder, on_pretended_gpu(case) as (args, world, counts):
        args = dataclasses.replace(args, run_dir=folder, resume="auto", save_adapters=args.lora.enable)
        with _files(counts) as files:
            saved = _start(case, args, world)
            _take_step(saved, case, args)
            saved.scaler.scale = _SCALE if saved.scaler.enabled else 1.0
            before = _local_tensors(saved)
            counts.restart()
            checkpoint = _save(saved, args, world)
            writing, copied = Counts.of(counts), counts.copied_to_host
            copies = {name: copied[tensor.untyped_storage()._cdata] for name, tensor in before.items()}
            _write_other_shards(checkpoint / STATE_NAME, saved, shard_count(args, world))

            counts.restart()
            resumed = _start(case, args, world)
            state = find_saved_state(args, Path(folder), world)
            assert state is not None
            files.random_state = None
            counts.restart()
            resumed.restore(state, args, world)
            reading = Counts.of(counts)
        scales, after = (saved.scaler.scale, resumed.scaler.scale), _local_tensors(resumed)
        counts.restart()
        _take_step(resumed, case, args)
        return Resumed(
            _placed(before),
            _placed(after),
            copies,
            files.exported,
            files.restored,
            scales,
            files.random_state == _RANDOM_STATE,
            writing,
            reading,
            Counts.of(counts),
        )


def _start(case: Case, args: TrainArgs, world: World) -> RunState:
    """Return a run before its first step."""
    hardware, model = build(case, args, world)
    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
    data: Any = SimpleNamespace(state_dict=_position)
    fingerprints: Any = None
    return RunState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        plan=Plan(0, args.max_steps),
        scaler=LossScaler(hardware.dtype),
        state=TrainState(args.max_steps),
        early_stopping=EarlyStopping(args.early_stopping),
        anomalies=AnomalyDetector(args.guards, Path(args.run_dir), world.rank),
        data_loader=data,
        fingerprints=fingerprints,  # none, as in checkpoints of earlier versions
    )


def _take_step(run: RunState, case: Case, args: TrainArgs) -> None:
    batches = [empty_batch(case, args)]
    with run.state.timed_step(args.seq_len):
        train_step(run.model, batches, run.optimizer, run.schedule, run.scaler, args.max_norm, DEVICE)


def _position() -> dict[str, Any]:
    """Return the position in data that has no sources."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {"sources": [], "layouts": [], "random": [name, np.asarray(keys).tolist(), *rest]}


def _save(run: RunState, args: TrainArgs, world: World) -> Path:
    create_run_dir(Path(args.run_dir), args)
    vocabulary = SimpleNamespace(file_path=__file__, version=SimpleNamespace(value="v3"))  # copied, and never read
    tokenizer: Any = SimpleNamespace(tokenizer=vocabulary)
    checkpointer = Checkpointer(
        run.model, tokenizer, args, Path(args.run_dir), choose_dtype(args.param_dtype, DEVICE, run.model.args), world
    )
    folder = checkpointer.save(run.state.step, run).parent
    checkpointer.finish()
    return folder


def _local_tensors(run: RunState) -> dict[str, torch.Tensor]:
    tensors = run.tensors().items()
    return {name: tensor.to_local() if is_sharded(tensor) else tensor for name, tensor in tensors}


def _placed(tensors: dict[str, torch.Tensor]) -> dict[str, Placed]:
    return {name: Placed(tuple(each.shape), str(each.dtype), each.device.type) for name, each in tensors.items()}


def _write_other_shards(folder: Path, run: RunState, shards: int) -> None:
    """Write what the other ranks that share the model would have saved."""
    tensors = {name: tensor for name, tensor in run.tensors().items() if is_sharded(tensor)}
    for shard in range(1, shards):
        rows = {name: shard_rows(len(tensor), shard, shards) for name, tensor in tensors.items()}
        parts = {name: tensor.to_local().new_empty(_size(tensor, rows[name])) for name, tensor in tensors.items()}
        offsets = {name: {SAVED_OFFSETS_KEY: [rows[name].start] + [0] * (t.dim() - 1)} for name, t in tensors.items()}
        content = _without_values(parts, {CUSTOM_METADATA_KEY: json.dumps(offsets)})
        (folder / f"shard-{shard + 1:05d}-model-00001-of-00001.safetensors").write_bytes(content)


def _size(tensor: torch.Tensor, rows: slice) -> list[int]:
    return [rows.stop - rows.start, *tensor.shape[1:]]


@dataclasses.dataclass
class _Files:
    """Counts what is written to files and read from them."""

    trace: Trace
    exported: int = 0
    restored: int = 0
    random_state: bytes | None = None

    def export(self, tensor: torch.Tensor) -> memoryview:
        """Return bytes for `model.weights.SafetensorsWriter`, of a tensor in the host's memory."""
        if tensor.device.type != "cpu":
            raise TypeError(f"a tensor on {tensor.device} cannot be written")
        self.exported += 1
        return memoryview(bytearray(tensor.nbytes))

    @contextlib.contextmanager
    def open(self, filename: str, framework: str, safe_open: Any = safetensors.safe_open) -> Iterator[Any]:
        """Open a file of safetensors, from which shapes and dtypes are read."""
        with safe_open(filename, framework=framework) as file:
            yield SimpleNamespace(
                keys=file.keys, metadata=file.metadata, get_slice=lambda name: _Slice(self, file.get_slice(name))
            )

    def run_now(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future:
        """Run what a thread would run in the background, where its waits do not delay training."""
        waits, done = self.trace.waits.copy(), Future[Any]()
        try:
            done.set_result(function(*args, **options))
        except Exception as error:
            done.set_exception(error)
        self.trace.waits = waits
        return done

    def set_random_state(self, state: torch.Tensor) -> None:
        self.random_state = state.numpy().tobytes()


class _Slice:
    """A tensor in a file."""

    def __init__(self, files: _Files, stored: Any) -> None:
        self._files, self._stored = files, stored
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
        with unset_fake_temporarily():
            found = self._stored[part]
        self._files.restored += 1
        return torch.empty(found.shape, dtype=found.dtype)


@contextlib.contextmanager
def _files(trace: Trace) -> Iterator[_Files]:
    """Let tensors without values be saved and loaded, and what saves them in the background run at once."""
    files = _Files(trace)
    state = torch.frombuffer(bytearray(_RANDOM_STATE), dtype=torch.uint8)
    offload = StateDictStager._offload_tensor
    offsets = planner_helpers.compute_local_shape_and_global_offset
    replaced: list[tuple[Any, str, Any]] = [
        (weights, "_as_bytes", files.export),
        (safetensors.torch, "save", functools.partial(_without_values, save=safetensors.torch.save)),
        (safetensors, "safe_open", files.open),
        (StateDictStager, "_offload_tensor", functools.partialmethod(_offload, offload)),
        (ThreadPoolExecutor, "submit", files.run_now),
        (state_dict_saver, "_DistWrapper", _alone),
        (state_dict_loader, "_DistWrapper", _alone),
        (resume, "_random_state", _with_values(resume._random_state)),
        (resume, "_set_random_state", _with_values(resume._set_random_state)),
        (planner_helpers, offsets.__name__, _with_values(offsets)),
        (torch.cuda, "get_rng_state", lambda: state),
        (torch.cuda, "set_rng_state", files.set_random_state),
    ]
    with contextlib.ExitStack() as stack:
        for target, name, value in replaced:
            stack.enter_context(mock.patch.object(target, name, value))
        yield files


def _without_values(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], save: Any = safetensors.torch.save
) -> bytes:
    with unset_fake_temporarily():
        zeros = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        content: bytes = save(zeros, metadata=metadata)
    return content


def _with_values(function: Callable[..., T]) -> Callable[..., T]:
    def call(*args: Any) -> T:
        with unset_fake_temporarily():
            return function(*args)

    return call


def _offload(stager: StateDictStager, of_storage: Any, x: torch.Tensor, memo: Any, non_blocking: bool = False) -> Any:
    """Copy a tensor to the host's memory, where PyTorch copies its storage."""
    copy: torch.Tensor
    if is_sharded(x):
        copy = DTensor(_offload(stager, of_storage, x.to_local(), memo, non_blocking), x._spec, requires_grad=False)
    elif isinstance(x, FakeTensor):
        copy = x.to("cpu", copy=True, non_blocking=non_blocking)
    else:
        return of_storage(stager, x, memo, non_blocking=non_blocking)
    memo[id(x)] = copy
    return copy


def _alone(group: Any, use_dist: bool, coordinator_rank: int) -> _DistWrapper:
    """Return rank 0 alone: the others would have nothing to say."""
    return _DistWrapper(group, False, coordinator_rank)
