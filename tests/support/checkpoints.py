"""Tiny random checkpoints, bit-identical on every machine (recipe and hashes: ../shared/golden, GENERATOR.md)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.args import BLOCK_LINEARS

DENSE_SHA256 = "8d0ba7df8ed86971d9455fcd5c37c2c791d1276dd56624ddcfab990c762b898a"
MOE_SHA256 = "84bb425c68a33695f90a6a051b1d268c9cf6f4a3ed8a086eb3c609c6926d5a5d"
TEKKEN_SHA256 = "0cf52ff87105b0cdb16cecf5cc39427834897e84a4afbfe9b26561ba0558ad03"
SMALL = {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rope_theta": 1e4}
TEKKEN_SHAPES = {"dim": 32, "n_layers": 1, "hidden_dim": 64, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 131072}


def make_tiny_checkpoint(
    folder: Path, *, moe: bool = False, seed: int | None = None, dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> Path:
    """Write params.json and consolidated.safetensors; without overrides, the reference models tiny_dense or tiny_moe.

    Args:
        folder: the folder to write, created if necessary.
        moe: four experts per layer, two per token.
        seed: seed of numpy's PCG64; None: 1 for dense, 2 for MoE, as in the reference models.
        dtype: dtype of every tensor.
        **overrides: keys of params.json, such as `vocab_size=256`.

    Returns:
        The folder.
    """
    params = {
        "dim": 64,
        "n_layers": 2,
        "head_dim": 16,
        "hidden_dim": 128,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 32768,
        **({"moe": {"num_experts": 4, "num_experts_per_tok": 2}} if moe else {"rope_theta": 1e6}),
        **overrides,
    }
    generator = np.random.Generator(np.random.PCG64(seed if seed is not None else 2 if moe else 1))
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in _tensors(params, generator)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


def make_tiny_adapter(
    base: Path,
    file: Path,
    *,
    rank: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    targets: Sequence[str] = BLOCK_LINEARS,
) -> Path:
    """Write a random adapter (A and B both non-zero) for the linear layers `targets` of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(base / "consolidated.safetensors").items():
        if name.split(".")[-2] in targets:
            stem = name.removesuffix("weight")
            tensors[f"{stem}lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator).mul(0.1).to(dtype)
            tensors[f"{stem}lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator).mul(0.1).to(dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


def _tensors(params: dict[str, Any], generator: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors as float32, in the order of the recipe."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * generator.standard_normal(dim)).astype(np.float32)

    def feed_forward(prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{prefix}.w1.weight", matrix(hidden, dim)
        yield f"{prefix}.w2.weight", matrix(dim, hidden)
        yield f"{prefix}.w3.weight", matrix(hidden, dim)

    dim, hidden, vocab = params["dim"], params["hidden_dim"], params["vocab_size"]
    q_width, kv_width = (params[heads] * params["head_dim"] for heads in ("n_heads", "n_kv_heads"))
    yield "tok_embeddings.weight", generator.standard_normal((vocab, dim)).astype(np.float32)
    for layer in (f"layers.{index}" for index in range(params["n_layers"])):
        yield f"{layer}.attention.wq.weight", matrix(q_width, dim)
        yield f"{layer}.attention.wk.weight", matrix(kv_width, dim)
        yield f"{layer}.attention.wv.weight", matrix(kv_width, dim)
        yield f"{layer}.attention.wo.weight", matrix(dim, q_width)
        yield f"{layer}.attention_norm.weight", norm()
        yield f"{layer}.ffn_norm.weight", norm()
        if moe := params.get("moe"):
            yield f"{layer}.feed_forward.gate.weight", matrix(moe["num_experts"], dim)
            for expert in range(moe["num_experts"]):
                yield from feed_forward(f"{layer}.feed_forward.experts.{expert}")
        else:
            yield from feed_forward(f"{layer}.feed_forward")
    yield "norm.weight", norm()
    yield "output.weight", matrix(vocab, dim)
