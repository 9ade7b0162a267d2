"""Write model folders in Mistral's layout, one tensor at a time."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.data.tokenizer_files import UNREAD_NAMES
from finetune.preflight import check_tensor_memory
from model.args import ModelArgs
from model.atomic import new_folder
from model.weights import SAFETENSORS_NAME, SafetensorsWriter, TensorSource, require_space

README_NAME = "README.md"
_TOKENIZER_PATTERNS = ("tokenizer.model*", "tekken*.json")


def announce(destination: Path, weights: TensorSource) -> None:
    """Print what will be written where, and its size; errors as `announce_size`, and if a tensor is too large."""
    check_tensor_memory(weights)
    size = sum(math.prod(shape) * weights.dtypes[name].itemsize for name, shape in weights.shapes.items())
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in weights.dtypes.values()}))
    announce_size(destination, len(weights.shapes), dtypes, size)


def announce_size(destination: Path, tensors: int, dtypes: str, size: int) -> None:
    """Print what will be written where, and its size in bytes.

    Raises:
        UserError: the disk has less space.
    """
    amount = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    print(f"Writing {tensors} tensors ({dtypes}), {amount}, to {destination}.", flush=True)
    require_space(destination, size)


def write_model_folder(
    destination: Path, weights: TensorSource, params: dict[str, Any], tokenizers: list[Path], readme: str = ""
) -> None:
    """Write a model folder atomically.

    Args:
        destination: folder to create.
        weights: all tensors of the model.
        params: the model's parameters, as `model.args.read_params` returns them.
        tokenizers: folders; the tokenizer of the first that has one is copied.
        readme: content of a README.md; empty: none is written.

    Raises:
        UserError: the destination exists, or the disk is full.
    """
    # Every tensor is written, the head's too if it is tied to the embeddings, and adapters are merged.
    params = {key: value for key, value in params.items() if key not in ("lora", "tied_embeddings")}
    params.setdefault("rope_theta", ModelArgs.rope_theta)  # loaders disagree on the default
    announce(destination, weights)
    with new_folder(destination) as folder:
        (folder / "params.json").write_text(json.dumps(params, indent=4), encoding="utf-8")
        if readme:
            (folder / README_NAME).write_text(readme, encoding="utf-8")
        copy_tokenizer(tokenizers, folder)
        write_weights(weights, folder / SAFETENSORS_NAME)


def write_weights(weights: TensorSource, path: Path) -> None:
    """Write a .safetensors file atomically."""
    layout = {name: (shape, weights.dtypes[name]) for name, shape in weights.shapes.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name in tqdm(layout, desc="writing", unit="tensor", disable=None):
            writer.write(name, weights.read(name))


def find_tokenizer(sources: list[Path]) -> list[Path]:
    """Return the tokenizer of the first folder that has one in Mistral's files; an empty list if none has."""
    for source in sources:
        if files := [file for pattern in _TOKENIZER_PATTERNS for file in sorted(source.glob(pattern))]:
            return files
    return []


def copy_tokenizer(sources: list[Path], folder: Path) -> list[Path]:
    """Copy the tokenizer of the first folder that has one and return the new files.

    If no folder has one in Mistral's files, copy Hugging Face's, and return none: without them, the new folder would
    seem to have mistral-common's default tokenizer.
    """
    if files := find_tokenizer(sources):
        return [Path(shutil.copyfile(file, folder / file.name)) for file in files]
    for source in sources:
        if names := [name for name in UNREAD_NAMES if (source / name).is_file()]:
            for name in names:
                shutil.copyfile(source / name, folder / name)
            print(f"The tokenizer of {source} is copied in Hugging Face's files ({', '.join(names)}).")
            return []
    print(f"{sources[0]} has no tokenizer, so the new folder has none either.")
    return []
