"""Storage formats for the frozen weight of a linear layer (dense, 4-bit NF4, 8-bit FP8) and its two matrix products.

A format replaces the parameter `weight` [out, in] with a few uint8 tensors whose first dimension is `out`. Rows are
independent, so each rank quantizes only its own. Scales are also stored as bytes, because FSDP2's mixed precision would
round them to the compute dtype. At each use the layer wraps its tensors in a view:

    weight = FORMATS["nf4"](**{name: getattr(layer, name) for name in FORMATS["nf4"].shapes_of(out, in)})
    y = weight.product(x)

Products keep no intermediate results: the backward pass dequantizes again.

| name   | bits per weight, in = 4096 | |
|--------|------|---|
| nf4    | 4.50 | 32 / 64 for the scales |
| nf4-dq | 4.14 | 8 / 64 + 64 / in for the scales |
| fp8    | 8.01 | 32 / in for the scales |

Shapes: T tokens; out, in: the layer's features.
"""

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import elementwise
from .errors import UserError

# The 16 levels of NF4: the quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al., 2023, appendix E).
_NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_BLOCK = 64  # weights that share a scale
_NF4_CHUNK = 1 << 20  # weights quantized at a time, which bounds the temporary memory
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_FP8_MULTIPLE = 16  # both dimensions must be multiples, as the tensor cores' products require
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None

Shapes = dict[str, tuple[tuple[int, int], torch.dtype]]  # tensor name -> shape, dtype


@dataclass(frozen=True)
class FrozenWeight(ABC):
    """A matrix W [out, in] that does not train, and its products. Cheap to create: a view of a layer's tensors."""

    weight: Tensor  # [out, ...]

    @property
    def out_features(self) -> int:
        return len(self.weight)

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in `dtype`."""

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T: x [T, in] -> [T, out], in x's dtype. Not differentiable; its backward is `input_gradient`."""
        return F.linear(x, self.dense(x.dtype))

    @classmethod
    def compiled_version(cls) -> "type[FrozenWeight]":
        """Return this format with its elementwise operations compiled."""
        return cls

    @classmethod
    def products(cls, weights: Sequence[Self], x: Tensor) -> list[Tensor]:
        """Return `product(x)` of several weights of this format."""
        return [weight.product(x) for weight in weights]

    def input_gradient(self, g: Tensor, total: Tensor | None = None) -> Tensor:
        """Return g W, added in place to `total` if given: g [T, out] -> [T, in], in g's dtype."""
        weight = self.dense(g.dtype)
        return g @ weight if total is None else total.addmm_(g, weight)


@dataclass(frozen=True)
class DenseWeight(FrozenWeight):
    """`weight` [out, in], any floating-point dtype."""

    weight: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class QuantizedWeight(FrozenWeight):
    """A format: a dataclass whose fields are the tensors that replace the parameter `weight`."""

    @staticmethod
    @abstractmethod
    def shapes_of(out_features: int, in_features: int, layer: str = "A layer") -> Shapes:
        """Return names, shapes and dtypes of the tensors that store a weight.

        Args:
            layer: name of the layer, for the error message.

        Raises:
            UserError: the format cannot store a matrix of this shape.
        """

    @staticmethod
    @abstractmethod
    def quantize(rows: Tensor) -> dict[str, Tensor]:
        """Quantize rows [n, in] of a weight, n >= 0, any floating-point dtype: the n rows of each stored tensor."""


