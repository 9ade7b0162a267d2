"""Attention engines: every engine that runs here against a softmax in float64, forward and backward; engine choice."""

import math

import pytest
import torch

from model.args import ATTENTION_ENGINES
from model.attention import ENGINES, PackedDocuments, choose_engine, why_not
from model.errors import UserError

DEVICES = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest value
HEAD_DIMS = (16, 80, 128)
AVAILABLE = [
    pytest.param(name, device, dtype, head_dim, id=f"{name}-{device.type}-{str(dtype)[6:]}-{head_dim}")
    for name in ENGINES
    for device in DEVICES
    for dtype in TOLERANCES
    for head_dim in HEAD_DIMS
    if why_not(name, device, dtype, head_dim) is None
]


def naive_attention(q, k, v, lengths):
    """softmax(q k^T / sqrt(Dh)) v over the earlier tokens of the same document."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    position = torch.arange(len(q), device=q.device)
    visible = (document[:, None] == document) & (position[:, None] >= position)  # [T, T]
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("name, device, dtype, head_dim", AVAILABLE)
@pytest.mark.parametrize("lengths", [[1], [1, 1], [7], [1, 13, 2, 1], [65, 3, 130]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2)])
def test_engine_matches_naive_attention(name, device, dtype, head_dim, lengths, heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(lengths), n, head_dim, generator=generator).to(device, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    out = ENGINES[name](*inputs, PackedDocuments.from_lengths(lengths, device))
    expected = naive_attention(*exact, lengths)
    assert out.dtype == dtype and out.shape == expected.shape
    grads = torch.autograd.grad(out, inputs, grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    for actual, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        scale = max(reference.abs().max().item(), 1.0)
        torch.testing.assert_close(actual.double(), reference, rtol=0, atol=TOLERANCES[dtype] * scale)


def test_packed_documents_from_lengths():
    documents = PackedDocuments.from_lengths([3, 1, 2], torch.device("cpu"))
    assert documents.lengths == [3, 1, 2]
    assert documents.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (documents.positions.dtype, documents.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert documents.max_length == 3


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_sdpa_runs_on_every_device_and_dtype(device):
    """V100 and T4 support neither bf16 kernels nor varlen attention, but must still be able to train in fp16."""
    assert not any(why_not("sdpa", device, dtype, head_dim) for dtype in TOLERANCES for head_dim in HEAD_DIMS)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_auto_selects_sdpa_on_cpu(dtype):
    assert choose_engine("auto", torch.device("cpu"), dtype, 16) == "sdpa"


@pytest.mark.parametrize(
    "works, expected",
    [(set(ENGINES), "varlen"), ({"xformers", "sdpa"}, "xformers"), ({"cudnn", "sdpa"}, "sdpa")],
)
def test_auto_prefers_varlen_then_xformers_on_cuda(monkeypatch, works, expected):
    monkeypatch.setattr("model.attention.why_not", lambda name, *_: None if name in works else "no kernel")
    assert choose_engine("auto", torch.device("cuda"), torch.float16, 128) == expected


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_named_engine_is_used_or_the_error_lists_supported_ones(name, device):
    if why_not(name, device, torch.float32, 16) is None:
        assert choose_engine(name, device, torch.float32, 16) == name
        return
    with pytest.raises(
        UserError, match=rf"`attention: {name}` does not run here \({device.type}, float32\): .+\. Supp.*sdpa"
    ):
        choose_engine(name, device, torch.float32, 16)


def test_unknown_engine_is_rejected():
    with pytest.raises(UserError, match="'flash'; expected auto, varlen, xformers, sdpa, cudnn"):
        choose_engine("flash", torch.device("cpu"), torch.float32, 16)


def test_settings_list_every_engine_in_order_of_preference():
    assert tuple(ENGINES) == ATTENTION_ENGINES


def test_without_any_engine_the_error_gives_each_reason(monkeypatch):
    monkeypatch.setattr("model.attention.why_not", lambda name, *_: f"no kernel for {name}")
    with pytest.raises(
        UserError, match=r"No attention engine runs here .*varlen: no kernel for varlen; xformers: .*sdpa: "
    ):
        choose_engine("auto", torch.device("cuda"), torch.float16, 128)


def test_a_full_gpu_does_not_select_another_engine(monkeypatch):
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(ENGINES, "sdpa", full)
    with pytest.raises(torch.OutOfMemoryError):
        choose_engine("auto", torch.device("cpu"), torch.float32, 16)


def test_an_engine_without_grouped_heads_is_not_selected(monkeypatch):
    def equal_heads(q, k, v, documents):
        return q * k * v

    monkeypatch.setitem(ENGINES, "varlen", equal_heads)
    assert "size of tensor" in why_not("varlen", torch.device("cpu"), torch.float32, 16)
