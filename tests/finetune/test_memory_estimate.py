"""The memory estimate agrees with what PyTorch allocates, and `checkpoint: auto` uses it."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import yaml

from finetune import preflight
from finetune.args import load_train_args
from finetune.distributed import World
from finetune.hardware import Hardware, free_bytes
from finetune.loss import cross_entropy_head
from finetune.memory_estimate import CHECKPOINTS, RESERVE, MemoryConfig, largest_seq_len
from finetune.optim import build_optimizer
from finetune.preflight import resolve_checkpoint
from finetune.wrapped_model import open_base_model, trainable_parameters
from model.args import BASE_DTYPES, LoraArgs, ModelArgs, MoeArgs
from model.lora import add_lora, quantize_linears
from model.transformer import Transformer
from tests.end_to_end.kill_runs import ForkedRun, kill_test_config
from tests.support.memory_tracker import AliveTensors

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
RECOMPUTE = {False: "nothing", "selective": "feed_forward", True: "block"}
TOKENS, VOCABULARY = 512, 300
DENSE = ModelArgs(128, 4, 32, 352, 4, 2, 1e-5, VOCABULARY)
SHAPES = {
    "dense": DENSE,
    "narrow": dataclasses.replace(DENSE, hidden_dim=160),  # attention needs more than the feed-forward network
    "mixture": dataclasses.replace(DENSE, hidden_dim=176, moe=MoeArgs(4, 2)),
}
LORA = LoraArgs(rank=8)


def build(shapes: ModelArgs, lora: LoraArgs, dtype: torch.dtype, checkpoint: bool | str) -> Transformer:
    """Build a model as finetune.wrapped_model does: trained parameters in fp32, the others in `dtype`."""
    torch.manual_seed(0)
    model = Transformer(shapes, "sdpa", dtype)
    if lora.enable:
        add_lora(model, lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    for block in model.layers:
        block.recompute = RECOMPUTE[checkpoint]
    return model.train()


def measure(config: MemoryConfig) -> tuple[int, int]:
    """Return the bytes kept after the forward pass, and the peak of a forward and a backward pass."""
    model = build(config.model, config.lora, config.dtype, config.checkpoint)
    ids = torch.randint(VOCABULARY, (config.seq_len,))
    positions = torch.arange(0, config.seq_len, round(1 / config.trained_share))
    with AliveTensors(model.parameters()) as alive:
        loss = model(ids, [config.seq_len // 2] * 2, cross_entropy_head(ids[positions]), positions)
        kept = alive.now
        loss.backward()
    return kept, alive.peak


def on_cpu(shapes: ModelArgs, **settings) -> MemoryConfig:
    return MemoryConfig(shapes, **{"lora": LORA, "seq_len": TOKENS, "device": "cpu", "attention": "sdpa"} | settings)


# --- Comparison with what PyTorch allocates


@pytest.mark.parametrize("share", [1.0, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_activations_and_peak(shapes, checkpoint, dtype, share):
    config = on_cpu(shapes, checkpoint=checkpoint, dtype=dtype, trained_share=share)
    kept, peak = measure(config)
    memory = config.memory()
    assert memory.activations == pytest.approx(kept, rel=0.02)
    # Gradients of the current block's trained parameters are alive at the peak, too: less than a percent.
    assert memory.activations + memory.transient == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("targets", [["wq", "wv"], ["wk", "w2", "wo"]])
def test_adapters_on_some_layers_only(targets):
    lora = LoraArgs(rank=64, targets=targets)
    config = on_cpu(DENSE, checkpoint=False, dtype=torch.float32, lora=lora)
    assert config.memory().activations == pytest.approx(measure(config)[0], rel=0.02)


@pytest.mark.parametrize(
    "lora", [LoraArgs(enable=False), LoraArgs(rank=8, dropout=0.1), LoraArgs(rank=8, targets=["wq", "output"])]
)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_estimate_without_fused_lora_is_approximate(lora, checkpoint):
    config = on_cpu(DENSE, checkpoint=checkpoint, dtype=torch.float32, lora=lora)
    memory = config.memory()
    assert memory.activations + memory.transient == pytest.approx(measure(config)[1], rel=0.25)


@pytest.mark.parametrize("enable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_optimizer_state(dtype, enable, tmp_path):
    lora = LoraArgs(rank=8, enable=enable)
    config = on_cpu(SHAPES["mixture"], dtype=dtype, lora=lora)
    model = build(config.model, lora, dtype, True)
    parameters = trainable_parameters(model)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    args = load_train_args(kill_test_config(tmp_path, "optimizer"))
    optimizer, _ = build_optimizer(parameters, args.optim, 10)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    memory = config.memory()
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert memory.frozen == sum(tensor.nbytes for tensor in frozen)
    assert memory.trained == memory.gradients == sum(tensor.nbytes for tensor in parameters)
    assert memory.moments == sum(tensor.nbytes for tensor in moments)
    counts = sum(tensor.numel() for tensor in parameters), sum(tensor.numel() for tensor in frozen)
    assert config.trained_and_frozen() == counts


@pytest.mark.parametrize("base_dtype", BASE_DTYPES[1:])
def test_quantized_base(base_dtype):
    shapes = dataclasses.replace(DENSE, hidden_dim=384)
    with torch.device("meta"):
        model = Transformer(shapes)
        add_lora(model, LORA)
    quantize_linears(model, base_dtype)
    stored = sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8)
    others = sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8 and not p.requires_grad)
    same, quantized = (on_cpu(shapes, base_dtype=name) for name in ("same", base_dtype))
    assert quantized.memory().frozen == stored + 2 * others
    assert quantized.memory().frozen < same.memory().frozen
    assert quantized.trained_and_frozen() == same.trained_and_frozen()


def test_ranks_share_weights_but_not_activations():
    alone, shared = (MemoryConfig(DENSE, LORA, TOKENS, shards=shards).memory() for shards in (1, 4))
    for part in ("frozen", "trained", "gradients", "moments"):
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) / 4, rel=0.01)
    assert (alone.unsharded, shared.activations) == (0, pytest.approx(alone.activations, rel=0.05))
    block = 2 * sum(parameter.numel() for parameter in build(DENSE, LORA, torch.bfloat16, True).layers[0].parameters())
    assert shared.unsharded > 2 * block


def test_cpu_offload_frees_gpu_memory():
    memory = MemoryConfig(DENSE, LORA, TOKENS, cpu_offload=True).memory()
    assert memory.frozen == memory.trained == memory.gradients == memory.moments == 0
    assert memory.total == memory.unsharded + memory.activations + memory.transient + memory.overhead


def test_vocabulary_size_affects_only_the_weights():
    """Without chunks in the loss, the larger vocabulary would need a gigabyte more."""
    small, large = (
        MemoryConfig(dataclasses.replace(DENSE, vocab_size=size), LORA, 4096).memory() for size in (32768, 131072)
    )
    assert (large.total - large.frozen) == pytest.approx(small.total - small.frozen, rel=0.01)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_largest_seq_len_is_the_limit(checkpoint):
    config = MemoryConfig(DENSE, LORA, 1, checkpoint=checkpoint)
    longest = largest_seq_len(config, 1 << 30)
    totals = [dataclasses.replace(config, seq_len=longest + more).memory().total for more in (0, 1)]
    assert totals[0] <= 1 << 30 < totals[1]
    assert largest_seq_len(config, 1 << 20) == 0


def test_another_seq_len_shares_the_parameters():
    config = MemoryConfig(DENSE, LORA, 1)
    longer = config.with_seq_len(7)
    assert longer == dataclasses.replace(config, seq_len=7) and longer._parameters is config._parameters


# --- checkpoint: auto


@pytest.fixture
def auto(tmp_path):
    args = load_train_args(kill_test_config(tmp_path, "auto", checkpoint="auto"))
    return open_base_model(args), args, Hardware(CPU, torch.float32, "sdpa"), World(0, 1, CPU)


@pytest.mark.parametrize("index", range(len(CHECKPOINTS)))
def test_auto_selects_the_fastest_mode_that_fits(index, auto, monkeypatch, caplog):
    base, args, hardware, world = auto
    config = MemoryConfig.of(args, base.args, torch.float32, "cpu", "sdpa", 1)
    totals = [dataclasses.replace(config, checkpoint=mode).memory().total for mode in CHECKPOINTS]
    assert totals == sorted(totals, reverse=True)
    free = totals[index] / (1 - RESERVE)
    monkeypatch.setattr(preflight, "free_bytes", lambda device, processes, swap=False: free * 1.0001)
    with caplog.at_level(logging.INFO):
        assert resolve_checkpoint(base, args, hardware, world).checkpoint == CHECKPOINTS[index]
    assert f"`checkpoint: auto` is {str(CHECKPOINTS[index]).lower()}: false needs about" in caplog.text
    monkeypatch.setattr(preflight, "free_bytes", lambda device, processes, swap=False: free * 0.9999)
    less = CHECKPOINTS[min(index + 1, len(CHECKPOINTS) - 1)]  # the one that needs least if none fits
    assert resolve_checkpoint(base, args, hardware, world).checkpoint == less


def test_auto_uses_the_smallest_memory_of_all_ranks(auto, monkeypatch):
    base, args, hardware, world = auto
    monkeypatch.setattr(World, "gather", lambda self, value: [1 << 60, 1, 1 << 60])
    assert resolve_checkpoint(base, args, hardware, world).checkpoint is True


def test_auto_recomputes_if_memory_is_unknown(auto, monkeypatch):
    base, args, hardware, world = auto
    monkeypatch.setattr(preflight, "free_bytes", lambda device, processes, swap=False: None)
    assert resolve_checkpoint(base, args, hardware, world).checkpoint is True


def test_explicit_mode_is_kept(auto):
    base, args, hardware, world = auto
    args.checkpoint = "selective"
    assert resolve_checkpoint(base, args, hardware, world) is args


def test_processes_of_a_node_share_its_memory():
    if not Path("/proc/meminfo").is_file():
        assert free_bytes(CPU, 1) is None
        return
    assert 0 < free_bytes(CPU, 4) == pytest.approx(free_bytes(CPU, 1) / 4, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_records_the_selected_mode(ranks, tmp_path):
    config = kill_test_config(tmp_path, "run", checkpoint="auto", max_steps=1)
    run = ForkedRun(config, ranks)
    assert run.wait() == [0] * ranks, run.log
    recorded = yaml.safe_load((config.with_suffix("") / "args.yaml").read_text(encoding="utf-8"))
    assert recorded["checkpoint"] is False  # this model fits anywhere
    assert run.log.count("`checkpoint: auto` is false") == 1
