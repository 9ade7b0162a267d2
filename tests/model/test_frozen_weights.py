"""Storage formats of frozen weights: against naive rounding, bitsandbytes and dense products; under FSDP2."""

import os
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import frozen_weights
from model.errors import UserError
from model.frozen_weights import FORMATS, DenseWeight, FP8Weight, FrozenWeight, NF4Weight
from tests.support.versions import TORCH, shards_bytes

E4M3_CODES = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)  # 127: NaN
E4M3 = E4M3_CODES.view(torch.float8_e4m3fn).double()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def heavy_tailed(*shape: int) -> Tensor:
    """Return normal weights, one in a hundred of them ten times larger."""
    return normal(*shape) * torch.where(normal(*shape, seed=1) > 2.33, 10.0, 1.0)


def stored(name: str, weight: Tensor) -> FrozenWeight:
    return FORMATS[name](**FORMATS[name].quantize(weight))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


class Product(torch.autograd.Function):
    """Uses a format as a layer does: only the bytes are saved for the backward pass."""

    @staticmethod
    def forward(ctx, x, name, *tensors):
        ctx.format = FORMATS[name]
        ctx.save_for_backward(*tensors)
        return ctx.format(*tensors).product(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.format(*ctx.saved_tensors).input_gradient(g), None, *[None] * len(ctx.saved_tensors)


# Stored tensors


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4.5), ("nf4-dq", 4.125 + 64 / 4096), ("fp8", 8 + 32 / 4096)])
def test_stored_tensors_have_the_declared_shape_and_size(name, bits):
    shapes = FORMATS[name].shapes_of(32, 4096)
    tensors = FORMATS[name].quantize(normal(32, 4096))
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == shapes
    assert all(shape[0] == 32 and dtype == torch.uint8 for shape, dtype in shapes.values())
    assert sum(shape[0] * shape[1] for shape, _ in shapes.values()) * 8 == 32 * 4096 * bits


@every_format
@every_dtype
def test_rows_are_quantized_independently(name, dtype, monkeypatch):
    weight = normal(16, 128).to(dtype)
    whole = FORMATS[name].quantize(weight)
    monkeypatch.setattr(frozen_weights, "_NF4_CHUNK", 3 * 128)
    for rows in (slice(0, 5), slice(5, 16), slice(16, 16)):
        part = FORMATS[name].quantize(weight[rows])
        assert all(torch.equal(part[key], whole[key][rows]) for key in whole)
        assert torch.equal(FORMATS[name](**part).dense(dtype), FORMATS[name](**whole).dense(dtype)[rows])


@pytest.mark.parametrize(
    ("name", "shape", "wrong"),
    [("nf4", (64, 96), "multiple of 64"), ("nf4-dq", (64, 32), "multiple of 64"), ("fp8", (40, 64), "multiple of 16")],
)
def test_unsupported_shape_is_rejected_by_layer_name(name, shape, wrong):
    with pytest.raises(UserError, match=wrong) as caught:
        FORMATS[name].shapes_of(*shape, layer="`layers.0.attention.wq`")
    assert str(caught.value).startswith(f"`layers.0.attention.wq` has a weight of shape {list(shape)}")
    assert f"`base_dtype: {name}`" in str(caught.value)


@every_format
@every_dtype
def test_blocks_of_equal_magnitudes(name, dtype):
    """Zero stays zero and equal magnitudes stay equal, in NF4 exactly, from the smallest to the largest numbers."""
    weight = torch.zeros(16, 128)
    magnitudes = [0, 1, 0.02, 6e4, 1e-3] + ([3e38, 1e-30, 2e-38] if dtype is not torch.float16 else [])
    for row, magnitude in enumerate(magnitudes):
        weight[row] = magnitude * (-1) ** torch.arange(128)
    weight = weight.to(dtype)
    dense = stored(name, weight).dense(dtype)
    tolerance = 1 / 16 if name == "fp8" else 0.0
    torch.testing.assert_close(dense, weight, rtol=tolerance, atol=0)
    x = torch.ones(1, 128, dtype=dtype)
    assert torch.equal(stored(name, weight[:1].repeat(16, 1)).product(x), torch.zeros(1, 16, dtype=dtype))
    assert FORMATS[name].quantize(weight[:1])["weight"].unique().tolist() == [0 if name == "fp8" else 0x77]


@every_format
@pytest.mark.parametrize("exponent", [-60, -7, 40])
def test_scaling_the_weight_scales_the_stored_weight(name, exponent):
    weight = heavy_tailed(16, 256)
    expected = stored(name, weight).dense(torch.float32) * 2.0**exponent
    assert torch.equal(stored(name, weight * 2.0**exponent).dense(torch.float32), expected)


