"""A small model with random weights that is trained on the device and on the CPU, from the same weights and batches."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.acceptance.check import Setting
from benchmarks.training.inputs import packed_batches
from benchmarks.training.weights import RandomWeights
from finetune.args import TrainArgs, load_train_args
from finetune.data.data_loader import Batch
from finetune.distributed import World, is_sharded
from finetune.hardware import Hardware, choose_hardware
from finetune.mixed_precision import LossScaler
from finetune.optim import build_optimizer
from finetune.wrapped_model import build_model, open_base_model, trainable_parameters
from model.args import ModelArgs
from model.transformer import Transformer
from train import train_step
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import FictionalNote, write_notes
from utils.icd10.answers import build_answer
from utils.icd10.prompts import instruct_row

_ROWS = 40
_SETTINGS = {"seq_len": 256, "max_steps": 4, "checkpoint": False, "compile": False, "log_freq": 1}
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class SmallModel:
    model: Transformer
    args: TrainArgs
    hardware: Hardware


def model_folder(setting: Setting, moe: bool = False) -> Path:
    """Write the model once and return its folder."""
    shapes = setting.shapes(moe)
    folder = setting.folder / ("mixture" if moe else "dense")
    if not folder.exists():
        folder.mkdir()
        weights = RandomWeights(shapes, CPU, torch.bfloat16)
        save_file({name: weights.read(name) for name in weights.shapes}, folder / "consolidated.safetensors")
        (folder / "params.json").write_text(json.dumps(_params(shapes)), encoding="utf-8")
    return folder


def _params(shapes: ModelArgs) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(shapes).items() if value is not None}


def config_file(setting: Setting, name: str, moe: bool = False, **settings: Any) -> Path:
    """Write a training YAML of the small model, whose run folder is `setting.folder/NAME`; return its path."""
    rows = setting.folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(map(_row, write_notes(_ROWS, seed=0, catalogue=load_catalogue()))), encoding="utf-8")
    own = {
        "data": {"instruct_data": str(rows), "eval_instruct_data": str(rows)},
        "model_id_or_path": str(model_folder(setting, moe)),
        "run_dir": str(setting.folder / name),
        "lora": {"rank": 8},
        "optim": {"lr": 1e-2, "pct_start": 0.25},
    }
    path = setting.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(_SETTINGS | own | settings), encoding="utf-8")
    return path


def _row(note: FictionalNote) -> str:
    """Return a line of about 100 tokens, so that two or three rows are packed into a sequence."""
    return json.dumps(instruct_row(" ".join(note.text.split()[:15]), build_answer(note.diagnoses[:1]))) + "\n"


def build(setting: Setting, device: torch.device, moe: bool = False, **settings: Any) -> SmallModel:
    """Build the model on a device. Trained parameters have the same values whatever the device and the dtype."""
    args = load_train_args(config_file(setting, "small", moe, **settings))
    base = open_base_model(args)
    hardware = choose_hardware(device, args.param_dtype, args.attention, base.args)
    model = build_model(base, args, hardware, World(0, 1, device))
    if args.lora.enable:
        _fill_adapters(model)
    return SmallModel(model, args, hardware)


@torch.no_grad()
def _fill_adapters(model: Transformer) -> None:
    """Give A and B random values; B starts as zero, which would hide the gradient of A."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model):
        values = torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[1] ** -0.5
        own = parameter.to_local() if is_sharded(parameter) else parameter  # one process has all rows
        own.copy_(values)


@functools.cache
def batches(setting: Setting, moe: bool = False) -> list[Batch]:
    """Return the batches of a run; all models of a part train on them."""
    args = load_train_args(config_file(setting, "batches", moe))
    loader = packed_batches(args)
    found = list(itertools.islice(loader, args.max_steps))
    loader.close()
    return found


def losses(setting: Setting, device: torch.device, moe: bool = False, **settings: Any) -> list[float]:
    """Train on one batch, again and again; return the loss of each step, in nats per token."""
    small = build(setting, device, moe, **settings)
    args = small.args
    optimizer, schedule = build_optimizer(trainable_parameters(small.model), args.optim, args.max_steps)
    scaler, found = LossScaler(small.hardware.dtype), []
    for _ in range(args.max_steps):
        batch = batches(setting, moe)[0]
        result = train_step(small.model, [batch], optimizer, schedule, scaler, args.max_norm, device)
        found.append(result.loss.item())
    return found
