"""Adds a LoRA adapter to its base model: W + scaling * B A, one tensor at a time, on the CPU.

python -m utils.merge_lora --initial_model_ckpt BASE --lora_ckpt ADAPTER --dump_ckpt OUT [--scaling 2.0]
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli
from model.args import read_params
from model.errors import UserError
from utils.models.model_folder import open_merged, write_model_folder, write_weights


def merge_lora(base_path: Path, adapter_path: Path, destination: Path, scaling: float | None = None) -> None:
    """Writes base + adapter in the adapter's dtype.

    Args:
        base_path: model folder, or its weights file.
        adapter_path: lora.safetensors, the folder that holds it, a checkpoint's, or a run's (its newest).
        destination: a new .safetensors file, or a new folder that becomes a complete model.
        scaling: factor of B A; None: as the params.json beside the adapter says.

    Raises:
        UserError: a file is missing or damaged, the adapter does not fit, or the destination exists.
    """
    merged = open_merged(base_path, adapter_path, scaling)
    if destination.suffix == ".safetensors" and not destination.is_dir():
        if destination.exists():
            raise UserError(f"{destination} already exists: remove it or choose another name.")
        destination.parent.mkdir(parents=True, exist_ok=True)
        write_weights(merged, destination)
    elif destination.suffix in (".pth", ".pt", ".bin"):
        raise UserError(f"{destination}: merged weights are written as .safetensors (or give a folder).")
    else:
        base_folder = base_path if base_path.is_dir() else base_path.parent
        write_model_folder(destination, merged, read_params(base_folder), [base_folder, merged.adapter.source.parent])
    print(f"Merged checkpoint saved to {destination}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Merges a LoRA adapter into its base model.")
    parser.add_argument("--initial_model_ckpt", type=Path, required=True, help="base model: folder or weights file")
    parser.add_argument("--lora_ckpt", type=Path, required=True, help="lora.safetensors; or a checkpoint, or a run")
    parser.add_argument("--dump_ckpt", type=Path, required=True, help="new .safetensors file, or new model folder")
    parser.add_argument("--scaling", type=float, help="factor of B A; default: what the adapter's params.json says")
    args = parser.parse_args()
    merge_lora(args.initial_model_ckpt, args.lora_ckpt, args.dump_ckpt, args.scaling)


if __name__ == "__main__":
    run_cli(main)
