"""Complete training runs compared with mistral-finetune's; ranks and micro-batches; fp16; contents of checkpoints."""

import errno
import itertools
import json
import math
import os
import re
import resource
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from finetune import mixed_precision
from finetune.args import load_train_args
from finetune.checkpointing import Checkpointer
from finetune.data.data_loader import Batch, build_data_loader
from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.distributed import World
from finetune.hardware import choose_hardware
from finetune.memory_estimate import MemoryConfig
from finetune.mixed_precision import LossScaler
from finetune.optim import build_optimizer
from finetune.run_dir import saved_checkpoints
from finetune.wrapped_model import build_model, open_base_model, trainable_parameters
from model.errors import UserError
from model.lora import lora_layers
from model.transformer import FeedForward, RMSNorm, Transformer
from model.weights import SafetensorsWriter
from tests.end_to_end.kill_runs import ForkedRun
from tests.support.checkpoints import SMALL, TEKKEN_SHAPES, make_tiny_checkpoint
from tests.support.golden import GOLDEN, fixture
from tests.support.run_trajectories import (
    INPUTS,
    RUNS,
    golden_config,
    read_jsonl,
    torchrun,
    write_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# A pairwise selection of the 32 recorded combinations of model, trained parameters, dtype, micro-batches and ranks, and
# a run whose adapter is recorded.
ONE_RANK = ["dense_lora_float32_mb1_w1", "moe_full_bfloat16_mb1_w1", "moe_full_float32_mb4_w1"]
ONE_RANK += ["dense_lora_bfloat16_mb1_w1"]
TWO_RANKS = ["moe_lora_float32_mb1_w2", "dense_full_bfloat16_mb1_w2", "dense_lora_bfloat16_mb4_w2"]
TWO_RANKS += ["x_merged_moe_lora_float32_w2"]
# Other settings of a YAML.
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
TOKENS = list(itertools.chain.from_iterable(PROMPTS))
LENGTHS = [len(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The checkpoints that the recorded runs trained, and smaller ones in fp32."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny_dense": make_tiny_checkpoint(folder / "tiny_dense"),
        "tiny_moe": make_tiny_checkpoint(folder / "tiny_moe", moe=True),
        "tiny_tekken": make_tiny_checkpoint(folder / "tiny_tekken", seed=3, **TEKKEN_SHAPES),
        "dense": make_tiny_checkpoint(folder / "dense", dtype=torch.float32, **SMALL),
        "moe": make_tiny_checkpoint(folder / "moe", moe=True, dtype=torch.float32, **SMALL),
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
    """Train in this process. Return the run folder."""
    train.train(str(config))
    return config.with_suffix("")


def build(config: Path, from_adapter: Path | None = None) -> Transformer:
    """Build the initial model of a YAML, or the one with the adapter `from_adapter`."""
    args = load_train_args(config)
    args.lora.from_adapter = None if from_adapter is None else str(from_adapter)
    args.compile = args.compile is True  # resolved, as before a run builds its model
    args.checkpoint = False if args.checkpoint == "auto" else args.checkpoint
    base = open_base_model(args)
    return build_model(base, args, choose_hardware(CPU.device, args.param_dtype, args.attention, base.args), CPU)


def loaders(config: Path, world_size: int, is_eval: bool) -> list:
    """Return the data loader of each rank."""
    args = load_train_args(config)
    tokenizer = load_instruct_tokenizer(Path(args.model_id_or_path), open_base_model(args).args.vocab_size)
    loader = (tokenizer, args.data, args.batch_size, args.seq_len, args.seed)
    return [build_data_loader(*loader, rank, world_size, is_eval) for rank in range(world_size)]


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS), LENGTHS)


def weights_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"


# --- The original's metrics and files


def assert_follows_the_original(name: str, run_dir: Path) -> None:
    run = RUNS[name]
    # bf16 and fp16, `python -m tests.end_to_end.trajectory_spread` on an Intel Xeon, 2026-11-28: torch 2.11, 2.12 (CUDA
    # builds, no GPU) and 2.13 (CPU build) differ from each other by up to 0.01 % in losses, 0.07 % in gradient norms
    # and 0.15 % in saved adapters; from the original by 0.03 %, 0.3 % and 0.9 %.
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
    ours = {
        f"{path.relative_to(run_dir)}{'/' * path.is_dir()}" for path in run_dir.rglob("*") if path.parent.name != "tb"
    }
    # The original does not save the state needed to resume.
    ours = {name for name in ours if not re.match(r"checkpoints/(last/|[^/]*/(state/|manifest\.json))", name)}
    originals = {name for name in run["run_dir_listing"] if not name.startswith("tb/events")}
    assert ours - {"loss.png"} == originals
    for checkpoint, saved in run["checkpoints"].items():
        folder = run_dir / "checkpoints" / checkpoint / "consolidated"
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert sizes | {"params.json": 0} == saved["files"] | {"params.json": 0}
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        if run["settings"]["save_adapters"]:
            assert Path(params["lora"].pop("base_model")).name == Path(run["settings"]["model_id_or_path"]).name
            assert params == saved["params.json"]
        else:  # the original writes its LoRA settings next to merged weights
            assert params == saved["params.json"] | {"lora": None}
        if "tensors" in saved:
            assert_same_tensors(run, saved, load_file(folder / saved["safetensors_file"]))


def recorded_weights(saved) -> Path | None:
    """Return the file with the adapter that the original saved, if it was kept."""
    file = (GOLDEN or fixture("")) / "expected/train" / saved.get("file", "none kept")
    return file if file.is_file() and file.name.endswith("_lora.safetensors") else None


def assert_same_tensors(run, saved, tensors) -> None:
    exact = run["param_dtype"] == "float32"
    assert tensors.keys() == saved["tensors"].keys()
    for name, facts in saved["tensors"].items():
        tensor = tensors[name]
        assert (list(tensor.shape), str(tensor.dtype)) == (facts["shape"], f"torch.{facts['dtype']}"), name
        assert tensor.double().norm().item() == pytest.approx(facts["l2"], rel=1e-4 if exact else 2e-2), name
    if file := recorded_weights(saved):
        for name, expected in load_file(file).items():
            error = (tensors[name].double() - expected.double()).norm() / expected.double().norm()
            assert error < (1e-3 if exact else 0.1), name


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_process_follows_the_original(name, models, tmp_path):
    assert_follows_the_original(name, run_here(golden_config(name, models, tmp_path)))


@pytest.mark.parametrize("name", ["dense_lora_float32_mb1_w1", "moe_lora_float32_mb1_w1"])
def test_optimizations_do_not_change_the_training(name, models, tmp_path):
    config = golden_config(name, models, tmp_path, checkpoint="selective", compile=True)
    assert_follows_the_original(name, run_here(config))


@pytest.mark.parametrize("compiles", [True, False])
def test_compile_applies_to_every_norm_and_activation(compiles, models, tmp_path):
    model = build(small_config(tmp_path, models["moe"], compile=compiles))
    norms = [module.compiled for module in model.modules() if isinstance(module, RMSNorm)]
    activations = [module.swiglu.compiled for module in model.modules() if isinstance(module, FeedForward)]
    rotations = [layer.attention.rotary.compiled for layer in model.layers]
    assert len(norms) == 5 and len(activations) == 8 and {*norms, *activations, *rotations} == {compiles}


# --- Ranks and micro-batches


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory) -> dict[str, Path]:
    """Run folders by name, trained in one launch of two processes."""
    folder = tmp_path_factory.mktemp("two_ranks")
    one_row = folder / "one_row.jsonl"
    one_row.write_text((INPUTS / "eval_instruct.jsonl").read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    data = {"instruct_data": str(INPUTS / "train_icd.jsonl")}
    configs = [golden_config(name, models, folder) for name in TWO_RANKS]
    uneven = {"no_eval": False, "eval_freq": 2, "ckpt_freq": 2, "max_steps": 4, "param_dtype": "fp32"}
    for name, rows, more in (
        ("one_row", one_row, {}),  # the second rank has nothing to evaluate
        ("uneven", INPUTS / "eval_instruct.jsonl", {}),
        ("uneven_batch_size_3", INPUTS / "eval_instruct.jsonl", {"batch_size": 3}),
    ):
        settings = uneven | {"data": data | {"eval_instruct_data": str(rows)}} | more
        configs.append(small_config(folder, models["dense"], name, **settings))
    configs.append(small_config(folder, models["moe"], "rank_1", lora={"rank": 1}))  # rank 1 has no row of any lora_A
    configs.append(small_config(folder, models["dense"], "fp16", param_dtype="fp16"))
    done = torchrun("tests.support.run_trajectories", *configs)
    assert done.returncode == 0, done.stderr
    return {config.stem: config.parent / config.stem for config in configs} | {"stdout": done.stdout}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_processes_follow_the_original(name, two_ranks):
    assert_follows_the_original(name, two_ranks[name])


@pytest.mark.parametrize("name", ["one_row", "uneven", "uneven_batch_size_3"])
def test_evaluation_is_the_mean_over_all_ranks_batches(name, two_ranks):
    """The original counts padding from the second evaluation on, and crashes on a rank without rows."""
    run_dir = two_ranks[name]
    config = run_dir.with_suffix(".yaml")
    per_rank = [list(loader) for loader in loaders(config, world_size=2, is_eval=True)]
    assert len(per_rank[0]) > len(per_rank[1])
    for metrics in read_jsonl(run_dir / "metrics.eval.jsonl"):
        adapter = weights_folder(run_dir, metrics["step"]) / "lora.safetensors"
        model = build(config, from_adapter=adapter).eval()
        assert metrics["eval_loss"] == pytest.approx(
            plain_mean_loss(model, itertools.chain.from_iterable(per_rank)), rel=1e-5
        )


def plain_mean_loss(model: Transformer, batches: Iterable[Batch]) -> float:
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.x), batch.sizes)
        trained = slice(None) if batch.y_mask is None else torch.from_numpy(batch.y_mask)
        losses.append(F.cross_entropy(logits[trained], torch.from_numpy(batch.y)[trained]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["moe_lora_float32_mb1_w2", "rank_1"])
def test_two_ranks_equal_one_rank_with_both_batches_as_micro_batches(name, two_ranks):
    run_dir = two_ranks[name]
    config = run_dir.with_suffix(".yaml")
    args = load_train_args(config)
    model = build(config)
    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
    ranks = loaders(config, world_size=2, is_eval=False)
    for recorded in read_jsonl(run_dir / "metrics.train.jsonl"):
        batches = [next(rank) for rank in ranks]
        result = train.train_step(
            model, batches, optimizer, schedule, LossScaler(torch.float32), args.max_norm, CPU.device
        )
        assert recorded["loss"] == pytest.approx(result.loss.item(), rel=1e-5)
        assert recorded["grad_norm"] == pytest.approx(result.grad_norm, rel=1e-4)
    for rank in ranks:
        rank.close()
    saved = load_file(weights_folder(run_dir, args.max_steps) / "lora.safetensors")
    for parameter, tensor in saved.items():
        torch.testing.assert_close(tensor, model.get_parameter(parameter).data, rtol=1e-3, atol=1e-4)


def test_two_ranks_train_in_fp16(two_ranks):
    steps = read_jsonl(two_ranks["fp16"] / "metrics.train.jsonl")
    assert all(math.isfinite(step["loss"]) for step in steps) and steps[-1]["skipped_steps"] == 0
    saved = load_file(weights_folder(two_ranks["fp16"], 3) / "lora.safetensors")
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in saved.values())


