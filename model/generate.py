"""Batched generation with a key/value cache.

Prompts of different lengths are packed, without padding. Shapes: B sequences, T packed tokens, S cache positions, H
query heads, K key/value heads, G = H / K query heads per key/value head, Dh head width, D model width, V vocabulary,
C candidate tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .attention import Engine, PackedDocuments, expand_heads
from .sampling import GREEDY, Sampling
from .transformer import Transformer


class Constraint(Protocol):
    """Restricts the tokens that may be generated for one sequence."""

    def allowed(self) -> Sequence[int] | np.ndarray | torch.Tensor:
        """Return the ids that may come next, at least one."""

    def take(self, token: int) -> None:
        """Advance past the chosen token."""


class Step(NamedTuple):
    """A chosen token, and the logarithm of its probability among those that its constraint allows, before sampling."""

    token: int
    log_probability: float


class _Cache:
    """Keys and values of earlier tokens; replaces the layers' attention engines during generation.

    The common prefix of all prompts is computed once, then the rest of each prompt, then one token per sequence at a
    time.
    """

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, device: torch.device
    ) -> None:
        self.device = device
        self.lengths = [len(prompt) for prompt in prompts]  # of each sequence, including generated tokens
        shape = (len(prompts), model.args.n_kv_heads, max(self.lengths) + max_tokens, model.args.head_dim)
        self.keys = [torch.zeros(shape, dtype=model.compute_dtype, device=self.device) for _ in model.layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]  # [B, K, S, Dh]
        self._prefix_length = 0  # tokens of the common prefix in the cache
        self._rows = torch.empty(0, dtype=torch.int64)  # [T] the sequence of each current token
        self._visible: torch.Tensor | None = None  # [B, 1, 1, longest sequence]; None while prompts are computed

    def attend(
        self, layer: int, engine: Engine, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments
    ) -> torch.Tensor:
        """Compute attention for a layer; `engine` is called while the documents are complete."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows, :, documents.positions] = k
        values[self._rows, :, documents.positions] = v
        if self._visible is not None:
            keys, values = (x[:, :, : self._visible.shape[-1]] for x in (keys, values))
            grouped = q.unflatten(1, (keys.shape[1], -1))  # [B, K, G, Dh]: the kernel sees G tokens at one position
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._visible).flatten(1, 2)
        if self._prefix_length:
            return self._attend_after_prefix(q, keys, values, documents.lengths)
        return engine(q, k, v, documents)

    def _attend_after_prefix(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """Compute one sequence at a time, since engines do not support queries that start later than their keys.

        Args:
            q: [T, H, Dh].
            keys: [B, K, S, Dh], like `values`.
            lengths: of each sequence, without the prefix.
        """
        outputs = []
        for q_own, k_own, v_own in zip(q.split(lengths), keys, values):
            end = self._prefix_length + len(q_own)
            k_own, v_own = (expand_heads(x[None, :, :end], q.shape[1]) for x in (k_own, v_own))  # [1, H, end, Dh]
            mask = _causal_mask(len(q_own), end, self.device)
            out = F.scaled_dot_product_attention(q_own.transpose(0, 1)[None], k_own, v_own, attn_mask=mask)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    def enter(self, counts: Sequence[int], starts: Sequence[int]) -> PackedDocuments:
        """Prepare for `counts` more tokens of each sequence from positions `starts`, and return them as documents."""
        documents = PackedDocuments.from_lengths(counts, torch.device("cpu"))
        rows = np.repeat(np.arange(len(counts)), counts)
        documents.positions += torch.from_numpy(np.asarray(starts)[rows])
        documents.last_position = max(start + count for start, count in zip(starts, counts)) - 1
        self._rows = torch.from_numpy(rows).to(self.device)
        return documents.map(lambda tensor: tensor.to(self.device))

    def share_prefix(self, length: int) -> None:
        """Copy the first `length` tokens of the first sequence to all sequences."""
        for x in (*self.keys, *self.values):
            x[:, :, :length] = x[:1, :, :length]
        self._prefix_length = length

    def advance(self) -> PackedDocuments:
        """Prepare for one more token of each sequence."""
        documents = self.enter([1] * len(self.lengths), self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        used = torch.arange(max(self.lengths), device=self.device)
        self._visible = (used <= documents.positions[:, None])[:, None, None]
        return documents

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other sequences."""
        index = torch.tensor(rows, device=self.device)
        self.keys, self.values = ([x[index] for x in layers] for layers in (self.keys, self.values))
        self.lengths = [self.lengths[row] for row in rows]


def _causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the mask of the last `queries` of `keys` positions."""
    if device.type == "cpu":
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    # Selects flash kernels on GPUs. Imported here because it imports torch.compile, which takes seconds.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, keys)


@contextlib.contextmanager
def _generating(model: Transformer, cache: _Cache) -> Iterator[None]:
    """Evaluation mode, with the cache in place of the attention engines."""
    was_training = model.training
    attentions = [layer.attention for layer in model.layers]
    engines = [attention.engine for attention in attentions]
    for layer, (attention, engine) in enumerate(zip(attentions, engines)):
        attention.engine = functools.partial(cache.attend, layer, engine)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for attention, engine in zip(attentions, engines):
            attention.engine = engine


@torch.no_grad()
def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_id: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    constraints: Sequence[Constraint] | None = None,
    any_active: Callable[[bool], bool] = bool,
    device: torch.device | None = None,
) -> Generator[dict[int, Step], None, None]:
    """Continue every prompt until `eos_id` or `max_tokens` tokens, and yield the tokens as they are chosen.

    Args:
        prompts: token ids of each prompt, at least one.
        sampling: how tokens are chosen.
        seeds: one per prompt, so that its tokens do not depend on the batch; default: that of `sampling` for all.
        constraints: one per prompt.
        any_active: returns whether to run a step, given whether any local sequence needs it. Ranks with a sharded model
            must run the same number of steps, and agree on it here.
        device: where to compute; default: the device of the weights.

    Yields:
        The next token of each prompt that has not ended, by the prompt's index.
    """
    active = list(range(len(prompts)))  # prompt of each cache row; finished ones are dropped once they are half
    ended: set[int] = set()
    cache = _Cache(model, prompts, max_tokens, device or model.tok_embeddings.weight.device)
    seeds = seeds or [sampling.seed] * len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # the same numbers on every device

    def choose(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        candidates = [constraints[index].allowed() for index in active] if constraints else None
        last = hidden[documents.cu_seqlens[1:].long() - 1]
        return _choose(last, weight, candidates, sampling, [generators[index] for index in active])

    with _generating(model, cache):
        tokens, documents = _compute_prefix(model, cache, prompts, any_active)
        for count in range(1, max_tokens + 1):
            tokens, log_probabilities = model(tokens, documents, head=choose)
            steps = zip(active, map(Step, tokens.tolist(), log_probabilities.tolist()))
            chosen = {index: step for index, step in steps if index not in ended}
            if constraints:
                for index, step in chosen.items():
                    constraints[index].take(step.token)
            ended.update(index for index, step in chosen.items() if step.token == eos_id)
            yield chosen
            running = [row for row, index in enumerate(active) if index not in ended]
            if count == max_tokens or not any_active(bool(running)):
                break
            if running and len(running) <= len(active) // 2:
                active = [active[row] for row in running]
                tokens = tokens[running]
                cache.keep(running)
            documents = cache.advance()


def collect(steps: Iterable[Mapping[int, Step]]) -> list[list[Step]]:
    """Return what `stream` yields for each prompt, once it has ended."""
    answers: list[list[Step]] = []
    for chosen in steps:
        answers = answers or [[] for _ in chosen]  # at first, every prompt gets a token
        for index, step in chosen.items():
            answers[index].append(step)
    return answers


def collect_tokens(steps: Iterable[Mapping[int, Step]]) -> list[list[int]]:
    """Return the tokens that `stream` yields for each prompt, with the end-of-sequence token if it was generated."""
    return [[step.token for step in answer] for answer in collect(steps)]


def _compute_prefix(
    model: Transformer, cache: _Cache, prompts: Sequence[Sequence[int]], any_active: Callable[[bool], bool]
) -> tuple[torch.Tensor, PackedDocuments]:
    """Compute the common prefix of all prompts; return what follows it, packed."""
    differing = (position for position, column in enumerate(zip(*prompts)) if len(set(column)) > 1)
    shortest = min(map(len, prompts))
    length = min(next(differing, shortest), shortest - 1) if len(prompts) > 1 else 0
    if any_active(length > 0):  # then on every rank; one without a common prefix computes a single token
        prefix = torch.tensor(prompts[0][: max(1, length)], device=cache.device)
        model(prefix, cache.enter([len(prefix)], [0]), head=lambda *_: None)
        cache.share_prefix(length)
    tokens = torch.tensor([token for prompt in prompts for token in prompt[length:]], device=cache.device)
    return tokens, cache.enter([len(prompt) - length for prompt in prompts], [length] * len(prompts))


def _choose(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    allowed: Sequence[Sequence[int] | np.ndarray | torch.Tensor] | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the next token of each sequence: final hidden states [B, D], output weight [V, D] -> [B], [B].

    Returns:
        The tokens, and the logarithms of their probabilities before sampling.
    """
    if allowed is None:
        return _pick(_logits(hidden, weight), sampling, generators)
    ids = [torch.as_tensor(each, device=hidden.device) for each in allowed]
    candidates, columns = torch.cat(ids).unique(return_inverse=True)  # [C], often a small part of V
    rows = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(each) for each in ids])).to(hidden.device)
    forbidden = torch.ones(len(ids), len(candidates), dtype=torch.bool, device=hidden.device)
    forbidden[rows, columns] = False
    logits = _logits(hidden, weight[candidates]).masked_fill(forbidden, -torch.inf)
    picked, log_probabilities = _pick(logits, sampling, generators)
    return candidates[picked], log_probabilities


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight.to(hidden.dtype)).float()


def _pick(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a column of each row: logits [B, C] -> [B], and the logarithms of their probabilities [B]."""
    if sampling.temperature == 0 and logits.device.type == "cpu":
        picked = torch.from_numpy(logits.numpy().argmax(axis=-1))  # torch's argmax takes ten times as long
    elif sampling.temperature == 0:
        picked = logits.argmax(dim=-1)
    else:
        picked = _sample(filtered_probabilities(logits, sampling), generators)
    return picked, logits.gather(1, picked[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def _sample(probabilities: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw a column of each row [B, C] -> [B] with the row's own generator."""
    cumulative = probabilities.double().cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=own, dtype=torch.float64) for own in generators])
    drawn = uniform.to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(1)


def filtered_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the probabilities of the tokens that `sampling` leaves, with a temperature above 0: [B, C] -> [B, C]."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        enough_before = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(enough_before, 0))
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
