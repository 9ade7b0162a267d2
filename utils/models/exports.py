"""Export checkpoints to the formats of other tools: PEFT adapters, and models in Hugging Face's or Mistral's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

from finetune.manifest import require_intact
from finetune.run_dir import find_weights
from finetune.wrapped_model import ADAPTER_NAME
from model.args import PARAMS_NAME, load_model_args, read_params
from model.atomic import new_folder, require_new_folder
from model.errors import UserError
from model.hf_config import CONFIG_NAME, config_from_params, generation_config
from model.hf_format import hf_name, open_model_weights, to_hf, write_hf_weights
from model.peft_format import ADAPTER_CONFIG_NAME, PEFT_PREFIX, peft_folder, read_peft_config
from model.weights import SafetensorsWriter, TensorSource, open_safetensors
from utils.models.merging import open_merged, recorded_scaling
from utils.models.model_folder import announce, copy_tokenizer, write_model_folder

# transformers then tokenizes with mistral-common, as training did; its own reader of SentencePiece files (5.23) omits
# the space before the first word.
_TOKENIZER_CONFIG = {"tokenizer_class": "MistralCommonBackend", "bos_token": "<s>", "eos_token": "</s>"}


def export(
    source: Path, to: str, out: Path, merged: bool = False, base: Path | None = None, step: int | str | None = None
) -> None:
    """Write the folder `out` atomically, in the checkpoint's dtype, or with a PEFT adapter in its base's.

    Args:
        source: folder of a run, a checkpoint, a PEFT adapter or a model.
        to: "peft", "hf" or "mistral".
        out: folder to create.
        merged: merge the adapter into its base; a checkpoint of all weights needs no merging.
        base: folder of the base model; None: the one that the checkpoint records.
        step: which checkpoint of a run: its step or "best"; None: the latest.

    Raises:
        UserError: the checkpoint or the base does not exist, cannot be exported that way, or `out` exists.
    """
    require_new_folder(out.resolve())  # before the announcements
    peft = peft_folder(source) if step is None else None
    checkpoint = peft or find_weights(source, step)
    has_adapter = peft is not None or (checkpoint / ADAPTER_NAME).is_file()
    if peft and not (merged and to != "peft"):
        raise UserError(f"{peft} already is a PEFT adapter; to merge it into its base, use --to hf --merged.")
    _check_request(checkpoint, has_adapter, to, merged)
    if to == "peft":
        _write_peft(out, checkpoint, base)
        print("PEFT applies it to the base in Hugging Face's layout: python -m utils.export MODEL --to hf --out BASE")
    else:
        if has_adapter:
            base = base or _recorded_base(checkpoint)
            weights: TensorSource = open_merged(base, checkpoint)
            params = read_params(base)
        else:
            require_intact(checkpoint)
            weights, params = open_model_weights(checkpoint), read_params(checkpoint)
        tokenizers = [checkpoint, *([base] if base else [])]
        write = _write_hf if to == "hf" else write_model_folder
        write(out, weights, params, tokenizers)
    print(f"Exported {checkpoint} to {out}.")


def _check_request(checkpoint: Path, has_adapter: bool, to: str, merged: bool) -> None:
    if to == "peft" and not has_adapter:
        raise UserError(
            f"{checkpoint} is a whole model, not an adapter (it has no {ADAPTER_NAME}), so there is nothing for PEFT. "
            "Export it with --to hf."
        )
    if to == "peft" and merged:
        raise UserError("--to peft writes only the adapter: omit --merged, or export with --to hf.")
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


def _write_hf(destination: Path, weights: TensorSource, params: dict[str, Any], tokenizers: list[Path]) -> None:
    """Write a folder that transformers loads; arguments and errors as `write_model_folder`."""
    dtype = next(iter(weights.dtypes.values()))
    config = config_from_params(params, str(dtype).removeprefix("torch."))
    announce(destination, weights)
    with new_folder(destination) as folder:
        _write_json(folder / CONFIG_NAME, config)
        _write_json(folder / "generation_config.json", generation_config())
        _write_hf_tokenizer(tokenizers, folder)
        write_hf_weights(folder, weights, params["head_dim"])


def _write_hf_tokenizer(sources: list[Path], folder: Path) -> None:
    files = copy_tokenizer(sources, folder)
    if files:
        _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    unversioned = folder / "tokenizer.model"  # the name that llama.cpp expects
    if files and files[0].name.startswith(unversioned.name) and not unversioned.exists():
        shutil.copyfile(files[0], unversioned)


def _write_peft(destination: Path, checkpoint: Path, base: Path | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the base model is not read."""
    require_intact(checkpoint)
    head_dim = load_model_args(checkpoint).head_dim
    adapter = open_safetensors(checkpoint / ADAPTER_NAME)
    _check_experts(adapter.source, list(adapter.shapes))
    ranks = {shape[0] for name, shape in adapter.shapes.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{adapter.source} has adapters of ranks {sorted(ranks)}; PEFT expects a single rank.")
    lora = read_params(checkpoint).get("lora") or {}
    config = _peft_config(list(adapter.shapes), ranks.pop(), recorded_scaling(checkpoint))
    config["base_model_name_or_path"] = str(base or lora.get("base_model") or "")
    names = {name: PEFT_PREFIX + hf_name(name) for name in adapter.shapes}
    layout = {names[name]: (shape, adapter.dtypes[name]) for name, shape in adapter.shapes.items()}
    announce(destination, adapter)
    with new_folder(destination) as folder:
        _write_json(folder / ADAPTER_CONFIG_NAME, config)
        with SafetensorsWriter(folder / "adapter_model.safetensors", layout, {"format": "pt"}) as writer:
            for name in adapter.shapes:
                writer.write(names[name], to_hf(name, adapter.read_finite(name), head_dim))


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
