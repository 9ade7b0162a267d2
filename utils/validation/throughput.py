"""How long a run will take, from published training speeds."""

import dataclasses
import math
import shutil

from model.args import ModelArgs

# Starting, loading and saving; mistral-finetune's own estimate allows for as much.
OVERHEAD_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class PublishedSpeed:
    """LoRA training of one model on H100: mistral-finetune's figures, 32,768 tokens per step, bf16, recomputation."""

    model: str
    active_parameters: float  # that one token goes through
    tokens_per_second: float  # per GPU


_ON_H100 = (
    PublishedSpeed("open-mistral-7b", 7.25e9, 5720),
    PublishedSpeed("open-mistral-nemo", 12.25e9, 3337),
    PublishedSpeed("open-mixtral-8x7b", 12.88e9, 2966),
    PublishedSpeed("open-mixtral-8x22b", 39.1e9, 1007),
    PublishedSpeed("mistral-large-latest", 122.6e9, 567),
)
# Speed against an H100, from LoRA figures for 7B (or 8B, by size) models. A name matches as a part of the device's.
_GPUS = {
    "H100": 1.0,
    "H200": 1.0,  # the same arithmetic as an H100; no figure of its own has been published
    "A100": 3653 / 5720,  # 24p11's notebook: 7B, rank 64, sequences of 8192, bf16, 40 GB
    "V100": 1202 / 5720,  # 24p11's log: 7B, rank 64, sequences of 15,000, fp16
    "RTX 4090": 3083 * 8.03 / 7.25 / 5720,  # torchtune: Llama-3 8B, packed to 2048, compiled
}
_USUAL_GPUS = ("H100", "A100", "V100")
_WIDEST_SCALING = 3.0  # a model this much larger or smaller than any published one is not guessed at


def visible_gpus() -> list[str]:
    """Names of the GPUs a run here would use."""
    if shutil.which("nvidia-smi") is None:  # spares the second or two that torch takes to load
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def active_parameters(args: ModelArgs) -> float:
    """Weights that one token goes through; of a mixture of experts, those of the chosen ones."""
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.n_kv_heads)
    experts = args.moe.num_experts_per_tok if args.moe else 1
    return args.n_layers * (attention + 3 * experts * args.dim * args.hidden_dim) + 2 * args.vocab_size * args.dim


def published_parameters(model_name: str) -> float | None:
    """Size of a model known by name; None for others."""
    return next((speed.active_parameters for speed in _ON_H100 if speed.model == model_name), None)


def tokens_per_second(parameters: float | None, gpu: str) -> float | None:
    """Speed of one GPU with a model of that many active parameters; None where nothing published tells.

    Training costs the same number of operations per token and parameter, so the figure of the model nearest in size
    is scaled by the sizes.
    """
    relative = next((relative for name, relative in _GPUS.items() if name in gpu), None)
    if parameters is None or relative is None:
        return None
    nearest = min(_ON_H100, key=lambda speed: abs(math.log(speed.active_parameters / parameters)))
    scale = nearest.active_parameters / parameters
    if not 1 / _WIDEST_SCALING <= scale <= _WIDEST_SCALING:
        return None
    return nearest.tokens_per_second * scale * relative


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of a whole run."""

    where: str
    tokens_per_second: float | None  # None: unknown


def run_speeds(num_gpus: int, gpus: list[str], parameters: float | None) -> list[Speed]:
    """Speeds on the first of the visible GPUs or, where there is none, on usual ones.

    Args:
        num_gpus: that the run takes.
        gpus: names of the visible ones.
        parameters: active parameters of the model, if known.
    """
    speeds = []
    for gpu in gpus[:1] or _USUAL_GPUS:
        of_one = tokens_per_second(parameters, gpu)
        speeds.append(Speed(f"{num_gpus} x {gpu}", None if of_one is None else num_gpus * of_one))
    return speeds if any(speed.tokens_per_second for speed in speeds) else speeds[:1]


def eta(tokens: float, speed: Speed) -> str:
    """Duration of a run of so many tokens as HH:MM:SS."""
    if speed.tokens_per_second is None:
        return "unknown"
    minutes, seconds = divmod(int(OVERHEAD_SECONDS + tokens / speed.tokens_per_second), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
