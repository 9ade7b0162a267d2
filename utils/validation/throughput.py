"""Duration of a run, estimated for the validator's report."""

import dataclasses
import shutil

from finetune.args import TrainArgs
from finetune.speed_estimate import (
    GPUS,
    Gpu,
    find_gpu,
    flops_per_token,
    mean_context,
    memory_config,
    tokens_per_second,
    visible_gpu,
)
from model.args import ModelArgs
from utils.validation.data_statistics import DataStatistics

# Start-up, loading and saving; mistral-finetune's estimate includes the same.
OVERHEAD_SECONDS = 300
# mistral-finetune's figures for an H100, in tokens/s per GPU. A YAML that names one of these models gets them as they
# are, so that its estimate is the one mistral-finetune gives.
_PUBLISHED_ON_H100 = {
    "open-mistral-7b": 5720.0,
    "open-mistral-nemo": 3337.0,
    "open-mixtral-8x7b": 2966.0,
    "open-mixtral-8x22b": 1007.0,
    "mistral-large-latest": 567.0,
}
_USUAL_GPUS = [GPUS["h100"], GPUS["a100"], GPUS["v100"]]


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that a run on this machine would use."""
    if shutil.which("nvidia-smi") is None:  # saves the second or two that importing torch takes
        return []
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [visible_gpu(gpu.name, gpu.total_memory) for gpu in found]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of a whole run."""

    where: str
    tokens_per_second: float | None  # None: unknown, because the model's shapes are
    basis: str = ""  # what an estimate is based on


def run_speeds(
    args: TrainArgs, model: ModelArgs | None, statistics: DataStatistics, num_gpus: int, gpus: list[Gpu]
) -> list[Speed]:
    """Estimate speeds on the first visible GPU, or on usual ones if none is visible.

    Args:
        args: of the run.
        model: shapes; None if unknown.
        statistics: of the training data.
        num_gpus: GPUs of the run.
        gpus: the visible ones.
    """
    if model is None:
        return [Speed(f"{num_gpus} x {(gpus or _USUAL_GPUS)[0].label}", None)]
    return [
        Speed(
            f"{num_gpus} x {gpu.label}", num_gpus * _speed_of_one(args, model, statistics, num_gpus, gpu), gpu.basis()
        )
        for gpu in gpus[:1] or _USUAL_GPUS
    ]


def _speed_of_one(args: TrainArgs, model: ModelArgs, statistics: DataStatistics, num_gpus: int, gpu: Gpu) -> float:
    if find_gpu(gpu.label) is GPUS["h100"] and args.model_id_or_path in _PUBLISHED_ON_H100:
        return _PUBLISHED_ON_H100[args.model_id_or_path]
    checkpoint = args.checkpoint
    if checkpoint == "auto":
        checkpoint = memory_config(args, model, gpu, num_gpus).resolved_checkpoint(gpu.usable_bytes)
    flops = flops_per_token(
        model,
        mean_context(statistics.document_lengths(args.seq_len), model.sliding_window),
        checkpoint,
        args.lora.enable,
        statistics.trained / statistics.tokens,
    )
    return tokens_per_second(gpu, model, flops, args.batch_size * args.seq_len)


def eta(tokens: float, speed: Speed) -> str:
    """Return the duration of a run of this many tokens as HH:MM:SS, start-up included."""
    if speed.tokens_per_second is None:
        return "unknown"
    minutes, seconds = divmod(int(OVERHEAD_SECONDS + tokens / speed.tokens_per_second), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
