"""A configuration of another tool leads to one of ours that trains, by doing what its error message says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from finetune.args import load_train_args
from finetune.distributed import World
from finetune.run_dir import saved_checkpoints
from model.errors import UserError
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.run_trajectories import INPUTS

# What only the user knows: these values name something that is not on this machine.
ANSWERS = {"data.instruct_data": "train.jsonl", "wandb.project": ""}

CONFIGS = {
    "trl": """
        model_name_or_path: model
        torch_dtype: float32
        attn_implementation: sdpa
        dataset_name: some-team/clinical-chat
        output_dir: run
        use_peft: true
        lora_r: 4
        lora_alpha: 8
        lora_dropout: 0.05
        lora_target_modules: [q_proj, v_proj, lm_head]
        lora_task_type: CAUSAL_LM
        learning_rate: 2.0e-4
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        max_steps: 3
        num_train_epochs: 1
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 2
        gradient_checkpointing: true
        gradient_checkpointing_kwargs: {use_reentrant: false}
        max_length: 512
        packing: true
        logging_steps: 1
        save_strategy: steps
        save_steps: 0.5
        report_to: none
        push_to_hub: false
        seed: 7
    """,
    "axolotl": """
        base_model: model
        load_in_4bit: true
        adapter: qlora
        lora_r: 4
        lora_alpha: 16
        lora_target_linear: true
        datasets: [{path: train.jsonl, type: chat_template}]
        val_set_size: 0
        output_dir: run
        sequence_len: 512
        sample_packing: true
        pad_to_sequence_len: true
        micro_batch_size: 1
        gradient_accumulation_steps: 1
        num_epochs: 0.5
        optimizer: adamw_torch
        lr_scheduler: cosine
        learning_rate: 0.0002
        train_on_inputs: false
        bf16: false
        gradient_checkpointing: true
        flash_attention: true
        warmup_ratio: 0.1
        saves_per_epoch: 1
        weight_decay: 0.0
        wandb_project:
        special_tokens:
    """,
    "llama_factory": """
        model_name_or_path: model
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_rank: 4
        lora_target: all
        dataset: icd10_train
        template: mistral
        cutoff_len: 512
        overwrite_cache: true
        preprocessing_num_workers: 2
        output_dir: run
        logging_steps: 1
        save_steps: 2
        plot_loss: true
        overwrite_output_dir: true
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 2
        learning_rate: 1.0e-4
        num_train_epochs: 0.5
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: false
        ddp_timeout: 180000000
        resume_from_checkpoint: null
    """,
    "mistral_finetune": """
        data:
          instruct_data: train.jsonl
          data: ""
          eval_instruct_data: train.jsonl
        model_id_or_path: model
        lora: {rank: 4}
        seq_len: 512
        batch_size: 1
        max_steps: 3
        optim: {lr: 6.e-5, weight_decay: 0.1, pct_start: 0.05}
        seed: 0
        log_freq: 1
        eval_freq: 2
        no_eval: False
        ckpt_freq: 2
        ckpt_only_lora: True
        run_dir: run
        wandb: {project: "", run_name: "", key: "", offline: False}
    """,
    "unsloth": """
        model: {model_name: model, max_seq_length: 512, dtype: null, load_in_4bit: true}
        peft:
          r: 4
          target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
          lora_alpha: 16
          lora_dropout: 0
          bias: none
          use_gradient_checkpointing: unsloth
          random_state: 3407
          use_rslora: false
          loftq_config: null
        trainer:
          train_dataset: train.jsonl
          dataset_text_field: text
          dataset_num_proc: 2
          packing: false
          args:
            per_device_train_batch_size: 1
            gradient_accumulation_steps: 2
            warmup_steps: 1
            max_steps: 4
            learning_rate: 2.0e-4
            fp16: false
            logging_steps: 1
            optim: adamw_torch
            weight_decay: 0.01
            lr_scheduler_type: linear
            output_dir: run
            report_to: none
    """,
}


def follow(message: str, text: str) -> dict[str, Any]:
    """Return the settings after each line of the message is followed to the letter."""
    leaves = dict(flat(yaml.safe_load(text)))
    for line in message.splitlines()[1:]:
        key = re.match(r"  - `([\w.]+)` is ", line)
        if key and " is missing" not in line:
            leaves.pop(key[1], None)
        if written := re.search(r"; write (`[^`]+`(?: and `[^`]+`)*)", line):
            for setting in re.findall(r"`([^`]+)`", written[1]):
                leaves |= yaml.safe_load(setting)
        elif named := re.search(r"; use `([^`]+)` instead", line):
            leaves[named[1]] = ANSWERS[named[1]]
    return leaves


def flat(block: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted keys and values."""
    return [
        pair
        for key, value in block.items()
        for pair in (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
        )
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("model"),
        dtype=torch.float32,
        **SMALL | {"n_layers": 1, "dim": 64, "hidden_dim": 128, "n_heads": 4, "head_dim": 16},
    )


@pytest.mark.parametrize("tool", CONFIGS)
def test_following_the_message_gives_a_run(tool: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model)
    rows = (INPUTS / "train_icd.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(rows[:3]), encoding="utf-8")
    config = Path("config.yaml")
    config.write_text(CONFIGS[tool], encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_train_args(config)
    assert "Known keys" not in str(error.value)
    config.write_text(yaml.safe_dump(follow(str(error.value), CONFIGS[tool])), encoding="utf-8")
    args = load_train_args(config)
    assert args.lora.rank == 4 and args.seq_len == 512
    train.run_training(args, World(0, 1, torch.device("cpu")))
    assert saved_checkpoints(Path("run/checkpoints"))
