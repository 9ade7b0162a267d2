"""FLOPs of a training step, and the machine's rate of matrix products."""

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch

from finetune.data.data_loader import Batch
from model.args import ModelArgs

_BOS, _EOS = 1, 2  # in all of Mistral's tokenizers
_MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}
_MATMUL_SECONDS = 5.0  # of one product


@dataclasses.dataclass
class Work:
    """Counts over batches."""

    positions: int = 0  # including padding
    trained: int = 0  # positions with a loss
    pairs: int = 0  # of a position and a position it attends to, including itself
    documents: int = 0
    complete: int = 0  # documents that are complete samples
    complete_positions: int = 0  # of those: a sample of n tokens has n - 1, the predictions

    def add(self, *batches: Batch) -> None:
        for batch in batches:
            sizes, complete = np.array(batch.sizes), np.fromiter(_complete(batch), bool)
            self.positions += len(batch.x)
            self.trained += batch.trained_tokens
            self.pairs += int((sizes * (sizes + 1) // 2).sum())
            self.documents += len(batch.rows)
            self.complete += int(complete.sum())
            self.complete_positions += int(sizes[complete].sum())


def document_bounds(batch: Batch) -> Iterator[tuple[int, int]]:
    """Return the first position of each document, and the one after its last; padding is one, too."""
    return itertools.pairwise(itertools.accumulate(batch.sizes, initial=0))


def _complete(batch: Batch) -> Iterator[bool]:
    """Yield for each document whether it begins and ends like a sample, which padding does not."""
    for start, end in document_bounds(batch):
        yield bool(batch.x[start] == _BOS and batch.y[end - 1] == _EOS)


def model_flops(shapes: ModelArgs, rank: int, work: Work) -> float:
    """Return the floating-point operations of a step, by the same formula for every implementation.

    Two per weight and position in the forward pass, two for the input's gradient, and for adapters two more for their
    own gradient. Attention's backward pass has twice the products of its forward pass. The head counts only at
    positions with a loss. Products of the last block count at all positions, although this project skips those without
    a loss.
    """
    base, adapters = _block_weights(shapes, rank)
    blocks = shapes.n_layers * work.positions * (4 * base + 6 * adapters)
    head = 4 * shapes.dim * shapes.vocab_size * work.trained
    return blocks + head + 3 * _attention_flops(shapes, work)


def recomputed_flops(shapes: ModelArgs, rank: int, work: Work) -> float:
    """Return what recomputing every block adds to `model_flops`: their forward pass.

    This project skips the last product of each block, which is not subtracted, so its HFU is an upper bound.
    """
    base, adapters = _block_weights(shapes, rank)
    return shapes.n_layers * work.positions * 2 * (base + adapters) + _attention_flops(shapes, work)


def _block_weights(shapes: ModelArgs, rank: int) -> tuple[int, int]:
    """Return the number of weights in a block's linear layers, and in their adapters, that each token uses."""
    queries, keys = shapes.n_heads * shapes.head_dim, shapes.n_kv_heads * shapes.head_dim
    dim, hidden = shapes.dim, shapes.hidden_dim
    experts, gate = (shapes.moe.num_experts_per_tok, dim * shapes.moe.num_experts) if shapes.moe else (1, 0)
    sides = [(dim, queries), (dim, keys), (dim, keys), (queries, dim)]
    sides += [(dim, hidden), (dim, hidden), (hidden, dim)] * experts
    return gate + sum(a * b for a, b in sides), rank * sum(a + b for a, b in sides)


def _attention_flops(shapes: ModelArgs, work: Work) -> float:
    """Return the FLOPs of one forward pass: scores and weighted sums of values, within the causal mask."""
    return 4 * shapes.n_layers * shapes.n_heads * shapes.head_dim * work.pairs


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 8) -> float:
    """Return the highest FLOP/s of products of square random matrices, the reference for MFU and HFU.

    They are smaller where one would take seconds: in bf16 on a CPU without instructions for it.
    """
    size = _MATMUL_SIZES[device.type]
    small = size // 4
    if 4**3 * min(_product_seconds(small, device, dtype, rounds=2)) > _MATMUL_SECONDS:
        size = small
    return 2 * size**3 / min(_product_seconds(size, device, dtype, rounds))


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[float]:
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