def test_only_rank_0_logs_steps(two_ranks):
    assert two_ranks["stdout"].count("step: 000001 - done") == len(two_ranks) - 1


def test_one_batch_of_four_is_four_micro_batches_of_one(models, tmp_path):
    """The means agree if every sequence has equally many trained tokens, as with pretraining rows."""
    data = {"data": str(INPUTS / "pretrain.jsonl")}
    big = run_here(small_config(tmp_path, models["dense"], "big", data=data, batch_size=4))
    small = run_here(small_config(tmp_path, models["dense"], "small", data=data, num_microbatches=4))
    for one, four in zip(*(read_jsonl(run / "metrics.train.jsonl") for run in (big, small)), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
    one, four = (load_file(weights_folder(run, 3) / "lora.safetensors") for run in (big, small))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-4)


def test_evaluating_between_steps_does_not_change_training(models, tmp_path):
    """Dropout must be on again and draw the same random numbers."""
    common = {"lora": {"rank": 4, "dropout": 0.5}, "data": {"instruct_data": str(INPUTS / "train_icd.jsonl")}}
    common["data"]["eval_instruct_data"] = str(INPUTS / "eval_instruct.jsonl")
    runs = [
        run_here(small_config(tmp_path, models["dense"], name, **common, **settings))
        for name, settings in (("without", {}), ("with", {"no_eval": False, "eval_freq": 1}))
    ]
    losses = [[step["loss"] for step in read_jsonl(run / "metrics.train.jsonl")] for run in runs]
    assert losses[0] == losses[1]


