"""Training on a 4-bit or 8-bit base."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from finetune.args import TrainArgs, load_train_args, read_train_args
from finetune.checkpointing import ADAPTER_NAME
from finetune.distributed import World
from finetune.hardware import choose_hardware
from finetune.inference import load_trained
from finetune.wrapped_model import build_model, open_base_model
from model.args import BLOCK_LINEARS
from model.errors import UserError
from model.frozen_weights import FORMATS
from model.lora import quantizable_linears
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.run_trajectories import INPUTS, read_jsonl, torchrun, write_config
from tests.support.versions import shards_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = World(rank=0, size=1, device=torch.device("cpu"))
STEPS = 6
NF4 = ("nf4", "nf4-dq")


def rounded(base: Path, folder: Path, name: str) -> Path:
    """Copy the model `base`, with the weights of its linear layers rounded to a format."""
    tensors = load_file(base / "consolidated.safetensors")
    for key, weight in tensors.items():
        if key.split(".")[-2] in BLOCK_LINEARS:
            tensors[key] = FORMATS[name](**FORMATS[name].quantize(weight)).dense(torch.float32)
    folder.mkdir(parents=True)
    (folder / "params.json").write_text((base / "params.json").read_text(encoding="utf-8"), encoding="utf-8")
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    dense = make_tiny_checkpoint(folder / "dense", dtype=torch.float32)
    moe = make_tiny_checkpoint(folder / "moe", moe=True, dtype=torch.float32)
    return {"same": dense, "moe": moe, "moe-nf4": rounded(moe, folder / "moe-nf4", "nf4")} | {
        name: rounded(dense, folder / name, name) for name in NF4
    }


def config(folder: Path, name: str, model: Path, base_dtype: str, **settings) -> Path:
    defaults = {
        "data": {"instruct_data": str(INPUTS / "train_icd.jsonl")},
        "model_id_or_path": str(model),
        "lora": {"rank": 4},
        "seq_len": 256,
        "max_steps": STEPS,
        "optim": {"lr": 0.01, "pct_start": 0.0},
        "base_dtype": base_dtype,
    }
    return write_config(folder, name, defaults | settings)


def outcome(run_dir: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    lines = read_jsonl(run_dir / "metrics.train.jsonl")  # the last line of a step is the valid one
    losses = list({line["step"]: line["loss"] for line in lines if "loss" in line}.values())
    return losses, load_file(run_dir / f"checkpoints/checkpoint_{STEPS:06d}/consolidated" / ADAPTER_NAME)


@pytest.fixture(scope="module")
def dense(models, tmp_path_factory) -> dict[str, Path]:
    """Return run folders, by the format that the trained weights were rounded to."""
    folder = tmp_path_factory.mktemp("dense")
    for name in NF4:
        train.train(str(config(folder, name, models[name], "same")))
    return {name: folder / name for name in NF4}


@pytest.mark.parametrize("checkpoint", [True, "selective"])
@pytest.mark.parametrize("base_dtype", NF4)
def test_nf4_base_trains_like_its_dequantized_weights(base_dtype, checkpoint, models, dense, tmp_path):
    train.train(str(config(tmp_path, "nf4", models["same"], base_dtype, checkpoint=checkpoint)))
    run_dirs = [tmp_path / "nf4", dense[base_dtype]]
    torch.testing.assert_close(*map(outcome, run_dirs))
    answers = [load_trained(run_dir)[0](torch.arange(1, 40), [20, 19]) for run_dir in run_dirs]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_fp8_base_trains_almost_like_the_unquantized_one(models, tmp_path):
    for base_dtype in ("fp8", "same"):
        train.train(str(config(tmp_path, base_dtype, models["same"], base_dtype)))
    losses = [torch.tensor(outcome(tmp_path / base_dtype)[0]) for base_dtype in ("fp8", "same")]
    assert not losses[0].equal(losses[1])
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)


@pytest.mark.parametrize("compiles", [True, False])
def test_compile_applies_to_the_quantization_of_inputs(compiles, models, tmp_path):
    args = load_train_args(config(tmp_path, "fp8", models["same"], "fp8", compile=compiles, checkpoint=True))
    base = open_base_model(args)
    hardware = choose_hardware(CPU.device, args.param_dtype, args.attention, base.args)
    formats = [layer.format for _, layer in quantizable_linears(build_model(base, args, hardware, CPU))]
    assert len(formats) == 14 and {each.compiled for each in formats} == {compiles}


@shards_bytes
def test_two_processes_share_a_quantized_base(models, tmp_path):
    configs = [
        config(tmp_path, "nf4", models["same"], "nf4"),
        config(tmp_path, "dense", models["nf4"], "same"),
        config(tmp_path, "moe_nf4", models["moe"], "nf4"),
        config(tmp_path, "moe", models["moe-nf4"], "same"),
    ]
    done = torchrun("tests.support.run_trajectories", *configs)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(outcome(tmp_path / "nf4"), outcome(tmp_path / "dense"))
    torch.testing.assert_close(outcome(tmp_path / "moe_nf4"), outcome(tmp_path / "moe"))


def test_a_torch_that_cannot_shard_a_quantized_base_is_named(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    path = config(tmp_path, "run", models["same"], "nf4", cpu_offload=True)
    with pytest.raises(UserError, match=r"with `cpu_offload` needs PyTorch 2\.12 or later, this is 2\.11\.0"):
        train.train(str(path))


def test_run_on_a_quantized_base_resumes(models, tmp_path):
    settings = {"ckpt_freq": 2, "resume": "auto"}
    train.train(str(config(tmp_path, "whole", models["same"], "nf4", **settings)))
    part = config(tmp_path, "part", models["same"], "nf4", **settings)
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(3))
        train_step = train.train_step
        patch.setattr(train, "train_step", lambda *args: next(steps) is not None and train_step(*args))
        with pytest.raises(StopIteration):
            train.train(str(part))
    train.train(str(part))
    torch.testing.assert_close(outcome(tmp_path / "part"), outcome(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base_dtype": "int4"}, "`base_dtype` is 'int4'; expected same, nf4, nf4-dq or fp8"),
        ({"lora": {"enable": False}, "save_adapters": False}, "`lora.enable` is false"),
        ({"save_adapters": False}, "python -m utils.merge_lora"),
    ],
)
def test_incompatible_settings_are_reported(settings, message, models, tmp_path):
    path = config(tmp_path, "run", models["same"], settings.pop("base_dtype", "nf4"), **settings)
    with pytest.raises(UserError, match=re.escape(message)):
        read_train_args(path, TrainArgs.problems)


def test_weight_unsupported_by_the_format_is_rejected(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "model", hidden_dim=72)
    with pytest.raises(UserError, match=r"layers\.0\.feed_forward\.w2.*multiple of 64"):
        train.train(str(config(tmp_path, "run", model, "nf4")))
    assert not (tmp_path / "run").exists()
