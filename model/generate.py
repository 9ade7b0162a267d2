"""Batched generation with a key/value cache.

Prompts of different lengths run packed, without padding. Shapes: B sequences, S cache positions, H query heads, K
key/value heads, Dh head width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from .attention import Engine, PackedDocuments, expand_heads
from .transformer import Transformer


class Constraint(Protocol):
    """What may be generated. One object serves one sequence."""

    def allowed(self) -> Sequence[int] | torch.Tensor:
        """Ids that may come next; never empty."""

    def take(self, token: int) -> None:
        """Notes the token that was chosen."""


class _LayerCache:
    """Stands in for a layer's attention engine: the same signature, with keys and values of earlier tokens kept."""

    def __init__(
        self, engine: Engine, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.engine = engine
        self.decoding = False  # the first pass fills the cache with the prompts
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [B, S, K, Dh]
        self.values = torch.zeros_like(self.keys)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        rows = torch.arange(len(documents.lengths), device=q.device)
        rows = rows.repeat_interleave(torch.tensor(documents.lengths, device=q.device))
        self.keys[rows, documents.positions] = k
        self.values[rows, documents.positions] = v
        if not self.decoding:
            return self.engine(q, k, v, documents)
        used = slice(0, int(documents.positions.max()) + 1)
        keys, values = (x[:, used].transpose(1, 2) for x in (self.keys, self.values))  # [B, K, s, Dh]
        seen = torch.arange(used.stop, device=q.device) <= documents.positions[:, None]  # [B, s]
        grouped = q.shape[1] != k.shape[1]
        if grouped and q.device.type != "cpu":
            keys, values = (expand_heads(x, q.shape[1]) for x in (keys, values))
            grouped = False
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, attn_mask=seen[:, None, None], enable_gqa=grouped
        )
        return out.squeeze(2)  # [B, H, Dh]

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these sequences alone."""
        self.keys, self.values = self.keys[rows], self.values[rows]


@contextlib.contextmanager
def _cached(model: Transformer, batch: int, capacity: int) -> Iterator[list[_LayerCache]]:
    attentions = [layer.attention for layer in model.layers]
    engines = [attention.engine for attention in attentions]
    shape = (batch, capacity, model.args.n_kv_heads, model.args.head_dim)
    device = model.tok_embeddings.weight.device
    caches = [_LayerCache(engine, shape, model.compute_dtype, device) for engine in engines]
    for attention, cache in zip(attentions, caches):
        attention.engine = cache
    try:
        yield caches
    finally:
        for attention, engine in zip(attentions, engines):
            attention.engine = engine


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    constraints: Sequence[Constraint] | None = None,
    any_active: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continues every prompt until `eos_id` or `max_tokens` tokens.

    Args:
        prompts: token ids, each at least one.
        temperature: 0 takes the likeliest token.
        generator: randomness for temperatures above 0.
        constraints: one per prompt, or None.
        any_active: whether to go on, given whether any sequence here does; ranks that share a sharded model must run
            the same number of steps, and agree through this.

    Returns:
        The new tokens of each prompt, `eos_id` included where it came.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    device = model.tok_embeddings.weight.device
    lengths = [len(prompt) for prompt in prompts]
    active = list(range(len(prompts)))  # prompt of each cache row; finished ones are dropped half a batch at a time
    last_positions = torch.tensor(lengths, device=device) - 1
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    documents = PackedDocuments.from_lengths(lengths, device)
    ends = documents.cu_seqlens[1:].long() - 1
    was_training = model.training
    model.eval()
    with _cached(model, len(prompts), max(lengths) + max_tokens) as caches:
        logits = model(tokens, documents, head=lambda hidden, weight: _logits(hidden[ends], weight))
        for cache in caches:
            cache.decoding = True
        for step in range(max_tokens):
            chosen = _choose(
                logits, [constraints[row] for row in active] if constraints else None, temperature, generator
            )
            running = []
            for place, (row, token) in enumerate(zip(active, chosen.tolist())):
                if not outputs[row] or outputs[row][-1] != eos_id:
                    outputs[row].append(token)
                    if constraints:
                        constraints[row].take(token)
                if outputs[row][-1] != eos_id:
                    running.append(place)
            if step + 1 == max_tokens or not any_active(bool(running)):
                break
            if running and len(running) <= len(active) // 2:
                rows = torch.tensor(running, device=device)
                active = [active[place] for place in running]
                chosen, last_positions = chosen[rows], last_positions[rows]
                for cache in caches:
                    cache.keep(rows)
            last_positions = last_positions + 1
            logits = model(chosen, _next_tokens(last_positions), head=_logits)
    model.train(was_training)
    return outputs


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight.to(hidden.dtype)).float()


def _next_tokens(positions: torch.Tensor) -> PackedDocuments:
    """One token of each sequence, at these positions."""
    count = len(positions)
    return PackedDocuments(
        lengths=[1] * count,
        positions=positions,
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=positions.device),
        max_length=1,
    )


def _choose(
    logits: torch.Tensor,
    constraints: Sequence[Constraint] | None,
    temperature: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """The next token of each sequence: logits [B, V] -> [B]."""
    if constraints is not None:
        barred = torch.full_like(logits, -torch.inf)
        for row, constraint in enumerate(constraints):
            ids = torch.as_tensor(constraint.allowed(), device=logits.device)
            barred[row, ids] = logits[row, ids]
        logits = barred
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator).squeeze(1)
