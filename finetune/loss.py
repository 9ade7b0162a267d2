"""Cross-entropy without the logits: the output head is applied where there is a loss, some rows at a time.

Shapes: T tokens, N trained tokens, D model width, V vocabulary.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from model.transformer import Head, Transformer

from .data.data_loader import Batch

# fp32 values that exist at a time: 8 MiB, so that they stay in a CPU's cache, and 128 MiB, which keep a GPU busy.
LOGITS_PER_CHUNK_ON_CPU, LOGITS_PER_CHUNK = 1 << 21, 1 << 25


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, weighted or not, with the gradients computed along with the loss.

    Only one chunk of logits exists at any time; nothing of size [N, V] is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        needs_grad: bool,
        shares: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype = hidden.dtype
        on_cpu = hidden.device.type == "cpu"
        if on_cpu:
            hidden = hidden.float()  # most CPUs multiply fp16 and bf16 tens of times slower than fp32
        working_weight = weight.to(dtype).to(hidden.dtype)  # [V, D]
        # Gradients stay undivided by N until backward: fp16 would lose the small ones.
        grad_hidden = torch.empty_like(hidden) if needs_grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if needs_grad and ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, (LOGITS_PER_CHUNK_ON_CPU if on_cpu else LOGITS_PER_CHUNK) // weight.shape[0])
        for start in range(0, len(hidden), rows):
            chunk, chunk_targets = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(chunk, working_weight).float()  # [n, V]
            log_probabilities = torch.log_softmax(logits, dim=-1)
            losses = F.nll_loss(log_probabilities, chunk_targets, reduction="sum" if shares is None else "none")
            loss += losses if shares is None else losses @ shares[start : start + rows]
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax(logits) - one_hot(targets)
            probabilities = log_probabilities.exp_()
            probabilities[torch.arange(len(chunk), device=chunk.device), chunk_targets] -= 1
            if shares is not None:
                probabilities *= shares[start : start + rows, None]
            grad_logits = probabilities.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, working_weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.to(dtype), grad_weight)
        ctx.count = max(len(hidden), 1) if shares is None else shares.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return loss / ctx.count

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * (grad_output / ctx.count)).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return *grads, None, None, None


def cross_entropy_head(targets: torch.Tensor, shares: torch.Tensor | None = None) -> Head:
    """Makes the head that turns final hidden states [N, D] into the mean loss.

    Args:
        targets: [N] int64, the tokens to predict.
        shares: [N] fp32, how much each of them counts; None: all the same.
    """
    return functools.partial(_cross_entropy, targets=targets, shares=shares)


def _cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor | None
) -> torch.Tensor:
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled(), shares)


def batch_loss(model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
    """Mean cross-entropy over a batch's trained positions, each counting as its message's weight says; in nats."""
    targets = torch.from_numpy(batch.y).to(device, non_blocking=True)
    trained, shares = None, None
    if batch.y_mask is not None:
        trained = torch.from_numpy(np.flatnonzero(batch.y_mask)).to(device, non_blocking=True)
        targets = targets[trained]
        if batch.y_mask.dtype != bool:
            shares = torch.from_numpy(batch.y_mask[batch.y_mask > 0]).to(device, torch.float32)
    inputs = torch.from_numpy(batch.x).to(device, non_blocking=True)
    return model(inputs, batch.sizes, head=cross_entropy_head(targets, shares), wanted=trained)
