"""Merged weights equal float64 arithmetic and mistral-finetune's files; adapters that do not fit are refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.cli import run_cli
from model.errors import UserError
from tests.support.checkpoints import make_tiny_adapter, make_tiny_checkpoint
from tests.support.forked import run_forked
from utils import merge_lora as merge_command
from utils.merge_lora import main
from utils.models.merging import merge_lora

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "expected"
GOLDEN_CASES = [("dense", "bfloat16", 2.0)]
if GOLDEN.is_dir():
    GOLDEN_CASES += [("dense", "bfloat16", 0.5), ("dense", "float32", 2.0), ("dense", "float32", 0.5)]
    GOLDEN_CASES += [("moe", "bfloat16", 2.0)]
else:
    GOLDEN = ROOT / "tests" / "fixtures" / "golden" / "expected"
SMALL = {"dim": 32, "hidden_dim": 48, "vocab_size": 64}


@pytest.fixture
def base(tmp_path) -> Path:
    return make_tiny_checkpoint(tmp_path / "base", **SMALL)


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    return make_tiny_adapter(base, tmp_path / "adapter" / "lora.safetensors")


def write_lora_params(adapter: Path, lora) -> None:
    (adapter.parent / "params.json").write_text(json.dumps({"dim": 32, "lora": lora}), encoding="utf-8")


def drop(file: Path, *names: str) -> None:
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in names}, file)


def assert_merged(base: Path, adapter: Path, merged: Path, scaling: float, dtype: torch.dtype | None = None) -> None:
    """Compare with W + scaling B A in float64, rounded once; other tensors must be equal up to the cast."""
    lora, result = load_file(adapter), load_file(merged)
    weights = load_file(base / "consolidated.safetensors")
    assert result.keys() == weights.keys()
    for name, weight in weights.items():
        expected = dtype or weight.dtype
        assert result[name].dtype == expected
        stem = name.removesuffix("weight")
        if f"{stem}lora_A.weight" not in lora:
            assert result[name].equal(weight.to(expected)), name
            continue
        delta = lora[f"{stem}lora_B.weight"].double() @ lora[f"{stem}lora_A.weight"].double() * scaling
        assert delta.abs().max() > 0.01
        exact = weight.double() + delta
        # Half a unit in the last place: one rounding. The sum in fp32 adds less than a thousandth of that in 16 bits.
        rounding = 0.5 * torch.finfo(expected).eps + 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(result[name].double(), exact, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_equals_the_formula_in_every_dtype(tmp_path, moe, base_dtype, dtype):
    base = make_tiny_checkpoint(tmp_path / "base", moe=moe, dtype=base_dtype, **SMALL)
    adapter = make_tiny_adapter(base, tmp_path / "lora.safetensors", dtype=dtype)
    merge_lora(base, adapter, tmp_path / "out" / "merged.safetensors", scaling=0.5)
    assert_merged(base, adapter, tmp_path / "out" / "merged.safetensors", 0.5)


def test_a_bf16_base_trained_in_fp32_merges_to_bf16_rounded_once(tmp_path, base, capsys):
    adapter = make_tiny_adapter(base, tmp_path / "lora.safetensors", dtype=torch.float32)
    merge_lora(base, adapter, tmp_path / "merged.safetensors", 0.5)
    size = sum(tensor.nbytes for tensor in load_file(base / "consolidated.safetensors").values())
    assert f"Writing 21 tensors (bfloat16), {size / 1e6:.1f} MB, to" in capsys.readouterr().out
    for dtype in (torch.float32, torch.float16):
        merge_lora(base, adapter, tmp_path / f"{dtype}.safetensors", 0.5, dtype)
        assert_merged(base, adapter, tmp_path / f"{dtype}.safetensors", 0.5, dtype)
    exact = load_file(tmp_path / "torch.float32.safetensors")
    for name, tensor in load_file(tmp_path / "merged.safetensors").items():
        assert tensor.equal(exact[name].bfloat16()), name


def test_values_that_fp16_cannot_hold_are_refused(tmp_path, base, adapter):
    file = base / "consolidated.safetensors"
    save_file(load_file(file) | {"norm.weight": torch.full((32,), 1e5).bfloat16()}, file)
    with pytest.raises(UserError, match=r"`norm.weight` has a value of more than 65,504"):
        merge_lora(base, adapter, tmp_path / "merged.safetensors", 0.5, torch.float16)
    assert not (tmp_path / "merged.safetensors").exists()


def test_files_and_folders_give_the_same(tmp_path, base, adapter):
    merge_lora(base, adapter, tmp_path / "1.safetensors", 2.0)
    merge_lora(base / "consolidated.safetensors", adapter.parent, tmp_path / "2.safetensors", 2.0)
    torch.save(load_file(base / "consolidated.safetensors"), tmp_path / "base.pth")
    merge_lora(tmp_path / "base.pth", adapter, tmp_path / "3.safetensors", 2.0)
    merge_lora(base, adapter, tmp_path / "folder", 2.0)
    first = (tmp_path / "1.safetensors").read_bytes()
    for other in ("2.safetensors", "3.safetensors", "folder/consolidated.safetensors"):
        assert (tmp_path / other).read_bytes() == first


def test_a_run_and_its_checkpoints_give_the_same(tmp_path, base):
    run = tmp_path / "run"
    weights = run / "checkpoints" / "checkpoint_000002" / "consolidated"
    adapter = make_tiny_adapter(base, weights / "lora.safetensors")
    (run / "args.yaml").touch()
    write_lora_params(adapter, {"scaling": 0.5})
    for number, source in enumerate((run, weights.parent, weights, adapter)):
        merge_lora(base, source, tmp_path / f"{number}.safetensors")
        assert_merged(base, adapter, tmp_path / f"{number}.safetensors", 0.5)


def test_folder_is_a_complete_model(tmp_path, base, adapter):
    params = json.loads((base / "params.json").read_text(encoding="utf-8"))
    (base / "params.json").write_text(json.dumps(params | {"lora": {"rank": 4}}), encoding="utf-8")
    (base / "tokenizer.model.v3").write_bytes(b"tokens of the base")
    (adapter.parent / "tekken.json").write_bytes(b"tokens of the adapter")
    merge_lora(base, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "params.json").read_text(encoding="utf-8")) == params
    assert (tmp_path / "merged" / "tokenizer.model.v3").read_bytes() == b"tokens of the base"
    assert len(list((tmp_path / "merged").iterdir())) == 3
    (base / "tokenizer.model.v3").unlink()
    merge_lora(base / "consolidated.safetensors", adapter, tmp_path / "merged_2")
    assert (tmp_path / "merged_2" / "tekken.json").read_bytes() == b"tokens of the adapter"


def test_scaling_comes_from_the_adapters_params(tmp_path, base, adapter, capsys):
    write_lora_params(adapter, {"enable": True, "rank": 4, "scaling": 0.25})
    merge_lora(base, adapter, tmp_path / "recorded.safetensors")
    assert "Scaling 0.25, as recorded" in capsys.readouterr().out
    assert_merged(base, adapter, tmp_path / "recorded.safetensors", 0.25)
    merge_lora(base, adapter, tmp_path / "given.safetensors", 1.5)
    assert_merged(base, adapter, tmp_path / "given.safetensors", 1.5)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_default_scaling_is_announced(tmp_path, base, adapter, capsys, lora):
    write_lora_params(adapter, lora)
    merge_lora(base, adapter, tmp_path / "merged.safetensors")
    assert "using the default, 2.0" in capsys.readouterr().out
    assert_merged(base, adapter, tmp_path / "merged.safetensors", 2.0)


@pytest.mark.parametrize("recorded", ["2", True, -1.0, 0, [2.0]])
def test_recorded_scaling_must_be_a_positive_number(tmp_path, base, adapter, recorded):
    write_lora_params(adapter, {"scaling": recorded})
    with pytest.raises(UserError, match=r"scaling.* is .*expected a number|must be a positive number"):
        merge_lora(base, adapter, tmp_path / "merged.safetensors")


# Refusals


def test_adapter_of_another_model_names_every_tensor(tmp_path, base):
    other = make_tiny_checkpoint(tmp_path / "other", moe=True, n_layers=1, **SMALL | {"dim": 64})
    adapter = make_tiny_adapter(other, tmp_path / "lora.safetensors")
    with pytest.raises(UserError) as caught:
        merge_lora(base, adapter, tmp_path / "merged.safetensors")
    message = str(caught.value)
    assert "does not fit the model" in message and str(adapter) in message and str(base) in message
    for linear in ("wq", "wk", "wv", "wo"):
        assert f"layers.0.attention.{linear}.lora_*: B " in message
    for expert in range(4):
        for linear in ("w1", "w2", "w3"):
            stem = f"layers.0.feed_forward.experts.{expert}.{linear}"
            assert f"{stem}.lora_*: the model has no {stem}.weight" in message
    assert not (tmp_path / "merged.safetensors").exists()


def test_long_lists_of_problems_are_cut(tmp_path, base):
    other = make_tiny_checkpoint(tmp_path / "other", n_layers=12, **SMALL)
    with pytest.raises(UserError, match=r"\.\.\. and 50 more") as caught:
        merge_lora(base, make_tiny_adapter(other, tmp_path / "lora.safetensors"), tmp_path / "merged.safetensors")
    assert len(str(caught.value).splitlines()) == 22


def test_an_incomplete_adapter_is_refused(tmp_path, base, adapter):
    drop(adapter, "layers.0.attention.wq.lora_B.weight", "layers.1.feed_forward.w2.lora_A.weight")
    with pytest.raises(UserError) as caught:
        merge_lora(base, adapter, tmp_path / "merged.safetensors")
    assert "layers.0.attention.wq.lora_B.weight: missing" in str(caught.value)
    assert "layers.1.feed_forward.w2.lora_A.weight: missing" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_ranks_of_a_and_b_must_agree(tmp_path, base, adapter):
    name = "layers.0.attention.wk.lora_B.weight"
    tensors = load_file(adapter)
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, adapter)
    with pytest.raises(UserError, match=r"wk\.lora_\*: B \[32, 3\] times A \[4, 32\] cannot be added to .* \[32, 32\]"):
        merge_lora(base, adapter, tmp_path / "merged.safetensors")


def test_tensors_that_are_not_adapters_are_refused(tmp_path, base, adapter):
    tensors = load_file(adapter)
    tensors["layers.0.attention.wq.lora_A.weight"] = tensors["layers.0.attention.wq.lora_A.weight"].float()
    save_file(tensors | {"layers.0.lora_magnitude": torch.ones(1).bfloat16()}, adapter)
    with pytest.raises(UserError) as caught:
        merge_lora(base, adapter, tmp_path / "merged.safetensors")
    assert "layers.0.lora_magnitude: expected a name that ends in" in str(caught.value)
    assert "dtypes torch.bfloat16, torch.float32" in str(caught.value)
    with pytest.raises(UserError, match="has no LoRA tensors"):
        merge_lora(base, base / "consolidated.safetensors", tmp_path / "merged.safetensors")


def test_quantized_base_is_refused(tmp_path, base, adapter):
    file = base / "consolidated.safetensors"
    name = "layers.0.attention.wq.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(UserError, match=r"wq.weight: the model stores it as torch.float8_e4m3fn"):
        merge_lora(base, adapter, tmp_path / "merged.safetensors")


def test_nothing_is_overwritten(tmp_path, base, adapter):
    file = tmp_path / "merged.safetensors"
    file.write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    for destination, sentence in [
        (file, "already exists"),
        (adapter.parent, "already exists and is not an empty folder"),
        (tmp_path / "merged.pth", "written as .safetensors"),
    ]:
        with pytest.raises(UserError, match=sentence):
            merge_lora(base, adapter, destination, 2.0)
    (base / "params.json").rename(base / "params.old")
    with pytest.raises(UserError, match=r"params.json does not exist"):
        merge_lora(base, adapter, tmp_path / "folder", 2.0)
    (base / "params.old").rename(base / "params.json")
    assert file.read_bytes() == b"precious" and sorted(tmp_path.rglob("*")) == before


def test_a_failed_merge_writes_nothing(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr("utils.models.merging.merged_weight", lambda *_: 1 / 0)
    for destination in (tmp_path / "merged", tmp_path / "merged.safetensors"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ZeroDivisionError):
            merge_lora(base, adapter, destination, 2.0)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_command_line(tmp_path, base, adapter):
    command, output = ("--initial_model_ckpt", base, "--lora_ckpt"), ("--dump_ckpt", tmp_path / "merged.safetensors")
    failed = run_forked(merge_command, *command, tmp_path / "none", *output)
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path / 'none'} does not exist or is not a file.\n"
    run_forked(merge_command, *command, adapter, *output, "--scaling", "0.5").check_returncode()
    assert_merged(base, adapter, tmp_path / "merged.safetensors", 0.5)


def test_command_uses_the_recorded_scaling_and_the_given_dtype(tmp_path, base, adapter, monkeypatch):
    write_lora_params(adapter, {"scaling": 0.75})
    merged = tmp_path / "merged.safetensors"
    paths = [f"--initial_model_ckpt={base}", f"--lora_ckpt={adapter}", f"--dump_ckpt={merged}"]
    monkeypatch.setattr(sys, "argv", ["merge_lora", *paths, "--dtype=fp32"])
    run_cli(main)
    assert_merged(base, adapter, merged, 0.75, torch.float32)


# mistral-finetune's files


@pytest.mark.parametrize("model, dtype, scaling", GOLDEN_CASES)
def test_merged_weights_equal_mistral_finetunes(tmp_path, model, dtype, scaling):
    base = make_tiny_checkpoint(tmp_path / "base", moe=model == "moe")
    lora = f"{model}_lora_{dtype}_mb1_w1_checkpoint_000020_lora.safetensors"
    expected = f"merge_lora_tiny_{model}_{dtype}_scaling{scaling}_without_embeddings.safetensors"
    # Theirs has the adapter's dtype.
    merge_lora(base, GOLDEN / "train" / "tensors" / lora, tmp_path / "m.safetensors", scaling, getattr(torch, dtype))
    merged = load_file(tmp_path / "m.safetensors")
    for name, tensor in load_file(GOLDEN / "forward" / expected).items():
        # Theirs rounds products, sum and result one after the other, ours the result only.
        tolerance = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(merged.pop(name), tensor, rtol=tolerance, atol=tolerance / 8)
    weights = load_file(base / "consolidated.safetensors")
    assert sorted(merged) == ["output.weight", "tok_embeddings.weight"]
    assert all(tensor.equal(weights[name].to(tensor.dtype)) for name, tensor in merged.items())
