"""Adds a LoRA adapter to its base model: W + scaling * B A, one tensor at a time, on the CPU.

python -m utils.merge_lora --initial_model_ckpt BASE --lora_ckpt ADAPTER --dump_ckpt OUT [--scaling 2.0]
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from finetune.cli import run_cli
from finetune.wrapped_model import ADAPTER_NAME
from model.args import LoraArgs, read_params
from model.errors import UserError
from model.lora import merged_weight
from model.weights import (
    SAFETENSORS_NAME,
    SafetensorsWriter,
    WeightsReader,
    new_folder,
    open_safetensors,
    open_weights,
)

TOKENIZER_PATTERNS = ("tokenizer.model*", "tekken*.json")
MERGEABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_NAMED_PROBLEMS = 20


def merge_lora(base_path: Path, adapter_path: Path, destination: Path, scaling: float | None = None) -> None:
    """Writes base + adapter in the adapter's dtype.

    Args:
        base_path: model folder, or its weights file.
        adapter_path: lora.safetensors, or the folder that holds it.
        destination: a new .safetensors file, or a new folder that becomes a complete model.
        scaling: factor of B A; None: as the params.json beside the adapter says.

    Raises:
        UserError: a file is missing or damaged, the adapter does not fit, or the destination exists.
    """
    base = open_weights(base_path)
    adapter = open_safetensors(adapter_path / ADAPTER_NAME if adapter_path.is_dir() else adapter_path)
    adapted = _adapted_tensors(base, adapter)
    if scaling is None:
        scaling = _recorded_scaling(adapter.source.parent)
    if not (scaling > 0 and math.isfinite(scaling)):
        raise UserError(f"The scaling is {scaling}; it must be a positive number (2.0 is usual).")
    if destination.suffix == ".safetensors" and not destination.is_dir():
        if destination.exists():
            raise UserError(f"{destination} already exists: remove it or choose another name.")
        destination.parent.mkdir(parents=True, exist_ok=True)
        _write_merged(base, adapter, adapted, scaling, destination)
    elif destination.suffix in (".pth", ".pt", ".bin"):
        raise UserError(f"{destination}: merged weights are written as .safetensors (or give a folder).")
    else:
        base_folder = base_path if base_path.is_dir() else base_path.parent
        params = {key: value for key, value in read_params(base_folder).items() if key != "lora"}
        with new_folder(destination) as folder:
            (folder / "params.json").write_text(json.dumps(params, indent=4), encoding="utf-8")
            _copy_tokenizer([base_folder, adapter.source.parent], folder)
            _write_merged(base, adapter, adapted, scaling, folder / SAFETENSORS_NAME)
    print(f"Merged checkpoint saved to {destination}")


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


def _recorded_scaling(folder: Path) -> float:
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


def _write_merged(base: WeightsReader, adapter: WeightsReader, adapted: set[str], scaling: float, path: Path) -> None:
    dtype = next(iter(adapter.dtypes.values()))
    print(f"Merging {len(adapted)} of {len(base.shapes)} tensors to {dtype}.")
    with SafetensorsWriter(path, {name: (shape, dtype) for name, shape in base.shapes.items()}) as writer:
        for name in tqdm(base.shapes, desc="merging", unit="tensor", disable=None):
            tensor = base.read(name).to(dtype)
            if name in adapted:
                stem = name.removesuffix("weight")
                lora_a, lora_b = adapter.read(f"{stem}lora_A.weight"), adapter.read(f"{stem}lora_B.weight")
                tensor = merged_weight(tensor, lora_a, lora_b, scaling)
            writer.write(name, tensor)


def _copy_tokenizer(sources: list[Path], folder: Path) -> None:
    """Copies the tokenizer of the first folder that has one."""
    for source in sources:
        if files := [file for pattern in TOKENIZER_PATTERNS for file in source.glob(pattern)]:
            for file in files:
                shutil.copyfile(file, folder / file.name)
            return
    print(f"No tokenizer beside the weights in {sources[0]}: the merged folder has none either.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Merges a LoRA adapter into its base model.")
    parser.add_argument("--initial_model_ckpt", type=Path, required=True, help="base model: folder or weights file")
    parser.add_argument("--lora_ckpt", type=Path, required=True, help="lora.safetensors, or the folder that holds it")
    parser.add_argument("--dump_ckpt", type=Path, required=True, help="new .safetensors file, or new model folder")
    parser.add_argument("--scaling", type=float, help="factor of B A; default: what the adapter's params.json says")
    args = parser.parse_args()
    merge_lora(args.initial_model_ckpt, args.lora_ckpt, args.dump_ckpt, args.scaling)


if __name__ == "__main__":
    run_cli(main)
