"""Writes a tiny Mistral model folder for demonstrations and tests on a laptop.

`python -m utils.make_demo_model --out DIR [--steps 1500] [--cim10 TABLE] [--dim 128] [--n_layers 2] [--seed 0]`

The model is trained for a minute or two to read fictional French notes and to name the diagnoses it finds in them
(`utils.fictional_notes.pretraining_examples`); it knows no CIM-10 code and no answer of the
fine-tuning task. `--steps 0` leaves it random.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tqdm import tqdm

from finetune.cli import run_cli
from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import V3_VOCABULARY, SampleEncoder, TokenSample
from model.args import ModelArgs
from model.atomic import new_folder
from model.errors import UserError
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, SafetensorsWriter
from utils.fictional_notes.catalogue import Catalogue, load_catalogue
from utils.fictional_notes.demo_base import LESSONS_PER_STEP, train_demo_base
from utils.fictional_notes.pretraining_examples import PretrainingExamples
from utils.icd10.codes import Cim10Table

HEAD_DIM = 32
STEPS = 1500


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


def make_demo_model(out: Path, args: ModelArgs, seed: int, steps: int = 0, catalogue: Catalogue | None = None) -> None:
    """Creates the folder `out` with params.json, bf16 weights and the v3 tokenizer.

    Args:
        out: folder to create.
        args: shapes of the model.
        seed: of weights and lessons, 0 or more.
        steps: to train; 0: the weights stay random.
        catalogue: diagnoses to teach; None: the common ones.

    Raises:
        UserError: `out` exists and is not empty.
    """
    with new_folder(out) as folder:
        (folder / "params.json").write_text(json.dumps(dataclasses.asdict(args), indent=4), encoding="utf-8")
        shutil.copyfile(MistralTokenizer.v3().instruct_tokenizer.tokenizer.file_path, folder / "tokenizer.model.v3")
        if steps:
            lessons = _encoded_lessons(catalogue or load_catalogue(), seed, steps * LESSONS_PER_STEP)
            weights = train_demo_base(args, lessons, seed)
        else:
            weights = _random_weights(args, seed)
        plan = {name: (tuple(weight.shape), torch.bfloat16) for name, weight in weights.items()}
        with SafetensorsWriter(folder / SAFETENSORS_NAME, plan) as file:
            for name, weight in weights.items():
                file.write(name, weight.to(torch.bfloat16))


def _encoded_lessons(catalogue: Catalogue, seed: int, count: int) -> list[TokenSample]:
    encoder = SampleEncoder(MistralTokenizer.v3().instruct_tokenizer)
    rows = tqdm(PretrainingExamples(catalogue, seed).lessons(count), total=count, unit=" lessons", disable=None)
    return [encoder.encode_conversation(parse_conversation(row)) for row in rows]


def _random_weights(args: ModelArgs, seed: int) -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(args).named_parameters()}
    return {name: _initial_weight(name, shape, generator) for name, shape in shapes.items()}


def _initial_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name == "tok_embeddings.weight":
        return torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps; 0: random (default: %(default)s)")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="teach only the diagnoses of this CIM-10 table")
    parser.add_argument("--dim", type=int, default=128, help=f"model width, a multiple of {2 * HEAD_DIM}")
    parser.add_argument("--n_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 0 or options.seed < 0:
        raise UserError(f"--steps {options.steps} --seed {options.seed}: expected 0 or more.")
    if options.dim < 1 or options.dim % (2 * HEAD_DIM):
        raise UserError(f"--dim {options.dim}: expected a multiple of {2 * HEAD_DIM}.")
    catalogue = load_catalogue(Cim10Table.from_file(options.cim10) if options.cim10 else None)
    args = demo_model_args(options.dim, options.n_layers)
    make_demo_model(options.out, args, options.seed, options.steps, catalogue)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    run_cli(main)
