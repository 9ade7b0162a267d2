"""The dtype of computation, and loss scaling for fp16.

Trained parameters are stored in fp32 and cast for computation (see model.lora.Linear), so they are their own master
copy. Frozen parameters are stored in the dtype of computation.
"""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve `param_dtype`: auto is bf16 on GPUs from Ampere on, fp16 on older ones, fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al., 2018), which prevents underflow of small fp16 gradients.

    The loss is multiplied by `scale` before the backward pass. A step with a non-finite gradient is skipped and halves
    the scale; `growth_interval` finite steps in a row double it. For bf16 and fp32 the scale is always 1.
    """

    def __init__(self, dtype: torch.dtype, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = dtype == torch.float16
        self.scale = scale if self.enabled else 1.0
        self.growth_interval = growth_interval
        self._finite_steps = 0

    def update(self, finite: bool) -> None:
        """Adjust the scale after a step whose gradient was finite or not."""
        if not self.enabled:
            return
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self._finite_steps == self.growth_interval:
            self.scale *= 2
            self._finite_steps = 0

    def state_dict(self) -> dict[str, float]:
        """Return the state to save in a checkpoint."""
        return {"scale": self.scale, "good_steps": self._finite_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved state."""
        self.scale, self._finite_steps = state["scale"], int(state["good_steps"])
