"""Linear layers that keep their checkpoint names, with and without a low-rank adapter."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .args import BLOCK_LINEARS, LoraArgs
from .errors import UserError
from .frozen_weights import FORMATS, DenseWeight, FrozenWeight
from .fused_lora import Adapter, Identity, InputFn, project


class Linear(nn.Linear):
    """A bias-free linear layer that computes in its input's dtype.

    Trainable parameters are fp32 master weights, cast at each use. A frozen weight may be stored in another format, see
    `quantize_linears`.
    """

    format: type[FrozenWeight] = DenseWeight  # `quantize_linears` sets another

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_linear((self,), x)[0]

    @property
    def is_fusible(self) -> bool:
        """Whether `project` computes what the layer does in its current state."""
        return not self.weight.requires_grad

    def frozen_weight(self) -> FrozenWeight:
        return self.format(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self.format)})

    def adapter(self, dtype: torch.dtype) -> Adapter | None:
        """Return the adapter, if there is one, with its factors cast to the compute dtype."""
        return None

    def unfused(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer on its own, with plain autograd for whatever trains."""
        if self.weight.requires_grad:
            return F.linear(x, self.weight.to(x.dtype))
        return project(Identity(), [x], [self.frozen_weight()], [None])[0]

    def as_product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors u [T, K] and M [out, K] of forward(x) = u M^T, to compute it in parts."""
        return x, self.weight


class LoRALinear(Linear):
    """W x + scaling * B(A(dropout(x))): `weight` keeps its name, `lora_A.weight` [R, in], `lora_B.weight` [out, R]."""

    def __init__(self, in_features: int, out_features: int, lora: LoraArgs) -> None:
        super().__init__(in_features, out_features)
        self.lora_A = Linear(in_features, lora.rank)
        self.lora_B = Linear(lora.rank, out_features)
        self.dropout = nn.Dropout(lora.dropout)
        assert lora.scaling is not None, "LoraArgs derives it from alpha"
        self.scaling = lora.scaling

    @property
    def is_fusible(self) -> bool:
        return super().is_fusible and not (self.training and self.dropout.p)

    def adapter(self, dtype: torch.dtype) -> Adapter:
        return Adapter(self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype), self.scaling)

    def unfused(self, x: torch.Tensor) -> torch.Tensor:
        return super().unfused(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    def as_product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors [x, scaling * A(dropout(x))] and [W, B], see `Linear.as_product`: K = in + R."""
        low = self.lora_A(self.dropout(x)) * self.scaling  # [T, R]
        return torch.cat([x, low], dim=-1), torch.cat([self.weight, self.lora_B.weight.to(self.weight.dtype)], dim=-1)


def fused_linear(
    layers: Sequence[Linear], *tensors: torch.Tensor, input_fn: InputFn | None = None, needs_output: bool = True
) -> tuple[torch.Tensor, ...]:
    """Return the outputs of layers that share the input `input_fn(*tensors)`, by default the tensor itself.

    Fused by `model.fused_lora.project` if every layer allows it.
    """
    fn = input_fn or Identity()
    if all(layer.is_fusible for layer in layers):
        weights = [layer.frozen_weight() for layer in layers]
        adapters = [layer.adapter(tensors[0].dtype) for layer in layers]
        return project(fn, tensors, weights, adapters, needs_output)
    x = fn.forward(*tensors)
    return tuple(layer.unfused(x) for layer in layers)


def add_lora(model: nn.Module, lora: LoraArgs) -> None:
    """Add an adapter to each linear layer named in `lora.targets` and freeze everything else; also on the meta device.

    Raises:
        UserError: the model has no such layer.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    if missing := set(lora.targets) - {name.rpartition(".")[2] for name in linears}:
        raise UserError(f"`lora.targets` names {', '.join(sorted(missing))}, which this model does not have.")
    for name, module in linears.items():
        parent_name, _, attribute = name.rpartition(".")
        if attribute not in lora.targets:
            continue
        with module.weight.device:
            wrapped = LoRALinear(module.in_features, module.out_features, lora)
        wrapped.weight = module.weight
        setattr(model.get_submodule(parent_name), attribute, wrapped)


def quantize_linears(model: nn.Module, base_dtype: str) -> None:
    """Replace the weights of `quantizable_linears` with the empty parameters of a format. For the meta device.

    Raises:
        UserError: the format cannot store one of the weights.
    """
    weight_format = FORMATS[base_dtype]
    for name, layer in quantizable_linears(model):
        layer.format = weight_format
        for part, (shape, dtype) in weight_format.shapes_of(layer.out_features, layer.in_features, name).items():
            empty = torch.empty(shape, dtype=dtype, device=layer.weight.device)
            layer.register_parameter(part, nn.Parameter(empty, requires_grad=False))


def quantizable_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Yield (checkpoint name, frozen layer) of the blocks, except gates, which are small and sensitive to rounding."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in BLOCK_LINEARS and not module.weight.requires_grad:
            yield name, module


def merge_lora(model: nn.Module) -> None:
    """Replace adapted layers with plain linear layers that hold the merged weights: the inverse of `add_lora`."""
    for name, layer in list(lora_layers(model)):
        parent_name, _, attribute = name.rpartition(".")
        with torch.device("meta"):
            merged = Linear(layer.in_features, layer.out_features)
        weight = merged_weight(layer.weight.detach(), layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
        merged.weight = nn.Parameter(weight.detach(), requires_grad=False)
        setattr(model.get_submodule(parent_name), attribute, merged)


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute what the base model computes."""
    scalings = {layer: layer.scaling for _, layer in lora_layers(model)}
    try:
        for layer in scalings:
            layer.scaling = 0.0
        yield
    finally:
        for layer, scaling in scalings.items():
            layer.scaling = scaling


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield (checkpoint name, layer) in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def initial_lora_tensors(model: nn.Module, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Initialize an adapter: A Kaiming-uniform (a = sqrt 5), B zero, unsharded, on the CPU.

    All A matrices are drawn from one generator in module order and in the dtype of the base weights, as in
    mistral-finetune: a seed gives the same adapter for any number of ranks.

    Yields:
        (parameter name, tensor)
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model):
        yield f"{name}.lora_A.weight", _kaiming_uniform(layer.lora_A.weight.shape, dtype, generator)
        yield f"{name}.lora_B.weight", torch.zeros(layer.lora_B.weight.shape, dtype=dtype, device="cpu")


def _kaiming_uniform(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix [R, in] as `nn.init.kaiming_uniform_` with a = sqrt 5 draws it from torch 2.12 on.

    torch 2.11 draws other numbers in bf16 and fp16. Later versions round those of fp32, and replace the upper bound of
    the half-open interval, to which some are rounded, by the lower one.
    """
    bound = math.sqrt(3) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(shape[1]))
    exact = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    rounded, upper = exact.to(dtype), torch.tensor(bound, dtype=dtype, device="cpu")
    return torch.where(rounded == upper, -upper, rounded)


def merged_weight(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return W + scaling * B A in W's dtype: weight [out, in], lora_a [R, in], lora_b [out, R].

    The factors are rounded to W's dtype, as they are in the saved adapter. Their product is computed in fp32, which is
    ten times faster on CPUs than fp16 and bf16.
    """
    product = lora_b.to(weight.dtype).float() @ lora_a.to(weight.dtype).float()
    return weight + product.to(weight.dtype) * scaling
