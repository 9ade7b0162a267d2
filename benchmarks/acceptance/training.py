"""Training of a small model: gradients and losses against the CPU's, runs that are resumed, full memory."""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.acceptance.check import Check, Setting, attempt, relative_error, within
from benchmarks.acceptance.small_model import CPU, batches, build, config_file, losses
from finetune.args import load_train_args
from finetune.distributed import World
from finetune.eval import evaluate
from finetune.loss import batch_loss
from finetune.mixed_precision import DTYPES, LossScaler
from finetune.wrapped_model import trainable_parameters
from model.attention import ENGINES, why_not
from model.errors import UserError
from train import run_training

# Of losses and of gradients, by bf16's 8 and fp16's 11 bits. The other ones are for fp8, whose inputs are rounded to 4,
# and for mixtures, where rounding can send a token to another expert.
_LIMITS = {"fp32": (1e-5, 1e-3), "bf16": (2e-3, 5e-2), "fp16": (5e-4, 1e-2)}
_COARSE_LIMITS = (5e-3, 2e-1)
_QUANTIZED = ("nf4", "nf4-dq", "fp8")
_ROOM_ON_CPU = 192 << 20  # bytes of address space left to a run that must fail


def gradients(setting: Setting) -> Iterator[Check]:
    """Yield a check per engine, dtype, base and kind of model: loss and gradients, and the loss of an evaluation."""
    for title, settings in _cases(setting):
        yield attempt(title, functools.partial(_compared, setting, title, **settings))


