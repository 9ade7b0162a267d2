"""The Mistral transformer, dense or mixture of experts, over packed documents.

Module and parameter names are those of Mistral's checkpoints. Shapes: T packed tokens, N output positions, D model
width, H query heads, K key/value heads, Dh head width, V vocabulary.
"""

# Execution options: attributes that are set after construction, by the module and from the setting named here:
#   TransformerBlock.recompute              finetune.wrapped_model, from `checkpoint`
#   RMSNorm.compiled, Attention.rotary,
#   FeedForward.swiglu                      Transformer.compile_elementwise, from `compile`
#   Linear.format                           model.lora.quantize_linears, from `base_dtype`; compile_elementwise
#   Attention.engine                        model.generate, which inserts its key/value cache while it runs

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .args import ModelArgs
from .attention import ENGINES, Engine, PackedDocuments
from .elementwise import elementwise
from .errors import UserError
from .fused_lora import InputFn, SwiGLU
from .lora import Linear, fused_linear
from .moe import MoeLayer
from .rope import Rotary, rotary_phases

# Maps the final hidden states [N, D] and the output weight [V, D], whose product is the logits, to what `Transformer`
# returns. If the output layer has an adapter, both are wider than D (see LoRALinear.as_product).
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# The part of a block that the backward pass recomputes (activation checkpointing).
Recompute = Literal["nothing", "feed_forward", "block"]


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then scaled (Zhang & Sennrich, 2019). An `InputFn` of the layers after it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.compiled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return elementwise(_rms_norm, self.compiled)(x, self.weight, self.eps)

    def gradients(self, grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the gradient of x. The scale gets none: wherever layers are fused, their norm is frozen."""
        return (elementwise(_rms_norm_gradient, self.compiled)(grad, x, self.weight, self.eps),)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight.to(x.dtype)


def _rms_norm_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x_fp32, grad_fp32 = x.float(), (grad * weight.to(grad.dtype)).float()
    inverse_rms = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    along_x = (grad_fp32 * x_fp32).mean(-1, keepdim=True) * inverse_rms.square()
    return ((grad_fp32 - x_fp32 * along_x) * inverse_rms).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, engine: Engine) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.engine = engine
        self.rotary = Rotary()
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def forward(
        self,
        x: torch.Tensor,
        norm: InputFn,
        phases: torch.Tensor,
        documents: PackedDocuments,
        output_positions: torch.Tensor | None,
    ) -> torch.Tensor:
        projected = fused_linear((self.wq, self.wk, self.wv), x, input_fn=norm)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        q, k = self.rotary(q, phases), self.rotary(k, phases)  # [T, H, Dh], [T, K, Dh]
        return self.wo(_select(self.engine(q, k, v, documents).flatten(-2), output_positions))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

        self.swiglu = SwiGLU()
        self._needs_output = True

    def forward(self, x: torch.Tensor, norm: InputFn | None = None) -> torch.Tensor:
        gate, up = fused_linear((self.w1, self.w3), x, input_fn=norm)
        return fused_linear((self.w2,), gate, up, input_fn=self.swiglu, needs_output=self._needs_output)[0]

    @contextlib.contextmanager
    def without_output(self) -> Iterator[None]:
        """Skip the product with w2: forward returns undefined values, its backward pass is unchanged."""
        self._needs_output = False
        try:
            yield
        finally:
            self._needs_output = True


def _feed_forward(args: ModelArgs) -> FeedForward | MoeLayer:
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
        self.recompute: Recompute = "nothing"

    def forward(
        self,
        x: torch.Tensor,
        phases: torch.Tensor,
        documents: PackedDocuments,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [N, D] given `output_positions` [N]."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return self._recomputed(self._forward, x, phases, documents, output_positions)
        return self._forward(x, phases, documents, output_positions)

    def _forward(
        self, x: torch.Tensor, phases: torch.Tensor, documents: PackedDocuments, output_positions: torch.Tensor | None
    ) -> torch.Tensor:
        attended = self.attention(x, self.attention_norm, phases, documents, output_positions)
        h = _select(x, output_positions) + attended
        if self.recompute == "feed_forward" and torch.is_grad_enabled():
            return h + self._recomputed(self.feed_forward, h, self.ffn_norm)
        return h + self.feed_forward(h, self.ffn_norm)

    def _recomputed(self, function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """Call a function that ends in the feed-forward network, saving only its inputs for the backward pass.

        The recomputation skips a dense network's last product: no gradient depends on it.
        """

        def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
            network = self.feed_forward
            recomputing = network.without_output() if isinstance(network, FeedForward) else contextlib.nullcontext()
            return contextlib.nullcontext(), recomputing

        return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _select(x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return x if positions is None else x.index_select(0, positions)


class Transformer(nn.Module):
    """Decoder-only transformer.

    Args:
        args: shapes.
        attention: name of an engine in `model.attention.ENGINES`.
        compute_dtype: dtype of activations and matrix products.
    """

    layers: Sequence[TransformerBlock]

    def __init__(self, args: ModelArgs, attention: str = "sdpa", compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.args = args
        self.compute_dtype = compute_dtype
        # As nn.Embedding initializes it, which on `meta` imports PyTorch's compiler, 2 s.
        embeddings = torch.empty(args.vocab_size, args.dim)
        if not embeddings.is_meta:
            embeddings.normal_()
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        blocks = (TransformerBlock(args, ENGINES[attention]) for _ in range(args.n_layers))
        self.layers = nn.ModuleList(blocks)  # type: ignore[assignment]  # ModuleList is not generic
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)

    def compile_elementwise(self) -> None:
        """Compile norms, rotations, activations and the quantization of inputs with torch.compile.

        Matrix products are left to the libraries.

        Whole blocks would be recompiled for each number of documents and hardly be faster.
        """
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.compiled = True
            elif isinstance(module, Attention):
                module.rotary = Rotary(compiled=True)
            elif isinstance(module, FeedForward):
                module.swiglu = SwiGLU(compiled=True)
            elif isinstance(module, Linear):
                module.format = module.format.compiled_version()

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int] | PackedDocuments,
        head: Head | None = None,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run packed documents through the model.

        Args:
            input_ids: [T] int64.
            lengths: document lengths, in order; their sum is T. Or `PackedDocuments`, to choose the positions.
            head: computes the result from the final hidden states and the output weight, so that a loss need not
                materialize all logits. Runs inside forward, the only place where a sharded output weight is complete.
            output_positions: [N] int64, the positions to return logits for; default: all T. After the last attention,
                nothing is computed for the others.

        Returns:
            fp32 logits [N, V], or the result of `head`.

        Raises:
            UserError: a document is longer than the model's sliding window.
        """
        documents = lengths
        if not isinstance(documents, PackedDocuments):
            documents = PackedDocuments.from_lengths(documents, input_ids.device)
        window = self.args.sliding_window
        if window is not None and documents.last_position >= window:
            raise UserError(f"A document is longer than the model's `sliding_window` of {window} tokens: shorten it.")
        phases = rotary_phases(documents.positions, self.args.head_dim, self.args.rope_theta)
        h = self.tok_embeddings(input_ids).to(self.compute_dtype)
        for layer in self.layers:
            h = layer(h, phases, documents, output_positions if layer is self.layers[-1] else None)
        h = self.norm(h)
        return self.output(h).float() if head is None else head(*self.output.as_product(h))
