"""Keys of other tools: each has the lines to write instead."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.args import known_settings, read_train_args
from finetune.translations import TRANSLATIONS, find_translation
from finetune.unknown_keys import replace_unknown
from finetune.yaml_file import as_yaml
from model.errors import Problem, UserError

REQUIRED = {"model_id_or_path": "m", "run_dir": "r", "data": {}}
ENTRIES = [entry for group in TRANSLATIONS.values() for entry in group]


def problems(settings: dict[str, Any]) -> list[str]:
    """Return the lines of the message for these settings, which replace required ones."""
    replaced = {"output_dir": "run_dir", "base_model": "model_id_or_path"}
    required = {key: value for key, value in REQUIRED.items() if key not in {replaced.get(name) for name in settings}}
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump(required | settings), encoding="utf-8")
    try:
        read_train_args(path)
    except UserError as error:
        return [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
    return []


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"num_train_epochs": 3}, "epochs: 3"),
        ({"per_device_train_batch_size": 4}, "batch_size: 4"),
        ({"gradient_accumulation_steps": 8}, "num_microbatches: 8"),
        ({"learning_rate": "2e-4"}, "optim.lr: 2e-4"),
        ({"learning_rate": "2.0e-4"}, "optim.lr: 2.0e-4"),
        ({"args": {"max_steps": 4}}, "max_steps: 4"),
        ({"learning_rate": 2.0e-4}, "optim.lr: 0.0002"),
        ({"weight_decay": 0.01}, "optim.weight_decay: 0.01"),
        ({"max_grad_norm": 0.3}, "max_norm: 0.3"),
        ({"max_grad_norm": 0}, "max_norm: 1e+09"),
        ({"warmup_ratio": 0.03}, "optim.pct_start: 0.03"),
        ({"warmup_steps": 5, "max_steps": 60}, "optim.pct_start: 0.083333"),
        ({"lr_scheduler_type": "cosine"}, "optim.schedule: cosine"),
        ({"optim": "paged_adamw_32bit"}, "optim.name: paged_adamw_32bit"),
        ({"save_steps": 0.1}, "ckpt_freq: 0.1"),
        ({"eval_steps": 50}, "eval_freq: 50"),
        ({"logging_steps": 10}, "log_freq: 10"),
        ({"save_strategy": "epoch"}, "ckpt_freq: epoch"),
        ({"saves_per_epoch": 1}, "ckpt_freq: epoch"),
        ({"evals_per_epoch": 4, "epochs": 2}, "eval_freq: 0.125"),
        ({"save_total_limit": 2}, "num_ckpt_keep: 2"),
        ({"load_best_model_at_end": True}, "keep_best: true"),
        ({"load_in_4bit": True}, "base_dtype: nf4"),
        ({"quantization_bit": 4}, "base_dtype: nf4"),
        ({"bnb": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}}, "base_dtype: nf4-dq"),
        ({"load_in_4bit": True, "use_bnb_nested_quant": True}, "base_dtype: nf4-dq"),
        ({"load_in_8bit": True}, "base_dtype: fp8"),
        ({"adapter": "qlora"}, "base_dtype: nf4"),
        ({"finetuning_type": "full"}, "lora.enable: false"),
        ({"bf16": True}, "param_dtype: bf16"),
        ({"fp16": True}, "param_dtype: fp16"),
        ({"torch_dtype": "bfloat16"}, "param_dtype: bf16"),
        ({"param_dtype": "float16"}, "param_dtype: fp16"),
        ({"lora_r": 64}, "lora.rank: 64"),
        ({"lora": {"r": 64}}, "lora.rank: 64"),
        ({"lora_alpha": 16}, "lora.alpha: 16"),
        ({"lora_dropout": 0.05}, "lora.dropout: 0.05"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lora.targets: [q_proj, lm_head]"),
        ({"lora_target": "all"}, "lora.targets: all-linear"),
        ({"lora_target": "q_proj,v_proj"}, "lora.targets: [q_proj, v_proj]"),
        ({"cutoff_len": 1024}, "seq_len: 1024"),
        ({"max-seq-length": 1024}, "seq_len: 1024"),
        ({"MAX_LENGTH": 1024}, "seq_len: 1024"),
        ({"gradient_checkpointing": True}, "checkpoint: true"),
        ({"use_gradient_checkpointing": "unsloth"}, "checkpoint: true"),
        ({"flash_attn": "fa2"}, "attention: auto"),
        ({"attn_implementation": "sdpa"}, "attention: sdpa"),
        ({"packing": True}, "data.packing: best_fit"),
        ({"datasets": [{"path": "a.jsonl", "type": "chat_template"}]}, "data.instruct_data: a.jsonl"),
        ({"datasets": [{"path": "a.jsonl", "type": "completion"}]}, "data.data: a.jsonl"),
        ({"train_file": "a.jsonl"}, "data.instruct_data: a.jsonl"),
        ({"data": "a.jsonl"}, "data.instruct_data: a.jsonl"),
        ({"validation_file": "b c.jsonl"}, "data.eval_instruct_data: b c.jsonl"),
        ({"output_dir": "out: 1"}, 'run_dir: "out: 1"'),
        ({"base_model": "models/7B"}, "model_id_or_path: models/7B"),
        ({"resume_from_checkpoint": True}, "resume: auto"),
        ({"resume": True}, "resume: auto"),
        ({"seed_": 1, "random_state": 3407}, "seed: 3407"),
        ({"save_steps": 1.0}, "ckpt_freq: 1"),
        ({"eval_steps": 0.25}, "eval_freq: 0.25"),
        ({"torch_compile": True}, "compile: true"),
        ({"wandb_project": "codes"}, "wandb.project: codes"),
        ({"training_arguments": {"run_name": "a"}}, "wandb.run_name: a"),
    ],
)
def test_the_line_to_write_instead_is_given(theirs: dict[str, Any], ours: str):
    found = [problem for problem in problems(theirs) if f"write `{ours}`" in problem]
    assert len(found) == 1, problems(theirs)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({"push_to_hub": True}, "training neither downloads nor uploads"),
        ({"deepspeed": "ds_z3.json"}, "torchrun starts the processes and FSDP shards the model"),
        ({"fsdp": ["full_shard"]}, "torchrun starts the processes"),
        ({"val_set_size": 0.05}, "split the data before, with `python -m utils.import_data --split 0.9,0.1`"),
        ({"report_to": "none"}, "TensorBoard events are always written"),
        ({"max_steps": -1}, "a run without `max_steps` is as long as `epochs`"),
        ({"num_train_epochs": 1, "max_steps": 60}, "`max_steps` sets the length of the run"),
        ({"use_dora": True}, "LoRA has no variants here"),
        ({"load_in_4bit": False}, "there is none by default"),
        ({"epochs": 2, "num_epochs": 3}, "`epochs` is given, too"),
        ({"load_in_4bit": True, "adapter": "qlora"}, "`adapter` sets `base_dtype`, too"),
        ({"wandb_project": None}, "it is empty"),
        ({"early_stopping_patience": None}, "it is empty"),
        ({"use_rslora": False}, "`lora.alpha` is divided by the rank by default"),
        ({"bf16": False}, "`param_dtype: auto` chooses what the device computes fast"),
        ({"wandb_api_key": "0123456789secret"}, "the key belongs to `wandb.key`, or in the variable WANDB_API_KEY"),
    ],
)
def test_a_key_without_equivalent_is_removed_for_a_reason(theirs: dict[str, Any], reason: str):
    [problem] = [line for line in problems(theirs) if "remove it: " in line]
    assert reason in problem and problem.split("`")[1] in theirs
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("theirs", "key"),
    [
        ({"datasets": [{"path": "hub/name"}]}, "data.instruct_data"),
        ({"dataset_name": 3}, "data.instruct_data"),
        ({"warmup_steps": 10}, "optim.pct_start"),
        ({"evals_per_epoch": 4}, "eval_freq"),
        ({"report_to": "wandb"}, "wandb.project"),
        ({"load_in_4bit": "perhaps"}, "base_dtype"),
        ({"output_dir": "x" * 400}, "run_dir"),
        ({"evals_per_epoch": 10**400, "epochs": 1.5}, "eval_freq"),
    ],
)
def test_the_key_is_named_if_the_value_has_no_equivalent(theirs: dict[str, Any], key: str):
    assert any(f"use `{key}` instead (" in line for line in problems(theirs))


def test_every_key_is_in_the_table_once_and_every_translation_is_a_setting():
    names = [name for entry in ENTRIES for name in entry.names]
    assert len(names) == len(set(names)) > 300
    assert all(name == name.lower() for name in names)
    assert {key for entry in ENTRIES for key in entry.ours} <= known_settings().keys()
    assert all(entry.ours or entry.remark for entry in ENTRIES)


VALUES = [True, False, None, 0, 1, -1, 4, 8, 0.1, 10**400, float("nan"), "", "auto", "steps", "epoch", "none", "wandb"]
VALUES += [[], ["q_proj"], [{}], [None], {}, {"path": 1}, "cosine", "lora", "x.jsonl", [{"path": "x.jsonl"}]]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20])
def test_any_value_is_translated_or_explained(value: Any):
    """Following a suggestion never leads to another tool's key, and only our keys are suggested."""
    for name in (name for entry in ENTRIES for name in entry.names):
        found: list[Problem] = []
        kept, _ = replace_unknown([(tuple(name.split(".")), value)], known_settings(), found)
        assert all(".".join(path) in known_settings() for path, _ in kept)
        for _, problem in found:
            lines = re.findall(r"(?<=write )`[^`]+`(?: and `[^`]+`)*", problem)
            for line in re.findall(r"`([\w.]+): ", " ".join(lines)):
                assert line in known_settings(), problem
            assert "did you mean" not in problem


def test_a_key_of_ours_is_never_taken_for_another_tools_by_its_last_part():
    for key in known_settings():
        assert find_translation(key.split("."), exact=True) is None or key in {
            *(
                "optim",
                "lora",
                "data",
                "resume",
                "max_steps",
                "param_dtype",
                "attention",
                "optim.name",
                "optim.schedule",
            )
        }


@pytest.mark.parametrize(
    "value",
    ["a", "a b", "2e-4", "010", "true", "null", "~/a", "$A/{b}", "a: b", "a #b", "- a", "é", "", " a", "a,b:2"]
    + [1, 1.5, True, None, [1, "a, b"], {"a": ["b"], "c": None}, "[a]", "{a}", "*a", "a\nb", '"'],
)
def test_values_are_written_as_yaml_reads_them(value: Any):
    assert yaml.safe_load(f"key: {as_yaml(value)}") == {"key": value}
    assert "\n" not in as_yaml(value)
