"""utils.plan: what a run will need, from its YAML and a model's name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.memory_estimate import CHECKPOINTS
from model.args import BASE_DTYPES
from tests.support.checkpoints import make_tiny_checkpoint
from utils import plan
from utils.models.known_models import KNOWN_MODELS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "data": {"instruct_data": "not/there.jsonl"},
    "model_id_or_path": "not/there",
    "run_dir": "not/there",
    "seq_len": 4096,
    "num_microbatches": 2,
    "max_steps": 100,
}


@pytest.fixture
def config(tmp_path):
    def write(**changes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | changes), encoding="utf-8")
        return path

    return write


@pytest.fixture
def planned(run_command):
    def run(*arguments: object) -> dict:
        code, said = run_command(plan, "--json", *arguments)
        assert code == 0, said
        return json.loads(said)

    return run


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_model_can_be_planned(name, config, planned):
    found = planned("--train_yaml", config(), "--model", name, "--gpu", "h100", "--gpus", 8)
    assert found["model"] == name
    assert len(found["memory"]) == len(BASE_DTYPES) * len(CHECKPOINTS)
    assert 0 < found["trained"] < 0.03 * found["parameters"]
    assert found["expected"]["hours"] > 0


def test_parts_add_up_and_each_mode_needs_less_memory(config, planned):
    found = planned("--train_yaml", config(), "--model", "mistral-7b")
    parts = ("frozen", "trained", "gradients", "moments", "unsharded", "activations", "transient", "overhead")
    for row in found["memory"]:
        assert row["total"] == pytest.approx(sum(row[part] for part in parts), abs=len(parts))
        assert row["fits"] == (row["total"] <= found["usable_bytes"]) == (row["largest_seq_len"] >= 4096)
    totals = [row["total"] for row in found["memory"]]
    assert totals[:3] == sorted(totals[:3], reverse=True)
    assert found["memory"][0]["frozen"] == 7_248_023_552 * 2
    assert found["memory"][0]["moments"] == 41_943_040 * 8  # rank 16 on all seven layers
    assert found["trained"] == 41_943_040 and found["parameters"] == 7_248_023_552 + 41_943_040


def test_gpus_share_weights(config, planned):
    one, eight = (planned("--train_yaml", config(), "--model", "nemo-12b", "--gpus", gpus) for gpus in (1, 8))
    assert eight["memory"][0]["frozen"] == pytest.approx(one["memory"][0]["frozen"] / 8, rel=0.001)


def test_auto_checkpoint_is_the_fastest_that_fits(config, planned):
    modes = {}
    for gb in (20, 24, 80):
        options = ("--train_yaml", config(checkpoint="auto"), "--model", "mistral-7b", "--gpu_gb", gb)
        modes[gb] = planned(*options)["checkpoint"]
    assert modes == {20: True, 24: "selective", 80: False}


def test_hours_follow_from_the_given_speed(config, planned):
    options = ("--train_yaml", config(), "--model", "mistral-7b", "--gpus", 4)
    run = planned(*options, "--tokens_per_second", 1000)["expected"]
    assert run["tokens"] == 100 * 2 * 4096 * 4
    assert run["hours"] == pytest.approx(run["tokens"] / 1000 / 3600) and run["basis"] == "as given"


def test_flops_of_a_token_follow_from_its_weights(config, planned):
    """Four per weight without recomputation and six with it, apart from attention and the head."""
    options = ("--model", "mistral-7b", "--gpu", "h100", "--trained_share", 0.1)
    flops = {}
    for mode in CHECKPOINTS:
        path = config(checkpoint=mode, seq_len=64)
        flops[mode] = planned("--train_yaml", path, *options)["expected"]["flops_per_token"]
    weights = 7_248_023_552 - 2 * 32768 * 4096
    assert flops[False] == pytest.approx(4 * weights, rel=0.01)
    assert flops[True] == pytest.approx(6 * weights, rel=0.01)
    assert flops[False] < flops["selective"] < flops[True]


def test_a_model_folder_in_the_yaml_is_enough(tmp_path, config, planned):
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    found = planned("--train_yaml", config(model_id_or_path=str(folder)))
    assert found["model"] == str(folder) and found["parameters"] < 10_000_000


def test_full_fine_tuning_with_epochs(config, planned):
    path = config(lora={"enable": False}, epochs=2.0)
    path.write_text(path.read_text().replace("max_steps: 100\n", ""))
    found = planned("--train_yaml", path, "--model", "mistral-7b", "--gpu", "h200", "--gpus", 8)
    assert found["trained"] == found["parameters"] and found["rough"]
    assert {row["base_dtype"] for row in found["memory"]} == {"same"}
    assert found["expected"]["tokens"] is None and found["expected"]["hours"] is None


def test_printed_plan(config, run_command):
    path = config(checkpoint="selective")
    code, said = run_command(plan, path, "--model", "Mistral-7B", "--gpu", "NVIDIA H100 80GB HBM3", "--gpus", 2)
    assert code == 0
    assert "Model: mistral-7b, 7,289,966,592 parameters, 41,943,040 of them trained (0.58%)" in said
    own = [line for line in said.splitlines() if line.startswith("* same")]
    assert len(own) == 1 and own[0].split()[2] == "selective" and own[0].split()[-2] == "yes"
    assert "estimated, not measured: 40% of the H100's 16-bit peak of 989 TFLOP/s" in said
    assert re.search(r"Your settings \(\*\) need [\d.]+ of 71.2 usable GiB: they fit\.", said)
    assert max(map(len, said.splitlines())) <= 120


def test_columns_of_the_printed_plan_add_up(config, run_command):
    _, said = run_command(plan, config(), "--model", "mistral-7b", "--gpus", 8)
    rows = [line[2:].split() for line in said.splitlines() if re.match(r"[* ] (same|nf4|fp8)", line)]
    assert len(rows) == len(BASE_DTYPES) * len(CHECKPOINTS)
    for _, _, *parts, total, _, _ in rows:
        assert sum(map(float, parts)) == pytest.approx(float(total), abs=0.03)


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        (16, "With seq_len 4,096 these fit: base_dtype nf4, checkpoint selective; base_dtype nf4, checkpoint true;"),
        (6, "Nothing fits with seq_len 4,096. The longest that does is 1,"),
        (2, "Nothing fits, whatever the seq_len: use more GPUs"),
    ],
)
def test_settings_that_do_not_fit_get_advice(gib, advice, config, run_command):
    code, said = run_command(plan, config(), "--model", "mistral-7b", "--gpu_gb", gib)
    assert code == 0 and "they do not fit." in said and advice in said, said


@pytest.mark.parametrize(
    ("options", "basis"),
    [
        ((), "40% of the A100 80 GB's 16-bit peak of 312 TFLOP/s, the slowest listed GPU with about as much memory"),
        (
            ("--gpu_gb", 24),
            "40% of the RTX 3090's 16-bit peak of 71 TFLOP/s, the slowest listed GPU with about as much",
        ),
        (("--gpu", "MI300X", "--gpu_gb", 192), "the B200's 16-bit peak of 2250 TFLOP/s, the slowest listed GPU"),
        (("--gpu", "t4", "--model", "tiny"), "40% of the T4's 16-bit peak of 65 TFLOP/s)"),
    ],
)
def test_speed_is_never_unknown(options, basis, config, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny_checkpoint(tmp_path / "tiny")
    code, said = run_command(plan, config(), "--model", "mistral-7b", *options)
    assert code == 0 and basis in said and "unknown" not in said
    assert re.search(r"Speed: [\d,]+ tokens/s on all GPUs \(estimated, not measured", said)
    assert re.search(r"Time: [\d.]+ hours", said)


def test_with_epochs_the_time_is_given_per_million_tokens(config, run_command):
    path = config(epochs=2.0)
    path.write_text(path.read_text().replace("max_steps: 100\n", ""))
    code, said = run_command(plan, path, "--model", "mistral-7b", "--tokens_per_second", 10_000)
    assert code == 0 and "Time: 1.7 minutes per million tokens" in said


def test_config_is_given_once(config, run_command):
    for arguments in ((), (config(), "--train_yaml", config())):
        code, said = run_command(plan, *arguments)
        assert code == 2 and "give one training YAML: CONFIG.yaml or --train_yaml CONFIG.yaml" in said


def test_help_does_not_load_torch():
    program = "import sys, utils.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, (), "`model_id_or_path`: the folder 'not/there' does not exist. Give --model"),
        ({}, ("--model", "mistral-8b"), "--model: the folder 'mistral-8b' does not exist"),
        ({}, ("--model", "mistral-7b", "--gpu", "rtx9"), "--gpu: 'rtx9' is not in the table of GPUs: v100-16, "),
        ({}, ("--model", "mistral-7b", "--gpu", "rtx9"), "For another GPU give its memory with --gpu_gb"),
        ({}, ("--model", "mistral-7b", "--gpus", "0"), "--gpus is 0; it must be positive"),
        ({}, ("--model", "mistral-7b", "--gpu_gb", "nan"), "--gpu_gb is nan; it must be positive"),
        ({}, ("--model", "mistral-7b", "--mfu", "45"), "--mfu is 45.0; it is a share"),
        ({"seq_len": 0}, ("--model", "mistral-7b"), "`seq_len` is 0; expected a whole number of at least 1"),
        ({"lora": {"targets": ["gate"]}}, ("--model", "mistral-7b"), "`lora.targets` names gate"),
        ({"lora": {"rnak": 3}}, ("--model", "mistral-7b"), "did you mean `lora.rank`?"),
        ({"checkpoint": "most"}, ("--model", "mistral-7b"), "`checkpoint` is 'most'"),
    ],
)
def test_mistakes_are_reported_in_one_message(changes, options, message, config, run_command):
    code, said = run_command(plan, "--train_yaml", config(**changes), *options)
    assert code == 1 and message in said and said.count("error: ") == 1 and "Traceback" not in said
