"""Build the model of a run: meta device -> adapters -> activation checkpointing -> shards -> weights.

Parameters are loaded one at a time and each rank reads only the rows it keeps, so host memory never contains a second
copy of the model.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from model.args import PARAMS_NAME, SHAPE_KEYS, LoraArgs, ModelArgs, load_model_args, params_path, read_params
from model.errors import UserError
from model.frozen_weights import FORMATS
from model.hf_config import key_in
from model.hf_format import open_model_weights
from model.lora import add_lora, initial_lora_tensors, quantizable_linears, quantize_linears
from model.peft_format import PeftAdapter, open_peft_adapter, peft_folder
from model.transformer import Recompute, Transformer
from model.weights import WeightsReader, open_safetensors

from .args import TrainArgs
from .distributed import World, is_sharded
from .hardware import Hardware
from .manifest import require_intact
from .run_dir import find_weights

logger = logging.getLogger("wrapped_model")

_RECOMPUTE: dict[bool | str, Recompute] = {True: "block", "selective": "feed_forward", False: "nothing"}
ADAPTER_NAME = "lora.safetensors"
_MAX_FAULTS_LISTED = 12
_LOG_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A checked model folder, before any weights are loaded."""

    folder: Path
    args: ModelArgs
    weights: WeightsReader
    adapter: WeightsReader | None  # of `lora.from_adapter`

    def require_intact(self) -> None:
        """Read the files that belong to a checkpoint, and raise UserError if one has changed since it was written."""
        for weights in filter(None, (self.weights, self.adapter)):
            require_intact(weights.source)


def open_base_model(args: TrainArgs) -> BaseModel:
    """Open the model folder and the initial adapter; compare every tensor's name and shape without reading weights.

    Raises:
        UserError: shapes, files or vocabulary do not match.
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
            f"The model in {folder} uses sliding-window attention over {model_args.sliding_window} tokens "
            f"(`sliding_window`), which is not supported: set `seq_len` ({args.seq_len}) to at most "
            f"{model_args.sliding_window}."
        )
    weights = open_model_weights(folder)
    with torch.device("meta"):
        model = Transformer(model_args)
    _compare_shapes(weights, {name: tuple(p.shape) for name, p in model.named_parameters()}, params_path(folder))
    adapter = None
    if args.lora.enable:
        add_lora(model, args.lora)
    if args.lora.enable and args.lora.from_adapter:
        expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        adapter = _initial_adapter(open_adapter(Path(args.lora.from_adapter), weights, folder), args.lora, expected)
    if args.base_dtype != "same":
        quantize_linears(model, args.base_dtype)  # on the meta device, for its checks only
    return BaseModel(folder, model_args, weights, adapter)


def open_adapter(path: Path, base: WeightsReader, base_folder: Path) -> WeightsReader:
    """Open the adapter that a user names: lora.safetensors or its folder, a checkpoint, a run, or a PEFT adapter.

    Args:
        path: of the adapter.
        base: the weights of its base model.
        base_folder: folder of the base model; read only for a PEFT adapter.

    Raises:
        UserError: there is no adapter, two adapters, or one that cannot be read.
    """
    if folder := peft_folder(path):
        if (folder / ADAPTER_NAME).is_file():
            raise UserError(f"{folder} contains both {ADAPTER_NAME} and a PEFT adapter: keep only the one to load.")
        return open_peft_adapter(folder, base, load_model_args(base_folder).head_dim)
    return open_safetensors(find_weights(path) / ADAPTER_NAME if path.is_dir() else path)


def _initial_adapter(adapter: WeightsReader, lora: LoraArgs, expected: dict[str, tuple[int, ...]]) -> WeightsReader:
    """Return the adapter to start training from, after comparing it with the settings."""
    if isinstance(adapter, PeftAdapter):
        return _uniform_adapter(adapter, lora, expected)
    settings = f"`lora.rank: {lora.rank}` and `lora.targets: [{', '.join(lora.targets)}]`"
    _compare_shapes(adapter, expected, f"this model with {settings}")
    folder = adapter.source.parent
    recorded = (read_params(folder).get("lora") or {}) if (folder / PARAMS_NAME).is_file() else {}
    if recorded.get("scaling", lora.scaling) != lora.scaling:
        raise UserError(
            f"{adapter.source} was trained with `lora.scaling: {recorded['scaling']}` but the YAML sets "
            f"{lora.scaling}, with which the adapter gives a different model. Use the adapter's value."
        )
    return adapter


def _uniform_adapter(adapter: PeftAdapter, lora: LoraArgs, expected: dict[str, tuple[int, ...]]) -> WeightsReader:
    """Return a PEFT adapter with the run's rank and scaling, and log what that changes."""
    assert lora.scaling is not None, "LoraArgs derives it from alpha"
    targets = sorted({layer.rpartition(".")[2] for layer in adapter.scalings})
    rank = max(adapter.shapes[f"{layer}.lora_A.weight"][0] for layer in adapter.scalings)
    if (rank, targets) != (lora.rank, sorted(lora.targets)):
        raise UserError(
            f"`lora.from_adapter`: the PEFT adapter {adapter.source} does not match `lora.rank: {lora.rank}` and "
            f"`lora.targets: [{', '.join(lora.targets)}]`; set `lora.rank: {rank}` and `lora.targets: "
            f"[{', '.join(targets)}]`."
        )
    _compare_shapes(adapter, adapter.with_own_ranks(expected), f"this model with `lora.rank: {rank}`")
    if other := sorted(set(adapter.scalings.values()) - {lora.scaling}):
        scalings = ", ".join(f"{scaling:g}" for scaling in other)
        logger.info(
            "%s: the adapter's scaling of %s is converted to `lora.scaling: %g`, by factors of B.",
            *(adapter.source, scalings, lora.scaling),
        )
    if absent := len(expected) // 2 - len(adapter.scalings):
        logger.info("%s: %d of the layers in `lora.targets` have no adapter and get none.", adapter.source, absent)
    return adapter.uniform(expected, lora.scaling)


