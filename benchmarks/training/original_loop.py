"""mistral-finetune's parts in a training loop, in a process that has its packages `model` and `finetune`, not ours.

`python original_loop.py CHECKOUT FOLDER` reads what `original.write_inputs` wrote and prints a line of JSON.
What is its own and what is replaced: see `original`.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def main() -> None:
    checkout, folder = map(Path, sys.argv[1:])
    sys.path[:1] = [str(checkout), str(Path(__file__).parents[2])]  # its packages come before ours
    from benchmarks.measure import peak_rss

    import_bytes = peak_rss()
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    model = build_model(folder, settings)
    assert Path(sys.modules["model"].__file__ or "").is_relative_to(checkout)
    found = train(model, read_batches(folder / "batches.npz", settings), settings)
    memory = {"peak_bytes": peak_rss(), "import_bytes": import_bytes}
    if settings["device"] == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        memory = {"host_peak_bytes": peak_rss(), "reserved_bytes": reserved}
        memory["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found | {"memory": memory}))


def build_model(folder: Path, settings: dict[str, Any]) -> torch.nn.Module:
    """Return its model as its `load_model` makes it, without FSDP."""
    from mistral_common.tokens.tokenizers import instruct, sentencepiece

    sentencepiece.InstructTokenizerBase = instruct.InstructTokenizerBase  # where it was when its code was written
    from finetune.wrapped_model import initialize_lora_parameters, load_args, load_state_dict
    from model import transformer
    from model.args import LoraArgs

    if settings["device"] == "cpu":
        transformer.BlockDiagonalCausalMask = SimpleNamespace(from_seqlens=list)
        transformer.memory_efficient_attention = attention_by_document
    dtype = getattr(torch, settings["dtype"])
    with torch.device("meta"):
        args = load_args(folder, LoraArgs(**settings["lora"]))
        model = transformer.Transformer(args=args, checkpoint=settings["checkpoint"])
    model.load_state_dict(load_state_dict(folder, dtype=dtype), assign=True)
    torch.manual_seed(settings["seed"])
    initialize_lora_parameters(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name
    return model.to(settings["device"]).train()


def attention_by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return causal attention within documents: all tensors are [1, T, heads, head_dim]; the sizes add up to T."""
    documents = zip(*(tensor.transpose(1, 2).split(sizes, dim=2) for tensor in (q, k, v)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*document, is_causal=True).transpose(1, 2) for document in documents], dim=1)


def read_batches(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    with np.load(path) as arrays:
        return [
            {key: arrays[name] for key in ("x", "y", "y_mask", "sizes") if (name := f"{key}{number}") in arrays}
            for number in range(settings["steps"] * settings["num_microbatches"])
        ]


def train(model: torch.nn.Module, batches: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Train as its `train.py` does, and return times, losses and the attention in use."""
    from benchmarks.measure import seconds_since_start
    from finetune.mixed_precision import prepare_mixed_precision

    dtype, optim = getattr(torch, settings["dtype"]), settings["optim"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=optim["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optim["lr"], total_steps=settings["steps"], pct_start=optim["pct_start"]
    )
    prepare_mixed_precision(model.parameters(), param_dtype=dtype, optim_dtype=torch.float32)
    losses, count = [], settings["num_microbatches"]
    for step in range(settings["steps"]):
        if step == settings["warmup"]:
            start = time.perf_counter()
        # Reading the loss, as its loop does at every step, also waits for a GPU.
        losses.append(train_step(model, batches[step * count : (step + 1) * count], optimizer, dtype, settings))
        schedule.step()
        if step == 0:
            first = seconds_since_start()
    seconds = time.perf_counter() - start
    attention = "xformers" if settings["device"] == "cuda" else "sdpa"
    return {"seconds": seconds, "first_step_seconds": first, "losses": losses, "attention": attention}


def train_step(
    model: torch.nn.Module,
    batches: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> float:
    from finetune.loss import compute_loss_with_mask
    from finetune.mixed_precision import downcast_mixed_precision, upcast_mixed_precision

    optimizer.zero_grad()
    loss = torch.zeros((), device=settings["device"])
    for batch in batches:
        tensors = {key: torch.from_numpy(batch[key]).to(settings["device"]) for key in batch if key != "sizes"}
        output = model(input_ids=tensors["x"], seqlens=batch["sizes"].tolist())
        microbatch_loss = compute_loss_with_mask(output, tensors["y"], tensors.get("y_mask"))
        microbatch_loss.backward()
        loss += microbatch_loss.detach() / len(batches)
    for parameter in model.parameters() if len(batches) > 1 else ():
        if parameter.requires_grad:
            parameter.grad.div_(len(batches))
    upcast_mixed_precision(model.parameters(), optim_dtype=torch.float32)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_norm"])
    optimizer.step()
    downcast_mixed_precision(model.parameters(), param_dtype=dtype)
    return loss.item()


if __name__ == "__main__":
    main()
