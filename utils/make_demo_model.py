"""Writes a tiny Mistral model folder with random weights, for demonstrations and tests on a laptop.

`python -m utils.make_demo_model --out DIR [--dim 128] [--n_layers 2] [--seed 0]`
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.cli import run_cli
from finetune.data.tokenize import V3_VOCABULARY
from model.args import ModelArgs
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, SafetensorsWriter, new_folder

HEAD_DIM = 32


def demo_model_args(dim: int, n_layers: int) -> ModelArgs:
    """Mistral's proportions at a small width: grouped heads, SwiGLU, the v3 vocabulary."""
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        head_dim=HEAD_DIM,
        hidden_dim=2 * dim,
        n_heads=dim // HEAD_DIM,
        n_kv_heads=max(1, dim // HEAD_DIM // 2),
        norm_eps=1e-5,
        vocab_size=V3_VOCABULARY,
        rope_theta=1e4,
    )


def make_demo_model(out: Path, args: ModelArgs, seed: int) -> None:
    """Creates the folder `out` with params.json, bf16 weights and the v3 tokenizer.

    Raises:
        UserError: `out` exists and is not empty.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(args).named_parameters()}
    with new_folder(out) as folder:
        (folder / "params.json").write_text(json.dumps(dataclasses.asdict(args), indent=4), encoding="utf-8")
        shutil.copyfile(MistralTokenizer.v3().instruct_tokenizer.tokenizer.file_path, folder / "tokenizer.model.v3")
        plan = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
        with SafetensorsWriter(folder / SAFETENSORS_NAME, plan) as file:
            for name, shape in shapes.items():
                file.write(name, _initial_weight(name, shape, generator).to(torch.bfloat16))


def _initial_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name == "tok_embeddings.weight":
        return torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a tiny Mistral model folder with random weights.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--dim", type=int, default=128, help=f"model width, a multiple of {2 * HEAD_DIM}")
    parser.add_argument("--n_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_demo_model(options.out, demo_model_args(options.dim, options.n_layers), options.seed)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    run_cli(main)