def _compare_shapes(weights: WeightsReader, expected: dict[str, tuple[int, ...]], source: Path | str) -> None:
    """Raise UserError listing the tensors that are missing, unexpected or of the wrong shape.

    Args:
        weights: what was found.
        expected: shapes by name.
        source: what the expected shapes follow from, in words, or the file of a model's shapes, whose keys are named.
    """
    faults = [f"{name} is missing" for name in expected if name not in weights.shapes]
    faults += [f"{name} is not part of the model" for name in weights.shapes if name not in expected]
    faults += [
        f"{name} is {list(weights.shapes[name])}, expected {list(shape)}"
        + (f" ({_keys_of_difference(source, name, weights.shapes[name], shape)})" if isinstance(source, Path) else "")
        for name, shape in expected.items()
        if weights.shapes.get(name, shape) != shape
    ]
    if faults:
        more = f" ... and {len(faults) - _MAX_FAULTS_LISTED} more" if len(faults) > _MAX_FAULTS_LISTED else ""
        listed = "; ".join(faults[:_MAX_FAULTS_LISTED])
        raise UserError(f"{weights.source} does not match {source}: {listed}{more}.")


def _keys_of_difference(file: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return the keys of params.json or config.json that determine the sizes of a tensor which differ."""
    sizes = itertools.zip_longest(SHAPE_KEYS[name.split(".")[-2]], found, expected)
    keys = [key for keys, ours, theirs in sizes if keys and ours != theirs for key in keys.split()]
    return ", ".join(f"`{key_in(file, key)}`" for key in keys)


def build_model(base: BaseModel, args: TrainArgs, hardware: Hardware, world: World, trains: bool = True) -> Transformer:
    """Build, shard and load the model.

    Trainable parameters are fp32, frozen ones `hardware.dtype`. With several ranks each keeps its rows of every
    parameter; with `cpu_offload` they are in host memory. With `trains=False` every parameter is frozen.

    Raises:
        UserError: weights are NaN or infinite, or were changed since they were opened; maybe on this rank only.
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
    """Return the number of processes that share one copy of the model."""
    return world.local_size if args.sharding == "hybrid" else world.size


def _shard(model: Transformer, args: TrainArgs, hardware: Hardware, world: World) -> None:
    # Imported here: it takes a second, which a single process need not wait for.
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    has_gpu = hardware.device.type == "cuda"
    if args.cpu_offload and not has_gpu:
        logger.info("`cpu_offload: true` has no effect here: the model is in host memory anyway.")
    offload = CPUOffloadPolicy(pin_memory=has_gpu) if args.cpu_offload else OffloadPolicy()
    # Inputs are not cast: the model casts its own, and the rotary phases are complex.
    policy = MixedPrecisionPolicy(param_dtype=hardware.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = world.mesh(shard_count(args, world))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)


def _load(model: Transformer, base: BaseModel, args: TrainArgs, hardware: Hardware, world: World) -> None:
    loaded = {}
    parameters = dict(model.named_parameters())
    device = torch.device("cpu") if args.cpu_offload else hardware.device
    widths = {name: _width(parameter, hardware) for name, parameter in parameters.items()}
    sizes = {name: parameter.numel() * widths[name] for name, parameter in parameters.items()}
    for name, tensor in _with_progress(_tensors(model, base, args, hardware), sizes, is_shown=world.is_master):
        parameter = parameters[name]
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if parameter.requires_grad else hardware.dtype)
        local = tensor.to(device)
        loaded[name] = nn.Parameter(_sharded_like(parameter, local), requires_grad=parameter.requires_grad)
    model.load_state_dict(loaded, strict=True, assign=True)


