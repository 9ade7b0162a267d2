"""Whole training runs: the original's numbers, oracles for ranks and micro-batches, fp16, and what checkpoints hold."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

import train
from finetune.args import load_train_args
from finetune.checkpointing import Checkpointer, saved_checkpoints
from finetune.data.data_loader import build_data_loader
from finetune.data.tokenize import load_instruct_tokenizer
from finetune.distributed import World
from finetune.hardware import choose_hardware
from finetune.mixed_precision import LossScaler
from finetune.optim import build_optimizer
from finetune.wrapped_model import build_model, open_base_model, trainable_parameters
from model.errors import UserError
from model.lora import lora_layers
from model.transformer import Transformer
from model.weights import SafetensorsWriter
from tests.checkpoints import TEKKEN_SHAPES, make_tiny_checkpoint
from tests.golden import GOLDEN, fixture
from tests.run_trajectories import INPUTS, ROOT, RUNS, golden_config, read_jsonl, torchrun, write_config

# Of golden's 32 combinations of model, what trains, dtype, micro-batches and ranks: every pair of two settings.
ONE_RANK = ["dense_lora_float32_mb1_w1", "dense_lora_bfloat16_mb1_w1", "moe_full_bfloat16_mb1_w1"]
ONE_RANK += ["moe_lora_bfloat16_mb4_w1"]
TWO_RANKS = ["moe_lora_float32_mb1_w2", "dense_full_float32_mb4_w2", "dense_lora_bfloat16_mb1_w2"]
TWO_RANKS += ["moe_full_float32_mb1_w2", "x_merged_moe_lora_float32_w2"]
# And what else a YAML can say.
ONE_RANK += [
    "x_batchsize2_dense_lora_float32",
    "x_float16_dense_lora",
    "x_fncall_moe_lora_float32",
    "x_keep2_ckptfreq3_dense_lora_float32",
    "x_lazy_dense_lora_float32",
    "x_maxnorm_0.1_dense_lora_float32",
    "x_merged_dense_lora_float32",
    "x_mix_pretrain_dense_lora_float32",
    "x_no_ckpt_logfreq3_evalfreq7_dense_lora_float32",
    "x_nocheckpointing_dense_lora_float32",
    "x_pct_start_0_dense_lora_float32",
    "x_rank4_scaling4_seed42_dense_lora_float32",
    "x_tekken_dense_lora_float32",
]
if os.environ.get("GOLDEN_RUNS") == "all":  # takes minutes
    everything = [name for name in RUNS if name != "fork_div_factor_250_final_10"]  # DEFECTS.md F1
    ONE_RANK = [name for name in everything if RUNS[name]["world_size"] == 1]
    TWO_RANKS = [name for name in everything if RUNS[name]["world_size"] == 2]

CPU = World(rank=0, size=1, device=torch.device("cpu"))
PROMPTS = [[1, 3, 1027, 4, 900], [1], [1, 17, 17, 2000, 31999, 5, 2]]
LENGTHS = [len(prompt) for prompt in PROMPTS]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """golden's checkpoints, and smaller ones in fp32."""
    folder = tmp_path_factory.mktemp("models")
    small = {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rope_theta": 1e4}
    return {
        "tiny_dense": make_tiny_checkpoint(folder / "tiny_dense"),
        "tiny_moe": make_tiny_checkpoint(folder / "tiny_moe", moe=True),
        "tiny_tekken": make_tiny_checkpoint(folder / "tiny_tekken", seed=3, **TEKKEN_SHAPES),
        "dense": make_tiny_checkpoint(folder / "dense", dtype=torch.float32, **small),
        "moe": make_tiny_checkpoint(folder / "moe", moe=True, dtype=torch.float32, **small),
    }


def small_config(folder: Path, model: Path, name: str = "run", **settings) -> Path:
    defaults = {
        "data": {"instruct_data": str(INPUTS / "train_icd.jsonl")},
        "model_id_or_path": str(model),
        "lora": {"rank": 4},
        "seq_len": 64,
        "max_steps": 3,
        "optim": {"lr": 0.01, "pct_start": 0.0},
    }
    return write_config(folder, name, defaults | settings)


def run_here(config: Path) -> Path:
    """Trains in this process. Returns the run folder."""
    train.train(str(config))
    return config.with_suffix("")


def build(config: Path, **settings) -> Transformer:
    """The model a configuration starts from."""
    args = load_train_args(config)
    for key, value in settings.items():
        setattr(args.lora, key, value)
    base = open_base_model(args)
    return build_model(base, args, choose_hardware(CPU.device, args.param_dtype, args.attention, base.args), CPU)


def loaders(config: Path, world_size: int, is_eval: bool) -> list:
    """What each rank of a world reads."""
    args = load_train_args(config)
    tokenizer = load_instruct_tokenizer(Path(args.model_id_or_path), open_base_model(args).args.vocab_size)
    loader = (tokenizer, args.data, args.batch_size, args.seq_len, args.seed)
    return [build_data_loader(*loader, rank, world_size, is_eval) for rank in range(world_size)]


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(sum(PROMPTS, [])), LENGTHS)


