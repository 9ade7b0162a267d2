"""Training speed estimated from a model's operations per token and a GPU's peak rate, with the table of GPUs.

These are estimates, not measurements. A GPU is assumed to reach `TYPICAL_SHARE` of its peak. Published LoRA runs of 7B
models reach 41 % on a V100 and 50 % on an A100, and at least 25 % on an H100 (attention not counted); an RTX 4090 was
reported at 56 % or more (torchtune, 8B). Not counted: adapters (a few percent), communication between GPUs, evaluation,
checkpoints, and unpacking weights of a quantized base. A small model waits for kernel launches instead, whose number is
counted and whose time is assumed.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from model.args import ModelArgs

from .args import CheckpointMode, TrainArgs

if TYPE_CHECKING:
    from .memory_estimate import MemoryConfig

TYPICAL_SHARE = 0.4  # of a GPU's peak rate
_LAUNCH_SECONDS = 1e-5  # assumed for one kernel of an eager PyTorch program
_LAYER_LAUNCHES, _NETWORK_LAUNCHES = 150, 60  # of a layer's forward and backward pass, and of each feed-forward network
_GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Gpu:
    label: str
    gib: float  # of memory as PyTorch reports it, a little less than the vendor's GB
    tflops: float  # peak rate of dense 16-bit matrix products accumulated in fp32
    dtype: str = "bf16"  # what `param_dtype: auto` selects
    attention: str = "varlen"  # what `attention: auto` selects
    stand_in: str = ""  # label of the listed GPU whose peak rate is assumed; empty: its own

    def basis(self, share: float = TYPICAL_SHARE) -> str:
        """Return what an estimate of its speed is based on."""
        reached = f"{share:.0%} of the {self.stand_in or self.label}'s 16-bit peak of {self.tflops:g} TFLOP/s"
        if not self.stand_in:
            return reached
        return f"{reached}, the slowest listed GPU with about as much memory, since only the memory is known"

    @property
    def usable_bytes(self) -> float:
        """Memory that a plan may use; the rest is kept free, as `checkpoint: auto` does."""
        from .memory_estimate import RESERVE

        return self.gib * _GIB * (1 - RESERVE)


def _before_ampere(label: str, gib: float, tflops: float) -> Gpu:
    return Gpu(label, gib, tflops, dtype="fp16", attention="xformers")


# Peak rates are the vendor's, in TFLOP/s without sparsity (half of what a data sheet gives with it).
GPUS = {
    "v100-16": _before_ampere("V100 16 GB", 15.8, 125.0),  # V100 data sheet: 125 (SXM2)
    "v100": _before_ampere("V100 32 GB", 31.7, 125.0),
    "t4": _before_ampere("T4", 14.6, 65.0),  # T4 data sheet: 65; 16 GB
    "l4": Gpu("L4", 22.0, 121.0),  # L4 data sheet: 242 with sparsity; 24 GB
    "a10": Gpu("A10", 22.0, 125.0),  # A10 data sheet: 125; 24 GB
    "a30": Gpu("A30", 23.5, 165.0),  # A30 data sheet: 165; 24 GB
    "a40": Gpu("A40", 44.4, 149.7),  # A40 data sheet: 149.7; 48 GB
    "a6000": Gpu("RTX A6000", 47.4, 154.8),  # RTX A6000 data sheet: 309.7 with sparsity; 48 GB
    "l40": Gpu("L40", 44.4, 181.0),  # L40 data sheet: 181.05; 48 GB
    "l40s": Gpu("L40S", 44.4, 362.0),  # L40S data sheet: 362.05; 48 GB
    "a100-40": Gpu("A100 40 GB", 39.4, 312.0),  # A100 data sheet: 312
    "a100": Gpu("A100 80 GB", 79.1, 312.0),
    "h100-pcie": Gpu("H100 PCIe", 79.1, 756.0),  # H100 data sheet: 1,513 with sparsity; 80 GB
    "h100": Gpu("H100", 79.1, 989.0),  # H100 data sheet (SXM): 1,979 with sparsity; 80 GB
    "h100-nvl": Gpu("H100 NVL", 93.0, 835.0),  # H100 data sheet: 1,671 with sparsity; 94 GB
    "h200": Gpu("H200", 139.8, 989.0),  # H200 data sheet (SXM): 1,979 with sparsity; 141 GB
    "b200": Gpu("B200", 178.0, 2250.0),  # DGX B200 data sheet: 36,000 for eight with sparsity; 180 GB
    # GeForce: the architecture white papers' "FP16 Tensor TFLOPS with FP32 accumulate".
    "rtx3090": Gpu("RTX 3090", 23.5, 71.0),  # GA102 white paper: 71; 24 GB
    "rtx4090": Gpu("RTX 4090", 23.5, 165.2),  # Ada white paper: 165.2; 24 GB
    "rtx4080": Gpu("RTX 4080", 15.6, 97.5),  # Ada white paper: 97.5; 16 GB
    "rtx5090": Gpu("RTX 5090", 31.3, 209.5),  # RTX Blackwell white paper: 209.5; 32 GB
}
_OTHER_GPUS = {"laptop", "mig", "q"}  # words of names that share a number with a GPU of the table (Max-Q)


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU of a key of `GPUS` or of a device's name ("NVIDIA A100-SXM4-40GB"); None if it is not listed."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    spelled = re.sub(r"(?i)\b(rtx|gtx)\s*(?=\d)", r"\1", name.lower())
    words = set(re.findall(r"[a-z0-9]+", spelled))
    if words & _OTHER_GPUS:
        return None
    # The name of an A100 with 40 GB contains all words of both `a100` and `a100-40`: the longer key is meant.
    keys = sorted(GPUS, key=len, reverse=True)
    return next((GPUS[key] for key in keys if all({part, f"{part}gb"} & words for part in key.split("-"))), None)


def unlisted_gpu(gib: float, label: str = "GPU") -> Gpu:
    """Return a GPU of which only the memory is known.

    It is assumed to be as fast as the slowest GPU of the table that computes in bf16 and has at least about as much
    memory, or as the one with the most memory.
    """
    recent = [gpu for gpu in GPUS.values() if gpu.dtype == "bf16"]
    as_large = [gpu for gpu in recent if gpu.gib >= 0.9 * gib]
    peer = min(as_large, key=lambda gpu: gpu.tflops) if as_large else max(recent, key=lambda gpu: gpu.gib)
    return Gpu(label, gib, peer.tflops, stand_in=peer.label)


def visible_gpu(name: str, memory_bytes: int) -> Gpu:
    """Return the GPU of a device, under the device's name."""
    listed = find_gpu(name)
    return dataclasses.replace(listed, label=name) if listed else unlisted_gpu(memory_bytes / _GIB, name)


