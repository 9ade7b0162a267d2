"""A model that does not fit in memory is refused before its weights are read; what may fit is tried."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

import train
from finetune import hardware, preflight, wrapped_model
from finetune.args import load_train_args
from finetune.hardware import Hardware, free_bytes
from finetune.inference import load_trained
from finetune.memory_estimate import MemoryConfig
from model.args import LoraArgs, ModelArgs, load_model_args
from model.errors import UserError
from model.transformer import Transformer
from tests.end_to_end.kill_runs import kill_test_config

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SEVEN_B = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
GIB = 1 << 30


def write_sparse_model(folder: Path) -> Path:
    """Write a model of 7.25 B parameters in bf16 whose file is one hole: 14.5 GB that take no space."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(SEVEN_B | {"norm_eps": 1e-5, "vocab_size": 32768}))
    with torch.device("meta"):
        model = Transformer(load_model_args(folder))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "consolidated.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("sparse") / "7B")


def limit(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda device, processes, swap=False: gib * GIB / processes)


def refuse_to_load(monkeypatch) -> None:
    monkeypatch.setattr(wrapped_model, "_load", lambda *_: pytest.fail("weights were read"))


def test_training_lists_the_settings_that_fit(seven_b, tmp_path, monkeypatch):
    limit(monkeypatch, 20)
    refuse_to_load(monkeypatch)
    config = kill_test_config(tmp_path, "run", model_id_or_path=str(seven_b), param_dtype="fp32", checkpoint=True)
    with pytest.raises(
        UserError, match=r"alone take 27\.\d GiB .* has 20\.0 GiB free\. With `seq_len: 512` these fit:"
    ) as info:
        train.train(str(config))
    assert "`param_dtype: fp32`, `base_dtype: nf4`, `checkpoint: true`" in str(info.value)
    assert not config.with_suffix("").exists()
    limit(monkeypatch, 2)
    with pytest.raises(UserError, match="a smaller model: no other setting is enough"):
        train.train(str(config))


def test_prediction_and_chat_are_refused(seven_b, monkeypatch):
    limit(monkeypatch, 8)
    refuse_to_load(monkeypatch)
    with pytest.raises(
        UserError, match=r"7B take 27\.0 GiB in fp32, but each process .* has 8\.0 GiB free\. Use a mach"
    ):
        load_trained(seven_b)


def test_what_an_estimate_alone_forbids_is_tried(tmp_path, monkeypatch, caplog):
    """Only weights, gradients and optimizer are certain: below them a run ends, above them it is warned."""
    args = load_train_args(kill_test_config(tmp_path, "run"))
    here = Hardware(CPU, torch.float32, "sdpa")
    config = MemoryConfig.of(args, load_model_args(Path(args.model_id_or_path)), torch.float32, "cpu", "sdpa", 1)
    memory = config.memory()
    for free, expected in ((memory.total, None), (memory.permanent, "The run may need")):
        limit(monkeypatch, free / GIB)
        found = preflight.check_memory(here, config, 1)
        assert found is None if expected is None else found.startswith(expected)
    with pytest.raises(UserError, match="alone take"):
        preflight.check_memory(here, config, 2)  # two processes share it
    limit(monkeypatch, memory.permanent / GIB)
    with caplog.at_level(logging.WARNING):
        train.train(str(kill_test_config(tmp_path, "tried", max_steps=1)))
    assert "The run may need" in caplog.text


def test_a_gpu_too_full_for_the_weights_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 32 * GIB))
    config = MemoryConfig(ModelArgs(**SEVEN_B, norm_eps=1e-5, vocab_size=32768), LoraArgs(), 512, dtype=torch.float16)
    with pytest.raises(UserError, match=r"cuda:0 \(V100\) has 1\.0 GiB free\. Is another process using it"):
        preflight.check_memory(Hardware(torch.device("cuda", 0), torch.float16, "sdpa"), config, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups(version, tmp_path, monkeypatch):
    """The lowest limit from this process's group up to the root counts; file cache is free, since it can be dropped."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for folder, most in ((root / "job", "5000"), (root / "job/step", "9000")):
        folder.mkdir(parents=True)
        for name, text in zip(
            (*names, "memory.stat"), (most, "3000", "active_file 300\ninactive_file 200\n"), strict=True
        ):
            (folder / name).write_text(text)
    own = tmp_path / "own"
    own.write_text("5:cpu,memory:/job/step\n1:cpu:/\n" if version == 1 else "0::/job/step\n")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", own)
    assert free_bytes(CPU, 2) == (5000 - 3000 + 500) / 2
    (root / "job" / names[0]).write_text("max\n")
    assert free_bytes(CPU, 1) == 9000 - 3000 + 500
    own.write_text("0::/of/the/host\n")
    assert hardware._container_free_bytes() == math.inf


def test_loading_is_logged_without_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr(wrapped_model, "_LOG_EVERY_S", 0.0)
    tensors = [("a", torch.zeros(1)), ("b", torch.zeros(1))]
    for shown in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert list(wrapped_model._with_progress(iter(tensors), {"a": 10**9, "b": 3 * 10**9}, shown)) == tensors
        lines = ["Loading weights: 25 %, 1.0 of 4.0 GB", "Loading weights: 100 %, 4.0 of 4.0 GB"]
        assert [record.message for record in caplog.records] == (lines if shown else [])
