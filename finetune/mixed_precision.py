"""The dtype of computation, and loss scaling for fp16.

Trained parameters are stored in fp32 and cast for computation (see model.lora.Linear), so they are their own master
copy. Frozen parameters are stored in the dtype of computation.
"""

import functools
import logging
import math
import time

import torch

from model.args import PARAM_DTYPES, ModelArgs, ParamDtype

logger = logging.getLogger("mixed_precision")

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES: dict[torch.dtype, ParamDtype] = {DTYPES[name]: name for name in PARAM_DTYPES}


_MIN_SPEEDUP = 1.5  # of bf16 products over fp32 ones, from which `auto` is bf16 on a CPU
_MIN_WIDTH, _MAX_WIDTH = 256, 1024  # in narrower models little time goes into products; wider ones are as fast
_ROWS, _ROUNDS = 128, 7


def choose_dtype(name: str, device: torch.device, shapes: ModelArgs) -> torch.dtype:
    """Resolve `param_dtype`: auto is bf16 on GPUs from Ampere on, fp16 on older ones, and measured on a CPU."""
    if device.type == "cpu":
        return _choose_on_cpu(name, shapes)
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def head_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of the products of the loss: fp32 on a CPU where those of `dtype` are not fast."""
    if device_type != "cpu" or (dtype == torch.bfloat16 and bf16_speedup(512, _MAX_WIDTH) >= _MIN_SPEEDUP):
        return dtype
    return torch.float32


def _choose_on_cpu(name: str, shapes: ModelArgs) -> torch.dtype:
    width = min(shapes.dim, shapes.hidden_dim)
    if name not in ("auto", "bf16") or width < _MIN_WIDTH:
        return DTYPES.get(name, torch.float32)
    speedup = bf16_speedup(min(shapes.dim, _MAX_WIDTH), min(shapes.hidden_dim, _MAX_WIDTH))
    if name == "auto":
        name = "bf16" if speedup >= _MIN_SPEEDUP else "fp32"
        logger.info("bf16 products are %.2g times as fast as fp32 on this CPU: computing in %s", speedup, name)
    elif speedup < 1:
        logger.warning("`param_dtype: bf16`: on this CPU, bf16 products are %.2g times as fast as fp32.", speedup)
    return DTYPES[name]


@functools.cache
def bf16_speedup(in_features: int, out_features: int) -> float:
    """Return how many times as fast as in fp32 this CPU multiplies bf16 matrices of a linear layer, by measurement.

    CPUs with instructions for bf16 (AMX, AVX512-BF16) are 2 to 8 times as fast; others convert, and are slower.
    """
    linear = torch.nn.functional.linear
    operands = [
        (torch.ones(_ROWS, in_features, dtype=dtype), torch.ones(out_features, in_features, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for x, weight in operands:
        linear(x, weight)  # prepares the kernel
    fastest = [math.inf, math.inf]
    for _ in range(_ROUNDS):
        for index, (x, weight) in enumerate(operands):
            start = time.perf_counter()
            linear(x, weight)
            fastest[index] = min(fastest[index], time.perf_counter() - start)
        if fastest[1] > 2 * fastest[0]:
            break  # no need to be exact
    return fastest[0] / fastest[1]


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
