"""The peer: transformers' Mistral with PEFT's LoRA, in the fastest settings available to its users.

Weights, adapters, batches, optimizer and schedule are the same as for this project, so both have the same losses up to
rounding. With a bf16 base, the adapters are also bf16: PEFT's default of fp32 would cast every input.
"""

import importlib.util
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.args import TrainArgs
from finetune.data.data_loader import Batch
from finetune.mixed_precision import choose_dtype
from finetune.optim import build_optimizer
from finetune.wrapped_model import trainable_parameters
from model.args import ModelArgs
from model.errors import UserError
from model.hf_config import config_from_params
from model.hf_format import hf_name, to_hf
from model.lora import add_lora, initial_lora_tensors
from model.transformer import Transformer

from .trial import Trainee
from .weights import RandomWeights

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100  # label of a position without loss


def build_peft(args: TrainArgs, shapes: ModelArgs, device: torch.device) -> Trainee:
    """Return the training step of a model with random weights.

    Raises:
        UserError: as `peft_model`.
    """
    model, attention, dtype = peft_model(args, shapes, device)
    if args.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = trainable_parameters(model)
    optimizer, schedule = build_optimizer(parameters, args.optim, args.max_steps)
    for group in optimizer.param_groups:  # as in transformers' Trainer
        group["fused"], group["foreach"] = True, False

    def step(batches: list[Batch]) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for batch in batches:
            microbatch_loss = model(**_inputs(batch, args.seq_len, device), use_cache=False).loss / len(batches)
            microbatch_loss.backward()
            loss += microbatch_loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_norm)
        optimizer.step()
        schedule.step()
        return loss

    return Trainee(step, attention, dtype)


def peft_model(args: TrainArgs, shapes: ModelArgs, device: torch.device) -> tuple[nn.Module, str, torch.dtype]:
    """Return a model with random weights and an adapter, its attention, and the dtype of both.

    Raises:
        UserError: transformers or PEFT is not installed, or they do not support a setting.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError('This peer needs transformers and PEFT: run `pip install -e ".[test]"`.') from error
    if shapes.moe:
        raise UserError(
            "transformers with PEFT is not measured with a mixture of experts; compare --impl ours with the preset "
            "cpu-60m."
        )
    dtype = peer_dtype(args, shapes, device)
    attention = _attention(args.attention, device)
    return _build_model(args, shapes, device, dtype, attention), attention, dtype


def peer_dtype(args: TrainArgs, shapes: ModelArgs, device: torch.device) -> torch.dtype:
    """Return the dtype of a peer's products: for `auto` on a CPU fp32, its users' default.

    Raises:
        UserError: a peer does not support the dtype, or `checkpoint`.
    """
    if not isinstance(args.checkpoint, bool):
        raise UserError(f"--checkpoint is {args.checkpoint}; peers support true and false.")
    name = "fp32" if args.param_dtype == "auto" and device.type == "cpu" else args.param_dtype
    dtype = choose_dtype(name, device, shapes)
    if dtype == torch.float16:
        raise UserError("Peers are measured in bf16 or fp32: in fp16 they would train without loss scaling.")
    return dtype


def _attention(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else "sdpa"


def _build_model(
    args: TrainArgs, shapes: ModelArgs, device: torch.device, dtype: torch.dtype, attention: str
) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(**config_from_params(vars(shapes), dtype=str(dtype).removeprefix("torch.")))
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    _fill(model, RandomWeights(shapes, device, dtype), shapes.head_dim)
    lora = LoraConfig(
        r=args.lora.rank,
        lora_alpha=args.lora.scaling * args.lora.rank,
        lora_dropout=args.lora.dropout,
        target_modules=_TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    _fill_adapters(model, args, shapes, dtype)
    return model.train()


@torch.no_grad()
def _fill(model: nn.Module, weights: RandomWeights, head_dim: int) -> None:
    parameters = dict(model.named_parameters())
    for name in weights.shapes:
        parameters[hf_name(name)].copy_(to_hf(name, weights.read(name), head_dim))


@torch.no_grad()
def _fill_adapters(model: nn.Module, args: TrainArgs, shapes: ModelArgs, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        ours = Transformer(shapes)
        add_lora(ours, args.lora)
    parameters = dict(model.named_parameters())
    for name, tensor in initial_lora_tensors(ours, args.seed, dtype):
        layer, part, _ = hf_name(name).rsplit(".", 2)
        parameters[f"base_model.model.{layer}.{part}.default.weight"].copy_(to_hf(name, tensor, shapes.head_dim))


def _inputs(batch: Batch, seq_len: int, device: torch.device) -> dict[str, Any]:
    """Return a batch as [B, seq_len]; positions restart at each document."""
    labels = batch.y if batch.y_mask is None else np.where(batch.y_mask, batch.y, IGNORED)
    positions = np.concatenate([np.arange(size) for size in batch.sizes])
    inputs = {"input_ids": batch.x, "position_ids": positions, "labels": labels, "shift_labels": labels}
    return {name: torch.from_numpy(value).view(-1, seq_len).to(device) for name, value in inputs.items()}
