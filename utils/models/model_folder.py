"""Model folders: an adapter added to its base, one tensor at a time, and what else a folder needs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.run_dir import find_weights
from finetune.wrapped_model import ADAPTER_NAME
from model.args import LoraArgs, ModelArgs, read_params
from model.atomic import new_folder
from model.errors import UserError
from model.hf_format import open_model_weights
from model.lora import merged_weight
from model.weights import (
    SAFETENSORS_NAME,
    SafetensorsWriter,
    TensorSource,
    WeightsReader,
    open_safetensors,
)

TOKENIZER_PATTERNS = ("tokenizer.model*", "tekken*.json")
MERGEABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_NAMED_PROBLEMS = 20


class MergedWeights:
    """The tensors of base + adapter, each computed when it is read, on the CPU.

    Attributes:
        base, adapter: what is merged.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor: the adapter's.
    """

    def __init__(self, base: WeightsReader, adapter: WeightsReader, scaling: float) -> None:
        self.base, self.adapter = base, adapter
        self._adapted = _adapted_tensors(base, adapter)
        self._scaling = scaling
        self.shapes = base.shapes
        dtype = next(iter(adapter.dtypes.values()))
        self.dtypes = dict.fromkeys(base.shapes, dtype)
        print(f"Merging {len(self._adapted)} of {len(self.shapes)} tensors to {dtype}.")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor of `shapes`."""
        tensor = self.base.read(name).to(self.dtypes[name])
        if name not in self._adapted:
            return tensor
        stem = name.removesuffix("weight")
        lora_a, lora_b = (self.adapter.read(f"{stem}{part}.weight") for part in ("lora_A", "lora_B"))
        return merged_weight(tensor, lora_a, lora_b, self._scaling)


def open_merged(base_path: Path, adapter_path: Path, scaling: float | None = None) -> MergedWeights:
    """Opens base and adapter and checks that they fit.

    Args:
        base_path: model folder, or its weights file.
        adapter_path: lora.safetensors, or a folder that `find_weights` finds it by.
        scaling: factor of B A; None: as the params.json beside the adapter says.

    Raises:
        UserError: a file is missing or damaged, or the adapter does not fit.
    """
    base = open_model_weights(base_path)
    adapter = open_safetensors(find_weights(adapter_path) / ADAPTER_NAME if adapter_path.is_dir() else adapter_path)
    if scaling is None:
        scaling = recorded_scaling(adapter.source.parent)
    if not (scaling > 0 and math.isfinite(scaling)):
        raise UserError(f"The scaling is {scaling}; it must be a positive number (2.0 is usual).")
    return MergedWeights(base, adapter, scaling)


def write_model_folder(
    destination: Path, weights: TensorSource, params: dict[str, Any], tokenizers: list[Path]
) -> None:
    """Writes a model folder in Mistral's layout, whole or not at all.

    Args:
        destination: a new folder.
        weights: all tensors of the model.
        params: what `model.args.read_params` says of it.
        tokenizers: folders; the tokenizer of the first that has one is copied.

    Raises:
        UserError: the destination exists, or the disk is full.
    """
    # All tensors are written, the head's too, and none is an adapter any more.
    params = {key: value for key, value in params.items() if key not in ("lora", "tied_embeddings")}
    params.setdefault("rope_theta", ModelArgs.rope_theta)  # loaders disagree on what its absence means
    with new_folder(destination) as folder:
        (folder / "params.json").write_text(json.dumps(params, indent=4), encoding="utf-8")
        copy_tokenizer(tokenizers, folder)
        write_weights(weights, folder / SAFETENSORS_NAME)


def write_weights(weights: TensorSource, path: Path) -> None:
    """Writes a .safetensors file, whole or not at all."""
    plan = {name: (shape, weights.dtypes[name]) for name, shape in weights.shapes.items()}
    with SafetensorsWriter(path, plan) as writer:
        for name in tqdm(plan, desc="writing", unit="tensor", disable=None):
            writer.write(name, weights.read(name))


def _adapted_tensors(base: WeightsReader, adapter: WeightsReader) -> set[str]:
    """Checks that the adapter fits the base; returns the names of the base tensors it changes.

    Raises:
        UserError: it does not; every tensor at fault is named (up to MAX_NAMED_PROBLEMS).
    """
    if not any("lora" in name for name in adapter.shapes):
        raise UserError(
            f"{adapter.source} holds no LoRA tensors (names that end in lora_A.weight and lora_B.weight): "
            "--lora_ckpt must be the lora.safetensors of a checkpoint."
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
    if len(dtypes) > 1 or not set(adapter.dtypes.values()) <= set(MERGEABLE_DTYPES):
        problems.append(f"its dtypes are {', '.join(dtypes)}: expected one of bfloat16, float16, float32 throughout")
    if problems:
        shown = problems[:MAX_NAMED_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise UserError(
            f"The adapter {adapter.source} does not fit the model {base.source}; was it trained on another one?\n  "
            + "\n  ".join(shown)
        )
    return {f"{stem}weight" for stem in stems}


def _fit_problems(base: WeightsReader, adapter: WeightsReader, stem: str) -> list[str]:
    """Says what hinders A [R, in] and B [out, R] of one linear from changing its weight [out, in]."""
    names = [f"{stem}lora_A.weight", f"{stem}lora_B.weight"]
    problems = [f"{name}: is missing" for name in names if name not in adapter.shapes]
    weight = f"{stem}weight"
    if weight not in base.shapes:
        return [*problems, f"{stem}lora_*: the model has no {weight}"]
    if base.dtypes[weight] not in MERGEABLE_DTYPES:
        problems.append(f"{weight}: the model stores it as {base.dtypes[weight]}; merging needs bf16, fp16 or fp32")
    if problems:
        return problems
    shape_a, shape_b = (adapter.shapes[name] for name in names)
    shape = base.shapes[weight]
    if len(shape_a) != 2 or len(shape_b) != 2 or (shape_b[0], shape_a[1]) != shape or shape_a[0] != shape_b[1]:
        return [f"{stem}lora_*: B {list(shape_b)} times A {list(shape_a)} cannot be added to {weight} {list(shape)}"]
    return []


def recorded_scaling(folder: Path) -> float:
    """Returns `lora.scaling` of the adapter's params.json; without one, the original's default, and says so."""
    default = LoraArgs().scaling
    lora = read_params(folder).get("lora") if (folder / "params.json").is_file() else None
    if not isinstance(lora, dict) or "scaling" not in lora:
        print(f"{folder} has no params.json that records the adapter's scaling: taking the default {default}.")
        return default
    if isinstance(lora["scaling"], bool) or not isinstance(lora["scaling"], int | float):
        raise UserError(f"{folder / 'params.json'}: `lora.scaling` is {lora['scaling']!r}; expected a number.")
    print(f"Scaling {lora['scaling']} as recorded in {folder / 'params.json'}.")
    return float(lora["scaling"])


def copy_tokenizer(sources: list[Path], folder: Path) -> list[Path]:
    """Copies the tokenizer of the first folder that has one; returns its new files."""
    for source in sources:
        if files := [file for pattern in TOKENIZER_PATTERNS for file in sorted(source.glob(pattern))]:
            return [Path(shutil.copyfile(file, folder / file.name)) for file in files]
    print(f"No tokenizer beside the weights in {sources[0]}: the new folder has none either.")
    return []
