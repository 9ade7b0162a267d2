"""Read LoRA adapters in PEFT's format: adapter_config.json with adapter_model.safetensors or adapter_model.bin.

PEFT scales each layer's B A by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with `use_rslora`; `rank_pattern` and
`alpha_pattern` give single layers other values. Names and channel order are those of Hugging Face's layout.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, quoted
from .hf_format import HFWeightsReader, hf_name, mistral_name
from .weights import TensorLocation, WeightsReader, open_weights

ADAPTER_CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
_WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(.+)\.(lora_[AB])\.weight")
_HEAD_COPY = "lm_head.base_layer.weight"  # PEFT also saves the frozen weight of an adapted head
_COMPARED_ROWS = 64

# Settings that say nothing about the function that the adapter computes, beyond the names and shapes of its tensors.
_DESCRIPTIVE = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}
_READ = {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
# Others (pissa, olora, loftq ...) change the base weights, too; PEFT can convert such adapters when it saves them.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftAdapter(HFWeightsReader):
    """The factors A and B of an adapter under Mistral's names and in Mistral's channel order.

    Attributes:
        scalings: the factor of B A by the adapted layer's name, such as `layers.0.attention.wq`.
    """

    def __init__(
        self, source: Path, locations: dict[str, TensorLocation], head_dim: int, scalings: dict[str, float]
    ) -> None:
        super().__init__(source, locations, head_dim)
        self.scalings = scalings

    def stored_name(self, name: str) -> str:
        return PEFT_PREFIX + hf_name(name)

    def with_own_ranks(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a model's factors A [R, in] and B [out, R] with this adapter's R, where it has them."""
        found: dict[str, tuple[int, ...]] = {}
        for name in expected.keys() & self.locations.keys():
            rank = self.locations[f"{name.rpartition('.lora_')[0]}.lora_A.weight"].shape[0]
            rows, columns = expected[name]
            found[name] = (rank, columns) if name.endswith(".lora_A.weight") else (rows, rank)
        return found

    def uniform(self, expected: Mapping[str, tuple[int, ...]], scaling: float) -> "UniformAdapter":
        """Return the same adapter with the shapes and the scaling of a model's LoRA layers."""
        return UniformAdapter(self.source, self.locations, self._head_dim, self.scalings, expected, scaling)


class UniformAdapter(PeftAdapter):
    """An adapter with the rank and the scaling of a model's LoRA layers, to continue training it.

    The difference to the adapter's own scaling is multiplied into B, in fp32. Layers of a smaller rank, or without an
    adapter, are filled with zeros: these have no gradient and stay zero, so only what PEFT would train is trained.
    """

    def __init__(
        self,
        source: Path,
        locations: dict[str, TensorLocation],
        head_dim: int,
        scalings: dict[str, float],
        expected: Mapping[str, tuple[int, ...]],
        scaling: float,
    ) -> None:
        super().__init__(source, locations, head_dim, scalings)
        self.shapes = dict(expected)
        self.dtypes = dict.fromkeys(expected, torch.float32)
        self._scaling = scaling

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a factor or some of its rows, in fp32; see `WeightsReader.read`."""
        start, stop, _ = (rows or slice(None)).indices(self.shapes[name][0])
        filled = torch.zeros(max(stop - start, 0), self.shapes[name][1])
        if name in self.locations:
            stored = super().read(name, slice(start, stop)).float()
            if name.endswith(".lora_B.weight"):
                stored *= self.scalings[name.removesuffix(".lora_B.weight")] / self._scaling
            filled[: stored.shape[0], : stored.shape[1]] = stored
        return filled


def peft_folder(path: Path) -> Path | None:
    """Return the folder of the PEFT adapter that a path names, itself or by its weights file; None: something else."""
    folder = path.parent if path.name in _WEIGHTS_NAMES else path
    return folder if (folder / ADAPTER_CONFIG_NAME).is_file() or path.name in _WEIGHTS_NAMES else None


def open_peft_adapter(folder: Path, base: WeightsReader, head_dim: int) -> PeftAdapter:
    """Open an adapter for a base model; checks names, shapes and settings, and reads almost no tensor.

    Args:
        folder: with adapter_config.json and weights.
        base: the base model's weights.
        head_dim: width of one of the base model's attention heads.

    Raises:
        UserError: a file is missing or corrupt, or a setting or tensor has no equivalent here.
    """
    config = read_peft_config(folder)
    file = _weights_file(folder)
    stored = open_weights(file)
    locations: dict[str, TensorLocation] = {}
    for name, location in stored.locations.items():
        theirs = name.removeprefix(PEFT_PREFIX)
        ours = mistral_name(theirs)
        if theirs == _HEAD_COPY:
            _require_same_head(stored, name, base)
        elif theirs != name and ours != theirs and _FACTOR.fullmatch(ours):
            locations[ours] = location
        else:
            raise UserError(f"{file}: {quoted(name)} is not the adapter of a linear layer of a Mistral model.")
    if not locations:
        raise UserError(f"{file} contains no adapter (no tensors named lora_A.weight and lora_B.weight).")
    layers = {match[1]: None for name in locations if (match := _FACTOR.fullmatch(name))}
    ranks = {layer: _rank(file, locations, layer) for layer in layers}
    scalings = {layer: _scaling(folder / ADAPTER_CONFIG_NAME, config, layer, rank) for layer, rank in ranks.items()}
    return PeftAdapter(file, locations, head_dim, scalings)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read and check adapter_config.json.

    Raises:
        UserError: the file cannot be read, or has a setting that is not supported.
    """
    path = folder / ADAPTER_CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it belongs to a PEFT adapter.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must contain a JSON object, found {type(config).__name__}.")
    for key, default, supported in (
        ("peft_type", None, ("LORA",)),
        ("bias", "none", ("none",)),
        ("init_lora_weights", True, _INITIALIZATIONS),
    ):
        if (value := config.get(key, default)) not in supported:
            raise UserError(f"{path}: `{key}` is {quoted(value)}; expected {' or '.join(map(repr, supported))}.")
    for key, value in config.items():
        if value and key not in _READ | _DESCRIPTIVE:
            raise UserError(
                f"{path}: `{key}` is {quoted(value)}, which is not supported; without it the adapter would compute "
                "something else."
            )
    return config


