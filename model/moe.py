"""Mixture of experts (Jiang et al., 2024): the gate routes each token to the k experts with the highest scores.

Shapes: T tokens, D model width, E experts, k experts per token. A token has k slots, one for each of its experts.

The experts run one after another and not as torch's grouped matrix product, which needs their weights as one tensor.
For a layer of Mixtral 8x7B (2.8 GB in bf16) that copy moves twice the bytes that the products read, for any number of
tokens, and it would be kept for the backward pass. Products of that size fill a GPU one at a time.
"""

import torch
from torch import nn

from .args import MoeArgs
from .fused_lora import InputFn
from .lora import Linear


class MoeLayer(nn.Module):
    def __init__(self, experts: list[nn.Module], gate: Linear, args: MoeArgs) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.num_experts_per_tok = args.num_experts_per_tok

    def forward(self, x: torch.Tensor, norm: InputFn | None = None) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs for x, normalized if `norm` is given: [T, D]."""
        if norm is not None:
            x = norm.forward(x)
        scores, chosen = torch.topk(self.gate(x), self.num_experts_per_tok)  # [T, k]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        order, ends = slots_by_expert(chosen, len(self.experts))
        token = order // self.num_experts_per_tok
        # tolist() is the only place where the host waits for the device. An expert without tokens still runs, on zero
        # rows: all ranks must produce the same set of gradients, otherwise their reduction would pair the wrong ones.
        parts = x.index_select(0, token).tensor_split(ends[:-1].tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])  # [T k, D]
        return torch.zeros_like(x).index_add(0, token, outputs * weights.flatten()[order, None])


def slots_by_expert(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the slots of `chosen` [T, k] by expert, and by token within an expert.

    Returns:
        Indices into `chosen.flatten()` [T k], and the end of each expert's slots among them [E].
    """
    expert, order = chosen.flatten().sort(stable=True)
    return order, torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True)
