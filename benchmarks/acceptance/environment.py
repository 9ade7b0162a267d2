"""The machine: versions, what PyTorch finds, the rates of its largest products and copies."""

import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Iterator

import torch

from benchmarks.acceptance.check import Check, Setting
from benchmarks.measure import machine, versions
from benchmarks.training.work import matmul_rate, synchronize
from finetune.hardware import choose_compile, choose_device
from finetune.mixed_precision import choose_dtype

_OPTIONAL = ("bitsandbytes", "xformers", "triton", "flash_attn_interface")
_COPIED = {"cpu": 1 << 26, "cuda": 1 << 32}  # bytes


def environment(setting: Setting) -> Iterator[Check]:
    """Yield versions and rates; fails if PyTorch was not built for the GPU."""
    found = {"platform": platform.platform(), **machine(), **versions()}
    found |= {name: _version(name) for name in _OPTIONAL}
    if setting.on_gpu:
        choose_device(0)  # refuses a GPU without kernels in this build
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
            "cuda": torch.version.cuda,
            "architectures": torch.cuda.get_arch_list(),
        }
    yield Check("versions", True, found)
    dtype = choose_dtype("auto", setting.device, setting.shapes())
    rate = matmul_rate(setting.device, dtype, rounds=8 if setting.on_gpu else 2)
    yield Check("matrix products", None, {"dtype": str(dtype), "tflops": round(rate / 1e12, 2)})
    yield Check("copies", None, {"gb_per_second": round(_copy_rate(setting.device) / 1e9, 1)})
    yield Check("torch.compile", None, {"works": choose_compile("auto", setting.device)})


def _version(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _copy_rate(device: torch.device) -> float:
    """Return the bytes per second of a copy within the device's memory, read and written."""
    source = torch.zeros(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * len(source) / min(seconds)
