"""Which dtype computes, and how fp16 is kept from overflowing.

Whatever trains is stored in fp32 and cast for computation (see model.lora.Linear), so it is its own master copy;
what is frozen is stored in the dtype that computes.
"""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolves `param_dtype`: auto is bf16 on cards that compute in it (Ampere on), fp16 on older ones, fp32 on CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al., 2018): keeps small fp16 gradients from vanishing.

    The loss is multiplied by `scale` before the backward pass. A step whose gradient is not finite is skipped and
    halves the scale; `growth_interval` good steps in a row double it. bf16 and fp32 need none of it: their scale is 1
    and stays.
    """

    def __init__(self, dtype: torch.dtype, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = dtype == torch.float16
        self.scale = scale if self.enabled else 1.0
        self.growth_interval = growth_interval
        self._good_steps = 0

    def update(self, finite: bool) -> None:
        """Takes note of whether a step's gradient was finite."""
        if not self.enabled:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self._good_steps == self.growth_interval:
            self.scale *= 2
            self._good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a continued run takes over."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from `state`."""
        self.scale, self._good_steps = state["scale"], int(state["good_steps"])