def _weights_file(folder: Path) -> Path:
    files = [folder / name for name in _WEIGHTS_NAMES if (folder / name).is_file()]
    if len(files) != 1:
        found = " and ".join(file.name for file in files) or "neither"
        raise UserError(f"{folder} must contain one of {' and '.join(_WEIGHTS_NAMES)}, found {found}.")
    return files[0]


def _require_same_head(stored: WeightsReader, name: str, base: WeightsReader) -> None:
    head = "output.weight"
    same = stored.shapes[name] == base.shapes.get(head)
    if same:
        theirs, ours = (weights.read(key, slice(0, _COMPARED_ROWS)) for weights, key in ((stored, name), (base, head)))
        same = theirs.equal(ours.to(theirs.dtype))
    if not same:
        raise UserError(
            f"{stored.source} contains a head (`{name}`) that is not the base model's in {base.source}: it was trained "
            "on another model."
        )


def _rank(file: Path, locations: Mapping[str, TensorLocation], layer: str) -> int:
    """Return R of the factors A [R, in] and B [out, R] of a layer."""
    shapes = [
        locations[name].shape
        for name in (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
        if name in locations and len(locations[name].shape) == 2
    ]
    if len(shapes) != 2 or shapes[0][0] != shapes[1][1] or not shapes[0][0]:
        raise UserError(f"{file}: {hf_name(layer + '.weight').removesuffix('.weight')} has no fitting pair of factors.")
    return shapes[0][0]


def _scaling(path: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    module = hf_name(f"{layer}.weight").removesuffix(".weight")
    stated = _number(path, "r", _setting(path, config, "rank_pattern", "r", module))
    if stated != rank:
        raise UserError(f"{path} gives {module} the rank {stated:g}, but its factors in the weights have {rank}.")
    alpha = _number(path, "lora_alpha", _setting(path, config, "alpha_pattern", "lora_alpha", module))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _setting(path: Path, config: Mapping[str, Any], patterns_key: str, key: str, module: str) -> Any:
    """Return a module's setting: that of the first pattern that matches the end of its name, else the general one."""
    patterns = config.get(patterns_key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: `{patterns_key}` is {quoted(patterns)}; expected an object.")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise UserError(f"{path}: `{patterns_key}` has an invalid pattern {quoted(pattern)}: {error}.") from error
    return config.get(key, 8)  # PEFT's default for both


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path}: `{key}` is {quoted(value)}; expected a positive number.")
    return float(value)
