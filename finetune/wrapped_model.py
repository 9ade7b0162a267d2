"""Builds the model a run trains: meta device -> adapters -> recomputation -> shards -> weights.

Parameters are filled one at a time and each rank reads only the rows it keeps, so host memory never holds a second
copy of the model.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model.args import LoraArgs, ModelArgs, load_model_args, read_params
from model.errors import UserError
from model.hf_format import open_model_weights
from model.lora import add_lora, initial_lora_tensors, quantizable_linears, quantize_linears
from model.transformer import Recompute, Transformer
from model.weights import WeightsReader, open_safetensors

from .args import TrainArgs
from .distributed import World
from .hardware import Hardware
from .run_dir import find_weights

logger = logging.getLogger("wrapped_model")

_RECOMPUTE: dict[bool | str, Recompute] = {True: "block", "selective": "feed_forward", False: "nothing"}
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
        path = Path(args.lora.from_adapter)
        adapter = _open_adapter(find_weights(path) if path.is_dir() else path, args.lora, expected)
    if args.base_dtype != "same":
        quantize_linears(model, args.base_dtype)  # for its complaints
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


def build_model(base: BaseModel, args: TrainArgs, hardware: Hardware, world: World, trains: bool = True) -> Transformer:
    """Builds, shards and loads the model.

    Parameters that train are fp32, the others `hardware.dtype`; with several ranks each holds its rows of all of them,
    with `cpu_offload` in host memory. Unless it `trains`, no parameter does.
    """
    with torch.device("meta"):
        model = Transformer(base.args, hardware.attention, hardware.dtype)
        if args.lora.enable:
            add_lora(model, args.lora)
        if not trains:
            model.requires_grad_(False)
        if args.base_dtype != "same":
            quantize_linears(model, args.base_dtype)
    for block in model.layers:
        block.recompute = _RECOMPUTE[args.checkpoint]
    if args.compile:
        model.compile_elementwise()
    if world.size > 1 or args.cpu_offload:
        _shard(model, args, hardware, world)
    _load(model, base, args, hardware, world)
    return model.train()


def shard_count(args: TrainArgs, world: World) -> int:
    """How many processes hold one copy of the model together."""
    return world.local_size if args.sharding == "hybrid" else world.size


def _shard(model: Transformer, args: TrainArgs, hardware: Hardware, world: World) -> None:
    mesh = world.mesh(shard_count(args, world))
    # Inputs are left alone: the model casts its own, and the rotary phases are complex.
    policy = MixedPrecisionPolicy(param_dtype=hardware.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = _offload_policy(args, hardware)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)


def _offload_policy(args: TrainArgs, hardware: Hardware) -> OffloadPolicy:
    if not args.cpu_offload:
        return OffloadPolicy()
    has_gpu = hardware.device.type == "cuda"
    if not has_gpu:
        logger.info("`cpu_offload: true` does nothing here: the model is in host memory anyway.")
    return CPUOffloadPolicy(pin_memory=has_gpu)


def _load(model: Transformer, base: BaseModel, args: TrainArgs, hardware: Hardware, world: World) -> None:
    loaded = {}
    parameters = dict(model.named_parameters())
    device = torch.device("cpu") if args.cpu_offload else hardware.device
    tensors = _tensors(model, base, args, hardware)
    for name, tensor in tqdm(
        tensors, desc="Loading weights", total=len(parameters), disable=None if world.is_master else True
    ):
        parameter = parameters[name]
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if parameter.requires_grad else hardware.dtype)
        local = tensor.to(device)
        loaded[name] = nn.Parameter(_sharded_like(parameter, local), requires_grad=parameter.requires_grad)
    model.load_state_dict(loaded, strict=True, assign=True)


def _tensors(
    model: Transformer, base: BaseModel, args: TrainArgs, hardware: Hardware
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every parameter's name and this rank's rows of it."""
    rows = {name: _local_rows(parameter) for name, parameter in model.named_parameters()}
    quantized = dict(quantizable_linears(model)) if args.base_dtype != "same" else {}
    for name in base.weights.shapes:
        tensor, layer_name = base.weights.read(name, rows[name]), name.removesuffix(".weight")
        if layer := quantized.get(layer_name):
            for part, stored in layer.format.quantize(tensor.to(hardware.device)).items():
                yield f"{layer_name}.{part}", stored
        else:
            yield name, tensor
    if base.adapter is not None:
        for name in base.adapter.shapes:
            yield name, base.adapter.read(name, rows[name])
    elif args.lora.enable:
        for name, tensor in initial_lora_tensors(model, args.seed, hardware.dtype):
            yield name, tensor[rows[name]].clone()


def reshard(model: Transformer) -> None:
    """Gives back what a forward pass without a backward pass leaves unsharded: embeddings, last norm and head."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _local_rows(parameter: nn.Parameter) -> slice:
    """The rows of a parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    shards = parameter.device_mesh["shard"]
    return shard_rows(len(parameter), shards.get_local_rank(), shards.size())


def shard_rows(rows: int, shard: int, shards: int) -> slice:
    """The rows that a shard of a parameter holds: equal chunks, the last ones shorter or empty."""
    chunk = -(-rows // shards)
    return slice(min(chunk * shard, rows), min(chunk * (shard + 1), rows))


def _sharded_like(parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    # DTensor.from_local would move an offloaded shard to the GPU.
    sharded = torch.empty_like(parameter, dtype=local.dtype, device=local.device, requires_grad=False)
    sharded.to_local().copy_(local)
    return sharded


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