# NF4


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA's construction: eight equal steps of probability above zero, seven below, zero itself, scaled to 1."""
    outermost = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    quantile = NormalDist().inv_cdf

    def side(steps: int) -> list[float]:
        return [quantile(0.5 + (outermost - 0.5) * step / steps) for step in range(1, steps + 1)]

    expected = torch.tensor([-level for level in reversed(side(7))] + [0.0] + side(8)) / quantile(outermost)
    torch.testing.assert_close(torch.tensor(frozen_weights._NF4_LEVELS), expected, rtol=0, atol=2e-6)


@every_dtype
def test_nf4_rounds_to_the_nearest_level(dtype):
    weight = heavy_tailed(8, 192).to(dtype)
    levels = torch.tensor(frozen_weights._NF4_LEVELS)
    expected = torch.empty(8, 192)
    for row in range(8):
        for start in range(0, 192, 64):
            block = weight[row, start : start + 64].float()
            scale = block.abs().max()
            nearest = (block[:, None] / scale - levels).abs().argmin(dim=1)
            expected[row, start : start + 64] = levels[nearest] * scale
    assert torch.equal(stored("nf4", weight).dense(dtype), expected.to(dtype))


def test_double_quantization_adds_little_error():
    weight = heavy_tailed(16, 4096)
    single, double = stored("nf4", weight), stored("nf4-dq", weight)
    assert error(double.dense(torch.float32), single.dense(torch.float32)) < 0.02
    assert error(double.dense(torch.float32), weight) < 1.01 * error(single.dense(torch.float32), weight)


def test_nf4_is_bit_identical_to_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in DTYPES:
        weight = torch.cat([heavy_tailed(8, 256), torch.zeros(1, 256)]).to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
        tensors = NF4Weight.quantize(weight)
        scales = tensors["weight_scales"].view(torch.float32)
        assert torch.equal(codes.view(9, 128), tensors["weight"])
        assert torch.equal(state.absmax.view(9, 4), scales)
        theirs = frozen_weights._dequantize_nf4_by_bitsandbytes(tensors["weight"], scales, dtype)
        assert torch.equal(theirs, NF4Weight(**tensors).dense(dtype))


def test_double_quantization_is_at_least_as_accurate_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in (normal(64, 4096), heavy_tailed(64, 4096)):
        theirs = functional.dequantize_4bit(
            *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        )
        assert error(stored("nf4-dq", weight).dense(torch.float32), weight) <= error(theirs, weight)


# FP8


def rounded_rows(x: Tensor) -> Tensor:
    """Round each row to e4m3 numbers times the smallest power of two that fits its largest magnitude.

    Ties are rounded to the even code.
    """
    scales = 2.0 ** torch.ceil(torch.log2(x.double().abs().amax(dim=1, keepdim=True) / 448))
    distance = (x[..., None] / scales[..., None] - E4M3).abs()
    return E4M3[(distance + 1e-13 * (E4M3_CODES % 2)).argmin(dim=-1)] * scales


@every_dtype
def test_fp8_rounds_each_factor_row_by_row(dtype):
    weight, x, g = (
        normal(32, 48, scale=0.02).to(dtype),
        normal(5, 48, seed=1).to(dtype),
        normal(5, 32, seed=2).to(dtype),
    )
    frozen, dense = stored("fp8", weight), rounded_rows(weight)
    assert torch.equal(frozen.dense(torch.float64), dense)
    scales = FP8Weight.quantize(weight)["weight_scales"].view(torch.float32).double()
    tolerance = 4 * torch.finfo(dtype).eps
    assert error(frozen.product(x), rounded_rows(x) @ dense.T) < tolerance
    folded = rounded_rows(g.double() * scales.T)
    assert error(frozen.input_gradient(g), folded @ (dense / scales)) < tolerance


