"""Cross-entropy that never materializes all logits: the output head is applied to trained positions, in chunks.

Shapes: T tokens, N trained tokens, D model width, V vocabulary.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from model.transformer import Head, Transformer

from .batch_tensors import tensors_on
from .data.data_loader import Batch
from .mixed_precision import head_dtype

# Logits per chunk: in fp32 16 MiB on a CPU, where products of more rows are no faster; 128 MiB, which keep a GPU busy.
LOGITS_PER_CHUNK_ON_CPU, LOGITS_PER_CHUNK = 1 << 22, 1 << 25


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean or weighted mean cross-entropy of `hidden @ weight.T`; the gradients are computed along with the loss.

    Only one chunk of logits exists at any time; nothing of size [N, V] is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        needs_grad: bool,
        loss_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype, device_type = hidden.dtype, hidden.device.type
        hidden = hidden.to(head_dtype(dtype, device_type))
        working_weight = weight.to(dtype).to(hidden.dtype)  # [V, D]
        # Gradients are divided by N only in the backward pass: in fp16 the small ones would underflow here.
        grad_hidden = torch.empty_like(hidden) if needs_grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if needs_grad and ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        rows = rows_per_chunk(len(weight), device_type)
        for start in range(0, len(hidden), rows):
            chunk, chunk_targets = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(chunk, working_weight).float()  # [n, V]
            log_probabilities = torch.log_softmax(logits, dim=-1)
            losses = F.nll_loss(log_probabilities, chunk_targets, reduction="sum" if loss_weights is None else "none")
            loss += losses if loss_weights is None else losses @ loss_weights[start : start + rows]
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax(logits) - one_hot(targets)
            probabilities = log_probabilities.exp_()
            probabilities[torch.arange(len(chunk), device=chunk.device), chunk_targets] -= 1
            if loss_weights is not None:
                probabilities *= loss_weights[start : start + rows, None]
            grad_logits = probabilities.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, working_weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.to(dtype), grad_weight)
        if loss_weights is None:
            ctx.divisor = max(len(hidden), 1)
        else:
            ctx.divisor = loss_weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return loss / ctx.divisor

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * (grad_output / ctx.divisor)).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return *grads, None, None, None


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Return how many positions are multiplied with the head at once."""
    return max(1, (LOGITS_PER_CHUNK_ON_CPU if device_type == "cpu" else LOGITS_PER_CHUNK) // vocab_size)


def cross_entropy_head(targets: torch.Tensor, loss_weights: torch.Tensor | None = None) -> Head:
    """Return a head that maps final hidden states [N, D] to the mean loss.

    Args:
        targets: [N] int64, the tokens to predict.
        loss_weights: [N] fp32, the weight of each of them; None: all equal.
    """
    return functools.partial(_cross_entropy, targets=targets, loss_weights=loss_weights)


def _cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor | None
) -> torch.Tensor:
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled(), loss_weights)


def batch_loss(model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the mean cross-entropy over a batch's trained positions, weighted by their messages' weights, in nats."""
    tensors = tensors_on(device, batch)
    head = cross_entropy_head(tensors.targets, tensors.loss_weights)
    return model(tensors.inputs, tensors.documents, head=head, output_positions=tensors.trained)