# --- fp16


def test_fp16_trains_without_a_non_finite_loss(models, tmp_path):
    full = {"lora": {"enable": False}, "save_adapters": False}
    run_dir = run_here(small_config(tmp_path, models["dense"], param_dtype="fp16", max_steps=15, **full))
    steps = read_jsonl(run_dir / "metrics.train.jsonl")
    losses = [step["loss"] for step in steps]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < sum(losses[:5]) - 3
    assert {step["skipped_steps"] for step in steps} == {0}


@pytest.fixture
def fp16_step(models, tmp_path):
    """Return a model, its optimizer and a function that takes a step with a given LossScaler."""
    config = small_config(tmp_path, models["dense"], param_dtype="fp16", max_steps=100)
    model = build(config)
    args = load_train_args(config)
    optimizer, schedule = build_optimizer(trainable_parameters(model), args.optim, args.max_steps)
    (loader,) = loaders(config, world_size=1, is_eval=False)

    def step(scaler: LossScaler) -> train.StepResult:
        return train.train_step(model, [next(loader)], optimizer, schedule, scaler, args.max_norm, CPU.device)

    yield model, optimizer, step
    loader.close()


def test_an_overflow_halves_the_scale_and_changes_neither_weights_nor_optimizer(fp16_step):
    model, optimizer, step = fp16_step
    step(LossScaler(torch.float16))
    state = {name: tensor.clone() for name, tensor in training_state(model, optimizer)}
    scaler = LossScaler(torch.float16, scale=2.0**40)
    result = step(scaler)
    assert result.skipped and not math.isfinite(result.grad_norm) and math.isfinite(result.loss.item())
    assert scaler.scale == 2.0**39
    assert all(tensor.equal(state[name]) for name, tensor in training_state(model, optimizer))
    assert not step(LossScaler(torch.float16)).skipped
    assert not all(tensor.equal(state[name]) for name, tensor in training_state(model, optimizer))


