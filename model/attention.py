"""Causal attention over packed documents: one signature, several engines.

Shapes: T packed tokens, H query heads, K key/value heads, Dh head width, N documents. An engine takes q [T, H, Dh],
k and v [T, K, Dh] and the document boundaries, and returns [T, H, Dh]. A token attends to itself and to earlier tokens
of its own document; scores are scaled by Dh ** -0.5.

To add an engine, write the function and add it to ENGINES and to `model.args.ATTENTION_ENGINES`; selection and tests
cover it automatically.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .errors import UserError, first_line


@dataclasses.dataclass
class PackedDocuments:
    """The document boundaries of a packed batch."""

    lengths: list[int]  # N document lengths in order; their sum is T
    positions: torch.Tensor  # [T] int64, position of each token within its document
    cu_seqlens: torch.Tensor  # [N + 1] int32, start of each document, and T
    max_length: int
    last_position: int  # the highest of `positions`, known without waiting for a GPU

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> "PackedDocuments":
        sizes = np.asarray(lengths, dtype=np.int64)
        ends = np.cumsum(sizes)
        positions = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        longest = int(sizes.max())
        return cls(
            lengths=sizes.tolist(),
            positions=torch.from_numpy(positions).to(device),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device),
            max_length=longest,
            last_position=longest - 1,
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PackedDocuments":
        """Return the same documents with their tensors moved, by `function`."""
        return dataclasses.replace(self, positions=function(self.positions), cu_seqlens=function(self.cu_seqlens))

    @functools.cached_property
    def xformers_bias(self) -> Any:
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        return BlockDiagonalCausalMask.from_seqlens(self.lengths, device=self.cu_seqlens.device)


Engine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedDocuments], torch.Tensor]


def expand_heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Repeat each of K heads for its group of query heads: [T, K, ...] -> [T, H, ...]."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, one document at a time: any device, any dtype."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu":
        # Kernels for GPUs before Ampere do not support grouped heads; the fallback would build the score matrix.
        k, v, grouped = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1]), False
    outputs = []
    for q_doc, k_doc, v_doc in zip(*(x.split(documents.lengths) for x in (q, k, v)), strict=True):
        # [t, H, Dh] -> [1, H, t, Dh], the layout that SDPA expects
        q_doc, k_doc, v_doc = (x.transpose(0, 1).unsqueeze(0) for x in (q_doc, k_doc, v_doc))
        out = F.scaled_dot_product_attention(q_doc, k_doc, v_doc, is_causal=True, enable_gqa=grouped)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
    """PyTorch's variable-length flash attention: CUDA, Ampere and later, fp16 and bf16."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # all earlier tokens, no later ones: causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # torch 2.11
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    bounds, longest = documents.cu_seqlens, documents.max_length
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(out, torch.Tensor)  # a tuple only with `return_aux`
    return out


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
    """xformers' memory-efficient attention with a block-diagonal causal mask, as in mistral-finetune (CUDA)."""
    from xformers.ops.fmha import memory_efficient_attention

    # No backward kernel of xformers supports grouped heads, so keys and values are repeated.
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    batched = (x.unsqueeze(0) for x in (q, k, v))  # [1, T, H, Dh]
    return memory_efficient_attention(*batched, attn_bias=documents.xformers_bias).squeeze(0)


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
    """cuDNN's attention, one document at a time, for few long documents: CUDA, Ampere and later, fp16 and bf16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, documents)


# In order of preference. From Ampere on, xformers calls the kernel of `varlen` and repeats keys and values for it.
ENGINES: dict[str, Engine] = {"varlen": varlen, "xformers": xformers, "sdpa": sdpa, "cudnn": cudnn}
_ONLY_ON_REQUEST = ("cudnn",)  # whether it is faster depends on the documents' lengths and was never measured


def why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Try an engine forward and backward on two small documents with grouped heads.

    Support depends on GPU, dtype and build of PyTorch.

    Returns:
        None if it runs, or else why it does not.

    Raises:
        torch.OutOfMemoryError: the GPU is full, which says nothing about the engine.
    """
    documents = PackedDocuments.from_lengths([3, 5], device)
    q, k, v = (torch.zeros(8, n, head_dim, dtype=dtype, device=device, requires_grad=True) for n in (4, 2, 2))
    try:
        ENGINES[name](q, k, v, documents).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        return first_line(error).removesuffix(".")
    return None


def choose_engine(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve the setting `attention` for a device and dtype.

    Raises:
        UserError: the engine is unknown or does not run on this device in this dtype.
        torch.OutOfMemoryError: the GPU is full.
    """
    if name != "auto" and name not in ENGINES:
        raise UserError(f"`attention` is {name!r}; expected auto, {', '.join(ENGINES)}.")
    if name == "auto":
        candidates = ["sdpa"] if device.type == "cpu" else [each for each in ENGINES if each not in _ONLY_ON_REQUEST]
    else:
        candidates = [name]
    here = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    faults = {}
    for engine in candidates:
        faults[engine] = why_not(engine, device, dtype, head_dim)
        if faults[engine] is None:
            return engine
    if name == "auto":
        reasons = "; ".join(f"{engine}: {fault}" for engine, fault in faults.items())
        raise UserError(f"No attention engine runs here ({here}): {reasons}.")
    works = [engine for engine in ENGINES if engine != name and why_not(engine, device, dtype, head_dim) is None]
    raise UserError(
        f"`attention: {name}` does not run here ({here}): {faults[name]}. Supported: {', '.join(works) or 'none'}. Set "
        "`attention: auto` to select one automatically."
    )
