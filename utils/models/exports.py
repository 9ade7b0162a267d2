"""Export checkpoints to the formats of other tools: PEFT adapters, and models in Hugging Face's or Mistral's layout."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.manifest import require_intact
from finetune.mixed_precision import DTYPES
from finetune.preflight import check_tensor_memory
from finetune.run_dir import find_weights
from finetune.wrapped_model import ADAPTER_NAME
from model.args import PARAMS_NAME, load_model_args, read_params
from model.atomic import new_folder, require_new_folder
from model.errors import UserError
from model.hf_config import CONFIG_NAME, config_from_params, generation_config
from model.hf_format import HF_STEM, hf_name, open_model_weights, to_hf, write_hf_weights
from model.peft_format import ADAPTER_CONFIG_NAME, PEFT_PREFIX, peft_folder, read_peft_config
from model.weights import SafetensorsWriter, TensorSource, open_safetensors
from utils.models.gguf_format import GGUF_TYPES, GgufLayout, write_gguf
from utils.models.hf_tokenizer import write_hf_tokenizer
from utils.models.merging import open_merged, recorded_scaling
from utils.models.model_card import model_card
from utils.models.model_folder import (
    README_NAME,
    announce,
    announce_size,
    copy_tokenizer,
    find_tokenizer,
    write_model_folder,
)
from utils.models.rounding import RoundedWeights

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def export(
    source: Path,
    to: str,
    out: Path,
    merged: bool = False,
    base: Path | None = None,
    step: int | str | None = None,
    dtype: str | None = None,
    scores: Path | None = None,
) -> None:
    """Write the folder `out` atomically.

    Args:
        source: folder of a run, a checkpoint, a PEFT adapter or a model.
        to: "peft", "hf", "mistral" or "gguf".
        out: folder to create.
        merged: merge the adapter into its base; a checkpoint of all weights needs no merging.
        base: folder of the base model, or for "peft" its name on the hub; None: the one that the checkpoint records.
        step: which checkpoint of a run: its step or "best"; None: the latest.
        dtype: "bf16", "fp16", "fp32", or "q8_0" of GGUF; None: the base's, or that of a checkpoint of all weights, and
            fp16 for GGUF.
        scores: an evaluation's JSON, for the model card; None: none.

    Raises:
        UserError: the checkpoint or the base does not exist, cannot be exported that way, or `out` exists.
    """
    require_new_folder(out.resolve())  # before the announcements
    peft = peft_folder(source) if step is None else None
    checkpoint = peft or find_weights(source, step)
    has_adapter = peft is not None or (checkpoint / ADAPTER_NAME).is_file()
    if peft and not (merged and to != "peft"):
        raise UserError(f"{peft} already is a PEFT adapter; to merge it into its base, use --to hf --merged.")
    _check_request(checkpoint, has_adapter, to, merged, dtype)
    card = model_card(out.resolve().name, to, checkpoint, base, scores)
    if to == "peft":
        _write_peft(out, checkpoint, base, card)
    else:
        if has_adapter:
            base = base or _recorded_base(checkpoint)
        # A GGUF file is rounded from fp32 tensor by tensor.
        weights, params = _open(
            checkpoint, base if has_adapter else None, DTYPES["fp32"] if to == "gguf" else DTYPES.get(dtype or "")
        )
        tokenizers = [checkpoint, *([base] if base else [])]
        if to == "gguf":
            _write_gguf(out, weights, params, tokenizers, card, dtype or "fp16")
        else:
            write = _write_hf if to == "hf" else write_model_folder
            write(out, weights, params, tokenizers, card)
    print(f"Exported {checkpoint} to {out}.")


def _open(checkpoint: Path, base: Path | None, dtype: torch.dtype | None) -> tuple[TensorSource, dict[str, Any]]:
    """Return the weights and parameters of a whole model: a checkpoint's own, or those of a base with its adapter."""
    if base:
        return open_merged(base, checkpoint, dtype=dtype), read_params(base)
    require_intact(checkpoint)
    weights = open_model_weights(checkpoint)
    return (RoundedWeights(weights, dtype) if dtype else weights), read_params(checkpoint)


def _check_request(checkpoint: Path, has_adapter: bool, to: str, merged: bool, dtype: str | None) -> None:
    if to == "peft" and not has_adapter:
        raise UserError(
            f"{checkpoint} is a whole model, not an adapter (it has no {ADAPTER_NAME}), so there is nothing for PEFT. "
            "Export it with --to hf."
        )
    if to == "peft" and merged:
        raise UserError("--to peft writes only the adapter: omit --merged, or export with --to hf.")
    if to == "peft" and dtype:
        raise UserError(
            "--to peft writes the adapter as it was trained: omit --dtype, or export with --to hf --merged."
        )
    if to != "gguf" and dtype == "q8_0":
        raise UserError("q8_0 is a format of GGUF files: use --to gguf, or one of bf16, fp16 and fp32.")
    if to != "peft" and has_adapter and not merged:
        alone = "with --to peft" if to == "hf" else f"as it is: {checkpoint / ADAPTER_NAME} is in Mistral's layout"
        raise UserError(
            f"{checkpoint} is an adapter, and --to {to} writes a whole model: add --merged to merge it into its "
            f"base, or use the adapter alone {alone}."
        )


def _recorded_base(checkpoint: Path) -> Path:
    """Return the folder of the base model that an adapter was trained on."""
    if peft_folder(checkpoint):
        file, name = ADAPTER_CONFIG_NAME, read_peft_config(checkpoint).get("base_model_name_or_path")
    else:
        file, name = PARAMS_NAME, (read_params(checkpoint).get("lora") or {}).get("base_model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{checkpoint / file} does not record the adapter's base model: give it with --base.")
    if not Path(name).is_dir():
        raise UserError(
            f"The base model {name}, which {checkpoint} was trained on, does not exist: give its folder with --base."
        )
    return Path(name)


