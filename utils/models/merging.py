"""Merge a LoRA adapter into its base model: W + scaling * B A in fp32, rounded once, one tensor at a time."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.manifest import require_intact
from finetune.wrapped_model import ADAPTER_NAME, open_adapter
from model.args import DEFAULT_SCALING, PARAMS_NAME, read_params
from model.errors import UserError
from model.hf_format import open_model_weights
from model.lora import merged_weight
from model.peft_format import ADAPTER_CONFIG_NAME, PeftAdapter
from model.weights import WeightsReader
from utils.models.model_folder import announce, write_model_folder, write_weights
from utils.models.rounding import rounded

_MERGEABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_NAMED_PROBLEMS = 20


class MergedWeights:
    """The tensors of a model with its adapter merged; each is computed when it is read.

    Attributes:
        base: weights without the adapter.
        adapter: A and B of each adapted linear layer.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor: the base's, unless another was chosen.
    """

    def __init__(
        self,
        base: WeightsReader,
        adapter: WeightsReader,
        scaling: float | Mapping[str, float],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.base, self.adapter = base, adapter
        self._adapted = _adapted_tensors(base, adapter)
        self._scaling = scaling
        self.shapes = base.shapes
        self.dtypes = dict.fromkeys(base.shapes, dtype) if dtype else dict(base.dtypes)
        print(f"Merging the adapter into {len(self._adapted)} of {len(self.shapes)} tensors.")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of `shapes`."""
        tensor = self.base.read_finite(name)
        if name in self._adapted:
            layer = name.removesuffix(".weight")
            lora_a, lora_b = (self.adapter.read_finite(f"{layer}.{part}.weight") for part in ("lora_A", "lora_B"))
            scaling = self._scaling[layer] if isinstance(self._scaling, Mapping) else self._scaling
            tensor = merged_weight(tensor.float(), lora_a, lora_b, scaling)
        return rounded(tensor, self.dtypes[name], name)


