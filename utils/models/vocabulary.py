"""Extend a model's vocabulary from 32,000 to the 32,768 tokens of the v3 tokenizer."""

import json
import math
import shutil
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tqdm import tqdm

from model.args import ModelArgs, load_model_args, params_path, read_params
from model.atomic import new_folder
from model.errors import UserError
from model.hf_format import open_model_weights
from model.weights import SAFETENSORS_NAME, SafetensorsWriter, WeightsReader

OLD_VOCAB_SIZE = 32000
NEW_VOCAB_SIZE = 32768
N_NEW_TOKENS = NEW_VOCAB_SIZE - OLD_VOCAB_SIZE
N_KEPT_TOKENS = 3  # <unk>, <s>, </s>: v3 inserts its control tokens after these
EXTENDED_TENSORS = ("tok_embeddings.weight", "output.weight")
TOKENIZER_NAME = "tokenizer.model.v3"


def extend_model_vocab(original: Path, extended: Path, seed: int = 0) -> None:
    """Write the model folder `extended` with rows for the 768 new tokens, drawn from N(0, 1 / dim).

    Args:
        original: model folder, .pth or .safetensors.
        extended: folder to create.
        seed: for the new rows; embeddings are drawn before the output head.

    Raises:
        UserError: the original has another vocabulary, is incomplete or corrupt, or the folder is not empty.
    """
    args = load_model_args(original)
    weights = open_model_weights(original)
    _check(original, args, weights)
    generator = torch.Generator().manual_seed(seed)
    new_rows = {  # [768, D] each
        name: torch.randn(N_NEW_TOKENS, args.dim, generator=generator) / math.sqrt(args.dim)
        for name in EXTENDED_TENSORS
    }
    # rope_theta is written because loaders disagree on the default.
    # Head and embeddings are no longer tied, since their new rows differ.
    params = read_params(original) | {"vocab_size": NEW_VOCAB_SIZE, "rope_theta": args.rope_theta}
    params.pop("tied_embeddings", None)
    tensors = {
        name: ((NEW_VOCAB_SIZE, args.dim) if name in new_rows else shape, weights.dtypes[name])
        for name, shape in weights.shapes.items()
    }
    with new_folder(extended) as folder:
        (folder / "params.json").write_text(json.dumps(params, indent=4), encoding="utf-8")
        shutil.copyfile(MistralTokenizer.v3().instruct_tokenizer.tokenizer.file_path, folder / TOKENIZER_NAME)
        with SafetensorsWriter(folder / SAFETENSORS_NAME, tensors) as writer:
            for name in tqdm(weights.shapes, desc="extending", unit="tensor", disable=None):
                tensor = weights.read(name)
                writer.write(name, _with_new_rows(tensor, new_rows[name]) if name in new_rows else tensor)


def _check(original: Path, args: ModelArgs, weights: WeightsReader) -> None:
    if args.vocab_size != OLD_VOCAB_SIZE:
        raise UserError(
            f"{params_path(original)}: `vocab_size` is {args.vocab_size}; only models of {OLD_VOCAB_SIZE} tokens "
            f"can be extended{', and this one already has been' if args.vocab_size == NEW_VOCAB_SIZE else ''}."
        )
    expected = (OLD_VOCAB_SIZE, args.dim)
    wrong = [
        f"{name}: {list(weights.shapes[name]) if name in weights.shapes else 'is missing'}"
        for name in EXTENDED_TENSORS
        if weights.shapes.get(name) != expected
    ]
    if wrong:
        file = params_path(original)
        raise UserError(f"{weights.source} does not match {file}, which requires {list(expected)}: {', '.join(wrong)}.")


def _with_new_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Insert rows [768, D] after the third row of [32000, D], in the tensor's dtype."""
    return torch.cat([tensor[:N_KEPT_TOKENS], rows.to(tensor.dtype), tensor[N_KEPT_TOKENS:]])
