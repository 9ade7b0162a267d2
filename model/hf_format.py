"""Weights in Hugging Face's layout (transformers' Mistral and Mixtral): names, channel order, files.

The two layouts hold the same numbers under different names, except that the rows of query and key projections are
ordered differently within a head: Mistral's rotary embeddings rotate adjacent channels (2j, 2j + 1), those of
transformers channels (j, j + Dh/2). Shapes: Dh head width, E experts, D model width, F inner width of an expert.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from .args import load_model_args, read_params
from .errors import UserError
from .weights import (
    SafetensorsWriter,
    TensorLocation,
    TensorSource,
    WeightsReader,
    joint_locations,
    open_weights,
    require_same_weights,
    weight_files,
)

logger = logging.getLogger("weights")

HF_STEM = "model"  # file names: model.safetensors or model-00001-of-0000N.safetensors
INDEX_NAME = "model.safetensors.index.json"  # maps tensors to shards; written only, shard headers suffice for reading
MAX_SHARD_BYTES = 5_000_000_000

_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
    "feed_forward.experts": "block_sparse_moe.experts",
}
_FROM_OUTSIDE = {theirs: ours for ours, theirs in _OUTSIDE.items()}
# transformers 5 keeps all experts of a layer in one tensor, under the name "mlp", and may save them in this form.
_FROM_LAYER = {theirs: ours for ours, theirs in _IN_LAYER.items()} | {"mlp.gate": "feed_forward.gate"}
_FUSED_EXPERTS = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTATED = re.compile(r"\.attention\.w[qk]\.(lora_B\.)?weight$")
_ROTARY_TABLE = "rotary_emb.inv_freq"  # stored in old files; computed from head_dim and rope_theta


def hf_name(name: str) -> str:
    """Return transformers' name of a tensor, including adapters such as `layers.0.attention.wq.lora_A.weight`."""
    if not name.startswith("layers."):
        return _renamed(name, _OUTSIDE)
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{_renamed(part, _IN_LAYER)}"


