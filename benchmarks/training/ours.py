"""This project, assembled from its parts as `train.run_training` does."""

from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.data.data_loader import Batch
from finetune.distributed import World
from finetune.hardware import choose_compile, choose_hardware
from finetune.mixed_precision import LossScaler
from finetune.optim import build_optimizer
from finetune.preflight import resolve_checkpoint
from finetune.wrapped_model import BaseModel, build_model, trainable_parameters
from model.args import ModelArgs
from train import train_step

from .trial import Trainee
from .weights import RandomWeights


def build_ours(args: TrainArgs, shapes: ModelArgs, device: torch.device) -> Trainee:
    """Return the training step of a model with random weights."""
    hardware = choose_hardware(device, args.param_dtype, args.attention, shapes)
    base = BaseModel(Path(args.model_id_or_path), shapes, RandomWeights(shapes, device, hardware.dtype), adapter=None)
    world = World(0, 1, device)
    args.compile = choose_compile(args.compile, device)
    args.checkpoint = resolve_checkpoint(base, args, hardware, world).checkpoint  # as recorded in the results
    model = build_model(base, args, hardware, world)
    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
    scaler = LossScaler(hardware.dtype)

    def step(batches: list[Batch]) -> torch.Tensor:
        return train_step(model, batches, optimizer, schedule, scaler, args.max_norm, device).loss

    return Trainee(step, hardware.attention, hardware.dtype)
