"""Attention engines, products of frozen weights and compiled functions, each against exact arithmetic."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from benchmarks.acceptance.check import Check, Setting, attempt, relative_error, within
from model.attention import ENGINES, PackedDocuments, why_not
from model.frozen_weights import FORMATS, FrozenWeight
from model.rope import Rotary, rotary_phases

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest value
_LENGTHS = ([1], [65, 3, 130])
_FP8_ROWS = (0, 1, 7, 17, 4097)
_OUT, _IN = 128, 192


def kernels(setting: Setting) -> Iterator[Check]:
    """Yield a check per attention engine, dtype and head width, and per product of a frozen weight."""
    head_dims = (64, 128) if setting.preset == "full" else (16,)
    for name, dtype, head_dim in itertools.product(ENGINES, TOLERANCES, head_dims):
        title = f"attention {name}, {str(dtype)[6:]}, head_dim {head_dim}"
        yield attempt(title, functools.partial(_engine, title, name, setting.device, dtype, head_dim))
    for name in ("nf4", "nf4-dq"):
        title = f"{name} weights are the CPU's"
        yield attempt(title, functools.partial(_dequantized, title, name, setting.device))
    for rows in _FP8_ROWS:
        title = f"fp8 products of {rows} tokens"
        yield attempt(title, functools.partial(_fp8_products, title, rows, setting.device))
    if setting.on_gpu:
        title = "compiled rotary embeddings"
        yield attempt(title, functools.partial(_compiled_rotation, title, setting.device))


def _engine(title: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Check:
    if reason := why_not(name, device, dtype, head_dim):
        return Check(title, None, message=reason.partition(". ")[0])
    errors = [attention_error(name, device, dtype, head_dim, lengths, 6, 2) for lengths in _LENGTHS]
    return within(title, TOLERANCES[dtype], {"error": max(errors)}, of="error")


def attention_error(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, lengths: Sequence[int], heads: int, groups: int
) -> float:
    """Return the largest error of an engine's output and gradients, relative to the largest value of each, at least 1.

    Args:
        name: of the engine.
        device, dtype: of its tensors.
        head_dim: width of a head.
        lengths: of the packed documents.
        heads: number of query heads.
        groups: number of key and value heads.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(lengths), n, head_dim, generator=generator).to(device, dtype)
        for n in (heads, groups, groups, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out = ENGINES[name](*inputs, PackedDocuments.from_lengths(lengths, device))
    expected = naive_attention(*exact, lengths)
    assert out.dtype == dtype and out.shape == expected.shape
    found = (out, *torch.autograd.grad(out, inputs, grad))
    references = (expected, *torch.autograd.grad(expected, exact, grad.cpu().double()))
    errors = [
        (actual.cpu().double() - reference).abs().max() / reference.abs().max().clamp_min(1.0)
        for actual, reference in zip(found, references, strict=True)
    ]
    return torch.stack(errors).max().item()  # NaN if any is


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(Dh)) v over the earlier tokens of the same document; shapes as for engines."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(q))
    visible = (document[:, None] == document) & (position[:, None] >= position)  # [T, T]
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


def _rows() -> torch.Tensor:
    return torch.randn(_OUT, _IN, generator=torch.Generator().manual_seed(1)).bfloat16()


def _on(device: torch.device, name: str, stored: dict[str, torch.Tensor]) -> FrozenWeight:
    return FORMATS[name](**{part: tensor.to(device) for part, tensor in stored.items()})


def _dequantized(title: str, name: str, device: torch.device) -> Check:
    """Compare codes and dequantized weights, of bitsandbytes' kernel if there is one, bit by bit."""
    stored, there = FORMATS[name].quantize(_rows()), FORMATS[name].quantize(_rows().to(device))
    different = [part for part in stored if not torch.equal(stored[part], there[part].cpu())]
    here, there_too = _on(torch.device("cpu"), name, stored), _on(device, name, stored)
    different += [
        str(dtype) for dtype in TOLERANCES if not torch.equal(here.dense(dtype), there_too.dense(dtype).cpu())
    ]
    return Check(title, not different, message=(different and f"these differ: {', '.join(different)}") or "")


def _fp8_products(title: str, rows: int, device: torch.device) -> Check:
    """Compare both products with those of the same rounded factors in fp32 on the CPU."""
    stored, generator = FORMATS["fp8"].quantize(_rows()), torch.Generator().manual_seed(2)
    x, g = (torch.randn(rows, width, generator=generator).bfloat16() for width in (_IN, _OUT))
    here, there = _on(torch.device("cpu"), "fp8", stored), _on(device, "fp8", stored)
    errors = {
        "product_error": relative_error(there.product(x.to(device)), here.product(x.float())),
        "gradient_error": relative_error(there.input_gradient(g.to(device)), here.input_gradient(g.float())),
    }
    worst = max(errors, key=lambda name: errors[name])
    return within(title, 1e-2, errors, of=worst)


def _compiled_rotation(title: str, device: torch.device) -> Check:
    x = torch.randn(130, 4, 64, generator=torch.Generator().manual_seed(3)).to(device)
    phases = rotary_phases(torch.arange(130, device=device), 64, 1e6)
    error = relative_error(Rotary(compiled=True)(x, phases), Rotary()(x, phases))
    return within(title, 1e-6, {"error": error}, of="error")
