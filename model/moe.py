"""Mixture of experts (Jiang et al., 2024): each token goes through the k experts its gate rates highest.

Shapes: T tokens, D model width, E experts, k experts per token. A token has k slots, one for each expert it chose.

The experts run one after the other rather than as torch's grouped product, which wants their weights as one tensor:
copying a layer's of Mixtral 8x7B (2.8 GB in bf16) moves twice the bytes that multiplying by them reads, at any
number of tokens, and the copy would be kept for the backward pass. Products of that size fill a GPU one by one.
"""

import torch
from torch import nn

from .args import MoeArgs
from .fused_lora import Source
from .lora import Linear


class MoeLayer(nn.Module):
    def __init__(self, experts: list[nn.Module], gate: Linear, args: MoeArgs) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.num_experts_per_tok = args.num_experts_per_tok

    def forward(self, x: torch.Tensor, norm: Source | None = None) -> torch.Tensor:
        """Mixes the chosen experts' outputs for x, or for what `norm` makes of it: [T, D] -> [T, D]."""
        if norm is not None:
            x = norm.forward(x)
        scores, chosen = torch.topk(self.gate(x), self.num_experts_per_tok)  # [T, k]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        order, ends = slots_by_expert(chosen, len(self.experts))
        token = order // self.num_experts_per_tok
        # The one place where the host waits for the device. An expert that no token chose runs all the same, on zero
        # rows: every rank must produce the same set of gradients, or their reduction would pair ones that do not match.
        parts = x.index_select(0, token).tensor_split(ends[:-1].tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])  # [T k, D]
        return torch.zeros_like(x).index_add(0, token, outputs * weights.flatten()[order, None])


def slots_by_expert(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the slots of `chosen` [T, k] by expert, those of one expert in the order of their tokens.

    Returns:
        indices into `chosen.flatten()` [T k], and where in them each expert's slots end [E].
    """
    expert, order = chosen.flatten().sort(stable=True)
    return order, torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True)