def _cases(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    for engine, dtype in itertools.product(ENGINES, _LIMITS):
        yield f"{engine}, {dtype}", {"attention": engine, "param_dtype": dtype}
    for base, dtype in itertools.product(_QUANTIZED, ("bf16", "fp16")):
        yield f"{base}, {dtype}", {"base_dtype": base, "param_dtype": dtype}
    half = {"param_dtype": "bf16"}
    yield "all weights, bf16", half | {"lora.enable": False, "save_adapters": False}
    yield "mixture of experts, bf16", half | {"moe": True}
    if setting.on_gpu:
        yield "compiled, bf16", half | {"compile": True}
        yield "compiled, fp8", half | {"compile": True, "base_dtype": "fp8"}


def _compared(setting: Setting, title: str, **settings: Any) -> Check:
    """Compare with the CPU in fp32, on the same base weights."""
    engine, dtype = settings.get("attention"), settings["param_dtype"]
    if engine and (reason := why_not(engine, setting.device, DTYPES[dtype], setting.shapes().head_dim)):
        return Check(title, None, message=reason.partition(". ")[0])
    exact = settings | {"param_dtype": "fp32", "attention": "auto", "compile": False}
    loss, evaluation, gradient = _computed(setting, setting.device, **settings)
    exact_loss, exact_evaluation, exact_gradient = _reference(setting, tuple(exact.items()))
    numbers = {
        "loss": loss,
        "loss_error": loss / exact_loss - 1,
        "evaluation_error": evaluation / exact_evaluation - 1,
        "gradient_error": relative_error(gradient, exact_gradient),
    }
    rounds_more = settings.get("moe") or settings.get("base_dtype") == "fp8"
    of_loss, of_gradient = _COARSE_LIMITS if rounds_more else _LIMITS[dtype]
    limits = {"loss_error": of_loss, "evaluation_error": of_loss, "gradient_error": of_gradient}
    checks = (within(title, limit, numbers, of=name) for name, limit in limits.items())
    return next((check for check in checks if not check.passed), Check(title, True, numbers))


@functools.cache
def _reference(setting: Setting, settings: tuple[tuple[str, Any], ...]) -> tuple[float, float, torch.Tensor]:
    return _computed(setting, CPU, **dict(settings))


def _computed(
    setting: Setting, device: torch.device, moe: bool = False, **settings: Any
) -> tuple[float, float, torch.Tensor]:
    """Return the loss of a batch, that of an evaluation, and the trained parameters' gradient."""
    small, two = build(setting, device, moe, **settings), batches(setting, moe)[:2]
    scale = LossScaler(small.hardware.dtype).scale
    loss = batch_loss(small.model, two[0], device)
    (loss * scale).backward()
    parameters = trainable_parameters(small.model)
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    gradient = torch.cat([part.flatten().cpu() for part in parts]) / scale
    return loss.item(), evaluate(small.model, two[1:], World(0, 1, device)), gradient


def precisions(setting: Setting) -> Iterator[Check]:
    """Yield the losses of short runs: every dtype and base like fp32 on the CPU; recomputation changes nothing."""
    exact = losses(setting, CPU, param_dtype="fp32")
    yield Check("fp32 on the CPU learns", exact[-1] < exact[0] - 0.5, {"losses": exact})
    for dtype, base in itertools.product(("bf16", "fp16"), ("same", *_QUANTIZED)):
        limit = 0.03 if base != "same" else 2 * _LIMITS[dtype][0]
        yield _similar(setting, f"{dtype}, {base}", exact, limit, param_dtype=dtype, base_dtype=base)
    exact = losses(setting, setting.device, param_dtype="bf16")
    for checkpoint in ("selective", True):
        title = f"checkpoint: {str(checkpoint).lower()}"
        yield _similar(setting, title, exact, 1e-3, param_dtype="bf16", checkpoint=checkpoint)


def sharding(setting: Setting) -> Iterator[Check]:
    """Yield whether a model that FSDP2 shards over one process, in host memory, trains like one that is not sharded."""
    exact = losses(setting, setting.device, param_dtype="bf16")
    title = "one process with FSDP2 and cpu_offload"
    yield _similar(setting, title, exact, 1e-3, param_dtype="bf16", cpu_offload=True)


def _similar(setting: Setting, title: str, expected: list[float], limit: float, **settings: Any) -> Check:
    """Compare the losses of a run with `settings` on the device with `expected`."""

    def compare() -> Check:
        found = losses(setting, setting.device, **settings)
        errors = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
        error = max(errors) if all(map(math.isfinite, errors)) else math.nan
        return within(title, limit, {"losses": found, "error": error}, of="error")

    return attempt(title, compare)


def resuming(setting: Setting) -> Iterator[Check]:
    """Yield whether a run that is resumed from its middle ends with the same losses and the same adapter, bit by bit.

    With PyTorch's deterministic algorithms: without them, a GPU adds gradients in an order that varies.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    settings = {"ckpt_freq": 2, "no_eval": False, "eval_freq": 2}
    first = _run(setting, "first", **settings)
    numbers = {"losses": _metrics(first, "train", "loss"), "evaluations": _metrics(first, "eval", "eval_loss")}
    finite = all(map(math.isfinite, [*numbers["losses"], *numbers["evaluations"]]))
    yield Check("a run with evaluations and checkpoints", finite and len(numbers["losses"]) == 4, numbers)
    checkpoint = first / "checkpoints" / "checkpoint_000002"
    resumed = _run(setting, "resumed", resume=str(checkpoint), **settings)
    again = _metrics(resumed, "train", "loss")
    yield Check("losses after resuming are bit-equal", again == numbers["losses"][2:], {"losses": again})
    adapters = [load_file(run / "checkpoints/last/consolidated/lora.safetensors") for run in (first, resumed)]
    different = [name for name, tensor in adapters[0].items() if not torch.equal(tensor, adapters[1][name])]
    yield Check("the adapter after resuming is bit-equal", not different, message=", ".join(different[:3]))


def _run(setting: Setting, name: str, **settings: Any) -> Path:
    run_training(load_train_args(config_file(setting, name, **settings)), World(0, 1, setting.device))
    return setting.folder / name


def _metrics(run_dir: Path, tag: str, key: str) -> list[float]:
    lines = (run_dir / f"metrics.{tag}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[key] for line in lines]


def full_memory(setting: Setting) -> Iterator[Check]:
    """Yield whether a run that exhausts the memory ends with a sentence that names settings to change."""
    logging.disable(logging.WARNING)  # the plan warns of it
    message = "the run did not run out of memory"
    with _little_memory(setting.device):
        try:
            _run(setting, "large", seq_len=1 << 16, batch_size=4, no_ckpt=True, checkpoint=False, max_steps=1)
        except UserError as error:
            message = str(error)
    expected = "is out of memory" in message and "a smaller `seq_len` (now 65536)" in message
    yield Check("a full memory is reported with advice", expected, {"said": message}, "" if expected else message)


@contextlib.contextmanager
def _little_memory(device: torch.device) -> Iterator[None]:
    """Limit the memory that this process can allocate: to a hundredth of a GPU's, or on a CPU to a little more."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.01, device)
        yield  # this process ends after it
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM_ON_CPU, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
