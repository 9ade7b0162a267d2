"""Turns a checkpoint into what other tools load: a PEFT adapter, or a whole model in either layout.

python -m utils.export RUN_OR_CKPT --to peft --out DIR
python -m utils.export RUN_OR_CKPT --to hf|mistral --merged --out DIR [--base MODEL] [--step N]
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from finetune.cli import add_step_option, run_cli
from finetune.run_dir import find_weights
from finetune.wrapped_model import ADAPTER_NAME
from model.args import load_model_args, read_params
from model.atomic import new_folder
from model.errors import UserError
from model.hf_config import CONFIG_NAME, config_from_params, generation_config
from model.hf_format import hf_name, open_model_weights, to_hf, write_hf_weights
from model.weights import SafetensorsWriter, TensorSource, open_safetensors
from utils.models.model_folder import copy_tokenizer, open_merged, recorded_scaling, write_model_folder

FORMATS = ("peft", "hf", "mistral")
_PEFT_PREFIX = "base_model.model."
# transformers then tokenises with mistral-common, as the training did; its own reading of a sentencepiece file (5.23)
# lacks the blank before the first word.
_TOKENIZER_CONFIG = {"tokenizer_class": "MistralCommonBackend", "bos_token": "<s>", "eos_token": "</s>"}


def export(
    source: Path, to: str, out: Path, merged: bool = False, base: Path | None = None, step: int | str | None = None
) -> None:
    """Writes the folder `out`, whole or not at all, in the checkpoint's dtype.

    Args:
        source: folder of a run, of a checkpoint or of a model.
        to: one of FORMATS.
        out: a new folder.
        merged: the adapter is merged into its base; a checkpoint of all weights needs no merging.
        base: folder of the base model; None: the one the checkpoint names.
        step: which checkpoint of a run: its number, or "best"; None: the newest.

    Raises:
        UserError: there is no such checkpoint or base, it cannot be written that way, or `out` exists.
    """
    checkpoint = find_weights(source, step)
    has_adapter = (checkpoint / ADAPTER_NAME).is_file()
    _check_request(checkpoint, has_adapter, to, merged)
    if to == "peft":
        _write_peft(checkpoint, base, out)
        print("PEFT loads it over the base in Hugging Face's layout: python -m utils.export MODEL --to hf --out BASE")
    else:
        if has_adapter:
            base = base or _recorded_base(checkpoint)
            weights: TensorSource = open_merged(base, checkpoint)
            params = read_params(base)
        else:
            weights, params = open_model_weights(checkpoint), read_params(checkpoint)
        tokenizers = [checkpoint, *([base] if base else [])]
        write = _write_hf if to == "hf" else write_model_folder
        write(out, weights, params, tokenizers)
    print(f"Exported {checkpoint} to {out}.")


def _check_request(checkpoint: Path, has_adapter: bool, to: str, merged: bool) -> None:
    if to == "peft" and not has_adapter:
        raise UserError(
            f"{checkpoint} holds a whole model, not an adapter (no {ADAPTER_NAME}): PEFT has nothing to load. "
            "Export it with --to hf."
        )
    if to == "peft" and merged:
        raise UserError("--to peft writes the adapter alone: leave --merged out, or export with --to hf.")
    if to != "peft" and has_adapter and not merged:
        alone = "with --to peft" if to == "hf" else f"as it is: {checkpoint / ADAPTER_NAME} is in Mistral's layout"
        raise UserError(
            f"{checkpoint} holds an adapter, and --to {to} writes a whole model: add --merged to merge it into its "
            f"base, or use the adapter alone {alone}."
        )


def _recorded_base(checkpoint: Path) -> Path:
    name = (read_params(checkpoint).get("lora") or {}).get("base_model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{checkpoint / 'params.json'} does not name the adapter's base model: give it with --base.")
    if not Path(name).is_dir():
        raise UserError(f"The base model {name}, which {checkpoint} names, is not there: give its folder with --base.")
    return Path(name)


def _write_hf(destination: Path, weights: TensorSource, params: dict[str, Any], tokenizers: list[Path]) -> None:
    """Writes a folder that transformers loads; arguments and errors as `write_model_folder`."""
    dtype = next(iter(weights.dtypes.values()))
    config = config_from_params(params, str(dtype).removeprefix("torch."))
    with new_folder(destination) as folder:
        _write_json(folder / CONFIG_NAME, config)
        _write_json(folder / "generation_config.json", generation_config())
        _write_hf_tokenizer(tokenizers, folder)
        write_hf_weights(folder, weights, params["head_dim"])


def _write_hf_tokenizer(sources: list[Path], folder: Path) -> None:
    files = copy_tokenizer(sources, folder)
    if files:
        _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    plain = folder / "tokenizer.model"  # the name that llama.cpp looks for
    if files and files[0].name.startswith(plain.name) and not plain.exists():
        shutil.copyfile(files[0], plain)


def _write_peft(checkpoint: Path, base: Path | None, out: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; the base model itself is not needed."""
    head_dim = load_model_args(checkpoint).head_dim
    adapter = open_safetensors(checkpoint / ADAPTER_NAME)
    _check_experts(adapter.source, list(adapter.shapes))
    ranks = {shape[0] for name, shape in adapter.shapes.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{adapter.source} holds adapters of the ranks {sorted(ranks)}; expected one rank throughout.")
    lora = read_params(checkpoint).get("lora") or {}
    config = _peft_config(list(adapter.shapes), ranks.pop(), recorded_scaling(checkpoint))
    config["base_model_name_or_path"] = str(base or lora.get("base_model") or "")
    names = {name: _PEFT_PREFIX + hf_name(name) for name in adapter.shapes}
    plan = {names[name]: (shape, adapter.dtypes[name]) for name, shape in adapter.shapes.items()}
    with new_folder(out) as folder:
        _write_json(folder / "adapter_config.json", config)
        with SafetensorsWriter(folder / "adapter_model.safetensors", plan, {"format": "pt"}) as writer:
            for name in adapter.shapes:
                writer.write(names[name], to_hf(name, adapter.read(name), head_dim))


def _check_experts(source: Path, names: list[str]) -> None:
    """Refuses what PEFT (0.21) makes nothing or something else of: transformers fuses the experts' w1 and w3."""
    parts = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".experts." in name}
    if parts & {"w1", "w3"} and not parts >= {"w1", "w2", "w3"}:
        raise UserError(
            f"{source} adapts {', '.join(sorted(parts))} of the experts, and PEFT computes adapters of w1 or w3 only "
            "where w1, w2 and w3 all have one: export it with --to hf --merged."
        )


def _peft_config(names: list[str], rank: int, scaling: float) -> dict[str, Any]:
    """PEFT's account of an adapter whose B A is multiplied by alpha / rank."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a checkpoint for other tools to load.")
    parser.add_argument("source", type=Path, metavar="RUN_OR_CKPT", help="run folder, or a checkpoint's")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="adapter for PEFT, or a model for transformers, vLLM, llama.cpp (hf) or mistral-inference, vLLM (mistral)",
    )
    parser.add_argument("--merged", action="store_true", help="merge the adapter into its base")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--base", type=Path, help="base model's folder; default: the one the checkpoint names")
    add_step_option(parser)
    args = parser.parse_args()
    export(args.source, args.to, args.out, args.merged, args.base, args.step)


if __name__ == "__main__":
    run_cli(main)
