"""Batched generation with a key/value cache and continuous batching.

A fixed number of prompts is continued at once; when one ends, the next takes its place. Each step is one forward pass
over packed tokens, without padding: one token of every prompt that is being continued, and those of prompts that enter.
Shapes: B prompts at once, T packed tokens, P tokens of the common prefix, S cache positions, H query heads, K key/value
heads, G = H / K query heads per key/value head, Dh head width, D model width, V vocabulary, C candidate tokens.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .attention import Engine, PackedDocuments, expand_heads
from .sampling import GREEDY, Sampling
from .transformer import Transformer

_ENTERING_TOKENS = 2048  # of all prompts that enter in one step, unless one alone has more: bounds the memory
_GROWTH = 256  # the cache grows to a multiple of this number of positions
_QUERIES_ON_CPU = 256  # that are computed at once: its kernel also computes what a mask hides
_ALIGNMENT = 16  # of masks, as GPU kernels require


class Constraint(Protocol):
    """Restricts the tokens that may be generated for one sequence."""

    def allowed(self) -> Sequence[int] | np.ndarray:
        """Return the ids that may come next, at least one."""

    def take(self, token: int) -> None:
        """Advance past the chosen token."""


class Step(NamedTuple):
    """A chosen token.

    Attributes:
        token: its id.
        log_probability: logarithm of its probability among those that its constraint allows, before sampling.
        is_last: whether the prompt has ended.
    """

    token: int
    log_probability: float
    is_last: bool


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: of the answer.
        seed: of its sampling, so that its tokens do not depend on the other prompts.
        constraint: restricts its tokens; of all prompts or of none.
    """

    prompt: Sequence[int]
    max_tokens: int
    seed: int = 0
    constraint: Constraint | None = None


@dataclasses.dataclass
class _Row:
    """A prompt that is being continued. Its row of the cache has the place that it has in the list of rows."""

    index: int  # of the prompt
    request: Request
    generator: torch.Generator
    pending: Sequence[int]  # tokens that the next step computes
    cached: int  # tokens before them, whose keys and values are in the cache
    written: int = 0  # tokens that were generated

    def take(self, token: int) -> None:
        """Advance past the chosen token."""
        self.cached += len(self.pending)
        self.pending = [token]
        self.written += 1
        if self.request.constraint:
            self.request.constraint.take(token)


