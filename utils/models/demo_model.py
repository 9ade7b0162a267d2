"""The demo's base model: a tiny Mistral model, pretrained from scratch on a CPU in a minute or two.

The training data is `utils.fictional_notes.pretraining_examples`. Training uses a reduced vocabulary, the tokens that
occur in the data, which makes the output head about 20 times smaller. The saved weights have the complete vocabulary.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from torch import nn
from tqdm import tqdm

from finetune.args import OptimArgs
from finetune.data.conversation import parse_conversation
from finetune.data.data_loader import Batch
from finetune.data.tokenize import SampleEncoder, TokenSample
from finetune.data.tokenizer_files import V3_VOCABULARY, load_instruct_tokenizer
from finetune.loss import batch_loss
from finetune.optim import build_optimizer
from model.args import ModelArgs
from model.atomic import new_folder
from model.errors import UserError
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, SafetensorsWriter
from utils.fictional_notes.catalogue import Catalogue, load_catalogue
from utils.fictional_notes.pretraining_examples import PretrainingExamples

HEAD_DIM = 32
EXAMPLES_PER_STEP = 16
_INITIAL_STD = 0.05


def demo_model_args(dim: int, n_layers: int) -> ModelArgs:
    """Return Mistral's proportions at a small width: grouped heads, SwiGLU, the v3 vocabulary.

    Raises:
        UserError: `dim` is not a multiple of two heads.
    """
    if dim < 1 or dim % (2 * HEAD_DIM):
        raise UserError(f"--dim {dim}: expected a multiple of {2 * HEAD_DIM}.")
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
    """Create the folder `out` with params.json, bf16 weights and the v3 tokenizer.

    Args:
        out: folder to create.
        args: shapes of the model.
        seed: seed of the weights and the examples, 0 or more.
        steps: number of training steps; 0 keeps the random weights.
        catalogue: diagnoses to teach; None for the common ones.

    Raises:
        UserError: `out` exists and is not empty.
    """
    with new_folder(out) as folder:
        (folder / "params.json").write_text(json.dumps(dataclasses.asdict(args), indent=4), encoding="utf-8")
        shutil.copyfile(MistralTokenizer.v3().instruct_tokenizer.tokenizer.file_path, folder / "tokenizer.model.v3")
        if steps:
            encoder = SampleEncoder(load_instruct_tokenizer(folder, args.vocab_size))
            weights = train_demo_model(args, _examples(encoder, catalogue or load_catalogue(), seed, steps), seed)
        else:
            weights = _random_weights(args, seed)
        plan = {name: (tuple(weight.shape), torch.bfloat16) for name, weight in weights.items()}
        with SafetensorsWriter(folder / SAFETENSORS_NAME, plan) as file:
            for name, weight in weights.items():
                file.write(name, weight.to(torch.bfloat16))


def _examples(encoder: SampleEncoder, catalogue: Catalogue, seed: int, steps: int) -> list[TokenSample]:
    count = steps * EXAMPLES_PER_STEP
    rows = tqdm(PretrainingExamples(catalogue, seed).rows(count), total=count, unit=" examples", disable=None)
    return [encoder.encode_conversation(parse_conversation(row)) for row in rows]


def _random_weights(args: ModelArgs, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(args).named_parameters()}
    return {name: _random_weight(name, shape, generator) for name, shape in shapes.items()}


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name == "tok_embeddings.weight":
        return torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def train_demo_model(args: ModelArgs, examples: Sequence[TokenSample], seed: int) -> dict[str, torch.Tensor]:
    """Train on the examples in the given order, EXAMPLES_PER_STEP per step, with loss on the tokens of their masks.

    Args:
        args: shapes of the model, with the complete vocabulary.
        examples: a multiple of EXAMPLES_PER_STEP.
        seed: seed of the initial weights.

    Returns:
        fp32 weights by name, for the complete vocabulary.
    """
    used, compact = np.unique(np.concatenate([example.tokens for example in examples]), return_inverse=True)
    samples = np.split(compact, np.cumsum([len(example.tokens) for example in examples])[:-1])
    masks = [np.asarray(example.masks, dtype=bool) for example in examples]
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(dataclasses.replace(args, vocab_size=len(used)))
    _initialize(model, generator)
    steps = range(0, len(samples), EXAMPLES_PER_STEP)
    optimizer, schedule = build_optimizer(model.parameters(), _optim_args(len(steps)), len(steps))
    with tqdm(steps, unit="step", disable=None) as bar:
        for start in bar:
            chosen = slice(start, start + EXAMPLES_PER_STEP)
            loss = batch_loss(model, _batch(samples[chosen], masks[chosen]), torch.device("cpu"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    answered = np.unique(np.concatenate([sample[mask] for sample, mask in zip(samples, masks)]))
    return _expand(model, used, answered, args.vocab_size, generator)


def _optim_args(steps: int) -> OptimArgs:
    """Return the settings of a linear warm-up from 0 over 10 % of the steps, then a cosine decay to 2 % of the peak."""
    warm_up = max(1.0, 0.1 * steps)
    return OptimArgs(
        lr=4e-3,
        schedule="cosine",
        weight_decay=0.01,
        pct_start=0.1,
        div_factor=warm_up,
        final_div_factor=50 / warm_up,
    )


def _initialize(model: Transformer, generator: torch.Generator) -> None:
    """Initialize like GPT-2: normal weights, scaled by 1 / sqrt(2 n_layers) if they write to the residual stream."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            writes = name.endswith(("wo.weight", "w2.weight"))
            std = _INITIAL_STD / math.sqrt(2 * model.args.n_layers) if writes else _INITIAL_STD
            nn.init.normal_(parameter, std=std, generator=generator)


def _batch(samples: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Batch:
    """Pack samples as documents of one sequence; each token predicts the next."""
    return Batch(
        x=np.concatenate([sample[:-1] for sample in samples]),
        y=np.concatenate([sample[1:] for sample in samples]),
        sizes=[len(sample) - 1 for sample in samples],
        y_mask=np.concatenate([mask[1:] for mask in masks]),
    )


def _expand(
    model: Transformer, used: np.ndarray, answered: np.ndarray, vocab_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Expand the embeddings and the output head from the tokens in `used` to the complete vocabulary.

    Unused tokens get a random embedding. Their row of the head is the mean row of the tokens that are never part of an
    answer (all but `answered`), which makes them as improbable as those.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = torch.from_numpy(used)
    embeddings = nn.init.normal_(torch.empty(vocab_size, model.args.dim), std=_INITIAL_STD, generator=generator)
    never = torch.ones(len(used), dtype=torch.bool)
    never[torch.from_numpy(answered)] = False
    head = weights["output.weight"]
    mean = head[never].mean(0) if never.any() else head.mean(0)
    expanded_head = mean.repeat(vocab_size, 1)
    embeddings[rows], expanded_head[rows] = weights["tok_embeddings.weight"], head
    return weights | {"tok_embeddings.weight": embeddings, "output.weight": expanded_head}