def training_state(model: Transformer, optimizer: torch.optim.Optimizer):
    yield from model.state_dict().items()
    for index, moments in optimizer.state_dict()["state"].items():
        yield from ((f"{index}.{name}", tensor) for name, tensor in moments.items())


def test_the_loss_scale_changes_neither_the_step_nor_the_clipping(models, tmp_path):
    """Gradients are unscaled before their norm is computed and clipped."""
    results = []
    for scale in (1.0, 2.0**14):
        config = small_config(tmp_path, models["dense"], f"scale_{scale}", max_norm=0.01)
        model = build(config)
        optimizer, schedule = build_optimizer(trainable_parameters(model), load_train_args(config).optim, 3)
        (loader,) = loaders(config, world_size=1, is_eval=False)
        scaler = LossScaler(torch.float16, scale=scale)
        result = train.train_step(model, [next(loader)], optimizer, schedule, scaler, 0.01, CPU.device)
        loader.close()
        results.append((result.grad_norm, [p.grad for p in trainable_parameters(model)]))
    assert results[0][0] > 0.02  # so clipping has an effect
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for plain, scaled in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-8)
    total = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in results[1][1]]))
    assert total.item() == pytest.approx(0.01, rel=1e-3)


def test_skipped_steps_are_counted_in_the_metrics(models, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.run.LossScaler", lambda dtype: LossScaler(dtype, scale=2.0**40))
    run_dir = run_here(small_config(tmp_path, models["dense"], param_dtype="fp16", max_steps=30))
    steps = read_jsonl(run_dir / "metrics.train.jsonl")
    skipped = [step["skipped_steps"] for step in steps]
    assert skipped[0] == 1 and skipped == sorted(skipped) and 0 < skipped[-1] < 30
    assert [step["loss_scale"] for step in steps] == [2.0**40 / 2**count for count in skipped]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert all(
        tensor.isfinite().all() for tensor in load_file(weights_folder(run_dir, 30) / "lora.safetensors").values()
    )


def test_a_run_resumes_in_the_dtype_that_was_measured_at_its_start(models, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_precision, "_MIN_WIDTH", 1)
    monkeypatch.setattr(mixed_precision, "bf16_speedup", lambda *shape: 3.0)
    monkeypatch.setattr("finetune.loss.head_dtype", lambda dtype, _: dtype)  # it is the same machine
    settings = {"resume": "auto", "optim": {"lr": 0.01, "pct_start": 0.0, "schedule": "constant"}, "max_steps": 4}
    whole = run_here(small_config(tmp_path, models["dense"], "whole", **settings))
    assert load_train_args(whole / "args.yaml").param_dtype == "bf16"
    run_here(small_config(tmp_path, models["dense"], "halves", **settings | {"max_steps": 2}))
    monkeypatch.setattr(mixed_precision, "bf16_speedup", lambda *shape: 0.1)
    halves = run_here(small_config(tmp_path, models["dense"], "halves", **settings))
    assert load_train_args(halves / "args.yaml").param_dtype == "bf16"
    losses = [[step["loss"] for step in read_jsonl(run / "metrics.train.jsonl")] for run in (whole, halves)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


# --- Checkpoints


def trained(folder: Path, model: Path, **settings) -> tuple[Path, Transformer]:
    """Return a YAML and its model with a random adapter, as if it had been trained."""
    config = small_config(folder, model, **settings)
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1)
    return config, model


def save(config: Path, model: Transformer, *steps: int) -> Path:
    """Save the model as a checkpoint of each step. Return the run folder."""
    args = load_train_args(config)
    tokenizer = load_instruct_tokenizer(Path(args.model_id_or_path), model.args.vocab_size)
    checkpointer = Checkpointer(model, tokenizer, args, Path(args.run_dir), model.compute_dtype, CPU)
    for step in steps:
        assert checkpointer.save(step) == weights_folder(Path(args.run_dir), step)
    checkpointer.finish()
    return Path(args.run_dir)


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_saved_adapter_starts_a_run_with_the_same_logits(name, param_dtype, models, tmp_path):
    config, model = trained(tmp_path, models[name], param_dtype=param_dtype)
    run_dir = save(config, model, 3)
    before = logits_of(build(config))
    for path in (weights_folder(run_dir, 3), weights_folder(run_dir, 3) / "lora.safetensors"):
        again = build(config, from_adapter=path)
        assert logits_of(again).equal(logits_of(model)) and not logits_of(again).equal(before)
        assert {p.dtype for p in trainable_parameters(again)} == {torch.float32}


@pytest.mark.parametrize("param_dtype, tolerance", [("fp32", 1e-5), ("bf16", 0.15), ("fp16", 0.02)])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_merged_weights_are_a_model_with_the_same_logits(name, param_dtype, tolerance, models, tmp_path):
    config, model = trained(tmp_path, models[name], param_dtype=param_dtype, save_adapters=False)
    folder = weights_folder(save(config, model, 3), 3)
    assert {path.name for path in folder.iterdir()} == {"consolidated.safetensors", "params.json", "tokenizer.model.v3"}
    plain = {"lora": {"enable": False}, "save_adapters": False, "param_dtype": param_dtype}
    merged = build(small_config(tmp_path, folder, "merged", **plain))
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=0, atol=tolerance)
    base = logits_of(build(small_config(tmp_path, models[name], "base", **plain)))
    assert (base - logits_of(model)).abs().max() > 5 * tolerance