@pytest.mark.skipif(TORCH < (2, 12), reason="torch 2.11 has no row-wise FP8 product on the CPU")
@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_fp8_hardware_products_match_the_emulation(tokens, monkeypatch):
    """Run the calls made on a Hopper GPU; recent torch supports them on the CPU too, and with more layouts."""
    frozen = stored("fp8", normal(64, 48, scale=0.02))
    x, g = normal(48, tokens, seed=1).to(torch.bfloat16).t(), normal(tokens, 64, seed=2).to(torch.bfloat16)
    emulated = frozen.product(x), frozen.input_gradient(g)
    multiply = torch._scaled_mm

    def multiply_as_on_gpu(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **options: object) -> Tensor:
        assert all(tensor.is_contiguous() for tensor in (a, b.t(), scale_a, scale_b))
        return multiply(a, b, scale_a=scale_a, scale_b=scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", multiply_as_on_gpu)
    monkeypatch.setattr(frozen_weights, "_has_fp8_products", lambda device: True)
    found = frozen.product(x), frozen.input_gradient(g)
    for ours, expected in zip(found, emulated):
        assert ours.dtype == torch.bfloat16
        assert error(ours, expected) < 0.005


def test_fp8_tokens_are_independent():
    frozen = stored("fp8", normal(32, 64))
    x, g = normal(6, 64, seed=1), normal(6, 32, seed=2)
    y, gradient = frozen.product(x), frozen.input_gradient(g)
    x[2, 3], x[4, 5], g[2, 3], g[4, 5] = torch.inf, torch.nan, -torch.inf, torch.nan
    finite = [0, 1, 3, 5]
    for found, before in ((frozen.product(x), y), (frozen.input_gradient(g), gradient)):
        assert torch.equal(found[finite], before[finite])
        assert found[[2, 4]].isnan().all()
    assert torch.equal(frozen.product(x[:2]), y[:2])
    assert frozen.product(x[:0]).shape == (0, 32)


# Products


@every_format
@every_dtype
@pytest.mark.parametrize("width", [256, 2048])
def test_products_are_close_to_the_dense_ones(name, dtype, width):
    """Rounding errors are independent, so the relative error does not grow with the number of terms."""
    weight = normal(128, width, scale=0.02)
    x, g = normal(64, width, seed=1), normal(64, 128, seed=2, scale=1e-3)
    frozen = stored(name, weight)
    low, high = (0.035, 0.04) if name == "fp8" else (0.085, 0.095)
    assert low < error(frozen.product(x.to(dtype)), DenseWeight(weight).product(x)) < high
    assert low < error(frozen.input_gradient(g.to(dtype)), DenseWeight(weight).input_gradient(g)) < high
    assert frozen.product(x.to(dtype)).dtype == frozen.input_gradient(g.to(dtype)).dtype == dtype


@every_format
def test_input_gradient_uses_the_stored_matrix(name):
    weight, g = normal(32, 64), normal(5, 32, seed=2)
    x = normal(5, 64, seed=1).requires_grad_()
    tensors = FORMATS[name].quantize(weight)
    Product.apply(x, name, *tensors.values()).backward(g)
    dense = FORMATS[name](**tensors).dense(torch.float32)
    (expected,) = torch.autograd.grad(F.linear(x, dense), x, g)
    if name == "fp8":  # apart from the rounding of g
        assert 0 < error(x.grad, expected) < 0.04
    else:
        assert torch.equal(x.grad, expected)


def test_dense_weight_computes_in_the_dtype_of_the_input():
    weight, x, g = normal(32, 64).to(torch.bfloat16), normal(5, 64, seed=1), normal(5, 32, seed=2)
    assert torch.equal(DenseWeight(weight).product(x), x @ weight.float().T)
    assert torch.equal(DenseWeight(weight).input_gradient(g), g @ weight.float())


# FSDP2


class Layer(nn.Module):
    """A frozen weight in some format, plus a trainable matrix as a stand-in for an adapter."""

    def __init__(self, name: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.tensor_names = name, list(tensors)
        for key, tensor in tensors.items():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        self.trained = nn.Parameter(normal(*tensors["weight"].shape[:1], 64, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, key) for key in self.tensor_names]
        return Product.apply(x, self.name, *tensors) + F.linear(x, self.trained.to(x.dtype))


def check_sharded(name: str, rank: int) -> None:
    """Quantize only this rank's rows and compare the products with those of the full matrix."""
    rows = 16 if name == "fp8" else 7  # 4 and 3
    weight, x = normal(rows, 64), normal(5, 64, seed=1).to(torch.bfloat16)
    alone = Layer(name, FORMATS[name].quantize(weight))
    shapes = FORMATS[name].shapes_of(rows, 64)
    sharded = Layer(name, {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    own = FORMATS[name].quantize(weight.tensor_split([-(-rows // 2)])[rank])
    for key in own:
        parameter = getattr(sharded, key)
        assert isinstance(parameter, DTensor) and parameter.to_local().shape == own[key].shape
        parameter.to_local().copy_(own[key])

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(given) for layer, given in zip((alone, sharded), inputs)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert sharded.trained.grad.dtype == torch.float32
    torch.testing.assert_close(sharded.trained.grad.full_tensor(), alone.trained.grad, rtol=0.01, atol=0.01)


def one_of_two_ranks(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name in FORMATS:
        check_sharded(name, rank)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort Python's own shutdown, see finetune.cli


@pytest.mark.slow
@shards_bytes
def test_fsdp_shards_the_bytes_without_changing_them(tmp_path: Path):
    rendezvous = str(tmp_path / "rendezvous")
    torch.multiprocessing.start_processes(one_of_two_ranks, (rendezvous,), nprocs=2, start_method="fork")


@every_format
def test_layers_that_share_an_input_quantize_it_once(name, monkeypatch):
    weights, x = [stored(name, normal(32, 64, seed=seed)) for seed in range(3)], normal(5, 64, seed=9)
    expected = [weight.product(x) for weight in weights]
    quantized = []
    quantize = frozen_weights._quantize_fp8
    monkeypatch.setattr(frozen_weights, "_quantize_fp8", lambda rows: quantized.append(rows) or quantize(rows))
    torch.testing.assert_close(type(weights[0]).products(weights, x), expected, rtol=0, atol=0)
    assert len(quantized) == (name == "fp8")
