"""Trains the demo's base model: all weights, from nothing, on a CPU in a minute or two.

Only the rows of the embeddings and the output head whose tokens occur in the lessons take part, which makes the head
some twenty times smaller; the vocabulary is complete again in what is returned.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from finetune.data.data_loader import Batch
from finetune.data.tokenize import TokenSample
from finetune.loss import batch_loss
from model.args import ModelArgs
from model.transformer import Transformer

LESSONS_PER_STEP = 16
_LR, _WARM_UP, _LAST_RATE = 4e-3, 0.1, 0.02  # highest rate; share of the steps; last rate / highest
_INITIAL_STD = 0.05


def train_demo_base(args: ModelArgs, lessons: Sequence[TokenSample], seed: int) -> dict[str, torch.Tensor]:
    """Trains on the lessons in their order, LESSONS_PER_STEP a step, on the tokens of their masks.

    Args:
        args: shapes of the model, with the complete vocabulary.
        lessons: a multiple of LESSONS_PER_STEP.
        seed: of the initial weights.

    Returns:
        fp32 weights by name, for the complete vocabulary.
    """
    used, compact = np.unique(np.concatenate([lesson.tokens for lesson in lessons]), return_inverse=True)
    samples = np.split(compact, np.cumsum([len(lesson.tokens) for lesson in lessons])[:-1])
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(dataclasses.replace(args, vocab_size=len(used)))
    _initialise(model, generator)
    steps = range(0, len(samples), LESSONS_PER_STEP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(steps)))
    with tqdm(steps, unit="step", disable=None) as bar:
        for start in bar:
            chosen = slice(start, start + LESSONS_PER_STEP)
            batch = _batch(samples[chosen], [lesson.masks for lesson in lessons[chosen]])
            loss = batch_loss(model, batch, torch.device("cpu"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    answered = np.unique(np.concatenate([sample[lesson.masks] for sample, lesson in zip(samples, lessons)]))
    return _expand(model, used, answered, args.vocab_size, generator)


def _initialise(model: Transformer, generator: torch.Generator) -> None:
    """Normal weights, those that write to the residual stream smaller by the root of their number (GPT-2's rule)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            writes = name.endswith(("wo.weight", "w2.weight"))
            std = _INITIAL_STD / math.sqrt(2 * model.args.n_layers) if writes else _INITIAL_STD
            nn.init.normal_(parameter, std=std, generator=generator)


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: linear warm-up, then half a cosine."""
    done = (step + 1) / steps
    if done < _WARM_UP:
        return done / _WARM_UP
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1, (done - _WARM_UP) / (1 - _WARM_UP))))


def _batch(samples: Sequence[np.ndarray], masks: Sequence[Sequence[bool]]) -> Batch:
    """Samples as documents of one sequence; each token predicts the next."""
    return Batch(
        x=np.concatenate([sample[:-1] for sample in samples]),
        y=np.concatenate([sample[1:] for sample in samples]),
        sizes=[len(sample) - 1 for sample in samples],
        y_mask=np.concatenate([np.asarray(mask[1:]) for mask in masks]),
    )


def _expand(
    model: Transformer, used: np.ndarray, answered: np.ndarray, vocab_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Puts the rows of `used` in their places of a complete vocabulary.

    Tokens without a row get a random embedding, and for the head the mean row of the tokens that were never an
    answer (all but `answered`), so that they are as improbable.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    places = torch.from_numpy(used)
    embeddings = nn.init.normal_(torch.empty(vocab_size, model.args.dim), std=_INITIAL_STD, generator=generator)
    never = torch.ones(len(used), dtype=torch.bool)
    never[torch.from_numpy(answered)] = False
    head = weights["output.weight"]
    mean = head[never].mean(0) if never.any() else head.mean(0)
    heads = mean.repeat(vocab_size, 1)
    embeddings[places], heads[places] = weights["tok_embeddings.weight"], head
    return weights | {"tok_embeddings.weight": embeddings, "output.weight": heads}