def test_saving_does_not_change_the_model(models, tmp_path):
    config, model = trained(tmp_path, models["dense"], save_adapters=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(config, model, 1)
    assert model.training and all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("keep, expected", [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (None, [1, 2, 3, 4, 5])])
def test_the_latest_checkpoints_are_kept(keep, expected, models, tmp_path):
    config, model = trained(tmp_path, models["dense"], num_ckpt_keep=keep)
    run_dir = save(config, model, 1, 2, 3, 4, 5)
    assert saved_checkpoints(run_dir / "checkpoints") == [weights_folder(run_dir, step).parent for step in expected]


def test_checkpoints_are_ordered_by_step_and_other_folders_are_kept(models, tmp_path):
    config, model = trained(tmp_path, models["dense"], num_ckpt_keep=2)
    run_dir = save(config, model, 999_999, 1_000_000)
    (run_dir / "checkpoints" / "checkpoint_mine").mkdir()
    save(config, model, 1_000_001)
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"checkpoint_1000000", "checkpoint_1000001", "checkpoint_mine", "last"}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failed_recovery_of_checkpoints_is_a_user_error(models, tmp_path, monkeypatch):
    config, model = trained(tmp_path, models["dense"])
    run_dir = save(config, model, 1, 2)
    args = load_train_args(config)
    tokenizer = load_instruct_tokenizer(Path(args.model_id_or_path), model.args.vocab_size)
    checkpointer = Checkpointer(model, tokenizer, args, run_dir, model.compute_dtype, CPU)
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match=r"cannot be cleaned up: .*No space left on device"):
        checkpointer.recover(1)  # the second checkpoint is later
    assert saved_checkpoints(run_dir / "checkpoints") == [weights_folder(run_dir, step).parent for step in (1, 2)]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["model.weights.SafetensorsWriter.write", "shutil.copyfile", "os.replace"])