class _Cache:
    """Keys and values of earlier tokens; replaces the layers' attention engines during generation."""

    def __init__(self, model: Transformer, device: torch.device) -> None:
        self.device = device
        self.last = torch.empty(0, dtype=torch.int64)  # [B] place of each row's last token among those of this step
        shape = (0, model.args.n_kv_heads, 0, model.args.head_dim)
        self._keys = [torch.empty(shape, dtype=model.compute_dtype, device=device) for _ in model.layers]
        self._values = list(self._keys)  # [B, K, S, Dh]
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each layer, [K, P, Dh]
        self._rows = torch.empty(0, dtype=torch.int64)  # [T] the row of each token of this step
        self._starts: Sequence[int] = ()  # position of each row's first token of this step
        self._visible = torch.empty(0)  # [B, 1, 1, longest row] added to the scores of last tokens: 0 or -inf

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for at least as many rows and positions, one layer at a time; what is there is kept."""
        present, _, length, _ = self._keys[0].shape
        if rows <= present and positions <= length:
            return
        rows, positions = max(rows, present), max(-(-positions // _GROWTH) * _GROWTH, length)
        for layers in (self._keys, self._values):
            for layer, old in enumerate(layers):
                layers[layer] = old.new_zeros(rows, old.shape[1], positions, old.shape[3])
                layers[layer][:present, :, :length] = old

    def enter(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[torch.Tensor, PackedDocuments]:
        """Prepare for more tokens of each row from positions `starts`; return them packed [T], and as documents."""
        counts, first = np.array([len(own) for own in tokens]), np.asarray(starts)
        ends, rows = np.cumsum(counts), np.repeat(np.arange(len(counts)), counts)
        total, last_position = int(ends[-1]), int((first + counts).max()) - 1
        positions = np.arange(total) + (first + counts - ends)[rows]
        packed = np.fromiter(itertools.chain.from_iterable(tokens), np.int64, total)
        # Copied at once: the host waits for each copy to a GPU.
        on_device = torch.from_numpy(np.concatenate([packed, rows, positions, [0], ends])).to(self.device)
        ids, self._rows, places, bounds = on_device.split([total, total, total, len(ends) + 1])
        self._starts, self.last = starts, bounds[1:] - 1
        longest = min(-(-(last_position + 1) // _ALIGNMENT) * _ALIGNMENT, self._keys[0].shape[2])
        hidden = torch.arange(longest, device=self.device) > places[self.last][:, None]
        self._visible = torch.zeros_like(hidden, dtype=self._keys[0].dtype).masked_fill_(hidden, -torch.inf)[
            :, None, None
        ]
        return ids, PackedDocuments(counts.tolist(), places, bounds.int(), int(counts.max()), last_position)

    def attend(
        self, layer: int, engine: Engine, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments
    ) -> torch.Tensor:
        """Compute attention for a layer; `engine` is called if the documents are complete.

        In the last layer, the results of all tokens but the last of each row are undefined: nothing depends on them.
        """
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows, :, documents.positions] = k
        values[self._rows, :, documents.positions] = v
        needs_all = layer < len(self._keys) - 1
        if needs_all and not any(self._starts):
            return engine(q, k, v, documents)
        of_last = self._attend_from_last(q, keys, values)
        if len(of_last) == len(q):
            return of_last
        out = torch.empty_like(q)
        if needs_all:
            self._attend_within(q, keys, values, documents.lengths, out)
        out[self.last] = of_last
        return out

    def _attend_from_last(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Compute the last token of each row: q [T, H, Dh], keys and values [B, K, S, Dh] -> [B, H, Dh]."""
        rows, _, _, longest = self._visible.shape
        keys, values = (x[:rows, :, :longest] for x in (keys, values))
        grouped = q[self.last].unflatten(1, (keys.shape[1], -1))  # [B, K, G, Dh]: as if G tokens had one position
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._visible).flatten(1, 2)

    def _attend_within(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int], out: torch.Tensor
    ) -> None:
        """Compute rows with several tokens one at a time: engines do not support queries that start after their keys.

        Args:
            q: [T, H, Dh].
            keys: [B, K, S, Dh], like `values`.
            lengths: of each row's tokens in q.
            out: receives the results, [T, H, Dh].
        """
        at_once = _QUERIES_ON_CPU if q.device.type == "cpu" else len(q)
        for q_own, out_own, k_own, v_own, end in zip(q.split(lengths), out.split(lengths), keys, values, self._starts):
            if len(q_own) == 1:
                continue
            for q_part, out_part in zip(q_own.split(at_once), out_own.split(at_once)):
                end += len(q_part)
                k_seen, v_seen = (expand_heads(x[None, :, :end], q.shape[1]) for x in (k_own, v_own))  # [1, H, end, Dh]
                mask = _causal_mask(len(q_part), end, q.device)
                result = F.scaled_dot_product_attention(q_part.transpose(0, 1)[None], k_seen, v_seen, attn_mask=mask)
                out_part.copy_(result[0].transpose(0, 1))

    def keep_prefix(self, length: int) -> None:
        """Remember the first `length` tokens of the first row."""
        pairs = zip(self._keys, self._values)
        self._prefix = [(keys[0, :, :length].clone(), values[0, :, :length].clone()) for keys, values in pairs]

    def copy_prefix(self, row: int, length: int) -> None:
        """Copy the first `length` of the remembered tokens to a row."""
        for keys, values, (prefix_keys, prefix_values) in zip(self._keys, self._values, self._prefix):
            keys[row, :, :length] = prefix_keys[:, :length]
            values[row, :, :length] = prefix_values[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for x in (*self._keys, *self._values):
            x[target, :, :length] = x[source, :, :length]


class _Batch:
    """The prompts that are being continued, and those that wait for a place.

    Args:
        requests: taken one by one as places become free.
        places: number of prompts at once.
        cache: of the prompts.

    Attributes:
        rows: what is being continued.
        prefix: tokens that the first prompts have in common.
    """

    def __init__(self, requests: Iterable[Request], places: int, cache: _Cache) -> None:
        self._requests = enumerate(requests)
        self._waiting = deque(itertools.islice(self._requests, max(2, places)))  # never empty while requests are left
        self._places = min(places, len(self._waiting))
        self._cache = cache
        self.rows: list[_Row] = []
        first, *others = [request.prompt for _, request in self._waiting] or [()]
        self.prefix = first[: min((_shared(first, other) for other in others), default=0)]

    def fill(self, ended: Sequence[int]) -> None:
        """Let prompts enter, first at the places of rows that have ended.

        Where there is no prompt, the last row moves there: rows are the first ones of the cache.
        """
        entering = self._next(self._places - len(self.rows) + len(ended))
        for place in reversed(ended):
            if entering:
                self.rows[place] = entering.pop()
                continue
            last = self.rows.pop()
            if place < len(self.rows):
                self._cache.move(len(self.rows), place, last.cached)
                self.rows[place] = last
        self.rows += entering
        for place, row in enumerate(self.rows):
            if not row.written:
                self._cache.reserve(self._places, row.cached + len(row.pending) + row.request.max_tokens)
                self._cache.copy_prefix(place, row.cached)

    def _next(self, count: int) -> list[_Row]:
        """Return at most `count` prompts that enter now."""
        entering: list[_Row] = []
        tokens = 0
        while self._waiting and len(entering) < count:
            index, request = self._waiting[0]
            prompt = request.prompt
            shared = min(_shared(prompt, self.prefix), len(prompt) - 1)
            tokens += len(prompt) - shared
            if entering and tokens > _ENTERING_TOKENS:
                break
            generator = torch.Generator().manual_seed(request.seed)  # the same numbers on every device
            entering.append(_Row(index, request, generator, prompt[shared:], shared))
            self._waiting.popleft()
            self._waiting.extend(itertools.islice(self._requests, 1))
        return entering


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that two prompts begin with."""
    pairs = enumerate(zip(one, other))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


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


def stream(
    model: Transformer,
    prompts: Iterable[Sequence[int]],
    max_tokens: int,
    eos_id: int,
    sampling: Sampling = GREEDY,
    seeds: Iterable[int] | None = None,
    constraints: Iterable[Constraint] | None = None,
    any_active: Callable[[bool], bool] = bool,
    device: torch.device | None = None,
    places: int = sys.maxsize,
) -> Generator[dict[int, Step], None, None]:
    """Continue prompts; see `stream_requests`.

    Args:
        seeds: one per prompt; default: that of `sampling` for all.
        constraints: one per prompt.
    """
    every_seed, no_constraint = itertools.repeat(sampling.seed), itertools.repeat(None)
    requests = map(Request, prompts, itertools.repeat(max_tokens), seeds or every_seed, constraints or no_constraint)
    return stream_requests(model, requests, eos_id, sampling, any_active, device, places)


@torch.no_grad()
def stream_requests(
    model: Transformer,
    requests: Iterable[Request],
    eos_id: int,
    sampling: Sampling = GREEDY,
    any_active: Callable[[bool], bool] = bool,
    device: torch.device | None = None,
    places: int = sys.maxsize,
) -> Generator[dict[int, Step], None, None]:
    """Continue every prompt until `eos_id` or its `max_tokens` tokens, and yield the tokens as they are chosen.

    What the first prompts have in common is computed once, and is not computed again for any prompt that begins like
    them.

    Args:
        requests: the prompts, taken as they are needed. Those of similar length should follow each other.
        sampling: how tokens are chosen.
        any_active: returns whether to run a step, given whether any local prompt needs it. Ranks with a sharded model
            must run the same number of steps, and agree on it here.
        device: where to compute; default: the device of the weights.
        places: number of prompts that are continued at once. The cache has as many rows, each for the longest prompt so
            far and its answer.

    Yields:
        The next token of each prompt that is being continued, by the prompt's index.
    """
    cache = _Cache(model, device or model.tok_embeddings.weight.device)
    batch = _Batch(requests, places, cache)
    ended: list[int] = []
    with _generating(model, cache):
        if any_active(bool(batch.prefix)):  # then on every rank; one without a common prefix computes a single token
            cache.reserve(1, max(1, len(batch.prefix)))
            _compute(model, cache, [batch.prefix or [0]], [0])
            cache.keep_prefix(len(batch.prefix))
        while True:
            batch.fill(ended)
            if not any_active(bool(batch.rows)):
                return
            steps = _step(model, cache, batch.rows, sampling, eos_id)
            yield steps
            ended = [place for place, row in enumerate(batch.rows) if steps[row.index].is_last]


def collect(steps: Iterable[Mapping[int, Step]]) -> list[list[Step]]:
    """Return what `stream` yields for each prompt, once all have ended."""
    return [answer for _, answer in sorted(answers(steps))]


def collect_tokens(steps: Iterable[Mapping[int, Step]]) -> list[list[int]]:
    """Return the tokens that `stream` yields for each prompt, with the end-of-sequence token if it was generated."""
    return [[step.token for step in answer] for answer in collect(steps)]


def answers(steps: Iterable[Mapping[int, Step]]) -> Iterator[tuple[int, list[Step]]]:
    """Yield each prompt's index and what `stream` yields for it, as soon as it has ended."""
    begun: dict[int, list[Step]] = {}
    for chosen in steps:
        for index, step in chosen.items():
            begun.setdefault(index, []).append(step)
            if step.is_last:
                yield index, begun.pop(index)


def _step(model: Transformer, cache: _Cache, rows: Sequence[_Row], sampling: Sampling, eos_id: int) -> dict[int, Step]:
    """Choose the next token of each row; without any row, compute a token for the other ranks."""
    if not rows:
        cache.reserve(1, 1)
        _compute(model, cache, [[0]], [0])
        return {}
    head = functools.partial(_choose, rows=rows, sampling=sampling)
    chosen = _compute(model, cache, [row.pending for row in rows], [row.cached for row in rows], head).tolist()
    steps = {}
    for row, token, log_probability in zip(rows, chosen, chosen[len(rows) :]):
        row.take(int(token))
        is_last = token == eos_id or row.written == row.request.max_tokens
        steps[row.index] = Step(int(token), log_probability, is_last)
    return steps


def _compute(
    model: Transformer,
    cache: _Cache,
    tokens: Sequence[Sequence[int]],
    starts: Sequence[int],
    head: Callable[[torch.Tensor, torch.Tensor], Any] = lambda *_: None,
) -> torch.Tensor:
    """Compute tokens of each row from positions `starts`; return what `head` makes of the last ones."""
    ids, documents = cache.enter(tokens, starts)
    return model(ids, documents, head=head, output_positions=cache.last)


def _choose(hidden: torch.Tensor, weight: torch.Tensor, rows: Sequence[_Row], sampling: Sampling) -> torch.Tensor:
    """Choose the next token of each row: final hidden states [B, D], output weight [V, D] -> float64 [2B].

    Returns:
        The tokens, and the logarithms of their probabilities before sampling: in one tensor, since the host waits for
        each that it reads from a GPU.
    """
    generators = [row.generator for row in rows]
    allowed = [row.request.constraint.allowed() for row in rows if row.request.constraint]
    if not allowed:
        return torch.cat(_pick(_logits(hidden, weight), sampling, generators))
    candidates, forbidden = (torch.from_numpy(x).to(hidden.device) for x in _candidates(allowed, len(weight)))
    logits = _logits(hidden, weight[candidates]).masked_fill(forbidden, -torch.inf)
    picked, log_probabilities = _pick(logits, sampling, generators)
    return torch.cat([candidates[picked.long()].double(), log_probabilities])


def _candidates(allowed: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that any row allows [C], often a small part of V, and which each row does not [B, C]."""
    columns = np.full(vocab_size, -1)
    for ids in allowed:
        columns[ids] = 0
    candidates = np.flatnonzero(columns == 0)
    columns[candidates] = np.arange(len(candidates))
    forbidden = np.ones((len(allowed), len(candidates)), dtype=bool)
    for row, ids in zip(forbidden, allowed):
        row[columns[ids]] = False
    return candidates, forbidden


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight.to(hidden.dtype)).float()


def _pick(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a column of each row: logits [B, C] -> float64 [B], and the logarithms of their probabilities [B]."""
    if sampling.temperature == 0 and logits.device.type == "cpu":
        picked = torch.from_numpy(logits.numpy().argmax(axis=-1))  # torch's argmax takes ten times as long
    elif sampling.temperature == 0:
        picked = logits.argmax(dim=-1)
    else:
        picked = _sample(filtered_probabilities(logits, sampling), generators)
    log_probabilities = logits.gather(1, picked[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
    return picked.double(), log_probabilities.double()


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
