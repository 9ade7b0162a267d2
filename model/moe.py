"""Mixture of experts (Jiang et al., 2024): each token goes through the k experts its gate rates highest.

Shapes: T tokens, D model width, E experts, k experts per token.
"""

import torch
from torch import nn

from .args import MoeArgs
from .lora import Linear


class MoeLayer(nn.Module):
    def __init__(self, experts: list[nn.Module], gate: Linear, args: MoeArgs) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.num_experts_per_tok = args.num_experts_per_tok

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mixes the chosen experts' outputs: [T, D] -> [T, D]."""
        scores, chosen = torch.topk(self.gate(x), self.num_experts_per_tok)  # [T, k]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            # An expert that no token chose still runs, on zero rows: every rank must produce the same set of
            # gradients, or their reduction across ranks would pair tensors that do not belong together.
            token, slot = torch.where(chosen == index)
            mixed = mixed.index_add(0, token, weights[token, slot, None] * expert(x[token]))
        return mixed