@pytest.mark.parametrize("what, error", [(full_disk, UserError), (interrupted, KeyboardInterrupt)])
def test_an_interrupted_save_keeps_earlier_checkpoints(where, what, error, models, tmp_path, monkeypatch):
    config, model = trained(tmp_path, models["dense"])
    run_dir = save(config, model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(where, what)
        with pytest.raises(error) as raised:
            save(config, model, 2)
    if error is UserError:
        assert "checkpoint_000002 could not be saved" in str(raised.value) and "No space left" in str(raised.value)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"checkpoint_000001", "last"}
    assert load_file(weights_folder(run_dir, 1) / "lora.safetensors")
    save(config, model, 2)
    assert load_file(weights_folder(run_dir, 2) / "lora.safetensors")


def test_a_process_killed_while_saving_leaves_only_complete_checkpoints(models, tmp_path, monkeypatch):
    original, written = SafetensorsWriter.write, []

    def die(self, name, tensor):
        original(self, name, tensor)
        self._file.flush()
        written.append(name)
        if written.count(name) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(SafetensorsWriter, "write", die)
    run = ForkedRun(small_config(tmp_path, models["dense"], ckpt_freq=1), 1)
    assert run.wait() == [-signal.SIGKILL]
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    assert saved_checkpoints(folder) == sorted(folder.glob("checkpoint_*")) == [folder / "checkpoint_000001"]
    assert {path.name for path in weights_folder(tmp_path / "run", 1).iterdir()} == {
        "lora.safetensors",
        "params.json",
        "tokenizer.model.v3",
    }
    assert build(tmp_path / "run.yaml", from_adapter=weights_folder(tmp_path / "run", 1))


