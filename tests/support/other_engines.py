"""Independent implementations on the CPU, applied to folders that this project wrote."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def transformers_logits(folder: Path, tokens: Sequence[int], adapter: Path | None = None) -> torch.Tensor:
    """Return the logits of transformers in fp32, optionally with the folder of a PEFT adapter: [T] -> [T, V]."""
    with torch.no_grad():
        return _load(folder, adapter)(torch.tensor([tokens])).logits[0]


def transformers_answers(
    folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int, eos_id: int, adapter: Path | None = None
) -> list[list[int]]:
    """Return the new tokens of greedy generation with transformers in fp32, including the end-of-sequence token."""
    model = _load(folder, adapter)
    settings = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": eos_id, "pad_token_id": eos_id}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    return answers


def _load(folder: Path, adapter: Path | None) -> Any:
    """Return a model of transformers in fp32, optionally with a PEFT adapter."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def mistral_inference_logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Return logits of mistral-inference in fp32, with PyTorch's attention since its own needs CUDA: [T] -> [T, V]."""
    import mistral_inference.transformer
    import mistral_inference.transformer_layers
    from mistral_inference.cache import BufferCache

    def attention(q, k, v, attn_bias):
        mask = attn_bias.materialize((1, q.shape[2], q.shape[1], k.shape[1]), dtype=torch.float32)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).contiguous()

    with mock.patch.object(mistral_inference.transformer_layers, "memory_efficient_attention", attention):
        model = mistral_inference.transformer.Transformer.from_folder(
            folder, max_batch_size=1, device="cpu", dtype=torch.float32
        )
        args = model.args
        cache = BufferCache(args.n_layers, 1, len(tokens), args.n_kv_heads, args.head_dim, args.sliding_window)
        cache.to(model.device, model.dtype)
        cache.reset()  # without a cache, its attention is not causal
        with torch.no_grad():
            return model.forward(torch.tensor(tokens), seqlens=[len(tokens)], cache=cache)