def _write_hf(
    destination: Path, weights: TensorSource, params: dict[str, Any], tokenizers: list[Path], card: str
) -> None:
    """Write a folder that transformers loads; arguments and errors as `write_model_folder`."""
    dtype = next(iter(weights.dtypes.values()))
    config = config_from_params(params, str(dtype).removeprefix("torch."))
    announce(destination, weights)
    with new_folder(destination) as folder:
        (folder / README_NAME).write_text(card, encoding="utf-8")
        _write_json(folder / CONFIG_NAME, config)
        _write_json(folder / "generation_config.json", generation_config())
        _write_tokenizer(tokenizers, folder, params["vocab_size"])
        write_hf_weights(folder, weights, params["head_dim"])


def _write_tokenizer(sources: list[Path], folder: Path, vocab_size: int) -> None:
    """Write the tokenizer in Mistral's files, which mistral-common reads, and in Hugging Face's."""
    files = copy_tokenizer(sources, folder)
    if not files:
        return
    write_hf_tokenizer(load_instruct_tokenizer(folder, vocab_size), folder)
    unversioned = folder / "tokenizer.model"  # the name that llama.cpp's own converter expects
    if files[0].name.startswith(unversioned.name) and not unversioned.exists():
        shutil.copyfile(files[0], unversioned)


def _write_gguf(
    destination: Path, weights: TensorSource, params: dict[str, Any], tokenizers: list[Path], card: str, dtype: str
) -> None:
    """Write a folder with one GGUF file; arguments and errors as `write_model_folder`."""
    layout = GgufLayout(weights, params["n_layers"], dtype)
    files = find_tokenizer(tokenizers)
    if not files:
        raise UserError(
            f"{tokenizers[-1]} has no tokenizer in Mistral's files, and a GGUF file contains one: put the model's "
            "tokenizer.model.v3 or tekken.json into its folder."
        )
    tokenizer = load_instruct_tokenizer(files[0].parent, params["vocab_size"])
    kind = GGUF_TYPES[dtype]
    check_tensor_memory(weights)
    announce_size(destination, len(layout.sizes), kind, sum(layout.sizes.values()))
    if window := params.get("sliding_window"):
        print(f"llama.cpp ignores the model's attention window of {window:,} tokens: keep prompts below that.")
    with new_folder(destination) as folder:
        (folder / README_NAME).write_text(card, encoding="utf-8")
        write_gguf(folder / f"model-{kind}.gguf", layout, params, tokenizer)


def _write_peft(destination: Path, checkpoint: Path, base: Path | None, card: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the base model is not read."""
    require_intact(checkpoint)
    head_dim = load_model_args(checkpoint).head_dim
    adapter = open_safetensors(checkpoint / ADAPTER_NAME)
    _check_experts(adapter.source, list(adapter.shapes))
    ranks = {shape[0] for name, shape in adapter.shapes.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{adapter.source} has adapters of ranks {sorted(ranks)}; PEFT expects a single rank.")
    config = _peft_config(list(adapter.shapes), ranks.pop(), recorded_scaling(checkpoint))
    config["base_model_name_or_path"] = _peft_base(checkpoint, base)
    names = {name: PEFT_PREFIX + hf_name(name) for name in adapter.shapes}
    layout = {names[name]: (shape, adapter.dtypes[name]) for name, shape in adapter.shapes.items()}
    announce(destination, adapter)
    with new_folder(destination) as folder:
        (folder / README_NAME).write_text(card, encoding="utf-8")
        _write_json(folder / ADAPTER_CONFIG_NAME, config)
        with SafetensorsWriter(folder / "adapter_model.safetensors", layout, {"format": "pt"}) as writer:
            for name in adapter.shapes:
                writer.write(names[name], to_hf(name, adapter.read_finite(name), head_dim))


def _peft_base(checkpoint: Path, given: Path | None) -> str | None:
    """Return the base model that PEFT loads with the adapter, or None and print what to do if none is known.

    Raises:
        UserError: the given base is neither a name on the hub nor a folder in Hugging Face's layout.
    """
    base = given or (read_params(checkpoint).get("lora") or {}).get("base_model")
    if base and (Path(base) / CONFIG_NAME).is_file() and any(Path(base).glob(f"{HF_STEM}*.safetensors")):
        return str(base)
    if given and not given.exists() and _HUB_NAME.fullmatch(given.as_posix()):
        return given.as_posix()
    remedy = (
        "Convert it with python -m utils.export MODEL --to hf --out BASE, and give that folder, or the model's name on "
        "the Hugging Face Hub, with --base."
    )
    if given:
        raise UserError(f"{given} is not a model in Hugging Face's layout, which PEFT needs. {remedy}")
    print(f"{ADAPTER_CONFIG_NAME} names no base model: PEFT cannot load {base or 'one that is not recorded'}. {remedy}")
    return None


def _check_experts(source: Path, names: list[str]) -> None:
    """Refuse adapters that PEFT (0.21) ignores or misreads, because transformers fuses w1 and w3 of the experts."""
    parts = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".experts." in name}
    if parts & {"w1", "w3"} and not parts >= {"w1", "w2", "w3"}:
        raise UserError(
            f"{source} adapts {', '.join(sorted(parts))} of the experts, but PEFT applies adapters of w1 or w3 only "
            "if w1, w2 and w3 all have one: export it with --to hf --merged."
        )


def _peft_config(names: list[str], rank: int, scaling: float) -> dict[str, Any]:
    """Return PEFT's configuration; PEFT multiplies B A by lora_alpha / r."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({hf_name(name).split(".lora_")[0].rpartition(".")[2] for name in names}),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
