"""Rotary position embeddings (Su et al., 2021) in Mistral's layout: adjacent channels form a complex number."""

import torch


def rotary_phases(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Return exp(i * position * theta^(-2j/Dh)): positions [T] -> complex64 [T, Dh/2].

    Computed for the given positions only, so there is no table and no maximum sequence length.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # Not theta**-exponents, which rounds differently from mistral-finetune: 5e-4 at position 128,000.
    angles = torch.outer(positions.float(), 1 / theta**exponents)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """Rotate each channel pair of x [T, heads, Dh] by its phase, in fp32; shape and dtype are preserved."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [T, heads, Dh/2]
    return torch.view_as_real(pairs * phases[:, None]).flatten(-2).to(x.dtype)
