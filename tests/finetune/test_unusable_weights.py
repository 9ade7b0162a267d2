"""Weights that are NaN, infinite or corrupt are refused wherever they are used; a run that trains nothing fails."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune.checkpointing import ADAPTER_NAME
from finetune.inference import load_trained
from finetune.run_dir import saved_checkpoints
from model.errors import UserError
from model.weights import open_safetensors
from tests.end_to_end.test_training import build, run_here, small_config, weights_folder
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from utils.models.exports import export
from utils.models.merging import merge_lora

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    shapes = SMALL | {"n_kv_heads": 2, "hidden_dim": 32}  # fp8 stores multiples of 16
    return make_tiny_checkpoint(tmp_path_factory.mktemp("dense"), dtype=torch.float32, **shapes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dense) -> Path:
    """A folder with the runs `adapter` and `merged`, of one step each."""
    folder = tmp_path_factory.mktemp("runs")
    run_here(small_config(folder, dense, "adapter", max_steps=1))
    run_here(small_config(folder, dense, "merged", max_steps=1, save_adapters=False))
    return folder


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs", symlinks=True))


def change(file: Path, name: str, value: float, index: int = -1) -> None:
    """Set one element of a tensor."""
    tensors = load_file(file)
    tensors[name].view(-1)[index] = value
    save_file(tensors, file)


def flip_bit(file: Path, offset: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


# --- Values that are not finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("index", [0, -1])
def test_a_tensor_with_one_value_that_is_not_finite_is_refused(tmp_path, dtype, value, index):
    file = tmp_path / "a.safetensors"
    largest = torch.finfo(dtype).max
    save_file({"a": torch.full((5, 7), largest, dtype=dtype), "b": torch.zeros(0, 3), "c": torch.ones(3).int()}, file)
    weights = open_safetensors(file)
    assert all(weights.read_finite(name).equal(weights.read(name)) for name in weights.shapes)
    change(file, "a", value, index)
    with pytest.raises(UserError, match=r"a.safetensors: `a` contains NaN or infinite values"):
        weights.read_finite("a")
    other_row = slice(0, 4) if index == -1 else slice(1, 5)  # read by another rank
    assert weights.read_finite("a", other_row).shape == (4, 7)


@pytest.mark.parametrize("settings", [{}, {"base_dtype": "fp8"}, {"lora": {"enable": False}, "save_adapters": False}])
def test_a_base_that_is_not_finite_is_refused(tmp_path, dense, settings):
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    change(model / "consolidated.safetensors", "layers.1.feed_forward.w2.weight", NAN)
    config = small_config(tmp_path, model, **settings)
    with pytest.raises(UserError, match=r"consolidated.safetensors: `layers.1.feed_forward.w2.weight` contains NaN"):
        run_here(config)
    assert not config.with_suffix("").exists()


def test_a_hugging_face_base_is_named_by_its_own_names(tmp_path, dense):
    export(dense, "hf", tmp_path / "hf")
    change(tmp_path / "hf" / "model.safetensors", "model.layers.0.self_attn.k_proj.weight", INF)
    with pytest.raises(UserError, match=r"model.safetensors: `model.layers.0.self_attn.k_proj.weight` contains NaN or"):
        build(small_config(tmp_path, tmp_path / "hf"))


def test_an_adapter_that_is_not_finite_is_refused(copied, tmp_path, dense):
    weights = weights_folder(copied / "adapter", 1)
    name = "layers.0.attention.wq.lora_B.weight"
    change(weights / ADAPTER_NAME, name, INF)
    (weights.parent / "manifest.json").unlink()  # as if training itself had written it
    for use in (
        lambda: run_here(small_config(tmp_path, dense, lora={"rank": 4, "from_adapter": str(weights)})),
        lambda: load_trained(copied / "adapter"),
        lambda: merge_lora(dense, weights, tmp_path / "merged"),
        lambda: export(weights, "hf", tmp_path / "hf", merged=True, base=dense),
    ):
        with pytest.raises(UserError, match=rf"{ADAPTER_NAME}: `{name}` contains NaN or infinite"):
            use()
    assert not (tmp_path / "merged").exists() and not (tmp_path / "hf").exists()


# --- Files that changed since they were written


def uses(runs: Path, out: Path, base: Path) -> dict[str, Callable[[], object]]:
    adapter, merged = weights_folder(runs / "adapter", 1), weights_folder(runs / "merged", 1)
    return {
        "predict": lambda: load_trained(runs / "adapter"),
        "predict, merged": lambda: load_trained(runs / "merged"),
        "peft": lambda: export(runs / "adapter", "peft", out / "peft"),
        "hf": lambda: export(adapter.parent, "hf", out / "hf", merged=True),
        "mistral": lambda: export(runs / "merged", "mistral", out / "mistral"),
        "merge": lambda: merge_lora(base, adapter / ADAPTER_NAME, out / "m.safetensors"),
        "from adapter": lambda: run_here(small_config(out, base, "a", lora={"rank": 4, "from_adapter": str(adapter)})),
        "from last": lambda: run_here(
            small_config(out, base, "b", lora={"rank": 4, "from_adapter": f"{runs}/adapter/checkpoints/last"})
        ),
        "base": lambda: run_here(small_config(out, merged, "c")),
    }


NAMES = ("predict", "predict, merged", "peft", "hf", "mistral", "merge", "from adapter", "from last", "base")


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_of_a_checkpoint_is_noticed_when_it_is_used(copied, tmp_path, dense, name):
    is_merged = name in ("predict, merged", "mistral", "base")
    checkpoint = weights_folder(copied / ("merged" if is_merged else "adapter"), 1).parent
    file = checkpoint / "consolidated" / ("consolidated.safetensors" if is_merged else ADAPTER_NAME)
    flip_bit(file)
    use = uses(copied, tmp_path, dense)[name]
    with pytest.raises(UserError) as error:
        use()
    assert f"{checkpoint.parent}" in str(error.value) and f"consolidated/{file.name} has changed" in str(error.value)
    flip_bit(file)
    flip_bit(checkpoint / "state" / "rank_00000.json", 0)  # not used
    use()


def test_other_folders_have_no_manifest_to_compare_with(copied, tmp_path, dense):
    weights = Path(shutil.copytree(weights_folder(copied / "adapter", 1), tmp_path / "consolidated"))
    flip_bit(weights / ADAPTER_NAME)
    merge_lora(dense, weights, tmp_path / "merged")


# --- Runs that train nothing


@pytest.fixture
def overflowing(tmp_path, dense) -> Path:
    """Finite weights, whose activations overflow."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    tensors = load_file(model / "consolidated.safetensors")
    tensors["norm.weight"].fill_(3e38)
    save_file(tensors, model / "consolidated.safetensors")
    return model


