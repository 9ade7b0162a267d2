"""Mistral's published models: each builds at full size on the meta device, and trains as a scaled-down copy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from finetune.hardware import choose_hardware
from finetune.wrapped_model import build_model, open_base_model, trainable_parameters
from model.args import load_model_args
from model.errors import UserError
from model.transformer import Transformer
from tests.support.checkpoints import make_tiny_checkpoint
from utils.models.known_models import KNOWN_MODELS

CPU = torch.device("cpu")


def params_json(name: str) -> dict:
    """Return the shape entries of a published model's params.json."""
    return {key: value for key, value in KNOWN_MODELS[name].to_dict().items() if value is not None}


def flat_keys(params: dict) -> dict:
    """Move the keys of `moe` to the top level, as in some published folders."""
    return {key: value for key, value in params.items() if key != "moe"} | params["moe"]


PARAMETERS = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b": 7_248_023_552,
    "nemo-12b": 12_247_782_400,
    "small-22b": 22_247_282_688,
    "codestral-22b": 22_247_282_688,
    "small-24b": 23_572_403_200,
    "large-123b": 122_610_069_504,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "ministral-8b": 8_019_808_256,
}
# params.json and the number of parameters
MODELS = {name: (params_json(name), count) for name, count in PARAMETERS.items()}
MODELS["mixtral-8x7b, flat keys"] = (flat_keys(MODELS["mixtral-8x7b"][0]), PARAMETERS["mixtral-8x7b"])
every_model = pytest.mark.parametrize(("params", "count"), MODELS.values(), ids=MODELS)


def write_params(folder: Path, params: dict) -> Path:
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    return folder


def train_args(folder: Path, **changes) -> TrainArgs:
    settings = {"param_dtype": "fp32", "seq_len": 32, "checkpoint": True, "compile": False} | changes
    return TrainArgs(data=DataArgs(), model_id_or_path=str(folder), run_dir="", **settings)


def scaled_down(folder: Path, params: dict) -> Path:
    """Create a checkpoint with a model's proportions: 1/64 of its width, heads of width 8, two layers."""
    scaled = {"dim": params["dim"] // 64, "hidden_dim": params["hidden_dim"] // 64, "head_dim": 8, "n_layers": 2}
    scaled |= {"n_heads": params["n_heads"] // 4, "n_kv_heads": 2, "vocab_size": 256}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    moe = {"moe": experts} if "moe" in params else experts if "num_experts" in params else {}
    tiny = make_tiny_checkpoint(folder, moe=bool(moe), dtype=torch.float32, **scaled)
    return write_params(tiny, params | scaled | moe)


@every_model
def test_builds_at_full_size(tmp_path, params, count):
    with torch.device("meta"):
        model = Transformer(load_model_args(write_params(tmp_path, params)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@every_model
def test_scaled_down_model_trains(tmp_path, params, count):
    args = train_args(scaled_down(tmp_path, params))
    base = open_base_model(args)
    model = build_model(base, args, choose_hardware(CPU, "fp32", "sdpa", base.args), World(0, 1, CPU))
    assert base.args.head_dim * base.args.n_heads == base.args.dim or params["vocab_size"] == 131072
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    tokens = torch.randint(256, (32,), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(tokens[:-1], [20, 11]), tokens[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_nested_and_flat_moe_keys_are_equivalent(tmp_path):
    nested, flat = MODELS["mixtral-8x7b"][0], MODELS["mixtral-8x7b, flat keys"][0]
    args = load_model_args(write_params(tmp_path, nested))
    assert args.moe.num_experts == 8 and args == load_model_args(write_params(tmp_path, flat))
    with pytest.raises(UserError, match=r"`moe.num_experts_per_tok` is 9; expected between 1 and"):
        load_model_args(write_params(tmp_path, flat | {"num_experts_per_tok": 9}))


# Sliding windows


def test_sliding_window_is_accepted_if_sequences_fit_into_it(tmp_path):
    folder = scaled_down(tmp_path, MODELS["mistral-7b-v0.1"][0] | {"sliding_window": 16})
    with pytest.raises(UserError, match=r"over 16 tokens .*set `seq_len` \(17\) to at most 16"):
        open_base_model(train_args(folder, seq_len=17))
    base = open_base_model(train_args(folder, seq_len=16))
    assert base.args.sliding_window == 16


def test_document_longer_than_the_window_is_rejected(tmp_path):
    args = load_model_args(scaled_down(tmp_path, MODELS["mistral-7b-v0.1"][0] | {"sliding_window": 16}))
    model = Transformer(args)
    tokens = torch.zeros(33, dtype=torch.int64)
    model(tokens[:32], [16, 16])
    with pytest.raises(UserError, match="longer than the model's `sliding_window` of 16 tokens"):
        model(tokens, [16, 17])


@pytest.mark.parametrize(
    "window",
    [
        {"sliding_window": [32768, None, None, None]},
        {"_sliding_window": [32768, None, None, None]},
        {"sliding_window": "4096"},
        {"yarn": {"beta": 32}},
    ],
)
def test_unsupported_variants_are_rejected_by_key(tmp_path, window):
    with pytest.raises(UserError, match=rf"params.json: `{next(iter(window))}` is "):
        load_model_args(write_params(tmp_path, MODELS["ministral-8b"][0] | window))


# Files


def test_sharded_weights_are_loaded(tmp_path):
    folder = scaled_down(tmp_path, MODELS["mistral-7b"][0])
    tensors = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    names = sorted(tensors)
    for index in range(3):
        part = {name: tensors[name] for name in names[index::3]}
        save_file(part, folder / f"consolidated-{index + 1:05d}-of-00003.safetensors")
    args = train_args(folder)
    args.lora.enable = False
    base = open_base_model(args)
    model = build_model(base, args, choose_hardware(CPU, "fp32", "sdpa", base.args), World(0, 1, CPU))
    assert all(parameter.equal(tensors[name]) for name, parameter in model.named_parameters())
