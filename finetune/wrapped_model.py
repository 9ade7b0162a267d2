"""Builds the model a run trains: meta device -> adapters -> recomputation -> shards -> weights.

Parameters are filled one at a time and each rank reads only the rows it keeps, so host memory never holds a second
copy of the model.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model.args import LoraArgs, ModelArgs, load_model_args, read_params
from model.errors import UserError
from model.hf_format import open_model_weights
from model.lora import add_lora, initial_lora_tensors
from model.transformer import Transformer
from model.weights import WeightsReader, open_safetensors

from .args import TrainArgs
from .distributed import World
from .hardware import Hardware

ADAPTER_NAME = "lora.safetensors"
_MAX_FAULTS_NAMED = 12


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A checked model folder: what a run starts from, before anything is loaded."""

    folder: Path
    args: ModelArgs
    weights: WeightsReader
    adapter: WeightsReader | None  # where `lora.from_adapter` names one


def open_base_model(args: TrainArgs) -> BaseModel:
    """Opens the model folder and the adapter to start from; compares every tensor's name and shape, reads none.

    Raises:
        UserError: shapes, files or vocabulary do not fit.
    """
    folder = Path(args.model_id_or_path)
    model_args = load_model_args(folder)
    if model_args.vocab_size == 32000:
        raise UserError(
            f"The model in {folder} has the old vocabulary of 32000 tokens. Extend it to 32768 with "
            f"`python -m utils.extend_model_vocab --original_model_ckpt {folder} "
            f"--extended_model_ckpt {folder}_extended` and train the extended model."
        )
    if model_args.sliding_window is not None and args.seq_len > model_args.sliding_window:
        raise UserError(
            f"The model in {folder} attends to {model_args.sliding_window} tokens at a time (`sliding_window`), which "
            f"this code does not compute: set `seq_len` ({args.seq_len}) to at most {model_args.sliding_window}."
        )
    weights = open_model_weights(folder)
    with torch.device("meta"):
        model = Transformer(model_args)
    _compare_shapes(
        weights, {name: tuple(p.shape) for name, p in model.named_parameters()}, "the shapes in params.json"
    )
    adapter = None
    if args.lora.enable:
        add_lora(model, args.lora)
    if args.lora.enable and args.lora.from_adapter:
        expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        adapter = _open_adapter(Path(args.lora.from_adapter), args.lora, expected)
    return BaseModel(folder, model_args, weights, adapter)


def _open_adapter(path: Path, lora: LoraArgs, expected: dict[str, tuple[int, ...]]) -> WeightsReader:
    path = path / ADAPTER_NAME if path.is_dir() else path
    adapter = open_safetensors(path)
    settings = f"`lora.rank: {lora.rank}` and `lora.targets: [{', '.join(lora.targets)}]`"
    _compare_shapes(adapter, expected, f"this model with {settings}")
    recorded = (read_params(path.parent).get("lora") or {}) if (path.parent / "params.json").is_file() else {}
    if recorded.get("scaling", lora.scaling) != lora.scaling:
        raise UserError(
            f"{path} was trained with `lora.scaling: {recorded['scaling']}` but the YAML says {lora.scaling}: "
            "the same adapter would be another model. Use the adapter's own."
        )
    return adapter


def _compare_shapes(weights: WeightsReader, expected: dict[str, tuple[int, ...]], what: str) -> None:
    """Raises UserError naming every tensor that is missing, unexpected or of another shape."""
    faults = [f"{name} is missing" for name in expected if name not in weights.shapes]
    faults += [f"{name} is not part of the model" for name in weights.shapes if name not in expected]
    faults += [
        f"{name} is {list(weights.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if weights.shapes.get(name, shape) != shape
    ]
    if faults:
        more = f" ... and {len(faults) - _MAX_FAULTS_NAMED} more" if len(faults) > _MAX_FAULTS_NAMED else ""
        named = "; ".join(faults[:_MAX_FAULTS_NAMED])
        raise UserError(f"{weights.source} does not fit {what}: {named}{more}.")


def build_model(base: BaseModel, args: TrainArgs, hardware: Hardware, world: World) -> Transformer:
    """Builds, shards and loads the model.

    Parameters that train are fp32, the others `hardware.dtype`; with several ranks each holds its rows of all of them.
    """
    model = empty_model(base, args, hardware)
    for block in model.layers:
        block.recompute = args.checkpoint
    if world.size > 1:
        _shard(model, hardware, world)
    _load(model, base, args, hardware, world)
    return model.train()


def empty_model(base: BaseModel, args: TrainArgs, hardware: Hardware) -> Transformer:
    """The model to train, with its adapters and without memory (on the meta device)."""
    with torch.device("meta"):
        model = Transformer(base.args, hardware.attention, hardware.dtype)
        if args.lora.enable:
            add_lora(model, args.lora)
    return model


def _shard(model: Transformer, hardware: Hardware, world: World) -> None:
    # Inputs are left alone: the model casts its own, and the rotary phases are complex.
    policy = MixedPrecisionPolicy(param_dtype=hardware.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = world.mesh()
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _load(model: Transformer, base: BaseModel, args: TrainArgs, hardware: Hardware, world: World) -> None:
    loaded = {}
    parameters = dict(model.named_parameters())
    tensors = _tensors(model, base, args, hardware, world)
    for name, tensor in tqdm(
        tensors, desc="Loading weights", total=len(parameters), disable=None if world.is_master else True
    ):
        parameter = parameters[name]
        dtype = torch.float32 if parameter.requires_grad else hardware.dtype
        local = tensor.to(hardware.device, dtype)
        loaded[name] = nn.Parameter(_sharded_like(parameter, local), requires_grad=parameter.requires_grad)
    model.load_state_dict(loaded, strict=True, assign=True)


def _tensors(
    model: Transformer, base: BaseModel, args: TrainArgs, hardware: Hardware, world: World
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every parameter's name and this rank's rows of it."""
    for name, shape in base.weights.shapes.items():
        yield name, base.weights.read(name, own_rows(shape[0], world))
    if base.adapter is not None:
        for name, shape in base.adapter.shapes.items():
            yield name, base.adapter.read(name, own_rows(shape[0], world))
    elif args.lora.enable:
        for name, tensor in initial_lora_tensors(model, args.seed, hardware.dtype):
            yield name, tensor[own_rows(len(tensor), world)].clone()


def reshard(model: Transformer) -> None:
    """Gives back what a forward pass without a backward pass leaves unsharded: embeddings, last norm and head."""
    if isinstance(model, FSDPModule):
        model.reshard()


def own_rows(rows: int, world: World) -> slice:
    """The rows of a sharded parameter that this rank holds: equal chunks, the last ones shorter or empty."""
    chunk = -(-rows // world.size)
    return slice(min(chunk * world.rank, rows), min(chunk * (world.rank + 1), rows))


def _sharded_like(parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
