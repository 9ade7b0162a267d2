"""Batched generation with a key/value cache.

Prompts of different lengths run packed, without padding. Shapes: B sequences, S cache positions, H query heads, K
key/value heads, G = H / K query heads that share one, Dh head width, D model width, V vocabulary, C candidate tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from .attention import Engine, PackedDocuments, expand_heads
from .transformer import Transformer


class Constraint(Protocol):
    """What may be generated. One object serves one sequence."""

    def allowed(self) -> Sequence[int] | np.ndarray | torch.Tensor:
        """Ids that may come next; never empty."""

    def take(self, token: int) -> None:
        """Notes the token that was chosen."""


class _Cache:
    """Keys and values of earlier tokens; stands in for the layers' attention engines.

    The prompts' common beginning is computed once, then what follows it, then one token of each sequence at a time.
    """

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, device: torch.device
    ) -> None:
        self.device = device
        self.lengths = [len(prompt) for prompt in prompts]  # of each sequence, its new tokens included
        shape = (len(prompts), model.args.n_kv_heads, max(self.lengths) + max_tokens, model.args.head_dim)
        self.keys = [torch.zeros(shape, dtype=model.compute_dtype, device=self.device) for _ in model.layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]  # [B, K, S, Dh]
        self._common = 0  # tokens of the common beginning that the cache holds
        self._rows = torch.empty(0, dtype=torch.int64)  # [T] the sequence of each token at hand
        self._seen: torch.Tensor | None = None  # [B, 1, 1, s], s the longest sequence; None while in the prompts

    def attend(
        self, layer: int, engine: Engine, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments
    ) -> torch.Tensor:
        """An engine's work for a layer; `engine` does that of whole documents."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows, :, documents.positions] = k
        values[self._rows, :, documents.positions] = v
        if self._seen is not None:
            keys, values = (x[:, :, : self._seen.shape[-1]] for x in (keys, values))
            grouped = q.unflatten(1, (keys.shape[1], -1))  # [B, K, G, Dh]: to the kernel, G tokens at one position
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._seen).flatten(1, 2)
        return self._attend_from(q, keys, values, documents.lengths) if self._common else engine(q, k, v, documents)

    def _attend_from(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Sequence by sequence, since engines know no queries that begin later than their keys: q [T, H, Dh]."""
        outputs = []
        for q_own, *own in zip(q.split(lengths), keys, values):
            seen = self._common + len(q_own)
            k_own, v_own = (expand_heads(x[None, :, :seen], q.shape[1]) for x in own)  # [1, H, seen, Dh]
            mask = causal_lower_right(len(q_own), seen)
            out = F.scaled_dot_product_attention(q_own.transpose(0, 1)[None], k_own, v_own, attn_mask=mask)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    def enter(self, counts: Sequence[int], starts: Sequence[int]) -> PackedDocuments:
        """Makes ready for so many more tokens of each sequence, from these positions on; returns where they stand."""
        documents = PackedDocuments.from_lengths(counts, self.device)
        self._rows = torch.arange(len(counts), device=self.device).repeat_interleave(documents.cu_seqlens.diff())
        documents.positions += torch.tensor(starts, device=self.device)[self._rows]
        return documents

    def share(self, common: int) -> None:
        """Gives all sequences the first `common` tokens of the first one."""
        for x in (*self.keys, *self.values):
            x[:, :, :common] = x[:1, :, :common]
        self._common = common

    def advance(self) -> PackedDocuments:
        """Makes ready for one more token of each sequence."""
        documents = self.enter([1] * len(self.lengths), self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        used = torch.arange(max(self.lengths), device=self.device)
        self._seen = (used <= documents.positions[:, None])[:, None, None]
        return documents

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these sequences alone."""
        index = torch.tensor(rows, device=self.device)
        self.keys, self.values = ([x[index] for x in layers] for layers in (self.keys, self.values))
        self.lengths = [self.lengths[row] for row in rows]


@contextlib.contextmanager
def _engines_replaced(model: Transformer, cache: _Cache) -> Iterator[None]:
    attentions = [layer.attention for layer in model.layers]
    engines = [attention.engine for attention in attentions]
    for layer, (attention, engine) in enumerate(zip(attentions, engines)):
        attention.engine = functools.partial(cache.attend, layer, engine)
    try:
        yield
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
    device: torch.device | None = None,
) -> list[list[int]]:
    """Continues every prompt until `eos_id` or `max_tokens` tokens.

    Args:
        prompts: token ids, each at least one.
        temperature: 0 takes the likeliest token.
        generator: randomness for temperatures above 0.
        constraints: one per prompt, or None.
        any_active: whether to take a step, given whether any sequence here needs it; ranks that share a sharded model
            must run the same number of steps, and agree through this.
        device: computes; None: the one that holds the weights.

    Returns:
        The new tokens of each prompt, `eos_id` included where it came.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # prompt of each cache row; finished ones are dropped half a batch at a time
    cache = _Cache(model, prompts, max_tokens, device or model.tok_embeddings.weight.device)

    def choose(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        candidates = [constraints[row].allowed() for row in active] if constraints else None
        return _choose(hidden[documents.cu_seqlens[1:].long() - 1], weight, candidates, temperature, generator)

    was_training = model.training
    model.eval()
    with _engines_replaced(model, cache):
        tokens, documents = _enter_prompts(model, cache, prompts, any_active)
        for step in range(max_tokens):
            tokens = model(tokens, documents, head=choose)
            running = []
            for place, (row, token) in enumerate(zip(active, tokens.tolist())):
                if not outputs[row] or outputs[row][-1] != eos_id:
                    outputs[row].append(token)
                    if constraints:
                        constraints[row].take(token)
                if outputs[row][-1] != eos_id:
                    running.append(place)
            if step + 1 == max_tokens or not any_active(bool(running)):
                break
            if running and len(running) <= len(active) // 2:
                active = [active[place] for place in running]
                tokens = tokens[running]
                cache.keep(running)
            documents = cache.advance()
    model.train(was_training)
    return outputs


def _enter_prompts(
    model: Transformer, cache: _Cache, prompts: Sequence[Sequence[int]], any_active: Callable[[bool], bool]
) -> tuple[torch.Tensor, PackedDocuments]:
    """Computes what all prompts begin with; returns the packed rest of them."""
    differing = (place for place, column in enumerate(zip(*prompts)) if len(set(column)) > 1)
    shortest = min(map(len, prompts))
    common = min(next(differing, shortest), shortest - 1) if len(prompts) > 1 else 0
    if any_active(common > 0):  # then on every rank, with one token where nothing is common
        first = torch.tensor(prompts[0][: max(1, common)], device=cache.device)
        model(first, cache.enter([len(first)], [0]), head=lambda *_: None)
        cache.share(common)
    tokens = torch.tensor([token for prompt in prompts for token in prompt[common:]], device=cache.device)
    return tokens, cache.enter([len(prompt) - common for prompt in prompts], [common] * len(prompts))


def _choose(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    allowed: Sequence[Sequence[int] | np.ndarray | torch.Tensor] | None,
    temperature: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """The next token of each sequence: final hidden states [B, D], the head's weight [V, D] -> [B]."""
    if allowed is None:
        return _pick(_logits(hidden, weight), temperature, generator)
    ids = [torch.as_tensor(each, device=hidden.device) for each in allowed]
    candidates, places = torch.cat(ids).unique(return_inverse=True)  # [C], often few of V
    rows = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(each) for each in ids])).to(hidden.device)
    barred = torch.ones(len(ids), len(candidates), dtype=torch.bool, device=hidden.device)
    barred[rows, places] = False
    logits = _logits(hidden, weight[candidates]).masked_fill(barred, -torch.inf)
    return candidates[_pick(logits, temperature, generator)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight.to(hidden.dtype)).float()


def _pick(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0 and logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))  # torch's own takes ten times as long
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator).squeeze(1)
