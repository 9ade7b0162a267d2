"""The choice of device, dtype and attention engine, and the memory that is available."""

import dataclasses
import importlib.util
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.args import ModelArgs
from model.attention import choose_engine
from model.errors import UserError, first_line
from model.fused_lora import SwiGLU

from .mixed_precision import DTYPE_NAMES, choose_dtype
from .speed_estimate import Gpu, visible_gpu

logger = logging.getLogger("hardware")

_CGROUP, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclasses.dataclass(frozen=True)
class Hardware:
    device: torch.device
    dtype: torch.dtype  # of computation and of frozen parameters
    attention: str  # one of model.attention.ENGINES

    def settings(self) -> dict[str, Any]:
        """Return the resolved YAML keys."""
        return {"param_dtype": DTYPE_NAMES[self.dtype], "attention": self.attention}

    def gpu(self) -> Gpu | None:
        """Return the GPU, for an estimate of its speed; None on a CPU."""
        if self.device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(self.device)
        return visible_gpu(found.name, found.total_memory)

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return ", ".join([name, *(f"{key}: {value}" for key, value in self.settings().items())])


def choose_device(local_rank: int) -> torch.device:
    """Return the GPU of this process, or the CPU if there is no CUDA.

    Raises:
        UserError: the node has more processes than GPUs, or this build of PyTorch has no kernels for the GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Before the first allocation. The lengths of tensors vary between batches, which would otherwise fragment memory.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(
            f"Process {local_rank} of this machine has no GPU: {count} are visible. "
            f"Start torchrun with --nproc-per-node {count} or check CUDA_VISIBLE_DEVICES."
        )
    device = torch.device("cuda", local_rank)
    _require_kernels(device)
    return device


def _require_kernels(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    if not built or any(_runs_on(architecture, major, minor) for architecture in built):
        return
    remedy = "Install a build of PyTorch that has them: https://pytorch.org/get-started/locally."
    if (5, 0) <= (major, minor) < (7, 5):
        remedy = (
            "Builds for CUDA 12.6 have them: pip install --force-reinstall torch --index-url "
            "https://download.pytorch.org/whl/cu126."
        )
    raise UserError(
        f"{torch.cuda.get_device_name(device)} needs kernels for sm_{major}{minor}; PyTorch {torch.__version__} was "
        f"built for {', '.join(built)}. {remedy}"
    )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Return whether code for an architecture (sm_86, sm_90a, compute_120) runs on a GPU of this capability."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    kind, suffix, built = match[1], match[4], (int(match[2]), int(match[3]))
    if suffix == "a":  # this capability only
        return built == (major, minor)
    if kind == "compute" and not suffix:  # is translated for any later GPU
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def choose_hardware(device: torch.device, param_dtype: str, attention: str, model_args: ModelArgs) -> Hardware:
    """Resolve `param_dtype` and `attention`.

    Raises:
        UserError: the requested attention engine does not run here.
    """
    dtype = choose_dtype(param_dtype, device, model_args)
    engine = choose_engine(attention, device, dtype, model_args.head_dim)
    if engine == "varlen":
        _enable_flash_attention_3(device)
    return Hardware(device, dtype, engine)


def _enable_flash_attention_3(device: torch.device) -> None:
    """Let PyTorch's flash attention use FlashAttention-3, which is for Hopper, if its package is installed."""
    has_package = importlib.util.find_spec("flash_attn_interface") is not None
    if has_package and torch.cuda.get_device_capability(device)[0] == 9:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")


def enable_tf32(hardware: Hardware) -> str | None:
    """Let this process multiply fp32 matrices as TF32. Return why that has no effect, if it has none."""
    if hardware.device.type != "cuda":
        return "this run has no GPU"
    if hardware.dtype != torch.float32:
        name = hardware.settings()["param_dtype"]
        return f"`param_dtype` is {name} on this GPU, and only fp32 has such products"
    if torch.cuda.get_device_capability(hardware.device)[0] < 8:
        return f"{torch.cuda.get_device_name(hardware.device)} has no TF32; GPUs have it from Ampere on"
    torch.set_float32_matmul_precision("high")
    return None


def choose_compile(setting: bool | str, device: torch.device) -> bool:
    """Resolve `compile`: auto compiles on a GPU where torch.compile works.

    Raises:
        UserError: `compile: true` does not work here.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    x = torch.ones(4, 4, device=device)
    try:
        SwiGLU(compiled=True).forward(x, x)
    except Exception as error:  # from the compiler, Triton, a missing header: of any type
        if setting == "auto":
            logger.warning("`compile: auto` is false, torch.compile does not work here: %s.", first_line(error))
            return False
        raise UserError(
            f"`compile: true` does not work here: {first_line(error)}. It needs a C++ compiler, and "
            "on a GPU Triton. Set `compile: false`."
        ) from error
    return True


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Return the peak and the current memory in bytes: allocated on the GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    import resource  # POSIX

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm") as file:
            return peak, int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return peak, peak


def free_bytes(device: torch.device, processes: int, swap: bool = False) -> float | None:
    """Return the bytes available to this process on its GPU, or its share of the node's RAM; None if unknown.

    Args:
        device: of the process.
        processes: number of processes on this node.
        swap: add the node's free swap space.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    if "MemAvailable" not in kib:
        return None
    available = min(kib["MemAvailable"] * 1024, _container_free_bytes())
    return (available + (kib.get("SwapFree", 0) * 1024 if swap else 0)) / processes


def _container_free_bytes() -> float:
    """Return what the control groups of a container or a batch job (cgroup v1 or v2) may still allocate.

    A group is limited by its parents, too. Its file cache counts as free: the kernel drops it on demand.
    """
    return min((_group_free_bytes(folder) for folder in _memory_groups()), default=math.inf)


def _memory_groups() -> Iterator[Path]:
    """Yield the folders of this process's control groups for memory, up to the root's."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUP / "memory" if controllers else _CGROUP
        group = root / path.strip("/")
        # In a container, the path may be that of the host; the folders outside of it do not exist then.
        yield from (folder for folder in (group, *group.parents) if folder == root or root in folder.parents)


def _group_free_bytes(group: Path) -> float:
    for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (float((group / name).read_text(encoding="utf-8")) for name in (most, now))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        cache = [float(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("active_file", "inactive_file")]
        return max(limit - used + sum(cache), 0)
    return math.inf