def mean_context(lengths: Mapping[int, int], window: int | None = None) -> float:
    """Return how many tokens a token attends to on average, itself included.

    Args:
        lengths: number of documents of each length in tokens.
        window: width of sliding-window attention.
    """
    tokens = sum(length * count for length, count in lengths.items())
    attended = 0.0
    for length, count in lengths.items():
        near = min(length, window or length)
        attended += count * (near * (near + 1) / 2 + (length - near) * near)
    return attended / tokens


def _block_parameters(model: ModelArgs) -> float:
    attention = 2 * model.dim * model.head_dim * (model.n_heads + model.n_kv_heads)
    return model.n_layers * attention + _feed_forward_parameters(model)


def _feed_forward_parameters(model: ModelArgs) -> float:
    experts = model.moe.num_experts_per_tok if model.moe else 1
    return 3 * model.n_layers * experts * model.dim * model.hidden_dim


def flops_per_token(
    model: ModelArgs, context: float, checkpoint: CheckpointMode, lora: bool = True, trained_share: float = 1.0
) -> float:
    """Return the floating-point operations of training on one token.

    A weight costs two in the forward pass, two for its input's gradient and, if it trains, two for its own.

    Args:
        model: shapes.
        context: tokens that a token attends to (see `mean_context`).
        checkpoint: what is recomputed in the backward pass: False, "selective" or True.
        lora: whether the base is frozen.
        trained_share: share of the tokens with a loss, for which alone the head is computed; 0 to 1.
    """
    blocks, head = _block_parameters(model), model.vocab_size * model.dim * trained_share
    attention = 4 * model.n_layers * model.n_heads * model.head_dim * context
    gate_and_up = 2 / 3 * _feed_forward_parameters(model)
    recomputed = {False: 0.0, "selective": 2 * gate_and_up, True: 2 * blocks + attention}
    return (4 if lora else 6) * (blocks + head) + 3 * attention + recomputed[checkpoint]


def tokens_per_second(
    gpu: Gpu, model: ModelArgs, flops: float, microbatch_tokens: int, share: float = TYPICAL_SHARE
) -> float:
    """Return the speed of one GPU, limited by arithmetic or, for a small model, by kernel launches.

    Args:
        gpu: of `GPUS`, or of `unlisted_gpu`.
        model: shapes.
        flops: operations per token (see `flops_per_token`).
        microbatch_tokens: tokens of a forward pass.
        share: share of the peak rate that is reached, 0 to 1.
    """
    networks = model.moe.num_experts if model.moe else 1
    launches = model.n_layers * (_LAYER_LAUNCHES + _NETWORK_LAUNCHES * networks)
    seconds = max(microbatch_tokens * flops / (share * gpu.tflops * 1e12), launches * _LAUNCH_SECONDS)
    return microbatch_tokens / seconds


def expected_time(args: TrainArgs, model: ModelArgs, gpu: Gpu, gpus: int, steps: int) -> str:
    """Return a sentence on how long these steps take on `gpus` of these GPUs, for the log before the first step."""
    microbatch = args.batch_size * args.seq_len
    context = mean_context({args.seq_len: 1}, model.sliding_window)
    flops = flops_per_token(model, context, args.checkpoint, args.lora.enable)
    speed = gpus * tokens_per_second(gpu, model, flops, microbatch)
    hours = steps * args.num_microbatches * microbatch * gpus / speed / 3600
    return (
        f"Expected time: {hours:.1f} hours for {steps:,} steps without evaluation and checkpoints, at {speed:,.0f} "
        f"tokens/s (estimated from {gpu.basis()}; the ETA of the following lines is measured)"
    )


def memory_config(args: TrainArgs, model: ModelArgs, gpu: Gpu, gpus: int, trained_share: float = 1.0) -> "MemoryConfig":
    """Return the memory estimate's configuration for a run on `gpus` of these GPUs."""
    from .memory_estimate import MemoryConfig  # loads torch
    from .mixed_precision import DTYPES

    dtype = gpu.dtype if args.param_dtype == "auto" else args.param_dtype
    attention = gpu.attention if args.attention == "auto" else args.attention
    return MemoryConfig.of(args, model, DTYPES[dtype], "cuda", attention, gpus, trained_share)
