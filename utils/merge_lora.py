"""Merge a LoRA adapter into its base model: W + scaling * B A, computed in fp32 on the CPU, in the base's dtype.

python -m utils.merge_lora --initial_model_ckpt BASE --lora_ckpt ADAPTER --dump_ckpt OUT [--scaling 2.0]
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--initial_model_ckpt", type=Path, required=True, metavar="BASE", help="model folder or weights file")
    add(
        "--lora_ckpt",
        type=Path,
        required=True,
        metavar="ADAPTER",
        help="lora.safetensors, a checkpoint, a run or a PEFT adapter",
    )
    add("--dump_ckpt", type=Path, required=True, metavar="OUT", help=".safetensors file or model folder to create")
    add("--scaling", type=float, help="factor of B A (default: as the adapter records)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="dtype to write (default: the base's)")
    args = parser.parse_args()

    from finetune.mixed_precision import DTYPES  # loads torch, which --help does not need
    from utils.models.merging import merge_lora

    dtype = DTYPES[args.dtype] if args.dtype else None
    merge_lora(args.initial_model_ckpt, args.lora_ckpt, args.dump_ckpt, args.scaling, dtype)
    print(f"Saved the merged model to {args.dump_ckpt}.")


if __name__ == "__main__":
    run_cli(main)