@pytest.mark.parametrize("max_steps", [1, 3])
def test_a_run_whose_steps_were_all_skipped_fails(tmp_path, overflowing, max_steps):
    config = small_config(tmp_path, overflowing, max_steps=max_steps, ckpt_freq=1)
    with pytest.raises(UserError) as error:
        run_here(config)
    message = str(error.value)
    assert f"the gradient was not finite in any of the {max_steps} steps, so nothing was trained" in message
    assert "no checkpoint has been saved yet" in message
    run = config.with_suffix("")
    assert saved_checkpoints(run / "checkpoints") == []
    assert len(list((run / "anomalies").iterdir())) == max_steps


def test_skipped_steps_before_a_limit_leave_no_checkpoint(tmp_path, overflowing):
    config = small_config(tmp_path, overflowing, max_steps=9, ckpt_freq=1, guards={"max_skipped_steps": 2})
    with pytest.raises(UserError, match=r"not finite in 2 steps in a row .*no checkpoint has been saved"):
        run_here(config)
    assert saved_checkpoints(config.with_suffix("") / "checkpoints") == []


def test_a_finished_run_may_be_started_again(copied):
    config = copied / "adapter.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump(settings | {"run_dir": str(copied / "adapter"), "resume": "auto"}))
    assert run_here(config) == copied / "adapter"
