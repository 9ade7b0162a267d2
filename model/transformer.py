"""The Mistral transformer, dense or mixture of experts, over packed documents.

Module and parameter names are those of Mistral's own checkpoints. Shapes: T packed tokens, D model width, H query
heads, K key/value heads, Dh head width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .args import ModelArgs
from .attention import ENGINES, Engine, PackedDocuments
from .errors import UserError
from .lora import Linear
from .moe import MoeLayer
from .rope import apply_rotary, rotary_phases

# What to make of the final hidden states [T, D], given the output head's weight [V, D]. Where the head has an adapter,
# both are wider (see LoRALinear.as_product); their product is the logits all the same.
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then scaled (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, engine: Engine) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.engine = engine
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(q, phases), apply_rotary(k, phases)  # [T, H, Dh], [T, K, Dh]
        return self.wo(self.engine(q, k, v, documents).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _feed_forward(args: ModelArgs) -> nn.Module:
    if args.moe is None:
        return FeedForward(args)
    experts: list[nn.Module] = [FeedForward(args) for _ in range(args.moe.num_experts)]
    return MoeLayer(experts, Linear(args.dim, args.moe.num_experts), args.moe)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, engine: Engine) -> None:
        super().__init__()
        self.attention = Attention(args, engine)
        self.feed_forward = _feed_forward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.recompute = False  # set from outside: keep only the block's input for the backward pass

    def forward(self, x: torch.Tensor, phases: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, phases, documents, use_reentrant=False)
        return self._forward(x, phases, documents)

    def _forward(self, x: torch.Tensor, phases: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), phases, documents)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Decoder-only transformer.

    Args:
        args: shapes.
        attention: name of the engine, one of `model.attention.ENGINES`.
        compute_dtype: dtype of activations and matrix products.
    """

    def __init__(self, args: ModelArgs, attention: str = "sdpa", compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.args = args
        self.compute_dtype = compute_dtype
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        engine = ENGINES[attention]
        self.layers = nn.ModuleList(TransformerBlock(args, engine) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)

    def forward(
        self, input_ids: torch.Tensor, lengths: Sequence[int] | PackedDocuments, head: Head | None = None
    ) -> torch.Tensor:
        """Runs packed documents through the model.

        Args:
            input_ids: [T] int64.
            lengths: document lengths, in order; their sum is T. Or the documents themselves, for other positions.
            head: what to make of the final hidden states and the head's weight, so that a loss need not build all
                logits; it runs inside forward because a sharded head is whole only there.

        Returns:
            fp32 logits [T, V], or what `head` returns.
        """
        documents = lengths
        if not isinstance(documents, PackedDocuments):
            documents = PackedDocuments.from_lengths(documents, input_ids.device)
        window = self.args.sliding_window
        if window is not None and documents.positions.max() >= window:
            raise UserError(f"A text is longer than the model's `sliding_window` of {window} tokens: shorten it.")
        phases = rotary_phases(documents.positions, self.args.head_dim, self.args.rope_theta)
        h = self.tok_embeddings(input_ids).to(self.compute_dtype)
        for layer in self.layers:
            h = layer(h, phases, documents)
        h = self.norm(h)
        return self.output(h).float() if head is None else head(*self.output.as_product(h))
