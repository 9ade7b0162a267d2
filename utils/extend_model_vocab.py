"""Extend a model's vocabulary from 32,000 to the 32,768 tokens of the v3 tokenizer.

python -m utils.extend_model_vocab --original_model_ckpt OLD --extended_model_ckpt NEW [--seed 0]
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original_model_ckpt", type=Path, required=True, help="folder of the model to extend")
    parser.add_argument("--extended_model_ckpt", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="seed for the new rows (default: 0)")
    args = parser.parse_args()

    from utils.models.vocabulary import NEW_VOCAB_SIZE, OLD_VOCAB_SIZE, extend_model_vocab  # loads torch

    extend_model_vocab(args.original_model_ckpt, args.extended_model_ckpt, args.seed)
    print(
        f"Extended model saved to {args.extended_model_ckpt}: {OLD_VOCAB_SIZE} -> {NEW_VOCAB_SIZE} tokens, "
        f"seed {args.seed}."
    )


if __name__ == "__main__":
    run_cli(main)