def _width(parameter: nn.Parameter, hardware: Hardware) -> int:
    """Return the bytes per element that a parameter has when loaded."""
    if not parameter.is_floating_point():
        return parameter.element_size()
    return (torch.float32 if parameter.requires_grad else hardware.dtype).itemsize


def _with_progress(
    tensors: Iterator[tuple[str, torch.Tensor]], sizes: dict[str, int], is_shown: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Show a bar on a terminal, and in a log a line every 10 s.

    Args:
        tensors: names and values.
        sizes: bytes of each, of all ranks together.
        is_shown: whether this rank shows them.
    """
    total, done, last = sum(sizes.values()), 0, time.monotonic()
    bar = tqdm(desc="Loading weights", total=total, unit="B", unit_scale=True, disable=None if is_shown else True)
    with bar:
        for name, tensor in tensors:
            yield name, tensor
            done += sizes[name]
            bar.update(sizes[name])
            if is_shown and bar.disable and time.monotonic() - last >= _LOG_EVERY_S:
                last = time.monotonic()
                logger.info("Loading weights: %.0f %%, %.1f of %.1f GB", 100 * done / total, done / 1e9, total / 1e9)


def _tensors(
    model: Transformer, base: BaseModel, args: TrainArgs, hardware: Hardware
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter's name and this rank's rows of it."""
    rows = {name: _local_rows(parameter) for name, parameter in model.named_parameters()}
    weight_format = FORMATS.get(args.base_dtype)  # None: the same as `param_dtype`
    quantized = dict(quantizable_linears(model)) if weight_format else {}
    for name in base.weights.shapes:
        tensor, layer_name = base.weights.read_finite(name, rows[name]), name.removesuffix(".weight")
        if weight_format and layer_name in quantized:
            for part, stored in weight_format.quantize(tensor.to(hardware.device)).items():
                yield f"{layer_name}.{part}", stored
        else:
            yield name, tensor
    if base.adapter is not None:
        for name in base.adapter.shapes:
            yield name, base.adapter.read_finite(name, rows[name])
    elif args.lora.enable:
        for name, tensor in initial_lora_tensors(model, args.seed, hardware.dtype):
            yield name, tensor[rows[name]].clone()


def reshard(model: Transformer) -> None:
    """Reshard what stays unsharded after a forward pass without a backward pass: embeddings, last norm and head."""
    if (reshard_module := getattr(model, "reshard", None)) is not None:  # only an FSDPModule has it
        reshard_module()


def _local_rows(parameter: nn.Parameter) -> slice:
    """Return the rows of a parameter that this rank keeps."""
    if not is_sharded(parameter):
        return slice(0, len(parameter))
    shards = parameter.device_mesh["shard"]
    return shard_rows(len(parameter), shards.get_local_rank(), shards.size())


def shard_rows(rows: int, shard: int, shards: int) -> slice:
    """Return the rows of one shard of a parameter: chunks of equal size, the last ones shorter or empty."""
    chunk = -(-rows // shards)
    return slice(min(chunk * shard, rows), min(chunk * (shard + 1), rows))


def _sharded_like(parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    if not is_sharded(parameter):
        return local
    # DTensor.from_local would move an offloaded shard to the GPU.
    sharded = torch.empty_like(parameter, dtype=local.dtype, device=local.device, requires_grad=False)
    assert is_sharded(sharded)
    sharded.to_local().copy_(local)
    return sharded


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the optimizer updates."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