def merge_lora(
    base_path: Path,
    adapter_path: Path,
    destination: Path,
    scaling: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write base + adapter.

    Args:
        base_path: model folder or its weights file.
        adapter_path: lora.safetensors, its folder, a checkpoint, a run (its latest checkpoint), or a PEFT adapter.
        destination: .safetensors file or model folder to create.
        scaling: factor of B A; None: the value in the adapter's params.json, or those of PEFT's adapter_config.json.
        dtype: of the result; None: the base's.

    Raises:
        UserError: a file is missing or corrupt, the adapter does not fit, or the destination exists.
    """
    merged = open_merged(base_path, adapter_path, scaling, dtype)
    if destination.suffix == ".safetensors" and not destination.is_dir():
        if destination.exists():
            raise UserError(f"{destination} already exists: remove it or choose another name.")
        destination.parent.mkdir(parents=True, exist_ok=True)
        announce(destination, merged)
        write_weights(merged, destination)
    elif destination.suffix in (".pth", ".pt", ".bin"):
        raise UserError(f"{destination}: merged weights are written as .safetensors; change the name or give a folder.")
    else:
        base_folder = _folder_of(base_path)
        write_model_folder(destination, merged, read_params(base_folder), [base_folder, merged.adapter.source.parent])


def open_merged(
    base_path: Path, adapter_path: Path, scaling: float | None = None, dtype: torch.dtype | None = None
) -> MergedWeights:
    """Open base and adapter and check that they fit; arguments and errors as `merge_lora`."""
    base = open_model_weights(base_path)
    adapter = open_adapter(adapter_path, base, _folder_of(base_path))
    for weights in (base, adapter):
        require_intact(weights.source)
    if scaling is None and isinstance(adapter, PeftAdapter):
        shown = ", ".join(f"{value:g}" for value in sorted(set(adapter.scalings.values())))
        print(f"Scaling {shown}, as recorded in {adapter.source.parent / ADAPTER_CONFIG_NAME}.")
        return MergedWeights(base, adapter, adapter.scalings, dtype)
    if scaling is None:
        scaling = recorded_scaling(adapter.source.parent)
    if not (scaling > 0 and math.isfinite(scaling)):
        raise UserError(f"The scaling is {scaling}; it must be a positive number (2.0 is usual).")
    return MergedWeights(base, adapter, scaling, dtype)


def _folder_of(model: Path) -> Path:
    """Return the folder of a model that is given by its folder or by its weights file."""
    return model if model.is_dir() else model.parent


def recorded_scaling(folder: Path) -> float:
    """Return and print `lora.scaling` of an adapter's params.json, or the default if it is not recorded.

    Raises:
        UserError: it is not a number.
    """
    path = folder / PARAMS_NAME
    lora = read_params(folder).get("lora") if path.is_file() else None
    if not isinstance(lora, dict) or "scaling" not in lora:
        print(f"{path} does not record the adapter's scaling: using the default, {DEFAULT_SCALING}.")
        return DEFAULT_SCALING
    if isinstance(lora["scaling"], bool) or not isinstance(lora["scaling"], int | float):
        raise UserError(f"{path}: `lora.scaling` is {lora['scaling']!r}; expected a number.")
    print(f"Scaling {lora['scaling']}, as recorded in {path}.")
    return float(lora["scaling"])


def _adapted_tensors(base: WeightsReader, adapter: WeightsReader) -> set[str]:
    """Return the names of the base's tensors that the adapter changes.

    Raises:
        UserError: the adapter does not fit; every wrong tensor is named, up to a limit.
    """
    if not any("lora" in name for name in adapter.shapes):
        raise UserError(
            f"{adapter.source} has no LoRA tensors (names that end in lora_A.weight and lora_B.weight): expected the "
            f"{ADAPTER_NAME} of a checkpoint."
        )
    stems, problems = set(), []
    for name in sorted(adapter.shapes):
        stem = name.removesuffix("lora_A.weight").removesuffix("lora_B.weight")
        if stem == name:
            problems.append(f"{name}: expected a name that ends in lora_A.weight or lora_B.weight")
        else:
            stems.add(stem)
    for stem in sorted(stems):
        problems += _fit_problems(base, adapter, stem)
    dtypes = sorted({str(dtype) for dtype in adapter.dtypes.values()})
    if len(dtypes) > 1 or not set(adapter.dtypes.values()) <= set(_MERGEABLE_DTYPES):
        problems.append(f"dtypes {', '.join(dtypes)}: expected one of bfloat16, float16, float32 for all tensors")
    if problems:
        shown = problems[:_MAX_NAMED_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise UserError(
            f"The adapter {adapter.source} does not fit the model {base.source}; was it trained on another model?\n  "
            + "\n  ".join(shown)
        )
    return {f"{stem}weight" for stem in stems}


def _fit_problems(base: WeightsReader, adapter: WeightsReader, stem: str) -> list[str]:
    """Return what prevents A [R, in] and B [out, R] of one layer from being added to its weight [out, in]."""
    names = [f"{stem}lora_A.weight", f"{stem}lora_B.weight"]
    problems = [f"{name}: missing" for name in names if name not in adapter.shapes]
    weight = f"{stem}weight"
    if weight not in base.shapes:
        return [*problems, f"{stem}lora_*: the model has no {weight}"]
    if base.dtypes[weight] not in _MERGEABLE_DTYPES:
        problems.append(f"{weight}: the model stores it as {base.dtypes[weight]}; merging needs bf16, fp16 or fp32")
    if problems:
        return problems
    shape_a, shape_b = (adapter.shapes[name] for name in names)
    shape = base.shapes[weight]
    if len(shape_a) != 2 or len(shape_b) != 2 or (shape_b[0], shape_a[1]) != shape or shape_a[0] != shape_b[1]:
        return [f"{stem}lora_*: B {list(shape_b)} times A {list(shape_a)} cannot be added to {weight} {list(shape)}"]
    return []