@dataclass(frozen=True)
class NF4Weight(QuantizedWeight):
    """4-bit NormalFloat as in QLoRA: 64 consecutive weights of a row share a scale, their largest magnitude.

    Codes and scales are bit-identical to bitsandbytes (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314).

    Attributes:
        weight: [out, in / 2] uint8, two codes per byte, the first in the high four bits.
        weight_scales: [out, in / 64 * 4] uint8, the bytes of fp32.
    """

    weight: Tensor
    weight_scales: Tensor

    @staticmethod
    def shapes_of(out_features: int, in_features: int, layer: str = "A layer") -> Shapes:
        _check_multiple("nf4", layer, (out_features, in_features), (1, _NF4_BLOCK))
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "weight_scales": ((out_features, in_features // _NF4_BLOCK * 4), torch.uint8),
        }

    @staticmethod
    def quantize(rows: Tensor) -> dict[str, Tensor]:
        codes, scales = _quantize_nf4(rows)
        return {"weight": codes, "weight_scales": scales.view(torch.uint8)}

    def dense(self, dtype: torch.dtype) -> Tensor:
        return _dequantize_nf4(self.weight, self.weight_scales.view(torch.float32), dtype)


@dataclass(frozen=True)
class DoubleQuantizedNF4Weight(QuantizedWeight):
    """NF4 with double quantization: scales are quantized to 8 bits between the smallest and largest scale of their row.

    QLoRA quantizes blocks of 256 scales around the mean of the whole matrix (0.127 bits per weight instead of 0.141 for
    in = 4096, 0.129 for 14336). Here rows are independent, and a row's offset saves as much range as the mean does.

    Attributes:
        weight: as in `NF4Weight`.
        weight_scales: [out, in / 64] uint8.
        weight_scale_ranges: [out, 8] uint8, the bytes of two fp32 numbers: the smallest scale and the step.
    """

    weight: Tensor
    weight_scales: Tensor
    weight_scale_ranges: Tensor

    @staticmethod
    def shapes_of(out_features: int, in_features: int, layer: str = "A layer") -> Shapes:
        _check_multiple("nf4-dq", layer, (out_features, in_features), (1, _NF4_BLOCK))
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "weight_scales": ((out_features, in_features // _NF4_BLOCK), torch.uint8),
            "weight_scale_ranges": ((out_features, 8), torch.uint8),
        }

    @staticmethod
    def quantize(rows: Tensor) -> dict[str, Tensor]:
        codes, scales = _quantize_nf4(rows)
        low, high = scales.aminmax(dim=-1, keepdim=True)  # [n, 1]
        step = ((high - low) / 255).clamp_min(_SMALLEST_NORMAL)
        return {
            "weight": codes,
            "weight_scales": ((scales - low) / step).round().clamp_max(255).to(torch.uint8),
            "weight_scale_ranges": torch.cat([low, step], dim=-1).view(torch.uint8),
        }

    def dense(self, dtype: torch.dtype) -> Tensor:
        low, step = self.weight_scale_ranges.view(torch.float32).split(1, dim=-1)
        return _dequantize_nf4(self.weight, self.weight_scales * step + low, dtype)


@dataclass(frozen=True)
class FP8Weight(QuantizedWeight):
    """W = diag(s) Wq with Wq in e4m3 and one scale per output channel. Both products run in FP8 if the GPU supports it.

    The other factor is quantized row by row at each use. A single Wq serves both products: in the input's gradient
    G W = (G diag(s)) Wq, the scales are folded into G before it is quantized. G is also stored in e4m3, not e5m2: each
    of its rows has its own scale, so the range of e4m3 (2^18 from smallest to largest) suffices, and the bit is better
    spent on precision.

    All scales are powers of two. This costs a floating-point format almost no precision and makes dividing by a scale,
    multiplying by it and folding it into G exact in bf16.

    Without FP8 products (CPUs, GPUs before Hopper), the same numbers are rounded in the same way and multiplied in the
    input's dtype.

    Attributes:
        weight: [out, in] uint8, the bytes of e4m3.
        weight_scales: [out, 4] uint8, the bytes of fp32.
    """

    weight: Tensor
    weight_scales: Tensor
    compiled: ClassVar[bool] = False

    @staticmethod
    def shapes_of(out_features: int, in_features: int, layer: str = "A layer") -> Shapes:
        _check_multiple("fp8", layer, (out_features, in_features), (_FP8_MULTIPLE, _FP8_MULTIPLE))
        return {
            "weight": ((out_features, in_features), torch.uint8),
            "weight_scales": ((out_features, 4), torch.uint8),
        }

    @staticmethod
    def quantize(rows: Tensor) -> dict[str, Tensor]:
        codes, scales = _quantize_fp8(rows)
        return {"weight": codes.view(torch.uint8), "weight_scales": scales.view(torch.uint8)}

    def dense(self, dtype: torch.dtype) -> Tensor:
        return _dequantize_fp8(self.weight.view(_FP8), self._scales(), dtype)

    @classmethod
    def compiled_version(cls) -> type[FrozenWeight]:
        return _CompiledFP8Weight

    def product(self, x: Tensor) -> Tensor:
        return self.products([self], x)[0]

    @classmethod
    def products(cls, weights: Sequence[Self], x: Tensor) -> list[Tensor]:
        """Return `product(x)` of each weight; x is quantized once."""
        codes, scales = elementwise(_quantize_fp8, cls.compiled)(x)
        if not _has_fp8_products(x.device):
            rounded = _dequantize_fp8(codes, scales, x.dtype)
            return [F.linear(rounded, weight.dense(x.dtype)) for weight in weights]
        return [
            _fp8_product(codes, scales, weight.weight.view(_FP8).t(), weight._scales().t()).to(x.dtype)
            for weight in weights
        ]

    def input_gradient(self, g: Tensor, total: Tensor | None = None) -> Tensor:
        product = self._input_gradient(g)
        return product if total is None else total.add_(product)

    def _input_gradient(self, g: Tensor) -> Tensor:
        weight_scales = self._scales().t()  # [1, out]
        codes, scales = elementwise(_scale_and_quantize_fp8, self.compiled)(g, weight_scales)
        if not _has_fp8_products(g.device):
            wide = _with_wide_exponents(g.dtype)
            rounded = _dequantize_fp8(codes, scales, wide) / weight_scales.to(wide)
            return rounded.to(g.dtype) @ self.dense(g.dtype)
        # The second factor of an FP8 product must be column-major, which requires a copy here: keeping it would double
        # the memory of the weights.
        columns = self.weight.t().contiguous().t().view(_FP8)
        return _fp8_product(codes, scales, columns, scales.new_ones(1, columns.shape[1])).to(g.dtype)

    def _scales(self) -> Tensor:
        """Return the scales, fp32 [out, 1]."""
        return self.weight_scales.view(torch.float32)


class _CompiledFP8Weight(FP8Weight):
    compiled = True


FORMATS: dict[str, type[QuantizedWeight]] = {
    "nf4": NF4Weight,
    "nf4-dq": DoubleQuantizedNF4Weight,
    "fp8": FP8Weight,
}


def _check_multiple(name: str, layer: str, shape: tuple[int, int], multiples: tuple[int, int]) -> None:
    if any(size % multiple for size, multiple in zip(shape, multiples)):
        out_multiple, in_multiple = multiples
        needed = f"an input width that is a multiple of {in_multiple}"
        needed += f" and an output width that is a multiple of {out_multiple}" if out_multiple > 1 else ""
        raise UserError(
            f"{layer} has a weight of shape {list(shape)} (output, input width), which `base_dtype: {name}` cannot "
            f"store: it needs {needed}. Use another `base_dtype`; `same` works with every model."
        )


@functools.cache  # a copy to a GPU would make the host wait at each product
def _nf4_levels(device: torch.device) -> Tensor:
    return torch.tensor(_NF4_LEVELS, device=device)


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte: [256, 2]."""
    levels = _nf4_levels(device)
    return torch.cartesian_prod(levels, levels)


def _quantize_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, in] -> codes uint8 [n, in / 2], scales fp32 [n, in / 64]."""
    levels = _nf4_levels(rows.device)
    boundaries = (levels[1:] + levels[:-1]) / 2
    parts = [_nearest_levels(part, boundaries) for part in rows.split(max(1, _NF4_CHUNK // rows.shape[1]))]
    codes, scales = zip(*parts)
    return torch.cat(codes), torch.cat(scales)


def _nearest_levels(rows: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    blocks = rows.float().unflatten(-1, (-1, _NF4_BLOCK))  # [n, in / 64, 64]
    scales = blocks.abs().amax(dim=-1)
    scaled = blocks / scales.clamp_min(_SMALLEST_NORMAL)[..., None]
    levels = torch.bucketize(scaled, boundaries, out_int32=True).to(torch.uint8).flatten(1)  # [n, in]
    return levels[:, ::2] << 4 | levels[:, 1::2], scales


def _dequantize_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes uint8 [out, in / 2], scales fp32 [out, in / 64] -> [out, in]."""
    if _HAS_BITSANDBYTES and codes.is_cuda:
        return _dequantize_nf4_by_bitsandbytes(codes, scales, dtype)
    if not codes.is_cuda:
        return _dequantize_nf4_in_chunks(codes, scales, dtype)
    blocks = F.embedding(codes.int(), _nf4_pairs(codes.device)).view(*scales.shape, _NF4_BLOCK)
    return blocks.mul_(scales[..., None]).flatten(1).to(dtype)


def _dequantize_nf4_in_chunks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the same numbers in parts that stay in a CPU's cache, without an fp32 matrix."""
    out_features, in_features = len(codes), codes.shape[1] * 2
    pairs = _nf4_pairs(codes.device).view(torch.int64).flatten()  # [256], each two fp32 levels
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    rows = max(1, _NF4_CHUNK // in_features)
    for some_codes, some_scales, target in zip(codes.split(rows), scales.split(rows), weight.split(rows), strict=True):
        blocks = torch.take(pairs, some_codes.long()).view(torch.float32).view(*some_scales.shape, _NF4_BLOCK)
        target.view_as(blocks).copy_(blocks.mul_(some_scales[..., None]))
    return weight


def _dequantize_nf4_by_bitsandbytes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the same numbers in one kernel."""
    import bitsandbytes  # noqa: F401  registers the operator

    shape = (codes.shape[0], codes.shape[1] * 2)
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, _NF4_BLOCK, "nf4", shape, dtype)


def _quantize_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, K] -> codes e4m3 [n, K], scales fp32 [n, 1], powers of two. Rows that are not finite become NaN."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scales = _next_power_of_two((largest / _FP8_MAX).clamp_min(_SMALLEST_NORMAL))
    wide = _with_wide_exponents(rows.dtype)
    return (rows.to(wide) / scales.to(wide)).to(_FP8).contiguous(), scales


def _scale_and_quantize_fp8(rows: Tensor, column_scales: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, K], column_scales fp32 [1, K] -> as `_quantize_fp8` of their product."""
    wide = _with_wide_exponents(rows.dtype)
    return _quantize_fp8(rows.to(wide) * column_scales.to(wide))


def _dequantize_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _with_wide_exponents(dtype)
    return (codes.to(wide) * scales.to(wide)).to(dtype)


def _with_wide_exponents(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to scale in: fp16's exponents are too few for the scales, bf16 has those of fp32."""
    return torch.float32 if dtype is torch.float16 else dtype


def _next_power_of_two(x: Tensor) -> Tensor:
    """Round normal positive fp32 up to powers of two: any mantissa above zero carries into the exponent."""
    return (x.view(torch.int32) + 0x007FFFFF & 0x7F800000).view(torch.float32)


def _has_fp8_products(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _fp8_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """a [T, K] row-major, a_scales [T, 1], b [K, N] column-major, b_scales [1, N] -> bf16 [T, N], for any T.

    With fast accumulation: without it, row-wise kernels lose most of their speed, and its error is far smaller than
    that of rounding to e4m3.
    """
    return torch._scaled_mm(a, b, scale_a=a_scales, scale_b=b_scales, out_dtype=torch.bfloat16, use_fast_accum=True)
