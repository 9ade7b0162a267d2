"""Speed and memory of models of benchmarks.train, by its code, and the kernels in which a step spends its time."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.acceptance.check import Check, Setting, within
from benchmarks.plan import estimated_bytes
from benchmarks.training.inputs import packed_batches, train_args
from benchmarks.training.ours import build_ours
from benchmarks.training.presets import PRESETS
from benchmarks.training.session import measure_training
from benchmarks.training.work import synchronize
from finetune.hardware import choose_device, free_bytes
from model.errors import first_line, full_memory

_KERNELS = 25
_GIB = 1 << 30
# Of the peak. Memory that a CPU's process uses has parts that are not tensors, and matter for a tiny model.
_PLAN_LIMITS = {"cuda": 0.05, "cpu": 0.5}
REPORTED = ("tokens_per_second", "mfu", "peak_bytes", "seconds", "first_loss", "last_loss", "attention", "recomputed")


def measured(setting: Setting, impl: str, preset: str, **changes: Any) -> Iterator[Check]:
    """Train for some steps; yield speed and peak, and for this project how far the plan is from the peak.

    Args:
        setting: where.
        impl: ours or peft.
        preset: of benchmarks.train.
        **changes: options of benchmarks.train.
    """
    case = _case(setting, preset, **changes)
    name = f"{preset}, {impl}"
    if impl == "ours" and (reason := _too_large(setting, case)):
        yield Check(name, None, case, message=reason)
        return
    try:
        numbers = measure_training(impl, case)
    except Exception as error:
        if impl == "ours" or full_memory(error) is None:
            raise
        yield Check(name, None, case, message=f"out of memory: {first_line(error)}")
        return
    yield Check(name, None, case | {key: numbers[key] for key in REPORTED})
    if impl == "ours":
        yield _planned(setting, case, numbers)


def _case(setting: Setting, preset: str, **changes: Any) -> dict[str, Any]:
    if setting.on_gpu:
        choose_device(0)  # sets up the allocator, as a run does
    own = PRESETS[preset]
    case: dict[str, Any] = {"preset": preset, "device": setting.device.type, "dtype": "auto", "attention": "auto"}
    case |= {"threads": len(os.sched_getaffinity(0)) if setting.on_gpu else torch.get_num_threads()}
    case |= {"checkpoint": "auto", "seq_len": own.seq_len, "vocab_size": own.shapes.vocab_size, "set": []}
    return case | {"warmup": 1, "steps": 2} | changes


def _too_large(setting: Setting, case: dict[str, Any]) -> str | None:
    """Return why a case cannot be trained here, if the memory that is planned for it is not free."""
    least = case | {"checkpoint": "true" if case["checkpoint"] == "auto" else case["checkpoint"]}
    needed, free = estimated_bytes(least, trained_share=1.0), free_bytes(setting.device, processes=1)
    if free is None or needed <= free:
        return None
    return f"needs about {needed / _GIB:.1f} GiB, of which {free / _GIB:.1f} are free"


def _planned(setting: Setting, case: dict[str, Any], numbers: dict[str, Any]) -> Check:
    before = numbers.get("import_bytes", 0)  # not recorded on a GPU, where imports use none
    resolved = case | {"checkpoint": numbers["recomputed"]}
    planned = before + estimated_bytes(resolved, numbers["trained_share"])
    found = {
        "planned_bytes": planned,
        "peak_bytes": numbers["peak_bytes"],
        "error": planned / numbers["peak_bytes"] - 1,
    }
    title = f"{case['preset']}, planned memory"
    return within(title, _PLAN_LIMITS[setting.device.type], case | found, of="error")


def profile(setting: Setting, preset: str, **changes: Any) -> Iterator[Check]:
    """Yield the kernels that a micro-batch with its optimizer step spends most time in."""
    case = _case(setting, preset, **changes)
    if reason := _too_large(setting, case):
        yield Check(f"{preset}, kernels", None, case, message=reason)
        return
    args = train_args(PRESETS[preset], case)
    trainee = build_ours(args, PRESETS[preset].shapes, setting.device)
    loader = packed_batches(args)
    batches = list(itertools.islice(loader, 2))
    loader.close()
    trainee.step(batches[:1])  # compiles
    synchronize(setting.device)
    activity = torch.profiler.ProfilerActivity.CUDA if setting.on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        trainee.step(batches[1:])
        synchronize(setting.device)
    kind = DeviceType.CUDA if setting.on_gpu else DeviceType.CPU
    rows = [event for event in profiler.key_averages() if event.device_type == kind]
    times = {event: event.self_device_time_total if setting.on_gpu else event.self_cpu_time_total for event in rows}
    most = sorted(rows, key=lambda event: times[event], reverse=True)[:_KERNELS]
    total = sum(times.values())
    kernels = [{"kernel": event.key[:100], "calls": event.count, "ms": round(times[event] / 1e3, 3)} for event in most]
    yield Check(f"{preset}, kernels", None, {"total_ms": round(total / 1e3, 3), "kernels": kernels})