class RunWithSmallFiles(ForkedRun):
    """A run that cannot write a file above 200 KiB."""

    def _prepare(self, rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 1024, 200 * 1024))


def test_a_failed_save_ends_every_rank_with_one_message(models, tmp_path):
    """The adapter is larger than a file may be."""
    run = RunWithSmallFiles(small_config(tmp_path, models["dense"], lora={"rank": 256}), 2)
    assert run.wait() == [1, 1] and "Traceback" not in run.log
    assert run.log.count("could not be saved") == 1
    assert "checkpoint_000003" in run.log and "File too large" in run.log
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# --- Before anything is loaded


@pytest.mark.parametrize("lora", [{"rank": 4}, {"rank": 4, "targets": ["wq", "gate"]}, {"enable": False}])
def test_estimated_parameter_counts_are_exact(lora, models, tmp_path):
    config = small_config(tmp_path, models["moe"], lora=lora, save_adapters=lora.get("enable", True))
    args, model = load_train_args(config), build(config)
    shapes = open_base_model(args).args
    counted = MemoryConfig.of(args, shapes, torch.float32, "cpu", "sdpa", shards=1).trained_and_frozen()
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad is trains) for trains in (True, False)]
    assert list(counted) == counts and counted[0] > 0


@pytest.mark.parametrize("no_eval", [True, False])
def test_unused_evaluation_data_is_warned_about(no_eval, models, tmp_path, caplog):
    data = {"instruct_data": str(INPUTS / "train_icd.jsonl"), "eval_instruct_data": str(INPUTS / "eval_instruct.jsonl")}
    run_here(small_config(tmp_path, models["dense"], data=data, no_eval=no_eval, max_steps=1))
    warnings = [record for record in caplog.records if "`data.eval_instruct_data` is not used" in record.message]
    assert len(warnings) == no_eval and all("set `no_eval: false`" in record.message for record in warnings)


# --- mistral-inference loads our checkpoints


@pytest.fixture
def mistral_inference(monkeypatch):
    """mistral-inference on a CPU: its attention kernels need CUDA and are replaced with PyTorch's."""
    import mistral_inference.cache
    import mistral_inference.transformer
    import mistral_inference.transformer_layers as layers

    def attention(q, k, v, attn_bias):
        mask = attn_bias.materialize((1, q.shape[2], q.shape[1], k.shape[1]), dtype=torch.float32).to(q.dtype)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).contiguous()

    monkeypatch.setattr(layers, "memory_efficient_attention", attention)

    def logits(folder: Path, adapter: Path | None = None, scaling: float = 2.0) -> torch.Tensor:
        model = mistral_inference.transformer.Transformer.from_folder(
            folder, max_batch_size=len(PROMPTS), device="cpu", dtype=torch.float32
        )
        if adapter:
            model.load_lora(adapter, scaling=scaling)
        args = model.args
        cache = mistral_inference.cache.BufferCache(
            args.n_layers, len(PROMPTS), max(LENGTHS), args.n_kv_heads, args.head_dim, args.sliding_window
        )
        cache.to(model.device, model.dtype)
        cache.reset()
        with torch.no_grad():
            return model.forward(torch.tensor(TOKENS), seqlens=LENGTHS, cache=cache)

    return logits


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_mistral_inference_gives_our_logits(name, mistral_inference, models, tmp_path):
    config, model = trained(tmp_path, models[name], lora={"rank": 4, "scaling": 3.0})
    folder = weights_folder(save(config, model, 1), 1)
    expected = logits_of(model)
    theirs = mistral_inference(models[name], folder / "lora.safetensors", scaling=3.0)
    torch.testing.assert_close(theirs.float(), expected, rtol=0, atol=2e-5)
    assert (mistral_inference(models[name]) - expected).abs().max() > 0.01

    merging = {"lora": {"rank": 4, "scaling": 3.0}, "save_adapters": False}
    config, model = trained(tmp_path, models[name], name="merged", **merging)
    theirs = mistral_inference(weights_folder(save(config, model, 1), 1))
    torch.testing.assert_close(theirs.float(), expected, rtol=0, atol=2e-5)