def mistral_name(name: str) -> str:
    """Return Mistral's name of a tensor (the inverse of `hf_name`); other names are returned unchanged."""
    if match := _LAYER.fullmatch(name):
        renamed = _renamed(match[2], _FROM_LAYER)
        return f"layers.{match[1]}.{renamed}" if renamed != match[2] else name
    return _renamed(name, _FROM_OUTSIDE)


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def to_hf(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a tensor [out, in] for transformers; `name` is its name in Mistral's layout."""
    return _reordered(tensor, (head_dim // 2, 2)) if _ROTATED.search(name) else tensor


def from_hf(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a tensor from transformers: the inverse of `to_hf`, for complete heads."""
    return _reordered(tensor, (2, head_dim // 2)) if _ROTATED.search(name) else tensor


def _reordered(tensor: torch.Tensor, pairs: tuple[int, int]) -> torch.Tensor:
    """Transpose each head's rows, viewed as a matrix of shape `pairs`."""
    return tensor.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


class HFWeightsReader(WeightsReader):
    """Read Hugging Face files under Mistral's names and in Mistral's channel order."""

    def __init__(self, source: Path, locations: dict[str, TensorLocation], head_dim: int) -> None:
        super().__init__(source, locations)
        self._head_dim = head_dim

    def stored_name(self, name: str) -> str:
        return hf_name(name)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor or some of its rows, see `WeightsReader.read`. Reordered tensors are read in complete heads."""
        if not _ROTATED.search(name):
            return super().read(name, rows)
        start, stop, _ = (rows or slice(None)).indices(self.shapes[name][0])
        first = start // self._head_dim * self._head_dim
        heads = super().read(name, slice(first, -(-stop // self._head_dim) * self._head_dim))
        return from_hf(name, heads, self._head_dim)[start - first : max(stop, start) - first].contiguous()


def _mistral_locations(source: Path, locations: dict[str, TensorLocation]) -> dict[str, TensorLocation]:
    found: dict[str, TensorLocation] = {}
    for name, location in locations.items():
        if name.endswith(_ROTARY_TABLE):
            continue
        match = _LAYER.fullmatch(name)
        if match and match[2] in _FUSED_EXPERTS:
            prefix = f"layers.{match[1]}.feed_forward.experts"
            found |= _expert_locations(source, prefix, _FUSED_EXPERTS[match[2]], location)
        else:
            found[mistral_name(name)] = location
    return found


def _expert_locations(
    source: Path, prefix: str, parts: tuple[str, ...], fused: TensorLocation
) -> dict[str, TensorLocation]:
    """Locate each expert's weights in a fused tensor: [E, 2F, D] with w1 above w3, or [E, D, F] with w2."""
    if len(fused.shape) != 3 or fused.shape[1] % len(parts):
        raise UserError(
            f"{source}: the tensor of all experts of {prefix} has an unexpected shape: {list(fused.shape)}."
        )
    shape = (fused.shape[1] // len(parts), fused.shape[2])
    size = math.prod(shape) * fused.dtype.itemsize
    names = [f"{prefix}.{expert}.{part}.weight" for expert in range(fused.shape[0]) for part in parts]
    return {
        name: dataclasses.replace(fused, offset=fused.offset + index * size, shape=shape)
        for index, name in enumerate(names)
    }


def write_hf_weights(
    folder: Path, weights: TensorSource, head_dim: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write weights in Hugging Face's layout, one tensor at a time: model.safetensors, or shards and their index.

    Args:
        folder: existing folder to write to.
        weights: all tensors, under Mistral's names.
        head_dim: width of one attention head.
        max_shard_bytes: maximum size of a file; a single larger tensor gets its own file.
    """
    sizes = {name: math.prod(shape) * weights.dtypes[name].itemsize for name, shape in weights.shapes.items()}
    shards = _split(sizes, max_shard_bytes)
    files = [f"{HF_STEM}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{HF_STEM}.safetensors"]
    progress = tqdm(total=len(sizes), desc="writing", unit="tensor", disable=None)
    for file, names in zip(files, shards, strict=True):
        plan = {hf_name(name): (weights.shapes[name], weights.dtypes[name]) for name in names}
        with SafetensorsWriter(folder / file, plan, {"format": "pt"}) as writer:
            for name in names:
                writer.write(hf_name(name), to_hf(name, weights.read(name), head_dim))
                progress.update()
    progress.close()
    if len(shards) > 1:
        weight_map = {hf_name(name): file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Group names in order, so that a group exceeds the limit only if it is a single tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def open_model_weights(path: Path) -> WeightsReader:
    """Open the weights of a model under Mistral's names: a folder in either layout, or a file in Mistral's layout.

    If a folder has them in both layouts, as published models do, they must be the same; Mistral's layout is read.

    Raises:
        UserError: there are no weights, several sets of weights, or a corrupt file.
    """
    if not path.is_dir():
        return open_weights(path)
    files = weight_files(path, HF_STEM)
    sets = [_hf_weights(path, joint_locations(files))] if files else []
    if not files or any(path.glob("consolidated*.safetensors")) or any(path.glob("consolidated*.pth")):
        weights = open_weights(path)
        sets.insert(0, WeightsReader(weights.source, _with_head(path, weights.locations)))
    if bins := sorted(path.glob("pytorch_model*.bin")):
        sets.append(_hf_weights(path, {name: at for file in bins for name, at in open_weights(file).locations.items()}))
    for other in sets[1:]:
        require_same_weights(path, sets[0], other)
        logger.info("%s has the same weights in %s and %s; the former are read.", path, sets[0].files, other.files)
    return sets[0]


def _hf_weights(folder: Path, locations: dict[str, TensorLocation]) -> WeightsReader:
    renamed = _with_head(folder, _mistral_locations(folder, locations))
    return HFWeightsReader(folder, renamed, load_model_args(folder).head_dim)


def _with_head(folder: Path, locations: dict[str, TensorLocation]) -> dict[str, TensorLocation]:
    """Add the output head, if it is tied to the embeddings and not stored."""
    if "output.weight" in locations or not read_params(folder).get("tied_embeddings"):
        return locations
    return {**locations, "output.weight": locations["tok_embeddings.weight"]}
