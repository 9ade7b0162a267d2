"""Attention engines: every engine that runs here against a softmax in float64, forward and backward; engine choice."""

import pytest
import torch

from benchmarks.acceptance.kernels import TOLERANCES, attention_error
from model.args import ATTENTION_ENGINES
from model.attention import ENGINES, PackedDocuments, choose_engine, why_not
from model.errors import UserError

DEVICES = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
HEAD_DIMS = (16, 80, 128)
AVAILABLE = [
    pytest.param(name, device, dtype, head_dim, id=f"{name}-{device.type}-{str(dtype)[6:]}-{head_dim}")
    for name in ENGINES
    for device in DEVICES
    for dtype in TOLERANCES
    for head_dim in HEAD_DIMS
    if why_not(name, device, dtype, head_dim) is None
]


@pytest.mark.parametrize("name, device, dtype, head_dim", AVAILABLE)
@pytest.mark.parametrize("lengths", [[1], [1, 1], [7], [1, 13, 2, 1], [65, 3, 130]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2)])
def test_engine_matches_naive_attention(name, device, dtype, head_dim, lengths, heads, kv_heads):
    assert attention_error(name, device, dtype, head_dim, lengths, heads, kv_heads) <= TOLERANCES[dtype]


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
