"""The Mistral transformer, dense or mixture of experts, over packed documents.

Module and parameter names are those of Mistral's own checkpoints. Shapes: T packed tokens, D model width, H query
heads, K key/value heads, Dh head width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .args import ModelArgs
from .attention import ENGINES, Engine, PackedDocuments
from .errors import UserError
from .fused_lora import Source, SwiGLU, elementwise
from .lora import Linear, fused_linear
from .moe import MoeLayer
from .rope import apply_rotary, rotary_phases

# What to make of the final hidden states [T, D], given the output head's weight [V, D]. Where the head has an adapter,
# both are wider (see LoRALinear.as_product); their product is the logits all the same.
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# What a block computes again for the backward pass instead of keeping it.
Recompute = Literal["nothing", "feed_forward", "block"]


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then scaled (Zhang & Sennrich, 2019). A `Source` of the layers behind it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.compiled = False  # set from outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return elementwise(_rms_norm, self.compiled)(x, self.weight, self.eps)

    def gradients(self, grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        """That of x; the scale is frozen where this is asked for."""
        return (elementwise(_rms_norm_gradient, self.compiled)(grad, x, self.weight, self.eps),)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight.to(x.dtype)


def _rms_norm_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x_fp32, grad_fp32 = x.float(), (grad * weight.to(grad.dtype)).float()
    inverse = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    along = (grad_fp32 * x_fp32).mean(-1, keepdim=True) * inverse.square()
    return ((grad_fp32 - x_fp32 * along) * inverse).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, engine: Engine) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.engine = engine
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def forward(
        self,
        x: torch.Tensor,
        norm: Source,
        phases: torch.Tensor,
        documents: PackedDocuments,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        projected = fused_linear((self.wq, self.wk, self.wv), x, source=norm)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        q, k = apply_rotary(q, phases), apply_rotary(k, phases)  # [T, H, Dh], [T, K, Dh]
        return self.wo(_rows(self.engine(q, k, v, documents).flatten(-2), wanted))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

        self.swiglu = SwiGLU()
        self.output_matters = True

    def forward(self, x: torch.Tensor, norm: Source | None = None) -> torch.Tensor:
        gate, up = fused_linear((self.w1, self.w3), x, source=norm)
        return fused_linear((self.w2,), gate, up, source=self.swiglu, output_matters=self.output_matters)[0]


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
        self.recompute: Recompute = "nothing"  # set from outside

    def forward(
        self,
        x: torch.Tensor,
        phases: torch.Tensor,
        documents: PackedDocuments,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [N, D] where only N positions are `wanted` of the last block."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return self._recomputed(self._forward, x, phases, documents, wanted)
        return self._forward(x, phases, documents, wanted)

    def _forward(
        self, x: torch.Tensor, phases: torch.Tensor, documents: PackedDocuments, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        h = _rows(x, wanted) + self.attention(x, self.attention_norm, phases, documents, wanted)
        if self.recompute == "feed_forward" and torch.is_grad_enabled():
            return h + self._recomputed(self.feed_forward, h, self.ffn_norm)
        return h + self.feed_forward(h, self.ffn_norm)

    def _recomputed(self, function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """Runs a function that ends in the feed-forward network, keeping its inputs alone."""
        return checkpoint(
            function, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), self._repeating())
        )

    @contextlib.contextmanager
    def _repeating(self) -> Iterator[None]:
        """The second time, the last product of a dense network is left out: no gradient needs it."""
        self.feed_forward.output_matters = False
        try:
            yield
        finally:
            self.feed_forward.output_matters = True


def _rows(x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    return x if wanted is None else x.index_select(0, wanted)


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

    def compile_elementwise(self) -> None:
        """Has torch.compile make kernels of the norms and activations, and leaves matrix products to the libraries.

        Whole blocks would be compiled anew for other numbers of documents, and hardly be faster.
        """
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.compiled = True
            elif isinstance(module, FeedForward):
                module.swiglu = SwiGLU(compiled=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int] | PackedDocuments,
        head: Head | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs packed documents through the model.

        Args:
            input_ids: [T] int64.
            lengths: document lengths, in order; their sum is T. Or the documents themselves, for other positions.
            head: what to make of the final hidden states and the head's weight, so that a loss need not build all
                logits; it runs inside forward because a sharded head is whole only there.
            wanted: [N] int64, the positions whose logits are asked for; None: all. Behind the last attention, nothing
                is computed for the others.

        Returns:
            fp32 logits [T or N, V], or what `head` returns.
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
            h = layer(h, phases, documents, wanted if layer is self.layers[-1] else None)
        h = self.norm(h)
        return self.output(h).float() if head is None else head(*self.output.as_product(h))
