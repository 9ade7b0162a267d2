"""Linear layers that keep their checkpoint names, with and without a low-rank adapter."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .args import BLOCK_LINEARS, LoraArgs
from .errors import UserError
from .frozen_weights import FORMATS, DenseWeight, FrozenWeight
from .fused_lora import Adapter, Given, Source, project


class Linear(nn.Linear):
    """A bias-free linear layer that computes in its input's dtype.

    Parameters that train are kept in fp32 and are their own master copy; the cast gives the working copy. A frozen
    weight may be stored in another format, see `quantize_linears`.
    """

    format: type[FrozenWeight] = DenseWeight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_linear((self,), x)[0]

    @property
    def is_fusible(self) -> bool:
        """Whether `project` can stand for the layer as it is now."""
        return not self.weight.requires_grad

    def frozen_weight(self) -> FrozenWeight:
        return self.format(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self.format)})

    def adapter(self, dtype: torch.dtype) -> Adapter | None:
        """The adapter, with factors in the dtype that computes."""
        return None

    def unfused(self, x: torch.Tensor) -> torch.Tensor:
        """forward, by autograd's own means where the layer trains."""
        if self.weight.requires_grad:
            return F.linear(x, self.weight.to(x.dtype))
        return project(Given(), [x], [self.frozen_weight()], [None])[0]

    def as_product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors u [T, K] and M [out, K] of forward(x) = u M^T, for who wants some rows or columns of it at a time."""
        return x, self.weight


class LoRALinear(Linear):
    """W x + scaling * B(A(dropout(x))): `weight` keeps its name, `lora_A.weight` [R, in], `lora_B.weight` [out, R]."""

    def __init__(self, in_features: int, out_features: int, lora: LoraArgs) -> None:
        super().__init__(in_features, out_features)
        self.lora_A = Linear(in_features, lora.rank)
        self.lora_B = Linear(lora.rank, out_features)
        self.dropout = nn.Dropout(lora.dropout)
        self.scaling = lora.scaling

    @property
    def is_fusible(self) -> bool:
        return super().is_fusible and not (self.training and self.dropout.p)

    def adapter(self, dtype: torch.dtype) -> Adapter:
        return Adapter(self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype), self.scaling)

    def unfused(self, x: torch.Tensor) -> torch.Tensor:
        return super().unfused(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    def as_product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Linear.as_product`, of [x, scaling * A(dropout(x))] and [W, B]: K = in + R."""
        low = self.lora_A(self.dropout(x)) * self.scaling  # [T, R]
        return torch.cat([x, low], dim=-1), torch.cat([self.weight, self.lora_B.weight.to(self.weight.dtype)], dim=-1)


def fused_linear(
    layers: Sequence[Linear], *tensors: torch.Tensor, source: Source | None = None, output_matters: bool = True
) -> tuple[torch.Tensor, ...]:
    """The outputs of layers whose common input `source` makes of `tensors`; without a source it is the tensor itself.

    See `model.fused_lora.project`, which does the work wherever the layers allow it.
    """
    source = source or Given()
    if all(layer.is_fusible for layer in layers):
        weights = [layer.frozen_weight() for layer in layers]
        return project(source, tensors, weights, [layer.adapter(tensors[0].dtype) for layer in layers], output_matters)
    x = source.forward(*tensors)
    return tuple(layer.unfused(x) for layer in layers)


def add_lora(model: nn.Module, lora: LoraArgs) -> None:
    """Gives the linear layers that `lora.targets` names an adapter and freezes all else. Works on the meta device.

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
    """Gives the frozen linear layers of the blocks the parameters of a format, empty. For the meta device.

    Raises:
        UserError: the format cannot store one of the weights.
    """
    for name, layer in quantizable_linears(model):
        layer.format = FORMATS[base_dtype]
        for part, (shape, dtype) in layer.format.shapes_of(layer.out_features, layer.in_features, name).items():
            empty = torch.empty(shape, dtype=dtype, device=layer.weight.device)
            layer.register_parameter(part, nn.Parameter(empty, requires_grad=False))


def quantizable_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Yields (checkpoint name, layer): all but the head and the gates, which are small and tell much apart."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in BLOCK_LINEARS and not module.weight.requires_grad:
            yield name, module


def merge_lora(model: nn.Module) -> None:
    """Puts plain linear layers with the merged weights in the place of adapters: the inverse of `add_lora`."""
    for name, layer in list(lora_layers(model)):
        parent_name, _, attribute = name.rpartition(".")
        with torch.device("meta"):
            merged = Linear(layer.in_features, layer.out_features)
        weight = merged_weight(layer.weight.detach(), layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
        merged.weight = nn.Parameter(weight.detach(), requires_grad=False)
        setattr(model.get_submodule(parent_name), attribute, merged)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yields (checkpoint name, layer) in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def initial_lora_tensors(model: nn.Module, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Draws the adapter a run starts from: A Kaiming-uniform (a = sqrt 5), B zero, full size, on the CPU.

    All of A is drawn from one generator in module order and in the dtype of the base weights, which is what the
    original does: the same seed starts the same run, whatever the number of ranks.

    Yields:
        (parameter name, tensor)
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model):
        weight_a = torch.empty(layer.lora_A.weight.shape, dtype=dtype, device="cpu")
        nn.init.kaiming_uniform_(weight_a, a=math.sqrt(5), generator=generator)
        yield f"{name}.lora_A.weight", weight_a
        yield f"{name}.lora_B.weight", torch.zeros(layer.lora_B.weight.shape, dtype=dtype, device="cpu")


def merged_weight(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling * B A in W's dtype: weight [out, in], lora_a [R, in], lora_b [out, R].

    The factors are rounded to W's dtype, as they are in the saved adapter; their product is taken in fp32, which CPUs
    do ten times faster than fp16 and bf16.
    """
    product = lora_b.to(weight.dtype).float() @ lora_a.to(weight.dtype).float()
    return weight + product.to(weight.dtype) * scaling