def weights_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"


# --- The original's numbers


def assert_follows_the_original(name: str, run_dir: Path) -> None:
    run = RUNS[name]
    tolerance = 1e-4 if run["param_dtype"] == "float32" else 2e-2
    steps = read_jsonl(run_dir / "metrics.train.jsonl")
    assert [step["step"] for step in steps] == [step["step"] for step in run["steps"]]
    for key, relative in (("loss", tolerance), ("grad_norm", tolerance), ("lr", 1e-8)):
        assert [step[key] for step in steps] == pytest.approx([step[key] for step in run["steps"]], rel=relative), key
    if not run["settings"]["no_eval"]:
        assert_evaluates_like_the_original(run, read_jsonl(run_dir / "metrics.eval.jsonl"), tolerance)
    assert_saves_like_the_original(run, run_dir)


def assert_evaluates_like_the_original(run, evals, tolerance) -> None:
    recorded = run["eval_metrics"]
    assert [metrics["step"] for metrics in evals] == [metrics["step"] for metrics in recorded]
    for ours, original in zip(evals, recorded):
        assert ours["train_loss"] == pytest.approx(original["train_loss"], rel=tolerance)
        assert ours["perplexity"] == pytest.approx(math.exp(ours["eval_loss"]))
    # The original dropped an incomplete batch, and with two ranks counted padding from the second evaluation on.
    right = 0 if run["settings"]["batch_size"] > 1 else 1 if run["world_size"] == 2 else len(evals)
    for ours, original in itertools.islice(zip(evals, recorded), right):
        assert ours["eval_loss"] == pytest.approx(original["eval_loss"], rel=tolerance)


def assert_saves_like_the_original(run, run_dir: Path) -> None:
    ours = {f"{path.relative_to(run_dir)}{'/' * path.is_dir()}" for path in run_dir.rglob("*") if path.parent.name != "tb"}
    originals = {name for name in run["run_dir_listing"] if not name.startswith("tb/events")}
    assert ours - {"loss.png"} == originals
    for checkpoint, saved in run["checkpoints"].items():
        folder = run_dir / "checkpoints" / checkpoint / "consolidated"
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        if run["settings"]["save_adapters"]:
            assert params["lora"].pop("base_model") == load_train_args(run_dir.with_suffix(".yaml")).model_id_or_path
            assert params == saved["params.json"]
        else:  # the original left its LoRA settings beside weights that hold no LoRA
            assert params == saved["params.json"] | {"lora": None}
        assert (folder / "tokenizer.model.v3").stat().st_size == 587591 if "tekken" not in str(folder) else True
        if "tensors" in saved:
            assert_same_tensors(run, saved, load_file(folder / saved["safetensors_file"]))


def assert_same_tensors(run, saved, tensors) -> None:
    exact = run["param_dtype"] == "float32"
    assert tensors.keys() == saved["tensors"].keys()
    for name, facts in saved["tensors"].items():
        tensor = tensors[name]
        assert (list(tensor.shape), str(tensor.dtype)) == (facts["shape"], f"torch.{facts['dtype']}"), name
        assert tensor.double().norm().item() == pytest.approx(facts["l2"], rel=1e-4 if exact else 2e-2), name
    file = next((f for f in map(expected_file, (GOLDEN, fixture(""))) if (f / saved["file"]).is_file()), None)
    if file is not None and saved["file"].endswith("_lora.safetensors"):
        for name, expected in load_file(file / saved["file"]).items():
            error = (tensors[name].double() - expected.double()).norm() / expected.double().norm()
            assert error < (1e-3 if exact else 0.1), name


def expected_file(golden: Path | None) -> Path:
    return (golden or fixture("")) / "expected" / "train"


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_process_follows_the_original(name, models, tmp_path):
    assert_follows_the_original(name, run_here(golden_config(name, models, tmp_path)))
