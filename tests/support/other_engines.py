"""Independent implementations on a CPU: what they make of a folder that we wrote."""

import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def transformers_logits(folder: Path, tokens: Sequence[int], adapter: Path | None = None) -> torch.Tensor:
    """transformers in fp32, with a PEFT adapter's folder or without: [T] -> [T, V]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0]


def transformers_answers(
    folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int, eos_id: int
) -> list[list[int]]:
    """transformers' greedy generation in fp32: the new tokens of each prompt, end of sequence included."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": eos_id, "pad_token_id": eos_id}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    return answers


def mistral_inference_logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """mistral-inference in fp32; its attention kernels need CUDA, so PyTorch's take their place: [T] -> [T, V]."""
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
        cache.reset()  # without a cache it would not be causal
        with torch.no_grad():
            return model.forward(torch.tensor(tokens), seqlens=[len(tokens)], cache=cache)
