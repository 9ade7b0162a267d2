"""PEFT's adapters, written by PEFT itself, compute here what they compute there, or are refused by name."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from finetune.hardware import choose_hardware
from finetune.inference import load_trained
from finetune.wrapped_model import build_model, open_base_model
from model.args import BLOCK_LINEARS, LoraArgs, load_model_args
from model.errors import UserError
from model.hf_format import open_model_weights
from model.peft_format import open_peft_adapter
from tests.support.checkpoints import make_tiny_adapter, make_tiny_checkpoint
from tests.support.other_engines import transformers_logits
from utils.models.exports import export
from utils.models.merging import merge_lora

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RANK = 4
TOKENS = torch.randint(96, (13,), generator=torch.Generator().manual_seed(0)).tolist()
QV, QV_HERE = ["q_proj", "v_proj"], ["wq", "wv"]
# PEFT's settings, and the layers that have an adapter as this project names them
ADAPTERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({"lora_alpha": 12, "target_modules": QV}, QV_HERE),
    "rslora": ({"lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "o_proj"]}, ["wk", "wo"]),
    "patterns": (
        {
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 1},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 20, "up_proj": 3},
        },
        ["w1", "w2", "w3", "wk", "wq"],
    ),
    "patterns with rslora": (
        {"lora_alpha": 8, "use_rslora": True, "target_modules": QV, "rank_pattern": {"v_proj": 2}},
        QV_HERE,
    ),
    "one layer": ({"lora_alpha": 8, "target_modules": QV, "layers_to_transform": [1]}, QV_HERE),
    "a regular expression": (
        {"lora_alpha": 8, "target_modules": r".*layers\.(0\..*q_proj|1\..*up_proj)"},
        ["w3", "wq"],
    ),
    "excluded": ({"lora_alpha": 8, "target_modules": QV, "exclude_modules": r".*layers\.0.*v_proj"}, QV_HERE),
    "head": ({"lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}, ["output", "wq"]),
    "gaussian": ({"lora_alpha": 8, "target_modules": QV, "init_lora_weights": "gaussian"}, QV_HERE),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    import transformers

    torch.manual_seed(0)
    shapes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 96}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2, "sliding_window": None}
    folder = tmp_path_factory.mktemp("base")
    transformers.MistralForCausalLM(transformers.MistralConfig(**shapes, **heads)).save_pretrained(folder)
    return folder


def save_with_peft(base: Path, folder: Path, **settings) -> Path:
    """Save an adapter with random factors."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": RANK} | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> Path:
    """A folder with each of ADAPTERS."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, (settings, _) in ADAPTERS.items():
        save_with_peft(base, folder / name, **settings)
    return folder


@pytest.fixture
def plain(adapters, tmp_path) -> Path:
    return Path(shutil.copytree(adapters / "plain", tmp_path / "plain"))


def trained_from(base: Path, adapter: Path, rank: int = RANK, targets: list[str] = QV_HERE, scaling: float = 1.5):
    """Build the model that a run with this initial adapter starts from."""
    lora = LoraArgs(rank=rank, scaling=scaling, targets=targets, from_adapter=str(adapter))
    args = TrainArgs(
        data=DataArgs(),
        model_id_or_path=str(base),
        run_dir="",
        param_dtype="fp32",
        checkpoint=True,
        compile=False,
        lora=lora,
    )
    opened = open_base_model(args)
    return build_model(opened, args, choose_hardware(CPU, "fp32", "sdpa", opened.args), World(0, 1, CPU))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS), [len(TOKENS)])


def change_config(adapter: Path, **changes) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}), encoding="utf-8")


def change_weights(adapter: Path, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


# --- The same logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_training_and_merging_start_from_what_peft_computes(base, adapters, tmp_path, name):
    adapter, targets = adapters / name, ADAPTERS[name][1]
    expected = transformers_logits(base, TOKENS, adapter)
    assert (expected - transformers_logits(base, TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(trained_from(base, adapter, targets=targets)), expected, rtol=0, atol=1e-4)
    merge_lora(base, adapter, tmp_path / "merged")
    merged = trained_model(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-4)


def trained_model(folder: Path):
    args = TrainArgs(
        data=DataArgs(), model_id_or_path=str(folder), run_dir="", param_dtype="fp32", checkpoint=True, compile=False
    )
    args.lora.enable = False
    opened = open_base_model(args)
    return build_model(opened, args, choose_hardware(CPU, "fp32", "sdpa", opened.args), World(0, 1, CPU))


def test_every_way_to_name_an_adapter_gives_the_same(base, plain, tmp_path):
    expected = transformers_logits(base, TOKENS, plain)
    export(plain, "hf", tmp_path / "hf", merged=True, base=base)
    torch.testing.assert_close(transformers_logits(tmp_path / "hf", TOKENS), expected, rtol=0, atol=1e-4)
    change_config(plain, base_model_name_or_path=str(base))
    export(plain / "adapter_model.safetensors", "mistral", tmp_path / "mistral", merged=True)
    torch.testing.assert_close(logits_of(trained_model(tmp_path / "mistral")), expected, rtol=0, atol=1e-4)
    torch.save(load_file(plain / "adapter_model.safetensors"), plain / "adapter_model.bin")
    (plain / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(logits_of(trained_from(base, plain)), expected, rtol=0, atol=1e-4)
    merge_lora(base, plain / "adapter_model.bin", tmp_path / "merged")
    torch.testing.assert_close(logits_of(trained_model(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("moe", [False, True])
def test_what_export_writes_is_read_back_bit_for_bit(tmp_path, moe):
    base = make_tiny_checkpoint(tmp_path / "base", moe=moe, dim=32, hidden_dim=48, vocab_size=64)
    file = make_tiny_adapter(base, tmp_path / "run" / "lora.safetensors", targets=[*BLOCK_LINEARS, "gate", "output"])
    params = json.loads((base / "params.json").read_text(encoding="utf-8"))
    (file.parent / "params.json").write_text(json.dumps(params | {"lora": {"scaling": 3.0}}), encoding="utf-8")
    export(file.parent, "peft", tmp_path / "peft")
    adapter, own = open_peft_adapter(tmp_path / "peft", open_model_weights(base), params["head_dim"]), load_file(file)
    assert adapter.shapes.keys() == own.keys() and set(adapter.scalings.values()) == {3.0}
    assert all(adapter.read(name).equal(tensor) for name, tensor in own.items())
    for to in ("run", "peft"):
        merge_lora(base, tmp_path / to, tmp_path / f"{to}.safetensors")
    ours, theirs = (load_file(tmp_path / f"{to}.safetensors") for to in ("run", "peft"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=2**-6, atol=2**-8)


def test_scalings_are_those_of_the_formula(base, adapters):
    def scalings(name: str) -> dict[str, float]:
        return open_peft_adapter(adapters / name, open_model_weights(base), 8).scalings

    assert set(scalings("plain").values()) == {12 / RANK}
    assert set(scalings("rslora").values()) == {6 / math.sqrt(RANK)}
    found = scalings("patterns")
    assert found["layers.0.attention.wq"] == 20 / RANK and found["layers.1.attention.wq"] == 8 / RANK
    assert found["layers.0.attention.wk"] == 8 / 2 and found["layers.1.feed_forward.w2"] == 8 / 1
    assert found["layers.0.feed_forward.w3"] == 3 / RANK and found["layers.1.feed_forward.w3"] == 3 / 1


def test_rows_of_all_ranks_form_the_adapter(base, adapters):
    lora = LoraArgs(rank=RANK, scaling=1.5, targets=ADAPTERS["patterns"][1], from_adapter=str(adapters / "patterns"))
    args = TrainArgs(data=DataArgs(), model_id_or_path=str(base), run_dir="", lora=lora, checkpoint=True, compile=False)
    adapter = open_base_model(args).adapter
    for name, shape in adapter.shapes.items():
        whole = adapter.read(name)
        assert tuple(whole.shape) == shape and whole.dtype is torch.float32
        for cuts in ([2], [1, 2], [5, 17]):
            edges = [0, *cuts, shape[0]]
            parts = [adapter.read(name, slice(a, min(b, shape[0]))) for a, b in itertools.pairwise(edges)]
            assert torch.cat(parts)[: shape[0]].equal(whole), name


def test_what_is_converted_is_logged(base, adapters, caplog):
    caplog.set_level("INFO", "wrapped_model")
    trained_from(base, adapters / "plain", scaling=3.0)
    assert not caplog.messages
    trained_from(base, adapters / "one layer", scaling=3.0)
    converted, absent = caplog.messages
    assert "the adapter's scaling of 2 is converted to `lora.scaling: 3`" in converted
    assert "2 of the layers in `lora.targets` have no adapter and get none" in absent


def test_padding_and_missing_layers_stay_zero_in_training(base, adapters):
    model = trained_from(base, adapters / "one layer")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.tensor(TOKENS), [len(TOKENS)]).logsumexp(-1).sum().backward()
    optimizer.step()
    adapted = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert all(not p.any() for name, p in adapted.items() if "layers.0" in name)
    assert all(p.any() and p.grad.any() for name, p in adapted.items() if "layers.1" in name)


def test_a_16_bit_base_keeps_its_dtype(base, plain, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "bf16"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merge_lora(folder, plain, tmp_path / "merged.safetensors")
    merged, base_weights = load_file(tmp_path / "merged.safetensors"), open_model_weights(folder)
    adapter = open_peft_adapter(plain, base_weights, load_model_args(folder).head_dim)
    layer = "layers.1.attention.wq"
    a, b = (adapter.read(f"{layer}.{part}.weight").double() for part in ("lora_A", "lora_B"))
    exact = base_weights.read(f"{layer}.weight").double() + b @ a * 3
    assert merged[f"{layer}.weight"].dtype is torch.bfloat16
    torch.testing.assert_close(merged[f"{layer}.weight"].double(), exact, rtol=2**-8, atol=0)


# --- Refusals

SETTINGS = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "fan_in_fan_out": True,
    "lora_bias": True,
    "peft_type": "LOHA",
    "layer_replication": [[0, 1]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
    "a_setting_of_tomorrow": 1,
    "rank_pattern": {"q_proj": 3},
    "r": 8,
    "lora_alpha": "16",
    "alpha_pattern": [1],
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_without_an_equivalent_are_refused_by_name(base, plain, tmp_path, key):
    change_config(plain, **{key: SETTINGS[key]})
    name = "rank" if key in ("rank_pattern", "r") else f"`{key}` is "
    for use in (lambda: trained_from(base, plain), lambda: merge_lora(base, plain, tmp_path / "merged")):
        with pytest.raises(UserError, match=rf"adapter_config.json.*{name}"):
            use()
    assert not (tmp_path / "merged").exists()


def test_settings_of_other_versions_that_change_nothing_are_ignored(base, plain):
    expected = logits_of(trained_from(base, plain))
    change_config(plain, a_setting_of_tomorrow=None, alpha_pattern="absent", rank_pattern=None, bias="absent")
    change_config(plain, use_rslora="absent", init_lora_weights=False, lora_dropout=0.1, inference_mode=False)
    assert logits_of(trained_from(base, plain)).equal(expected)


PREFIX = "base_model.model.model.layers.0.self_attn."
TENSORS = {
    "an embedding": lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 96)}),
    "a whole layer": lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(96, 32)}),
    "a bias": lambda t: t.update({f"{PREFIX}q_proj.lora_B.bias": torch.ones(48)}),
    "DoRA": lambda t: t.update({f"{PREFIX}q_proj.lora_magnitude_vector": torch.ones(48)}),
    "another architecture": lambda t: t.update({f"{PREFIX}query_key_value.lora_A.weight": torch.ones(4, 32)}),
    "a missing factor": lambda t: t.pop(f"{PREFIX}q_proj.lora_B.weight"),
    "another rank": lambda t: t.update({f"{PREFIX}q_proj.lora_A.weight": torch.ones(3, 32)}),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_without_an_equivalent_are_refused(base, plain, tmp_path, name):
    change_weights(plain, TENSORS[name])
    for use in (lambda: trained_from(base, plain), lambda: merge_lora(base, plain, tmp_path / "merged")):
        with pytest.raises(UserError, match=r"adapter_model.safetensors"):
            use()


def test_the_head_of_another_model_is_refused(base, adapters, tmp_path):
    adapter = Path(shutil.copytree(adapters / "head", tmp_path / "head"))
    change_weights(adapter, lambda tensors: tensors["base_model.model.lm_head.base_layer.weight"].add_(1))
    with pytest.raises(UserError, match=r"a head .*that is not the base model's"):
        merge_lora(base, adapter, tmp_path / "merged")


def test_files_that_do_not_form_one_adapter_are_refused(base, plain, tmp_path):
    shutil.copyfile(plain / "adapter_model.safetensors", plain / "lora.safetensors")
    with pytest.raises(UserError, match=r"both lora.safetensors and a PEFT adapter: keep only"):
        trained_from(base, plain)
    (plain / "lora.safetensors").rename(plain / "adapter_model.bin")
    with pytest.raises(UserError, match=r"found adapter_model.safetensors and adapter_model.bin"):
        trained_from(base, plain)
    (plain / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.bin .*not written by torch.save"):
        trained_from(base, plain)
    (plain / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"adapter_model.bin, found neither"):
        trained_from(base, plain)
    (plain / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read: No such file"):
        merge_lora(base, plain / "adapter_model.safetensors", tmp_path / "merged")


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_a_config_that_is_not_an_object_is_refused(base, plain, content):
    (plain / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        trained_from(base, plain)


@pytest.mark.parametrize(
    "settings", [{"rank": 8}, {"targets": ["wq"]}, {"targets": ["wq", "wk", "wv"]}, {"targets": ["wv", "wk"]}]
)
def test_other_settings_are_refused_with_those_to_set(base, plain, settings):
    with pytest.raises(UserError, match=r"set `lora.rank: 4` and `lora.targets: \[wq, wv\]`"):
        trained_from(base, plain, **settings)


def test_an_adapter_of_a_larger_model_is_refused(base, plain, tmp_path):
    change_weights(
        plain, lambda t: t.update({k.replace("layers.1", "layers.2"): v.clone() for k, v in list(t.items())})
    )
    with pytest.raises(UserError, match=r"layers.2.attention.w[qv].lora_[AB].weight is not part of the model"):
        trained_from(base, plain)
    with pytest.raises(UserError, match=r"wq.lora_\*: the model has no layers.2.attention.wq.weight"):
        merge_lora(base, plain, tmp_path / "merged")


def test_what_needs_no_merging_or_cannot_is_refused(base, plain, tmp_path):
    for to, merged in (("peft", False), ("peft", True), ("hf", False), ("mistral", False)):
        with pytest.raises(UserError, match=r"already is a PEFT adapter"):
            export(plain, to, tmp_path / "out", merged=merged, base=base)
    change_config(plain, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"adapter_config.json does not record the adapter's base model"):
        export(plain, "hf", tmp_path / "out", merged=True)
    with pytest.raises(UserError, match=r"is a PEFT adapter; merge it into its base model first"):
        load_trained(plain)
    assert not (tmp_path / "out").exists()
